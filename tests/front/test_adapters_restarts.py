"""Adapters across restarts, from the command line, and when things go wrong half-way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tests.front.house import collect, configure, running, spec, until
from tests.front.uploading import blobs, files, upload

from loramux.adapters import blobs as blobs_module
from loramux.adapters.blobs import BlobStore, BlobWriter
from loramux.adapters.pack import packed_path
from loramux.adapters.registry import Registry
from loramux.errors import (
    AdapterInvalid,
    Conflict,
    LoramuxError,
    Overloaded,
)
from loramux.front.adapters import AdapterView
from loramux.front.front import INGEST
from loramux.metrics.stats import StepStats
from loramux.request import AdapterRef


def test_adapters_survive_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        config = configure(tmp_path)
        async with running(config) as front:
            kept = await upload(front, "kept")
            lost = await upload(front, "lost", b"lost")
            await upload(front, "slow", b"slow", wait_s=0, wait=1)
            packed_path(config.data_dir, lost.digest, "fake-base").unlink()
        stray = BlobStore(config.data_dir).writer(10)
        stray.write(b"stray")
        stray.commit()
        (config.data_dir / "blobs" / "tmp" / "half").write_bytes(b"half")
        async with running(config) as front:
            assert front.adapters.resolve("kept").label == kept.digest
            assert [view.status for view in front.adapters.list()] == ["ready"] * 3
            assert len(files(tmp_path)) == 3
            assert len(blobs(tmp_path)) == 5  # three weights, two configs
            assert not list((config.data_dir / "blobs" / "tmp").iterdir())

    asyncio.run(main())


def test_packed_files_go_with_their_version(tmp_path: Path) -> None:
    """Of every base and importer; what a death has left, at the next start."""

    def pack_as(view: AdapterView, ending: str) -> Path:
        path = tmp_path / "data" / "packed" / f"{view.digest}-{ending}.lmx"
        path.write_bytes(b"packed")
        return path

    async def main() -> None:
        config = configure(tmp_path)
        async with running(config) as front:
            cat, dog = await upload(front, "cat"), await upload(front, "dog", b"dog")
            [*packed] = files(tmp_path)
            version = packed[0].stem.rpartition("-")[2]
            others = [pack_as(view, f"another-base-{version}") for view in (cat, dog)]
            await front.adapters.delete("cat")
            await until(lambda: not others[0].exists())
            assert {path.name[:64] for path in files(tmp_path)} == {dog.digest}
        stale = pack_as(dog, "fake-base-v0")
        orphan = pack_as(cat, f"fake-base-{version}")
        async with running(config) as front:
            assert not stale.exists() and not orphan.exists() and len(files(tmp_path)) == 2
            assert front.adapters.resolve("dog").label == dog.digest

    asyncio.run(main())


def test_killed_between_its_files_an_adapter_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the data directory at each point is what a kill there would have left."""
    cuts: list[Path] = []

    def cut() -> None:
        folder = tmp_path / f"cut-{len(cuts)}"
        shutil.copytree(tmp_path / "data", folder / "data")
        shutil.copytree(tmp_path / "model", folder / "model")
        cuts.append(folder)

    publish, create = blobs_module.publish, Registry.create

    def publishing(temporary: Path, final: Path) -> None:
        publish(temporary, final)
        cut()

    def creating(self: Registry, *args: Any, **kwargs: Any) -> Any:
        result = create(self, *args, **kwargs)
        cut()
        return result

    async def uploading() -> str:
        async with running(configure(tmp_path)) as front:
            with monkeypatch.context() as patch:
                patch.setattr(blobs_module, "publish", publishing)
                patch.setattr(Registry, "create", creating)
                view = await upload(front, "cat", profile=b'{"system":"x"}')
            return view.profile_digest

    async def restarting(folder: Path) -> tuple[list[str], int]:
        async with running(configure(folder)) as front:
            views = front.adapters.list()
            served = [await front.voices.of(front.adapters.resolve(v.name)) for v in views]
            assert all(voice.system == "x" for voice in served)
            return [view.status for view in views], len(blobs(folder))

    profile = asyncio.run(uploading())
    left = [asyncio.run(restarting(folder)) for folder in cuts]
    assert left == [([], 0), ([], 0), ([], 0), (["ready"], 3)], "weights, config, profile, row"
    assert profile in blobs(cuts[-1])


def test_another_base_makes_them_incompatible(tmp_path: Path) -> None:
    async def main() -> None:
        config = configure(tmp_path)
        async with running(config) as front:
            view = await upload(front, "cat")
        registry = Registry(config.data_dir)
        row = registry.get("cat")
        registry.mark_ready(row.id, fingerprint="another-base", report=row.report)
        registry.close()
        async with running(config) as front:
            assert front.adapters.show("cat").status == "incompatible"
            with pytest.raises(Conflict) as caught:
                front.adapters.resolve("cat")
            assert caught.value.code == "adapter_incompatible"
            with pytest.raises(Conflict):
                front.adapters.require(view.digest)

    asyncio.run(main())


