"""The packed files: which are missing, which nobody needs any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loramux.adapters.pack import collect, delete, packed_path
from loramux.adapters.registry import AdapterRow, Registry


class PackedFiles:
    """An adapter's own file, and that of its basis, which other adapters may need too.

    What removes something runs on the registry's thread, as does whatever finds that a row needs
    it: no basis goes between being found to be there and being written down as needed.
    """

    def __init__(self, data_dir: Path, registry: Registry) -> None:
        self._data_dir = data_dir
        self._registry = registry

    def lacks(self, row: AdapterRow, fingerprint: str) -> bool:
        """Whether a file is missing that the row needs by its report."""
        paths = (packed_path(self._data_dir, digest, fingerprint) for digest in _needed(row))
        return not all(path.exists() for path in paths)

    def forget(self, row: AdapterRow) -> list[str]:
        """The row is gone: remove its files that no other row needs; their digests."""
        gone = [digest for digest in _needed(row) if not self._is_needed(digest)]
        for digest in gone:
            delete(self._data_dir, digest)
        return gone

    def collect(self) -> None:
        """Remove the files that no row needs: a crash came between one and the other."""
        collect(self._data_dir, self._is_needed)

    def _is_needed(self, digest: str) -> bool:
        return self._registry.uses_adapter(digest) or self._registry.uses_basis(digest)


def _needed(row: AdapterRow) -> Iterator[str]:
    yield row.digest
    if basis := row.report.get("basis"):
        yield basis["digest"]
