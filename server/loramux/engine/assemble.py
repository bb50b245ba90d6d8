"""Configuration -> a working Engine: weights loaded, pool cut to measure, kernels compiled."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from loramux.adapters.pack import chunk_elems
from loramux.adapters.packed_files import FrameStore, PackedFiles, Store
from loramux.adapters.residency import Residency
from loramux.adapters.staging import BLOCK_BYTES, CudaDevice, TieredStore
from loramux.config import ServerConfig, parse_memory
from loramux.engine.engine import Engine
from loramux.engine.scheduler import Limits, Scheduler
from loramux.errors import ConfigError
from loramux.memory.arena import Arena
from loramux.memory.formats import AdapterFormat, KvFormat
from loramux.memory.pool import Pool
from loramux.model.architecture import Architecture, read_architecture
from loramux.model.decoder import Decoder
from loramux.model.description import describe
from loramux.model.fingerprint import fingerprint
from loramux.model.inputs import ModelInputs
from loramux.model.loader import Progress, Weights, load_weights
from loramux.model.runner import ModelRunner
from loramux.request import BASE_MODEL_ID
from loramux.sampling.sampler import Sampler
from loramux.speculation.drafter import Drafter, Drafting
from loramux.speculation.lookup import COPYSPEC_MATCH, Lookup
from loramux.wire import Ready, table_widths
from loramux_kernels.attention import Pages
from loramux_kernels.jit import keep_compiled_in, set_num_threads
from loramux_kernels.lora import AdapterTable, Runs
from loramux_kernels.lora.table import INPUT_GAIN, TABLE_MODULES, VECTORS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_POOL_SHARE = 0.25
"""Of the free memory, when --pool-memory is auto on CPU: the machine is rarely ours alone."""
CPU_POOL_MOST = 4 << 30
CUDA_POOL_SHARE = 0.9
HOST_SHARE = 0.25
HOST_MOST = 4 << 30
"""Pinned memory when --host-memory is auto: pinning takes a second for every few GiB."""
WIDEST_ADAPTER_BYTES = 4
"""A chunk that fits a slice in fp32 fits it in the narrower dtypes too."""


@dataclass(frozen=True)
class Assembled:
    """An engine and what it tells the front when it is ready."""

    engine: Engine
    ready: Ready


def assemble(
    config: ServerConfig,
    *,
    epoch: int = 0,
    poison: bool = False,
    num_frames: int | None = None,
    overlap: bool | None = None,
    progress: Progress | None = None,
) -> Assembled:
    """Build the engine of ``config``. Raises ConfigError naming what is wrong.

    ``poison`` fills freed frames with NaN and ``num_frames`` overrides --pool-memory: for tests.
    ``overlap`` plans a step while the one before it is computed: by default on a GPU.
    ``progress`` hears (bytes read, bytes in all) while the weights load.
    """
    timer = _Stopwatch()
    device = _device(config.device)
    set_num_threads(config.threads or torch.get_num_threads())
    keep_compiled_in(config.data_dir)
    architecture = read_architecture(config.model)
    dtype = _dtype(config.dtype, architecture.checkpoint_dtype, device)
    weights = _weights(config, architecture, dtype, device, progress)
    timer.done("weights")
    # A base that was not seen before is hashed while the kernels compile.
    hashing = ThreadPoolExecutor(1).submit(fingerprint, config.model, architecture, config.data_dir)
    kv = _kv_format(architecture, config.page_tokens, dtype)
    frames = num_frames or _num_frames(config, kv, device)
    arena = Arena(frames, kv.frame, device, poison=poison)
    table = AdapterTable(
        num_layers=architecture.num_layers,
        widths=table_widths(architecture.widths, architecture.vocab_size),
        slice_bytes=kv.frame.slice_bytes,
        chunk=chunk_elems(architecture.widths, kv.frame.slice_bytes, WIDEST_ADAPTER_BYTES),
        device=device,
    )
    decoder = Decoder(
        architecture,
        weights,
        arena.data,
        table,
        device,
        config.max_batch_tokens,
        max_positions=_max_model_len(config, architecture),
    )
    timer.done("pool")
    sampler = Sampler(architecture.vocab_size, device)
    _compile_kernels(decoder, kv, table)
    sampler.warm_up()
    timer.done("kernels")
    base = hashing.result()
    timer.done("fingerprint")
    engine = _connect(config, epoch, arena, kv, table, decoder, sampler, base, overlap)
    timer.done("graphs")
    ready = Ready(
        engine_epoch=epoch,
        base=describe(
            config,
            architecture,
            fingerprint=base,
            slice_bytes=kv.frame.slice_bytes,
            pool_bytes=frames * kv.frame.frame_bytes,
            itemsize=dtype.itemsize,
        ),
        vocab_size=architecture.vocab_size,
        max_model_len=_max_model_len(config, architecture),
        page_tokens=config.page_tokens,
        num_frames=frames,
        frame_bytes=kv.frame.frame_bytes,
        max_num_seqs=config.max_num_seqs,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        drafters=tuple(engine.drafting.drafters),
        startup_s=timer.seconds,
    )
    return Assembled(engine, ready)


def _kv_format(architecture: Architecture, page_tokens: int, dtype: torch.dtype) -> KvFormat:
    return KvFormat(
        model_id=BASE_MODEL_ID,
        num_layers=architecture.num_layers,
        num_kv_heads=architecture.num_kv_heads,
        head_dim=architecture.head_dim,
        page_tokens=page_tokens,
        itemsize=dtype.itemsize,
    )


def _weights(
    config: ServerConfig,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> Weights:
    quantize = config.quantize == "int8"
    if quantize and device.type != "cpu":
        raise ConfigError("--quantize int8 is for a CPU", param="quantize")
    return load_weights(
        config.model,
        architecture,
        dtype=dtype,
        device=device,
        quantize=quantize,
        progress=progress,
    )


def _connect(
    config: ServerConfig,
    epoch: int,
    arena: Arena,
    kv: KvFormat,
    table: AdapterTable,
    decoder: Decoder,
    sampler: Sampler,
    base: str,
    overlap: bool | None,
) -> Engine:
    pool = Pool(arena.num_frames, arena.freed)
    store = _store(config, PackedFiles(config.data_dir, base), arena)
    residency = Residency(pool, AdapterFormat(kv.frame), store, table)
    scheduler = Scheduler(
        pool=pool,
        kv=kv,
        adapters=residency,
        limits=Limits(
            config.max_num_seqs,
            config.max_batch_tokens,
            config.fairness_debt_tokens,
            config.prefix_caching,
        ),
        fingerprint=base,
    )
    return Engine(
        pool=pool,
        residency=residency,
        scheduler=scheduler,
        runner=ModelRunner(decoder, kv, residency),
        sampler=sampler,
        drafting=Drafting(drafters()),
        epoch=epoch,
        overlap=arena.data.is_cuda if overlap is None else overlap,
    )


def drafters() -> dict[str, Drafter]:
    """Those that need nothing but the request."""
    return {
        "lookup": Lookup(),
        "copyspec": Lookup(shortest=COPYSPEC_MATCH, longest=COPYSPEC_MATCH, first=True),
    }


def _store(config: ServerConfig, files: PackedFiles, arena: Arena) -> Store:
    asked = parse_memory(config.host_memory)
    device = arena.data.device
    if device.type == "cpu":
        if asked is not None:
            raise ConfigError("--host-memory is for a GPU", param="host_memory")
        return FrameStore(files, arena)
    size = _part(asked, _free_memory(), HOST_SHARE, HOST_MOST)
    if size < BLOCK_BYTES:
        raise ConfigError(
            f"--host-memory: {size} bytes are less than one transfer of {BLOCK_BYTES}",
            param="host_memory",
        )
    store = TieredStore(files, arena, CudaDevice(device), size)
    store.warm_up()
    return store


def _compile_kernels(decoder: Decoder, kv: KvFormat, table: AdapterTable) -> None:
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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is not a device", param="device") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: this machine shows no CUDA device", param="device")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name!r}: only cpu and cuda are served", param="device")
    return device


def _dtype(asked: str, checkpoint: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        if asked not in ("auto", "float32"):
            raise ConfigError(f"--dtype {asked} needs a CUDA device: cpu computes in float32")
        return torch.float32
    if asked == "auto":
        asked = checkpoint if checkpoint in ("bfloat16", "float16") else "bfloat16"
    return DTYPES[asked]


def _max_model_len(config: ServerConfig, architecture: Architecture) -> int:
    longest = architecture.context_length
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise ConfigError(
            f"--max-model-len {config.max_model_len} is more than the {longest} positions the "
            "model was made for",
            param="max_model_len",
        )
    return config.max_model_len


def _num_frames(config: ServerConfig, kv: KvFormat, device: torch.device) -> int:
    asked = parse_memory(config.pool_memory)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        size = _part(asked, free, CUDA_POOL_SHARE, free)
    else:
        size = _part(asked, _free_memory(), CPU_POOL_SHARE, CPU_POOL_MOST)
    frames = size // kv.frame.frame_bytes
    if frames < 2:
        raise ConfigError(
            f"--pool-memory: {size} bytes hold {frames} frames of {kv.frame.frame_bytes} bytes",
            param="pool_memory",
        )
    return frames


def _part(asked: int | float | None, free: int, share: float, most: int) -> int:
    """Bytes of ``free`` ones: as many as asked for, or that fraction; by default ``share`` of them
    and at most ``most``."""
    if asked is None:
        return min(int(free * share), most)
    return int(free * asked) if isinstance(asked, float) else asked


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Stopwatch:
    """Seconds of each part of the start-up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(now - self._last, 3)
        self._last = now
