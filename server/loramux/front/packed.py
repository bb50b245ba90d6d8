"""The packed files of the base that is served: which are missing, which nobody needs any more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loramux.adapters.pack import packed_path
from loramux.adapters.registry import AdapterRow, Registry

_ANY = "0" * 64


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

    def collect(self, row: AdapterRow) -> list[str]:
        """The row was forgotten: remove its files that no other row needs; their digests."""
        used = (self._registry.uses_adapter, self._registry.uses_basis)
        gone = [d for d, uses in zip(_needed(row), used, strict=False) if not uses(d)]
        if fingerprint := self._registry.base_fingerprint:
            for digest in gone:
                packed_path(self._data_dir, digest, fingerprint).unlink(missing_ok=True)
        return gone

    def sweep(self) -> None:
        """Remove the files that no row needs: a crash came between one and the other."""
        needed = {digest for row in self._registry.every() for digest in _needed(row)}
        example = packed_path(self._data_dir, _ANY, self._registry.base_fingerprint)
        for path in example.parent.glob(example.name.replace(_ANY, "*")):
            if path.name[: len(_ANY)] not in needed:
                path.unlink(missing_ok=True)


def _needed(row: AdapterRow) -> Iterator[str]:
    yield row.digest
    if basis := row.report.get("basis"):
        yield basis["digest"]
