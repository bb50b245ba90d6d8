"""Adapters for the draft and the small model: uploaded for one, asked for through another."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tests.adapters.peft_files import make_config
from tests.front.house import collect, configure, running, spec, until
from tests.front.uploading import engine_said, files, upload

from loramux.adapters.pack import packed_path
from loramux.config import ServerConfig
from loramux.errors import (
    AdapterInvalid,
    AdapterLoadFailed,
    Conflict,
    GenerationGone,
    InvalidRequest,
    NotFound,
)
from loramux.front.catalog import Companion
from loramux.front.front import INGEST, Front
from loramux.front.generation import GenerationSpec
from loramux.front.observations import Observations
from loramux.request import DRAFT_MODEL_ID, SMALL_MODEL_ID, AdapterRef, EntropyAdaptive

BOTH = json.dumps({"companions": {"draft": "d", "small": "s"}}).encode()
DRAFT = json.dumps({"companions": {"draft": "d"}}).encode()


def with_partners(folder: Path, **names: str) -> ServerConfig:
    named = {f"{role}_model": folder / name for role, name in names.items()}
    return configure(folder, **named)


def both(folder: Path) -> ServerConfig:
    return with_partners(folder, draft="tiny", small="little")


def asked(front: Front, model: str, request_id: str = "r", **fields: Any) -> GenerationSpec:
    served = front.adapters.resolve(model, tenant=fields.get("tenant", ""))
    fields |= {"adapters": served.adapters, "companions": served.companions}
    return spec(request_id, **fields)


def state(front: Front, name: str, role: str = "draft", tenant: str = "") -> Companion:
    return front.adapters.show(name, tenant=tenant).companions[role]  # type: ignore[index]


def test_companions_reach_the_engine_and_no_request_names_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            draft = await upload(front, "d", b"draft", base="draft")
            small = await upload(front, "s", b"small", base="small")
            cat = await upload(front, "cat", b"cat", profile=BOTH)
            assert (draft.base, small.base, cat.base) == ("draft", "small", "target")
            assert cat.companions == {
                "draft": Companion(name="d", status="ready", digest=draft.digest),
                "small": Companion(name="s", status="ready", digest=small.digest),
            }
            wanted = {
                DRAFT_MODEL_ID: (AdapterRef(draft.digest),),
                SMALL_MODEL_ID: (AdapterRef(small.digest),),
            }
            assert front.adapters.resolve("cat").companions == wanted
            await front.adapters.aliases.set("lion", [("cat", 1)])
            assert front.adapters.resolve("lion").companions == wanted
            assert front.adapters.resolve("base").companions == {}
            await collect(front.submit(asked(front, "cat")))
            told = (await engine_said(front))["companions"]["r"]
            assert told == {1: [[draft.digest, 1.0]], 2: [[small.digest, 1.0]]}
            for name, role in (("d", "draft"), ("s", "small"), ("d@1", "draft")):
                with pytest.raises(InvalidRequest, match=f"is for the {role} model") as caught:
                    front.adapters.resolve(name)
                assert caught.value.param == "model"
                for targets in ([(name, 1)], [("cat", 1), (name, 1)]):
                    with pytest.raises(InvalidRequest, match=f"is for the {role} model"):
                        await front.adapters.aliases.set("alias", targets)

    asyncio.run(main())


def test_each_is_packed_for_its_own_model(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            config = front.config
            for name, base, fingerprint in (
                ("cat", "target", "fake-base"),
                ("d", "draft", "tiny"),
                ("s", "small", "little"),
            ):
                view = await upload(front, name, name.encode(), base=base)
                assert packed_path(config.data_dir, view.digest, fingerprint).exists()
            assert len(files(tmp_path)) == 3

    asyncio.run(main())


def test_without_such_a_model_nothing_is_taken(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(with_partners(tmp_path, draft="tiny")) as front:
            with pytest.raises(InvalidRequest, match="no small model.*--small-model") as caught:
                await upload(front, "s", base="small")
            assert caught.value.param == "base" and front.adapters.list() == []
            with pytest.raises(InvalidRequest) as caught:
                await upload(front, "d", base="draft", profile=DRAFT)
            assert caught.value.param == "profile" and front.adapters.list() == []
            seen = await upload(front, "d", base="draft", validate_only=True)
            assert (seen.base, seen.generation) == ("draft", 0) and not files(tmp_path)

    asyncio.run(main())


def test_what_is_not_there_or_not_ready_is_told_and_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            assert (await upload(front, "cat", profile=DRAFT)).companions == {
                "draft": Companion(name="d", status="missing")
            }
            await upload(front, "d", b"small", base="small")
            assert state(front, "cat") == Companion(name="d", status="other_base")
            assert front.adapters.resolve("cat").companions == {}
            await front.adapters.delete("d")
            with pytest.raises(AdapterInvalid):
                await upload(front, "d", b"bad", base="draft", bad=["one"])
            assert state(front, "cat").status == "failed"
            slow = await upload(front, "d", b"slow", base="draft", wait=0.3, wait_s=0)
            assert state(front, "cat") == Companion(name="d", status="validating")
            assert front.adapters.resolve("cat").companions == {}
            await until(lambda: state(front, "cat").status == "ready")
            assert state(front, "cat").digest == slow.digest
            second = await upload(front, "d", b"second", base="draft", expected_generation=3)
            assert state(front, "cat").digest == second.digest, "the current generation"
            await collect(front.submit(asked(front, "cat")))
            await front.adapters.set_ttl("d", 1)
            await until(lambda: state(front, "cat").digest == slow.digest)
            await front.adapters.delete("d")
            assert state(front, "cat").status == "missing"

    asyncio.run(main())


def test_a_companion_is_looked_up_where_its_adapter_is_at_home(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            shared = await upload(front, "d", b"shared", base="draft")
            await upload(front, "common", b"common", profile=DRAFT)
            await upload(front, "own", b"own", profile=DRAFT, tenant="alice")
            await upload(front, "own", b"own", profile=DRAFT, tenant="bob")
            alices = await upload(front, "d", b"alice", base="draft", tenant="alice")
            for tenant, model, digest in (
                ("alice", "own", alices.digest),
                ("bob", "own", shared.digest),
                ("alice", "common", shared.digest),
            ):
                served = front.adapters.resolve(model, tenant=tenant)
                assert served.companions == {DRAFT_MODEL_ID: (AdapterRef(digest),)}
                assert state(front, model, tenant=tenant).digest == digest
            with pytest.raises(InvalidRequest, match="draft"):
                front.adapters.resolve("d", tenant="bob")
            with pytest.raises(NotFound):
                front.adapters.resolve("own", tenant="carol")

    asyncio.run(main())


def test_a_name_is_for_one_model_as_long_as_it_holds_something(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            await upload(front, "d", base="draft")
            for base in ("target", "small"):
                for weights in (b"weights", b"others"):
                    with pytest.raises(Conflict, match="for the draft model") as caught:
                        await upload(front, "d", weights, base=base, expected_generation=1)
                    assert (caught.value.param, caught.value.code) == ("base", "name_reserved")
            with pytest.raises(InvalidRequest, match="pinned"):
                await front.adapters.set_pinned("d", True)
            await front.adapters.delete("d")
            assert (await upload(front, "d")).base == "target"
            with pytest.raises(AdapterInvalid):
                await upload(front, "x", bad=["one"])
            assert front.adapters.show("x").base == "target"
            with pytest.raises(AdapterInvalid):
                await upload(front, "x", base="draft", bad=["one"])
            assert front.adapters.show("x").base == "draft", "the very files, tried for another"
            assert (await upload(front, "x", b"good", base="small")).base == "small"

    asyncio.run(main())


def test_a_companion_goes_when_the_requests_with_it_have_ended(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            draft = await upload(front, "d", b"draft", base="draft")
            await upload(front, "cat", b"cat", profile=DRAFT)
            late = asked(front, "cat", "late")
            generation = front.submit(asked(front, "cat", script="delay=0.02", max_tokens=30))
            await anext(generation)
            await front.adapters.delete("d")
            assert state(front, "cat").status == "missing"
            await asyncio.sleep(0.1)
            packed = packed_path(front.config.data_dir, draft.digest, "tiny")
            assert packed.exists() and generation.done is None
            await collect(front.submit(late))
            assert (await engine_said(front))["companions"]["late"] == {}, "drafted without it"
            assert packed.exists()
            await collect(generation)
            await until(lambda: not packed.exists())

    asyncio.run(main())


def test_without_the_small_models_adapter_the_answer_would_be_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            await upload(front, "s", b"small", base="small")
            await upload(front, "cat", b"cat", profile=BOTH)
            adaptive = asked(front, "cat", entropy=EntropyAdaptive(threshold=1))
            plain = asked(front, "cat", "plain")
            await front.adapters.delete("s")
            with pytest.raises(Conflict) as caught:
                front.submit(adaptive)
            assert caught.value.code == "adapter_not_ready"
            await collect(front.submit(plain))
            assert (await engine_said(front))["companions"] == {"plain": {}}

    asyncio.run(main())


def test_other_models_at_the_next_start(tmp_path: Path) -> None:
    """Listed as incompatible under another model and without one; served again with its own."""

    async def main() -> None:
        own = with_partners(tmp_path, draft="tiny")
        async with running(own) as front:
            draft = await upload(front, "d", b"draft", base="draft")
            cat = await upload(front, "cat", b"cat", profile=DRAFT)
            await upload(front, "slow", b"slow", base="draft", wait_s=0, wait=1)
        for config in (configure(tmp_path), with_partners(tmp_path, draft="another")):
            other = config.draft_model is not None
            async with running(config) as front:
                assert front.adapters.show("d").status == "incompatible"
                assert front.adapters.show("slow").status == ("ready" if other else "incompatible")
                assert state(front, "cat") == Companion(name="d", status="incompatible")
                served = front.adapters.resolve("cat")
                assert served.label == cat.digest and served.companions == {}
                with pytest.raises(Conflict, match="for the draft model"):
                    await upload(front, "d", b"target")
                await collect(front.submit(asked(front, "cat")))
            assert len(files(tmp_path)) == 2 + other
        async with running(own) as front:
            assert state(front, "cat") == Companion(name="d", status="ready", digest=draft.digest)
            assert front.adapters.show("slow").status == "incompatible", "of the other draft now"

    asyncio.run(main())


def test_a_packed_file_that_is_missing_is_made_again_for_its_model(tmp_path: Path) -> None:
    async def main() -> None:
        config = both(tmp_path)
        async with running(config) as front:
            draft = await upload(front, "d", base="draft", wait=0.2)
            # The same files for the base: one digest, two packed forms.
            assert (await upload(front, "cat", wait=0.2)).digest == draft.digest
            dog = await upload(front, "dog", b"dog", profile=DRAFT)
        paths = [packed_path(config.data_dir, draft.digest, base) for base in ("tiny", "fake-base")]
        paths[0].unlink()
        untouched = paths[1].stat()
        async with running(config) as front:
            assert paths[0].exists() and paths[1].stat() == untouched
            assert state(front, "dog").digest == draft.digest
            for path in paths:
                path.unlink()
            with pytest.raises(AdapterLoadFailed):
                await collect(front.submit(asked(front, "dog", script="fail=adapter_load_failed")))
            assert state(front, "dog") == Companion(name="d", status="validating")
            await until(lambda: all(path.exists() for path in paths))
            await until(lambda: state(front, "dog").status == "ready")
            assert front.adapters.resolve("dog").label == dog.digest

    asyncio.run(main())


def test_an_alias_that_follows_a_name_never_stands_for_another_models(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(both(tmp_path)) as front:
            await upload(front, "cat", b"cat")
            await front.adapters.aliases.set("lion", [("cat", 1)])
            front.adapters.shelf.registry.mark_failed(
                front.adapters.shelf.catalog._of("", "cat")[0].id, code="corrupt", problems=["x"]
            )
            assert (await upload(front, "cat", b"draft", base="draft")).base == "draft"
            (target,) = front.adapters.aliases.show("lion").targets
            assert (target.status, target.digest) == ("gone", None)
            with pytest.raises(GenerationGone):
                front.adapters.resolve("lion")

    asyncio.run(main())


def test_whoever_uses_a_companion_may_see_where_it_is() -> None:
    observations = Observations()
    companions = {DRAFT_MODEL_ID: (AdapterRef("d"),), SMALL_MODEL_ID: (AdapterRef("s", 1.0),)}
    one = spec(adapters=(AdapterRef("cat"),), companions=companions, tenant="alice")
    observations.submitted(one)
    assert observations.snapshot.wearers == {digest: {"alice"} for digest in ("cat", "d", "s")}


def test_profiles_of_an_earlier_release_are_read_again(tmp_path: Path) -> None:
    async def main() -> None:
        config = both(tmp_path)
        async with running(config) as front:
            await upload(front, "d", b"draft", base="draft")
            await upload(front, "cat", b"cat", profile=DRAFT)
        with sqlite3.connect(config.data_dir / "registry.sqlite") as db:
            db.execute("UPDATE adapters SET report = json_remove(report, '$.companions')")
        db.close()
        async with running(config) as front:
            assert state(front, "cat").status == "ready"

    asyncio.run(main())


def weights(width: int, layers: int, rank: int = 4) -> bytes:
    at = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {}
    for layer in range(layers):
        tensors[at.format(layer, "A")] = np.ones((rank, width), np.float32)
        tensors[at.format(layer, "B")] = np.ones((width, rank), np.float32)
    return save(tensors)


def test_the_importer_judges_it_by_that_models_widths(tmp_path: Path) -> None:
    """The base here is 16 wide with one layer, the draft 8 wide with two."""
    config = make_config(target_modules=["q_proj"])

    async def main() -> None:
        async with running(with_partners(tmp_path, draft="tiny"), ingest=INGEST) as front:
            with pytest.raises(AdapterInvalid) as caught:
                await upload(front, "d", weights(16, 1), base="draft", **config)
            assert any("layers.0.self_attn.q_proj" in text for text in caught.value.problems)
            with pytest.raises(AdapterInvalid) as caught:
                await upload(front, "cat", weights(8, 2), **config)
            assert any("layers.1" in text for text in caught.value.problems)
            wide = {**config, "r": 64}
            view = await upload(front, "d", weights(8, 2, 64), base="draft", **wide)
            assert view.status == "ready" and view.report["layers"] == [0, 1]
            assert view.num_bytes == 4 * 4096
            assert view.num_frames == 4, "a frame of this pool has the base's one layer"
            cat = await upload(front, "cat", weights(16, 1), profile=DRAFT, **config)
            assert cat.report["companions"] == {"draft": "d"}
            assert cat.companions["draft"].digest == view.digest

    asyncio.run(main())
