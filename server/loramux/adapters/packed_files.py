"""Packed adapters on disk -> frames of the arena, read straight into place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path

import torch

from loramux.adapters.pack import PackedAdapter, packed_path, read_header
from loramux.errors import AdapterLoadFailed
from loramux.memory.arena import Arena


class PackedFiles:
    """The packed files under ``data_dir`` that belong to the base ``fingerprint``."""

    def __init__(self, data_dir: Path, fingerprint: str, arena: Arena) -> None:
        self._data_dir = data_dir
        self._fingerprint = fingerprint
        self._arena = arena

    def header(self, digest: str) -> PackedAdapter:
        """What the packed file of ``digest`` holds. Raises LoramuxError if it is not usable."""
        path = packed_path(self._data_dir, digest, self._fingerprint)
        try:
            return read_header(path)
        except OSError as error:
            raise AdapterLoadFailed("the adapter's packed file is missing") from error

    def read_into(self, packed: PackedAdapter, frames: Sequence[int]) -> None:
        """Read the stream into ``frames`` and compare its SHA-256 with the header's.

        On CPU the bytes go from the file to their frame without a stop; on CUDA through one
        pinned frame, on a stream of the loader's own.
        """
        digest = hashlib.sha256()
        left = packed.num_bytes
        with FileIO(packed.path) as file:
            file.seek(packed.payload_offset)
            for target, commit in self._targets(frames):
                view = memoryview(target.numpy().data)[: min(left, target.numel())]
                _read_exactly(file, view)
                digest.update(view)
                left -= len(view)
                commit()
        if digest.hexdigest() != packed.payload_sha256:
            raise AdapterLoadFailed(
                "the adapter's packed file is damaged: its checksum does not match"
            )

    def _targets(self, frames: Sequence[int]) -> Iterator[tuple[torch.Tensor, Callable[[], None]]]:
        """Where to put the bytes of each frame, and what to do once they are there."""
        data = self._arena.frame_data
        if self._arena.data.device.type == "cpu":
            for frame in frames:
                yield data(frame), lambda: None
            return
        staging = torch.empty(self._arena.frame.frame_bytes, dtype=torch.uint8, pin_memory=True)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for frame in frames:

            def commit(frame: int = frame) -> None:
                with torch.cuda.stream(stream):
                    data(frame).copy_(staging, non_blocking=True)
                stream.synchronize()

            yield staging, commit


def _read_exactly(file: FileIO, view: memoryview) -> None:
    while len(view):
        got = file.readinto(view)
        if not got:
            raise AdapterLoadFailed("the adapter's packed file is shorter than its header says")
        view = view[got:]
