"""Packed files are there as long as somebody needs them: an adapter's own, and those it shares."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.front.house import configure, running, until
from tests.front.uploading import engine_said, files, upload

from loramux.adapters.pack import packed_path
from loramux.adapters.registry import Registry
from loramux.front.front import Front

BASIS, OTHER, KEPT = "ba" * 32, "0e" * 32, "ce" * 32


def there(folder: Path) -> set[str]:
    return {path.name[:64] for path in files(folder)}


async def evictions(front: Front) -> list[str]:
    commands = (await engine_said(front))["commands"]
    return [digest for kind, digest in commands if kind == "evict"]


def test_a_basis_goes_with_the_last_adapter_on_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            cat = await upload(front, "cat", b"cat", basis=BASIS)
            assert cat.report["basis"]["digest"] == BASIS and cat.num_bytes == 128
            dog = await upload(front, "dog", b"dog", basis=BASIS, tenant="another")
            owl = await upload(front, "owl", b"owl", basis=OTHER)
            assert there(tmp_path) == {cat.digest, dog.digest, owl.digest, BASIS, OTHER}
            await front.adapters.delete("cat")
            await until(lambda: cat.digest not in there(tmp_path))
            assert there(tmp_path) == {dog.digest, owl.digest, BASIS, OTHER}
            await front.adapters.delete("dog", tenant="another")
            await until(lambda: BASIS not in there(tmp_path))
            assert there(tmp_path) == {owl.digest, OTHER}
            while len(await evictions(front)) < 3:
                await asyncio.sleep(0.01)
            assert await evictions(front) == [cat.digest, dog.digest, BASIS]

    asyncio.run(main())


def test_two_names_of_one_version_both_need_its_files(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            cat = await upload(front, "cat", basis=BASIS)
            assert (await upload(front, "kitten", basis=BASIS)).digest == cat.digest
            await front.adapters.delete("cat")
            await until(lambda: [view.name for view in front.adapters.list()] == ["kitten"])
            assert there(tmp_path) == {cat.digest, BASIS} and not await evictions(front)
            await front.adapters.delete("kitten")
            await until(lambda: not there(tmp_path))

    asyncio.run(main())


def test_a_basis_that_went_while_another_was_found_to_need_it_is_made_again(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            cat = await upload(front, "cat", b"cat", basis=BASIS)
            packed_path(tmp_path / "data", BASIS, "fake-base").write_bytes(b"seen to be there")
            await upload(front, "dog", b"dog", wait_s=0, basis=BASIS, wait=0.5)
            await until(lambda: b"seen" not in content(tmp_path, BASIS))
            await front.adapters.delete("cat")
            await until(lambda: cat.digest not in there(tmp_path))
            assert BASIS not in there(tmp_path), "no row is known to need it"
            await until(lambda: front.adapters.show("dog").status == "ready")
            assert there(tmp_path) == {front.adapters.show("dog").digest, BASIS}

    asyncio.run(main())


def content(folder: Path, digest: str) -> bytes:
    return packed_path(folder / "data", digest, "fake-base").read_bytes()


def test_deleted_while_validating_leaves_no_basis(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            await upload(front, "cat", wait_s=0, wait=0.3, basis=BASIS)
            await front.adapters.delete("cat")
            await until(lambda: front.adapters.list() == [])
            assert not there(tmp_path)

    asyncio.run(main())


def test_a_start_makes_what_is_missing_and_removes_what_nobody_needs(tmp_path: Path) -> None:
    async def main() -> None:
        config = configure(tmp_path)
        async with running(config) as front:
            cat = await upload(front, "cat", basis=BASIS)
            dog = await upload(front, "dog", b"dog", basis=KEPT)
        data_dir = config.data_dir
        packed_path(data_dir, KEPT, "fake-base").write_bytes(b"as it was")
        packed_path(data_dir, BASIS, "fake-base").unlink()
        packed_path(data_dir, OTHER, "fake-base").write_bytes(b"a basis")
        packed_path(data_dir, "ad" * 32, "fake-base").write_bytes(b"an adapter")
        async with running(config) as front:
            assert front.adapters.show("cat").status == "ready"
            assert there(tmp_path) == {cat.digest, BASIS, dog.digest, KEPT}
            assert content(tmp_path, KEPT) == b"as it was"

    asyncio.run(main())


def test_what_a_row_needs_is_what_its_report_says(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for name, basis in (("cat", BASIS), ("dog", OTHER), ("plain", None)):
        row, _ = registry.create(name, tenant=name, config_digest="c" * 64, weights_digest="d" * 64)
        report = {"basis": {"digest": basis}} if basis else {"rank": 4}
        registry.mark_ready(row.id, fingerprint="f", report=report)
    assert registry.uses_basis(BASIS) and registry.uses_basis(OTHER)
    assert not registry.uses_basis("ee" * 32)
    (row,) = registry.list(tenant="cat")
    registry.forget(row.id)
    assert not registry.uses_basis(BASIS) and registry.uses_basis(OTHER)
    registry.close()
