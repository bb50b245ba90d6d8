"""What the other processes are told of the models an engine serves; no torch."""

from __future__ import annotations

from pathlib import Path

from loramux.config import ServerConfig
from loramux.model.architecture import Architecture
from loramux.wire import BaseDescription

_FLOAT32_BYTES = 4


def describe(
    config: ServerConfig,
    architecture: Architecture,
    directory: Path,
    *,
    fingerprint: str,
    slice_bytes: int,
    pool_bytes: int,
    itemsize: int = _FLOAT32_BYTES,
) -> BaseDescription:
    """``itemsize``: of the dtype it is computed in."""
    quantized = config.quantize != "none"
    if quantized:
        held = 1
    elif itemsize == _FLOAT32_BYTES:
        # Computed in float32, matrices are read as the checkpoint holds them.
        held = _FLOAT32_BYTES if architecture.checkpoint_dtype == "float32" else 2
    else:
        held = itemsize
    return BaseDescription(
        fingerprint=fingerprint,
        num_layers=architecture.num_layers,
        widths=architecture.widths,
        slice_bytes=slice_bytes,
        max_rank=config.max_rank,
        vocab_size=architecture.vocab_size,
        max_adapter_bytes=config.max_adapter_bytes or 0,
        pool_bytes=pool_bytes,
        directory=str(directory),
        step_bytes=architecture.matrix_elements * held,
        quantized=quantized,
        tied=architecture.tie_embeddings,
    )
