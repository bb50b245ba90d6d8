"""Adapters on disk for tests: saved by PEFT itself, or written byte by byte."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import CanonicalAdapter
from loramux.adapters.formats import import_adapter
from loramux.adapters.safetensors_file import FileTensor
from loramux.wire import MODULES, BaseDescription

DTYPE_NAMES = {"<f4": "F32", "<f2": "F16", "<u2": "BF16"}
BLOCK = {m: "self_attn" if m in MODULES[:4] else "mlp" for m in MODULES}

Tensors = dict[str, np.ndarray[Any, Any]]


def base_description(
    *,
    hidden: int = 32,
    inter: int = 48,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    layers: int = 3,
    page_tokens: int = 16,
    max_rank: int = 64,
    fingerprint: str = "f" * 64,
) -> BaseDescription:
    """A tiny base as ingest is told about it; a slice is one float32 page of KV."""
    q, kv = heads * head_dim, kv_heads * head_dim
    outs = (q, kv, kv, hidden, inter, inter, hidden)
    ins = (hidden, hidden, hidden, q, hidden, hidden, inter)
    return BaseDescription(
        fingerprint=fingerprint,
        num_layers=layers,
        widths=dict(zip(MODULES, zip(ins, outs, strict=True), strict=True)),
        slice_bytes=page_tokens * 2 * kv * 4,
        max_rank=max_rank,
    )


class NoWeights:
    """A base without biases whose weights nobody asks for."""

    def blocks(self, layer: int, module: str) -> Iterator[Float32]:
        """Only formats defined on the base's weights read them."""
        raise AssertionError(f"{module} of layer {layer} was read")

    def bias(self, layer: int, module: str) -> Float32 | None:
        """There is none."""
        return None


def import_files(
    config: Mapping[str, Any], tensors: Mapping[str, FileTensor], base: BaseDescription
) -> CanonicalAdapter:
    """``import_adapter`` for formats that do not read the base."""
    return import_adapter(config, tensors, base, NoWeights())


def module_name(layer: int, module: str) -> str:
    """``model.layers.0.self_attn.q_proj``."""
    return f"model.layers.{layer}.{BLOCK[module]}.{module}"


def tensor_name(layer: int, module: str, side: str) -> str:
    """The name PEFT saves one half of a pair under."""
    return f"base_model.model.{module_name(layer, module)}.lora_{side}.weight"


def make_tensors(
    base: BaseDescription,
    *,
    rank: int = 4,
    modules: tuple[str, ...] = ("q_proj", "v_proj"),
    layers: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Tensors:
    """Random pairs under PEFT's names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(base.num_layers) if layers is None else layers:
        for module in modules:
            width_in, width_out = base.widths[module]
            for side, shape in (("A", (rank, width_in)), ("B", (width_out, rank))):
                values = rng.standard_normal(shape).astype("<f4")
                tensors[tensor_name(layer, module, side)] = values
    return tensors


def make_config(**changes: Any) -> dict[str, Any]:
    """The least config that fits ``make_tensors``; a change to None removes nothing."""
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
    }
    return {**config, **changes}


def safetensors_bytes(tensors: Tensors, **header_changes: Any) -> bytes:
    """A safetensors file. uint16 arrays are bfloat16 bits; ``header_changes`` replace entries."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in tensors.items():
        start, data = len(data), data + np.ascontiguousarray(values).tobytes()
        header[name] = {
            "dtype": DTYPE_NAMES[values.dtype.str],
            "shape": list(values.shape),
            "data_offsets": [start, len(data)],
        }
    return file_bytes({**header, **header_changes}, data)


def file_bytes(header: object, data: bytes = b"") -> bytes:
    """Any header, serialised or raw bytes, before any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_adapter(folder: Path, config: object, tensors: Tensors) -> None:
    """The two files of an adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "adapter_config.json").write_bytes(text)
    (folder / "adapter_model.safetensors").write_bytes(safetensors_bytes(tensors))
