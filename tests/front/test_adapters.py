"""The life of an adapter through the service: names, verdicts, pins, deletion, restarts."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import collect, configure, running, spec, until
from tests.front.uploading import WAIT, blobs, engine_said, files, upload

from loramux.errors import (
    AdapterInvalid,
    Conflict,
    GenerationGone,
    InvalidRequest,
    NotFound,
    Overloaded,
    PayloadTooLarge,
    ServiceError,
)
from loramux.front.front import Front
from loramux.metrics.prometheus import Exporter


def test_an_upload_becomes_a_model(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await upload(front, "cat")
            assert (view.name, view.generation, view.status) == ("cat", 1, "ready")
            assert (view.rank, view.num_bytes, view.num_frames) == (4, 128, 1)
            assert hashlib.sha256(b"weights").hexdigest() in blobs(tmp_path)
            for model in ["cat", "cat@1", f"cat@sha256:{view.digest[:12]}"]:
                served = front.adapters.resolve(model)
                assert (served.name, served.label, served.generation) == ("cat", view.digest, 1)
                assert [ref.digest for ref in served.adapters] == [view.digest]
            delta = await collect(front.submit(spec("r", adapters=served.adapters)))
            assert delta.token_ids
            assert front.snapshot.adapter_tokens == {view.digest: [5, 8]}
            assert front.snapshot.uploads == {"ready": 1}
            assert front.adapters.list() == [front.adapters.show("cat")]
            again = await upload(front, "cat")
            assert again == view

    asyncio.run(main())


def test_every_verdict_is_timed_and_faults_are_counted_by_code(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            front.observer = exporter = Exporter(front, dict)
            value = exporter.registry.get_sample_value
            await upload(front, "cat")
            failures = "loramux_adapter_validation_failures_total"
            assert value("loramux_adapter_validation_seconds_count") == 1
            assert value(failures, {"code": "adapter_invalid"}) is None
            with pytest.raises(AdapterInvalid):
                await upload(front, "dog", bad=["no"], code="rank_mismatch", validate_only=True)
            assert value("loramux_adapter_validation_seconds_count") == 2
            assert value(failures, {"code": "rank_mismatch"}) == 1

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
            assert front.adapters.resolve("cat").label == one.digest
            with pytest.raises(Conflict) as caught:
                front.adapters.resolve("cat@2")
            assert caught.value.code == "adapter_not_ready" and caught.value.retry_after_s
            await until(lambda: front.adapters.resolve("cat").generation == 2)
            assert front.adapters.resolve("cat@1").label == one.digest
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
                "message": "2 problems; the first: first",
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
            for name in ["", "a b", "a@1", "../a", "é", "a" * 97, "-a"]:
                with pytest.raises(InvalidRequest) as caught:
                    await upload(front, name)
                assert caught.value.param == "name"
            with pytest.raises(Conflict) as reserved:
                await upload(front, "base")
            assert reserved.value.code == "name_reserved"
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
                ["unpin", view.digest],
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

            monkeypatch.setattr(front.adapters.pins, "_ask_engine", refuse)
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
