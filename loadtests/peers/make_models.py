"""The files to be served, made once per folder and kept for the next run."""

from __future__ import annotations

from pathlib import Path

from cases import Mix, write_adapters, write_checkpoint
from peer import Models

NUM_ADAPTERS = 32


def make_models(folder: Path, mix: Mix) -> Models:
    """The base and the adapters of a mix (none for ``base``) below ``folder``."""
    base = folder / "base"
    if not (base / "tokenizer_config.json").exists():
        write_checkpoint(folder)
    mine = folder / mix
    paths = [mine / f"adapter{i}" for i in range(0 if mix == "base" else NUM_ADAPTERS)]
    if not all((path / "adapter_model.safetensors").exists() for path in paths):
        write_adapters(mine, base, NUM_ADAPTERS, mix)
    return Models(mine, base, paths)
