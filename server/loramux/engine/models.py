"""One model on the pool: its weights, the format of its KV, and its adapters.

Any number of models share a pool, which is cut for one of them, the target. The others are its
partners: a draft model that guesses, a small one that takes over where a text is easy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from loramux.adapters.pack import chunk_elems
from loramux.adapters.packed_files import FrameStore, PackedFiles, Store
from loramux.adapters.residency import Residency
from loramux.adapters.staging import BLOCK_BYTES, CudaDevice, TieredStore
from loramux.config import ServerConfig, parse_memory
from loramux.errors import ConfigError
from loramux.memory.arena import Arena
from loramux.memory.formats import AdapterFormat, FrameShape, KvFormat
from loramux.memory.machine import free_memory
from loramux.memory.pool import Pool
from loramux.model.architecture import Architecture, read_architecture
from loramux.model.decoder import Decoder
from loramux.model.description import describe
from loramux.model.fingerprint import fingerprint
from loramux.model.inputs import ModelInputs
from loramux.model.loader import Progress, Weights, load_weights
from loramux.model.runner import ModelRunner
from loramux.request import DRAFT_MODEL_ID, SMALL_MODEL_ID
from loramux.wire import BaseDescription, table_widths
from loramux_kernels.attention import Pages
from loramux_kernels.lora import AdapterTable, Runs
from loramux_kernels.lora.table import INPUT_GAIN, TABLE_MODULES, VECTORS

HOST_SHARE = 0.25
HOST_MOST = 4 << 30
"""Pinned memory when --host-memory is auto: pinning takes a second for every few GiB."""
WIDEST_ADAPTER_BYTES = 4
"""A chunk that fits a slice in fp32 fits it in the narrower dtypes too."""


@dataclass(frozen=True)
class Partner:
    """A model beside the target: ``runner`` computes rows whose ``kv`` is its own."""

    model_id: int
    kv: KvFormat
    decoder: Decoder
    residency: Residency
    runner: ModelRunner
    description: BaseDescription
    max_model_len: int


def partners(
    config: ServerConfig, target: Architecture, arena: Arena, pool: Pool, dtype: torch.dtype
) -> dict[int, Partner]:
    """The models that ``config`` puts beside the ``target``, by model id. Raises ConfigError naming
    the flag of one that cannot stand there."""
    asked = {
        DRAFT_MODEL_ID: ("draft_model", config.draft_model),
        SMALL_MODEL_ID: ("small_model", config.small_model),
    }
    return {
        model_id: _partner(config, model_id, param, directory, target, arena, pool, dtype)
        for model_id, (param, directory) in asked.items()
        if directory is not None
    }


def _partner(
    config: ServerConfig,
    model_id: int,
    param: str,
    directory: Path,
    target: Architecture,
    arena: Arena,
    pool: Pool,
    dtype: torch.dtype,
) -> Partner:
    flag = "--" + param.replace("_", "-")
    architecture = read_architecture(directory)
    if architecture.vocab_size != target.vocab_size:
        raise ConfigError(
            f"{flag}: {directory} has {architecture.vocab_size} tokens, the base has "
            f"{target.vocab_size}: they must be the same",
            param=param,
        )
    kv = KvFormat.guest(
        arena.frame,
        model_id=model_id,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        itemsize=dtype.itemsize,
    )
    if kv is None:
        raise ConfigError(
            f"{flag}: one token of its KV is larger than a frame of {arena.frame.frame_bytes} "
            "bytes, which is cut for the base: enlarge --page-tokens",
            param=param,
        )
    device = arena.data.device
    weights = read_weights(config, directory, architecture, dtype, device)
    table = adapter_table(architecture, arena.frame, device)
    longest = architecture.context_length
    decoder = Decoder(
        architecture,
        weights,
        arena.data,
        table,
        device,
        config.max_batch_tokens,
        max_positions=longest,
    )
    compile_kernels(decoder, kv, table)
    base = fingerprint(directory, architecture, config.data_dir)
    residency = adapters_of(config, base, model_id, arena, pool, table)
    return Partner(
        model_id,
        kv,
        decoder,
        residency,
        ModelRunner(decoder, kv, residency),
        described(config, architecture, directory, base, arena, dtype),
        longest,
    )


def described(
    config: ServerConfig,
    architecture: Architecture,
    directory: Path,
    base: str,
    arena: Arena,
    dtype: torch.dtype,
) -> BaseDescription:
    """What the other processes are told of a model whose fingerprint is ``base``."""
    return describe(
        config,
        architecture,
        directory,
        fingerprint=base,
        slice_bytes=arena.frame.slice_bytes,
        pool_bytes=arena.num_frames * arena.frame.frame_bytes,
        itemsize=dtype.itemsize,
    )


def adapter_table(
    architecture: Architecture, frame: FrameShape, device: torch.device
) -> AdapterTable:
    """Where the kernels look up the adapters of a model in a pool of such frames."""
    return AdapterTable(
        num_layers=architecture.num_layers,
        widths=table_widths(architecture.widths, architecture.vocab_size),
        slice_bytes=frame.slice_bytes,
        chunk=chunk_elems(architecture.widths, frame.slice_bytes, WIDEST_ADAPTER_BYTES),
        device=device,
    )


def adapters_of(
    config: ServerConfig,
    base: str,
    model_id: int,
    arena: Arena,
    pool: Pool,
    table: AdapterTable,
) -> Residency:
    """The adapters of the model whose fingerprint is ``base``."""
    store = _store(config, PackedFiles(config.data_dir, base), arena)
    return Residency(pool, AdapterFormat(arena.frame), store, table, model_id=model_id)


def read_weights(
    config: ServerConfig,
    directory: Path,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
) -> Weights:
    """The weights of a model directory, as ``config`` wants them held."""
    quantize = config.quantize == "int8"
    if quantize and device.type != "cpu":
        raise ConfigError("--quantize int8 is for a CPU", param="quantize")
    return load_weights(
        directory,
        architecture,
        dtype=dtype,
        device=device,
        quantize=quantize,
        progress=progress,
    )


def compile_kernels(decoder: Decoder, kv: KvFormat, table: AdapterTable) -> None:
    """Run every kernel once, on memory that nobody owns yet, so that no request waits for a
    compiler. The adapter has whatever the arena holds for everything an adapter can have."""
    device = decoder.weights.norm.device
    shape = (kv.num_layers, len(TABLE_MODULES))
    widest = int(max(table.in_width.max(), table.out_width.max()))
    num_slices = 2 + widest * WIDEST_ADAPTER_BYTES // kv.frame.slice_bytes
    vector_offset = np.zeros((*shape, len(VECTORS)), np.int64)
    shared = [module for module in TABLE_MODULES if module not in ("o_proj", "down_proj")]
    vector_offset[:, [TABLE_MODULES.index(module) for module in shared], INPUT_GAIN] = -1
    slot = table.add(
        slices=np.zeros(num_slices, np.int64),
        a_offset=np.zeros(shape, np.int64),
        b_offset=np.zeros(shape, np.int64),
        rank=np.ones(shape, np.int32),
        scale=np.zeros(shape, np.float32),
        dtype=torch.float32,
        vector_offset=vector_offset,
        num_token_rows=np.ones(2, np.int32),
    )
    one = torch.zeros(1, dtype=torch.int64, device=device)
    pages = Pages(
        offsets=kv.offsets(np.zeros((1, 1), np.int64)),
        row_start=np.array([0, 1], np.int32),
        context=np.array([1], np.int32),
        page_tokens=kv.page_tokens,
        num_kv_heads=kv.num_kv_heads,
        head_dim=kv.head_dim,
        dtype=decoder.weights.norm.dtype,
    )
    runs = Runs.build([1], [[(slot, 1.0)]])
    decoder.forward(ModelInputs(one, one, pages, runs, one, np.zeros(1, np.int64)))
    table.remove(slot)


def _store(config: ServerConfig, files: PackedFiles, arena: Arena) -> Store:
    asked = parse_memory(config.host_memory)
    device = arena.data.device
    if device.type == "cpu":
        if asked is not None:
            raise ConfigError("--host-memory is for a GPU", param="host_memory")
        return FrameStore(files, arena)
    size = part_of(asked, free_memory(), HOST_SHARE, HOST_MOST)
    if size < BLOCK_BYTES:
        raise ConfigError(
            f"--host-memory: {size} bytes are less than one transfer of {BLOCK_BYTES}",
            param="host_memory",
        )
    store = TieredStore(files, arena, CudaDevice(device), size)
    store.warm_up()
    return store


def part_of(asked: int | float | None, free: int, share: float, most: int) -> int:
    """Bytes of ``free`` ones: as many as asked for, or that fraction; by default ``share`` of them
    and at most ``most``."""
    if asked is None:
        return min(int(free * share), most)
    return int(free * asked) if isinstance(asked, float) else asked
