"""Blends of adapters in folders, without the processes around them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.adapters.peft_files import NoWeights

from loramux.adapters.blobs import BlobStore
from loramux.adapters.canonical import CanonicalAdapter, widen
from loramux.adapters.formats import import_adapter, parse_config
from loramux.adapters.safetensors_file import read_tensors
from loramux.ingest.job import run
from loramux.wire import BaseDescription, BlendJob, BlendRecipe, BlendSource, IngestDone

FILES = ("adapter_config.json", "adapter_model.safetensors")
Deltas = dict[tuple[int, str], npt.NDArray[np.float64]]


def store(data_dir: Path, folder: Path) -> list[str]:
    """The digests of a folder's two files, now blobs."""
    digests = []
    for name in FILES:
        with BlobStore(data_dir).writer(1 << 40) as writer:
            writer.write((folder / name).read_bytes())
            digests.append(writer.commit())
    return digests


def blend_job(
    data_dir: Path,
    sources: Sequence[tuple[Path, float]],
    base: BaseDescription,
    limit_bytes: int = 1 << 30,
    **recipe: Any,
) -> BlendJob:
    """What the front would ask for; a source is called as its folder."""
    listed = []
    for folder, weight in sources:
        config, weights = store(data_dir, folder)
        listed.append(
            BlendSource(
                name=folder.name, config_digest=config, weights_digest=weights, weight=weight
            )
        )
    return BlendJob(
        job_id=1,
        sources=listed,
        recipe=BlendRecipe(**recipe),
        base=base,
        limit_bytes=limit_bytes,
    )


def blend(
    into: Path, sources: Sequence[tuple[Path, float]], base: BaseDescription, **recipe: Any
) -> IngestDone:
    """Blend, and leave the result as a PEFT folder in ``into``."""
    done = run(blend_job(into / "data", sources, base, **recipe), into / "data")
    assert not done.problems, done.problems
    (into / FILES[0]).write_bytes(done.config)
    (into / FILES[1]).write_bytes(BlobStore(into / "data").path(done.digest).read_bytes())
    return done


def deltas(folder: Path, base: BaseDescription) -> Deltas:
    """What an adapter folder changes, [out, in] in float64, as our importer reads it."""
    with ExitStack() as files:
        tensors = read_tensors(files.enter_context(open(folder / FILES[1], "rb")))
        config = parse_config((folder / FILES[0]).read_bytes())
        adapter: CanonicalAdapter = import_adapter(config, tensors, base, NoWeights())
        return {
            (pair.layer, pair.module): pair.scale
            * (
                widen(pair.b.read(), pair.b.dtype).astype(np.float64)
                @ widen(pair.a.read(), pair.a.dtype).astype(np.float64)
            )
            for pair in adapter.pairs
        }


def differ(got: Deltas, want: Deltas) -> float:
    """The largest difference, by the size of what is wanted."""
    assert got.keys() == want.keys()
    return max(float(np.abs(got[at] - want[at]).max() / np.abs(want[at]).max()) for at in want)