def test_a_deletion_cut_short_is_finished(tmp_path: Path) -> None:
    async def main() -> None:
        config = configure(tmp_path)
        async with running(config) as front:
            await upload(front, "cat")
        registry = Registry(config.data_dir)
        registry.delete("cat")
        registry.close()
        async with running(config) as front:
            await until(lambda: front.adapters.list() == [])
            assert not files(tmp_path) and not blobs(tmp_path)

    asyncio.run(main())


def folder(path: Path, weights: bytes | None = b"weights", **config: Any) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    if weights is not None:
        (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def test_adapters_of_the_command_line(tmp_path: Path) -> None:
    folder(tmp_path / "many" / "good")
    folder(tmp_path / "many" / "refused", b"r", bad=["no"])
    folder(tmp_path / "many" / "bad name", b"n")
    folder(tmp_path / "many" / "empty", None)
    (tmp_path / "many" / "no adapter").mkdir()
    one = folder(tmp_path / "one", b"one")

    async def main() -> None:
        options = {"adapters": tmp_path / "many", "adapter": (f"solo={one}", "gone=/nonexistent")}
        async with running(configure(tmp_path, **options)) as front:
            assert {view.name: view.status for view in front.adapters.list()} == {
                "good": "ready",
                "refused": "failed",
                "bad name": "failed",
                "empty": "failed",
                "solo": "ready",
                "gone": "failed",
            }
            for name in ["refused", "bad name", "empty", "gone"]:
                with pytest.raises(Conflict) as caught:
                    front.adapters.resolve(name)
                assert caught.value.code == "adapter_failed"
        (one / "adapter_model.safetensors").write_bytes(b"another one")
        async with running(configure(tmp_path, **options)) as front:
            assert front.adapters.resolve("solo").generation == 2
            assert front.adapters.resolve("good").generation == 1
            assert (await front.adapters.delete("gone")).name == "gone"
            assert (await upload(front, "empty", b"full")).status == "ready"

    asyncio.run(main())


def test_an_alias_keeps_its_name_from_the_command_line(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", b"one")

    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            await upload(front, "cat")
            await front.adapters.aliases.set("solo", [("cat", 1)])
        async with running(configure(tmp_path, adapter=(f"solo={one}", "hole=/none"))) as front:
            assert front.adapters.resolve("solo").versions == ("cat@1",)
            (_, _, solo) = front.adapters.list()
            assert solo.error is not None and solo.error["code"] == "name_reserved"
            for name in ("solo", "hole"):
                await front.adapters.delete(name)
            await front.adapters.aliases.set("hole", [("cat", 1)])

    asyncio.run(main())


def test_no_aliases_before_the_catalog_is_filled(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path), ready=False, engine=("/nonexistent",)) as front:
            for call in (
                front.adapters.aliases.set("prod", [("base", 1)]),
                front.adapters.aliases.delete("prod"),
            ):
                with pytest.raises(Overloaded) as caught:
                    await call
                assert caught.value.code == "engine_starting"

    asyncio.run(main())


def test_a_file_that_kills_the_ingest_process(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            bomb = asyncio.create_task(upload(front, "bomb", b"bomb", die=True))
            good = asyncio.create_task(upload(front, "good", b"good"))
            with pytest.raises(AdapterInvalid, match="each time"):
                await bomb
            assert (await good).status == "ready"
            assert front.not_ready() == []

    asyncio.run(main())


def test_without_an_ingest_process_uploads_fail_and_the_rest_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.front.supervisor._BACKOFF_S", (0.0,) * 5)

    async def main() -> None:
        async with running(configure(tmp_path), ingest=("/nonexistent",)) as front:
            with pytest.raises(LoramuxError) as caught:
                await upload(front, "cat")
            assert caught.value.code == "ingest_failed"
            await collect(front.submit(spec("r")))

    asyncio.run(main())


def test_an_upload_left_in_the_middle_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    write, abort = BlobWriter.write, BlobWriter.abort

    def slow_write(self: BlobWriter, data: bytes) -> None:
        order.append("begin")
        time.sleep(0.05)
        write(self, data)
        order.append("end")

    def seen_abort(self: BlobWriter) -> None:
        order.append("abort")
        abort(self)

    monkeypatch.setattr(BlobWriter, "write", slow_write)
    monkeypatch.setattr(BlobWriter, "abort", seen_abort)

    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            for committed in (False, True):
                writer = await front.adapters.begin()
                await writer.write(b"x" * (3 << 20))
                if committed:
                    await writer.commit()
                await writer.abort()
                await writer.abort()
            cut_off = await front.adapters.begin()
            order.clear()
            writing = asyncio.create_task(cut_off.write(b"y" * (2 << 20)))
            await until(lambda: order)
            writing.cancel()
            await cut_off.abort()
            assert order == ["begin", "end", "abort"]
            await until(lambda: not blobs(tmp_path))
            assert not list((tmp_path / "data" / "blobs" / "tmp").iterdir())

    asyncio.run(main())


def test_residency_comes_from_the_engine(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat")
            assert view.residency == "disk"
            front.snapshot.resident = frozenset([view.digest])
            assert front.adapters.show("cat").residency == "pool"

    asyncio.run(main())


def test_residency_tells_nothing_of_another_tenants_file(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            for tenant in ("alice", "bob"):
                digest = (await upload(front, "cat", tenant=tenant)).digest

            def seen() -> dict[str, str]:
                show = front.adapters.show
                return {each: show("cat", tenant=each).residency for each in ("alice", "bob")}

            def engine_says(*resident: str) -> None:
                front._observations.step(StepStats(resident=list(resident)))

            await collect(front.submit(spec("r", adapters=(AdapterRef(digest),), tenant="alice")))
            assert seen() == {"alice": "disk", "bob": "disk"}
            engine_says(digest)
            assert seen() == {"alice": "pool", "bob": "disk"}
            engine_says(digest, "0" * 64)
            assert seen() == {"alice": "pool", "bob": "disk"}
            engine_says()
            assert seen() == {"alice": "disk", "bob": "disk"}
            await collect(front.submit(spec("s", adapters=(AdapterRef(digest),), tenant="bob")))
            engine_says(digest)
            assert seen() == {"alice": "disk", "bob": "pool"}, "hers had gone since"
            await front.adapters.set_pinned("cat", True, tenant="alice")
            assert seen() == {"alice": "pool", "bob": "pool"}

    asyncio.run(main())


@pytest.mark.parametrize("code", ["adapter_load_failed", "packed_file_invalid"])
@pytest.mark.parametrize("rotten", [False, True], ids=["blob whole", "blob rotten"])
def test_what_the_engine_cannot_load_is_made_again_from_whole_files(
    tmp_path: Path, rotten: bool, code: str
) -> None:
    """Or, with a blob that has rotted too, is no longer served at all."""
    where = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{where}.lora_A.weight": np.ones((2, 16), np.float32),
        f"{where}.lora_B.weight": np.ones((16, 2), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}

    async def main() -> None:
        async with running(configure(tmp_path), ingest=INGEST) as front:
            show = front.adapters.show
            view = await upload(front, "cat", save(tensors), wait_s=60, **config)
            await upload(front, "dog", save(tensors), wait_s=60, **config, tenant="bob")
            [packed] = files(tmp_path)
            whole = packed.read_bytes()
            packed.write_bytes(whole[:-1] + b"!")
            if rotten:
                blob = BlobStore(tmp_path / "data").path(hashlib.sha256(save(tensors)).hexdigest())
                blob.write_bytes(blob.read_bytes()[:-1] + b"!")
            refs = front.adapters.resolve("cat").adapters
            with pytest.raises(LoramuxError):
                await collect(front.submit(spec("r", f"fail={code}", adapters=refs)))
            assert show("cat").status == show("dog", tenant="bob").status == "validating"
            with pytest.raises(Conflict) as caught:
                front.submit(spec("s", adapters=refs))
            assert caught.value.code == "adapter_not_ready"
            await until(lambda: not front.adapters.verdicts._running)
            if rotten:
                assert (show("cat").error or {})["code"] == "blob_corrupt"
                with pytest.raises(Conflict):
                    front.adapters.resolve("cat")
                await upload(front, "cat", save(tensors), wait_s=60, **config)
            assert [show("cat").status, files(tmp_path)] == ["ready", [packed]]
            assert packed.read_bytes() == whole and show("cat").digest == view.digest
            await collect(front.submit(spec("t", adapters=refs)))
            with pytest.raises(LoramuxError):
                await collect(front.submit(spec("u", f"fail={code}", adapters=refs)))
            assert show("cat").status == "ready", "not again so soon"

    asyncio.run(main())


def test_with_the_real_ingest_process(tmp_path: Path) -> None:
    where = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{where}.lora_A.weight": np.ones((2, 16), np.float32),
        f"{where}.lora_B.weight": np.ones((16, 2), np.float32),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}

    async def main() -> None:
        async with running(configure(tmp_path), ingest=INGEST) as front:
            good = await upload(front, "good", save(tensors), wait_s=60, **config)
            assert (good.status, good.rank) == ("ready", 2)
            assert [path.name[:64] for path in files(tmp_path)] == [good.digest]
            with pytest.raises(AdapterInvalid) as caught:
                await upload(front, "bad", save(tensors), wait_s=60, **config, use_dora=True)
            assert any("use_dora" in problem for problem in caught.value.problems)
            with pytest.raises(AdapterInvalid):
                await upload(front, "worse", b"no safetensors", validate_only=True, **config)
            assert front.adapters.resolve("good").label == good.digest

    asyncio.run(main())
