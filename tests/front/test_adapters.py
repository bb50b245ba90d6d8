"""The life of an adapter through the service: names, verdicts, pins, deletion, restarts."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tests.front.house import collect, configure, running, spec, until

from loramux.adapters.blobs import BlobStore, BlobWriter
from loramux.adapters.pack import packed_path
from loramux.adapters.registry import Registry
from loramux.errors import (
    AdapterInvalid,
    Conflict,
    GenerationGone,
    InvalidRequest,
    LoramuxError,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    ServiceError,
)
from loramux.front.adapters import AdapterView
from loramux.front.front import INGEST, Front

WAIT = 20.0


async def upload(
    front: Front, name: str, weights: bytes = b"weights", wait_s: float = WAIT, **config: Any
) -> AdapterView:
    """An upload as HTTP makes one. ``config`` scripts the fake ingest process."""
    expected = config.pop("expected_generation", None)
    validate_only = config.pop("validate_only", False)
    writer = await front.adapters.begin()
    try:
        for start in range(0, len(weights), 3):
            await writer.write(weights[start : start + 3])
        return await front.adapters.create(
            name,
            json.dumps(config).encode(),
            await writer.commit(),
            wait_s=wait_s,
            expected_generation=expected,
            validate_only=validate_only,
        )
    finally:
        await writer.abort()


def blobs(folder: Path) -> set[str]:
    return set(BlobStore(folder / "data").digests())


def files(folder: Path) -> list[Path]:
    return [path for path in (folder / "data" / "packed").glob("*") if path.is_file()]


async def engine_said(front: Front) -> dict[str, Any]:
    return await front.command("state")


def test_an_upload_becomes_a_model(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat")
            assert (view.name, view.generation, view.status) == ("cat", 1, "ready")
            assert (view.rank, view.num_bytes, view.num_frames) == (4, 128, 1)
            assert hashlib.sha256(b"weights").hexdigest() in blobs(tmp_path)
            for model in ["cat", "cat@1", f"cat@sha256:{view.digest[:12]}"]:
                served = front.adapters.resolve(model)
                assert (served.name, served.digest, served.generation) == ("cat", view.digest, 1)
                assert [ref.digest for ref in served.adapters] == [view.digest]
            delta = await collect(front.submit(spec("r", adapters=served.adapters)))
            assert delta.token_ids
            assert front.snapshot.adapter_tokens == {view.digest: [5, 8]}
            assert front.snapshot.uploads == {"ready": 1}
            assert front.adapters.list() == [front.adapters.show("cat")]
            again = await upload(front, "cat")
            assert again == view

    asyncio.run(main())


NAMES_OF_NOTHING = [
    "dog",
    "cat@",
    "cat@0",
    "cat@9",
    "cat@sha256:abc",
    "cat@sha256:" + "0" * 64,
    "",
    "@1",
] + ["base@1", "cat@1@1", "cat@sha256:", "cat@x", "../cat", "cat\n", "cat@" + "9" * 30]


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat")
            for model in [*NAMES_OF_NOTHING, f"cat@sha256:{view.digest[:11]}"]:
                with pytest.raises(NotFound) as caught:
                    front.adapters.resolve(model)
                assert caught.value.code == "model_not_found"
            assert front.adapters.resolve("base").adapters == ()

    asyncio.run(main())


def test_generations(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            one = await upload(front, "cat", b"one")
            with pytest.raises(Conflict) as caught:
                await upload(front, "cat", b"two")
            assert caught.value.code == "generation_conflict"
            waiting = await upload(front, "cat", b"two", wait_s=0, wait=0.3, expected_generation=1)
            assert (waiting.status, waiting.generation) == ("validating", 2)
            assert front.adapters.resolve("cat").digest == one.digest
            with pytest.raises(Conflict) as caught:
                front.adapters.resolve("cat@2")
            assert caught.value.code == "adapter_not_ready" and caught.value.retry_after_s
            await until(lambda: front.adapters.resolve("cat").generation == 2)
            assert front.adapters.resolve("cat@1").digest == one.digest
            await front.adapters.delete("cat")
            await until(lambda: front.adapters.list() == [])
            three = await upload(front, "cat", b"three")
            assert three.generation == 3
            with pytest.raises(GenerationGone):
                front.adapters.resolve("cat@1")

    asyncio.run(main())


def test_a_refused_upload(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            with pytest.raises(AdapterInvalid) as caught:
                await upload(front, "cat", bad=["first", "second"])
            assert caught.value.problems == ("first", "second")
            assert front.adapters.show("cat").error == {
                "code": "adapter_invalid",
                "message": "2 problems",
                "problems": ["first", "second"],
            }
            with pytest.raises(Conflict) as failed:
                front.adapters.resolve("cat")
            assert failed.value.code == "adapter_failed"
            assert front.snapshot.uploads == {"adapter_invalid": 1}
            assert (await upload(front, "cat", b"better")).status == "ready"

    asyncio.run(main())


def test_validate_only_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat", validate_only=True)
            assert (view.status, view.generation, view.rank) == ("ready", 0, 4)
            with pytest.raises(AdapterInvalid):
                await upload(front, "cat", validate_only=True, bad=["no"])
            await until(lambda: not blobs(tmp_path))
            assert front.adapters.list() == [] and files(tmp_path) == []

    asyncio.run(main())


def test_bad_names(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            for name in ["", "base", "a b", "a@1", "../a", "é", "a" * 97, "-a"]:
                with pytest.raises(InvalidRequest) as caught:
                    await upload(front, name)
                assert caught.value.param == "name"
            await until(lambda: not blobs(tmp_path))

    asyncio.run(main())


def test_limits_hold_at_the_byte(tmp_path: Path) -> None:
    async def main() -> None:
        config = configure(tmp_path, max_adapter_file_bytes=9, max_config_bytes=2)
        async with running(config) as front:
            assert (await upload(front, "cat", b"123456789")).status == "ready"
            with pytest.raises(PayloadTooLarge) as caught:
                await upload(front, "dog", b"1234567890")
            assert caught.value.param == "weights"
            with pytest.raises(PayloadTooLarge) as caught:
                await upload(front, "dog", b"1", x=1)
            assert caught.value.param == "config"
            with pytest.raises(NotFound):
                await front.adapters.create("dog", b"{}", "0" * 64)
            await until(lambda: len(blobs(tmp_path)) == 2)
            assert not list((tmp_path / "data" / "blobs" / "tmp").iterdir())

    asyncio.run(main())


def test_no_uploads_before_the_base_is_known(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path), ready=False, engine=("/nonexistent",)) as front:
            with pytest.raises(Overloaded):
                await upload(front, "cat")

    asyncio.run(main())


def test_deletion_waits_for_the_last_request(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat")
            served = front.adapters.resolve("cat")
            streams = [
                front.submit(spec(f"r{i}", "delay=0.01", 400, served.adapters)) for i in range(2)
            ]
            assert (await front.adapters.delete("cat")).status == "deleting"
            with pytest.raises(NotFound):
                front.adapters.resolve("cat")
            with pytest.raises(Conflict):
                front.submit(spec("late", adapters=served.adapters))
            streams[0].cancel()
            await asyncio.sleep(0.1)
            assert files(tmp_path) and [v.status for v in front.adapters.list()] == ["deleting"]
            streams[1].cancel()
            await until(lambda: front.adapters.list() == [])
            assert not files(tmp_path) and not blobs(tmp_path)
            await until_said(front, ["evict", view.digest])
            with pytest.raises(NotFound):
                await front.adapters.delete("cat")

    asyncio.run(main())


async def until_said(front: Front, command: list[str]) -> None:
    for _ in range(1000):
        if command in (await engine_said(front))["commands"]:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the engine was never told {command}")


def test_a_shared_version_outlives_one_of_its_names(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            one, two = await upload(front, "cat"), await upload(front, "dog")
            assert one.digest == two.digest
            await front.adapters.delete("cat")
            await until(lambda: [view.name for view in front.adapters.list()] == ["dog"])
            assert len(blobs(tmp_path)) == 2 and len(files(tmp_path)) == 1
            assert ["evict", one.digest] not in (await engine_said(front))["commands"]

    asyncio.run(main())


def test_an_upload_keeps_a_blob_that_a_deletion_lets_go(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            await upload(front, "cat")
            writer = await front.adapters.begin()
            await writer.write(b"weights")
            digest = await writer.commit()
            await front.adapters.delete("cat")
            await until(lambda: front.adapters.list() == [])
            assert blobs(tmp_path) == {digest}
            view = await front.adapters.create("dog", b"{}", digest, wait_s=WAIT)
            await writer.abort()
            assert view.status == "ready" and digest in blobs(tmp_path)

    asyncio.run(main())


def test_deleted_while_validating(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            await upload(front, "cat", wait_s=0, wait=0.3)
            await front.adapters.delete("cat")
            dog = await upload(front, "dog", b"dog")  # its turn comes after the cat's
            await until(lambda: [view.name for view in front.adapters.list()] == ["dog"])
            assert [path.name[:64] for path in files(tmp_path)] == [dog.digest]
            assert len(blobs(tmp_path)) == 2

    asyncio.run(main())


def test_pins(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat")
            assert (await front.adapters.set_pinned("cat", True)).pinned
            with pytest.raises(Conflict) as caught:
                await front.adapters.delete("cat")
            assert caught.value.code == "adapter_pinned"
            two = await upload(front, "cat", b"two", expected_generation=1)
            assert two.pinned and not front.adapters.show("cat@1").pinned
            assert not (await front.adapters.set_pinned("cat", False)).pinned
            assert (await engine_said(front))["commands"][:-1] == [
                ["pin", view.digest],
                ["pin", two.digest],
                ["unpin", two.digest],
            ]
            with pytest.raises(NotFound):
                await front.adapters.set_pinned("dog", True)

    asyncio.run(main())


def test_a_pin_the_engine_refuses_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            await upload(front, "cat")

            async def refuse(kind: str, digest: str | None = None) -> dict[str, Any]:
                raise Conflict("no room", code="pool_full")

            monkeypatch.setattr(front.adapters, "_ask_engine", refuse)
            with pytest.raises(Conflict, match="no room"):
                await front.adapters.set_pinned("cat", True)
            assert not front.adapters.show("cat").pinned

    asyncio.run(main())


def test_pins_are_told_to_every_new_engine(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat")
            await front.adapters.set_pinned("cat", True)
            with pytest.raises(ServiceError):
                await collect(front.submit(spec("r", "die=0")))
            await until(lambda: front.not_ready() == [])
            await until_said(front, ["pin", view.digest])

    asyncio.run(main())


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
            assert front.adapters.resolve("kept").digest == kept.digest
            assert [view.status for view in front.adapters.list()] == ["ready"] * 3
            assert len(files(tmp_path)) == 3
            assert len(blobs(tmp_path)) == 5  # three weights, two configs
            assert not list((config.data_dir / "blobs" / "tmp").iterdir())

    asyncio.run(main())


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
            assert front.adapters.resolve("good").digest == good.digest

    asyncio.run(main())
