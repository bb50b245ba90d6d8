"""Finding an adapter in folders and archives, and the bodies that carry it."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.client.doubles import write_adapter_files

from loramux_client import AdapterFilesError
from loramux_client._files import BLOCK_BYTES, AdapterFiles, File, Part, blocks, find_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def content(file: File) -> bytes:
    with file.open() as stream:
        data = stream.read()
    assert len(data) == file.size
    return data


def check(files: AdapterFiles, folder: Path, name: str) -> None:
    for _ in range(2):  # a second try reads again
        assert content(files.config) == (folder / CONFIG).read_bytes()
        assert content(files.weights) == (folder / WEIGHTS).read_bytes()
    assert files.name == name


def test_a_folder_and_two_files(tmp_path: Path) -> None:
    folder = write_adapter_files(tmp_path / "my-adapter")
    check(find_adapter(folder), folder, "my-adapter")
    check(find_adapter(str(folder) + "/"), folder, "my-adapter")
    check(find_adapter((folder / CONFIG, str(folder / WEIGHTS))), folder, "my-adapter")


@pytest.mark.parametrize("inside", ["", "my/nested/", "./", "../../"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip", "zip-deflated"])
def test_archives_are_read_where_they_lie(mode: str, inside: str, tmp_path: Path) -> None:
    folder = write_adapter_files(tmp_path / "src")
    (folder / "README.md").write_text("more")
    archive = tmp_path / "packed" / ("my.adapter" + (".zip" if "zip" in mode else ".tar.gz"))
    archive.parent.mkdir()
    if mode.startswith("zip"):
        method = zipfile.ZIP_DEFLATED if mode == "zip-deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(archive, "w", method) as out:
            for path in folder.iterdir():
                out.write(path, inside + path.name)
    else:
        with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
            for path in folder.iterdir():
                tar.add(path, inside + path.name)
    before = sorted(tmp_path.rglob("*"))
    check(find_adapter(archive), folder, "my.adapter")
    assert sorted(tmp_path.rglob("*")) == before


def tar_of(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(data), "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return path


REG = tarfile.REGTYPE
REFUSED: dict[str, Callable[[Path], object]] = {
    "nothing there": lambda d: d / "missing",
    "an empty folder": lambda d: d,
    "a lone file": lambda d: (d / "x.safetensors", (d / "x.safetensors").write_bytes(b"abc"))[0],
    "an empty file": lambda d: (d / "x.zip", (d / "x.zip").write_bytes(b""))[0],
    "no weights": lambda d: tar_of(d / "x.tar", (CONFIG, REG, b"{}")),
    "a link for weights": lambda d: tar_of(
        d / "x.tar", (CONFIG, REG, b"{}"), (WEIGHTS, tarfile.SYMTYPE, b"")
    ),
    "a hard link": lambda d: tar_of(
        d / "x.tar", (CONFIG, REG, b"{}"), (WEIGHTS, tarfile.LNKTYPE, b"")
    ),
    "a device": lambda d: tar_of(
        d / "x.tar", (CONFIG, REG, b"{}"), (WEIGHTS, tarfile.CHRTYPE, b"")
    ),
    "two adapters": lambda d: tar_of(
        d / "x.tar", *((f"{n}/{f}", REG, b"x") for n in "ab" for f in (CONFIG, WEIGHTS))
    ),
    "two folders": lambda d: tar_of(
        d / "x.tar", (f"a/{CONFIG}", REG, b"{}"), (f"b/{WEIGHTS}", REG, b"x")
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_one_adapter_is_refused(what: str, tmp_path: Path) -> None:
    source = REFUSED[what](tmp_path)
    with pytest.raises(AdapterFilesError):
        find_adapter(source)  # type: ignore[arg-type]


def test_a_symbolic_link_in_a_zip_is_not_followed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        out.writestr(CONFIG, "{}")
        info = zipfile.ZipInfo(WEIGHTS)
        info.external_attr = 0o120777 << 16
        out.writestr(info, "/etc/passwd")
    with pytest.raises(AdapterFilesError, match="0 files"):
        find_adapter(tmp_path / "x.zip")


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "zip"])
def test_a_damaged_archive_is_an_error_of_ours(mode: str, tmp_path: Path) -> None:
    folder = write_adapter_files(tmp_path / "src", bytes(range(256)) * 4000)
    archive = tmp_path / "packed"
    if mode == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for path in folder.iterdir():
                out.write(path, path.name)
    else:
        with tarfile.open(archive, mode) as tar:  # type: ignore[call-overload]
            tar.add(folder, "x")
    good = archive.read_bytes()
    for position in range(0, len(good), max(1, len(good) // 40)):
        archive.write_bytes(good[:position] + bytes([good[position] ^ 0x55]) + good[position + 1 :])
        try:
            files = find_adapter(archive)
            for file in (files.config, files.weights):
                b"".join(blocks(file, 0, file.size))
        except AdapterFilesError:
            pass


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 7])
@pytest.mark.parametrize("archive", [False, True])
def test_a_part_is_those_bytes_of_the_file(size: int, archive: bool, tmp_path: Path) -> None:
    weights = (bytes(range(251)) * (size // 251 + 1))[:size]
    source = write_adapter_files(tmp_path / "a", weights)
    if archive:
        with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
            tar.add(source, "x")
        source = tmp_path / "a.tgz"
    file = find_adapter(source).weights
    for start, end in ((0, size), (size // 3, size), (size // 3, size // 2), (size, size)):
        seen: list[int] = []
        part = Part(file, start, end, seen.append)
        for _ in range(2):
            seen.clear()
            pieces = list(part)
            assert b"".join(pieces) == weights[start:end]
            assert all(len(piece) <= BLOCK_BYTES for piece in pieces)
            assert seen == sorted(set(seen)) and (not seen or seen[-1] == end)


def test_a_file_that_shrinks_meanwhile_is_noticed(tmp_path: Path) -> None:
    folder = write_adapter_files(tmp_path / "a", bytes(1000))
    part = Part(find_adapter(folder).weights, 0, 1000, lambda _: None)
    (folder / WEIGHTS).write_bytes(b"short")
    with pytest.raises(AdapterFilesError, match="shrank"):
        list(part)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFilesError, match="cannot be read"):
        list(part)
