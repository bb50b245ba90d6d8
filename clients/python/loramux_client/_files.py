"""A PEFT adapter on this machine: in a folder, a tar or a zip, or as two files.

Archives are read, never unpacked: the two members wanted are found by name and streamed, so no
path, link or mode inside an archive is ever acted upon, and nothing is written to disk.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from loramux_client._errors import AdapterFilesError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
HEADS = "medusa_heads.safetensors"
BESIDE = (
    "chat_template.jinja",
    "generation_config.json",
    "loramux.json",
    "tokenizer_config.json",
)
"""Files that say how an adapter is spoken to and speaks."""
BLOCK_BYTES = 1 << 18

Source = str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]]
"""A folder, a tar or zip archive, or the paths of the config and of the weights."""
Progress = Callable[[int, int], None]
Opener = Callable[[], contextlib.AbstractContextManager[IO[bytes]]]

# What reading a damaged archive raises; RuntimeError is zipfile's for an encrypted one.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class File:
    """Something that can be opened for reading more than once; ``size`` in bytes."""

    open: Opener
    size: int


@dataclass(frozen=True)
class AdapterFiles:
    """The two files of an adapter; ``name`` is what their folder or archive is called, ``heads``
    and ``beside`` are HEADS and those of BESIDE that lie in the same folder."""

    name: str
    config: File
    weights: File
    heads: File | None = None
    beside: dict[str, File] = field(default_factory=dict)


def find_adapter(source: Source) -> AdapterFiles:
    """Raises AdapterFilesError when there is not exactly one adapter there."""
    if isinstance(source, tuple):
        config, weights = map(Path, source)
        return AdapterFiles(weights.resolve().parent.name, local_file(config), local_file(weights))
    path = Path(source)
    if path.is_dir():
        names = (name for name in (HEADS, *BESIDE) if (path / name).is_file())
        beside = {name: local_file(path / name) for name in names}
        return _together(
            path.resolve().name, local_file(path / CONFIG), local_file(path / WEIGHTS), beside
        )
    if not path.is_file():
        raise AdapterFilesError(f"{path} is neither a folder nor a file")
    name = path.name
    for suffix in (".gz", ".bz2", ".xz", ".tgz", ".tar", ".zip"):
        name = name.removesuffix(suffix)
    try:
        if zipfile.is_zipfile(path):
            return _together(name, *_in_zip(path))
        if tarfile.is_tarfile(path):
            return _together(name, *_in_tar(path))
    except _UNREADABLE as exc:
        raise AdapterFilesError(f"{path} cannot be read as an archive: {exc}") from exc
    raise AdapterFilesError(f"{path} is neither a folder nor a tar or zip archive")


def _together(name: str, config: File, weights: File, beside: dict[str, File]) -> AdapterFiles:
    return AdapterFiles(name, config, weights, beside.pop(HEADS, None), beside)


def local_file(path: Path) -> File:
    """Raises AdapterFilesError when there is none."""
    if not path.is_file():
        which = f": PEFT saves {CONFIG} and {WEIGHTS}" if path.name in (CONFIG, WEIGHTS) else ""
        raise AdapterFilesError(f"{path} is missing{which}")
    return File(lambda: path.open("rb"), path.stat().st_size)


def _in_zip(path: Path) -> tuple[File, File, dict[str, File]]:
    with zipfile.ZipFile(path) as archive:
        members = {
            info.filename: info.file_size
            for info in archive.infolist()
            # Mode bits are only there if the archive was made on a system that has them.
            if not info.is_dir() and stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
        }

    def opener(name: str) -> Opener:
        @contextlib.contextmanager
        def open_member() -> Iterator[IO[bytes]]:
            with zipfile.ZipFile(path) as archive, archive.open(name) as file:
                yield file

        return open_member

    return _pick(path, members, opener)


def _in_tar(path: Path) -> tuple[File, File, dict[str, File]]:
    with tarfile.open(path) as archive:
        members = {info.name: info.size for info in archive if info.isreg()}

    def opener(name: str) -> Opener:
        @contextlib.contextmanager
        def open_member() -> Iterator[IO[bytes]]:
            with tarfile.open(path) as archive:
                file = archive.extractfile(name)
                assert file is not None, "only regular members are offered"
                with file:
                    yield file

        return open_member

    return _pick(path, members, opener)


def _pick(
    path: Path, members: dict[str, int], opener: Callable[[str], Opener]
) -> tuple[File, File, dict[str, File]]:
    """The one config and the one weights file among an archive's members, side by side, and what
    else is there."""
    found = []
    for wanted in (CONFIG, WEIGHTS):
        names = [name for name in members if PurePosixPath(name).name == wanted]
        if len(names) != 1:
            raise AdapterFilesError(f"{path} holds {len(names)} files {wanted}, not one")
        found.append(names[0])
    if PurePosixPath(found[0]).parent != PurePosixPath(found[1]).parent:
        raise AdapterFilesError(f"{path} holds {CONFIG} and {WEIGHTS} in different folders")
    config, weights = (File(opener(name), members[name]) for name in found)
    folder = PurePosixPath(found[0]).parent
    beside = {
        PurePosixPath(name).name: File(opener(name), size)
        for name, size in members.items()
        if PurePosixPath(name).parent == folder and PurePosixPath(name).name in (HEADS, *BESIDE)
    }
    return config, weights, beside


@dataclass(frozen=True)
class Part:
    """Bytes ``start`` to ``end`` of a file as a request's body; iterate it as often as it is sent.

    Never holds more than a block. ``sent`` is told how far into the file the connection has come.
    """

    file: File
    start: int
    end: int
    sent: Callable[[int], None]

    def __iter__(self) -> Iterator[bytes]:
        at = self.start
        for block in blocks(self.file, self.start, self.end):
            yield block
            at += len(block)
            self.sent(at)


def blocks(file: File, start: int, end: int) -> Iterator[bytes]:
    """Exactly the bytes from ``start`` to ``end``; an error if the file has fewer."""
    left = end - start
    try:
        with file.open() as stream:
            stream.seek(start)
            while left:
                block = stream.read(min(left, BLOCK_BYTES))
                if not block:
                    raise AdapterFilesError("a file of the adapter shrank while it was being sent")
                left -= len(block)
                yield block
    except _UNREADABLE as exc:
        raise AdapterFilesError(f"a file of the adapter cannot be read: {exc}") from exc
