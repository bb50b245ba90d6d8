"""From the two open files of an adapter to its canonical form, compressed or not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loramux.adapters import compeft
from loramux.adapters.canonical import CanonicalAdapter
from loramux.adapters.formats import parse_config, read_upload
from loramux.adapters.formats.upload import Upload
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import read_tensors
from loramux.ingest.base import CheckpointWeights
from loramux.wire import BaseDescription


@dataclass(frozen=True)
class Read:
    """An upload that was read; ``compression`` is empty for one that is not compressed."""

    upload: Upload
    compression: dict[str, Any]

    def canonical(self) -> CanonicalAdapter:
        """The adapter; AdapterInvalid with all that is wrong with it. Its matrices are in the file:
        it has to stay open."""
        self.upload.problems.raise_any()
        return self.upload.canonical()


def read_adapter(
    config: bytes, weights: BinaryIO, base: BaseDescription, problems: Problems | None = None
) -> Read:
    """Read both files. Raises AdapterInvalid for what no tensor can be read out of."""
    fields, compression = parse_config(config), {}
    if compeft.KEY in fields:
        expanded = compeft.expand(fields, weights, base)
        fields, tensors, compression = expanded.config, expanded.tensors, expanded.facts
    else:
        tensors = read_tensors(weights)
    own = CheckpointWeights(Path(base.directory))
    upload = Upload(fields, tensors, base, own, problems or Problems())
    read_upload(upload)
    return Read(upload, compression)
