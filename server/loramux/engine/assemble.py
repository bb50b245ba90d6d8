"""Configuration -> a working Engine: weights loaded, pool cut to measure, kernels compiled."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from loramux.adapters.residency import Residency
from loramux.config import HEADS_BYTES, ServerConfig, parse_memory
from loramux.engine.costs import measure_costs
from loramux.engine.engine import Engine
from loramux.engine.limits import Limits
from loramux.engine.models import (
    Partner,
    adapter_table,
    adapters_of,
    compile_kernels,
    described,
    part_of,
    partners,
    read_weights,
)
from loramux.engine.scheduler import Scheduler
from loramux.engine.served import Served
from loramux.errors import ConfigError
from loramux.memory.arena import Arena
from loramux.memory.formats import KvFormat
from loramux.memory.machine import free_memory
from loramux.memory.pool import Pool
from loramux.model.architecture import Architecture, read_architecture
from loramux.model.decoder import Decoder
from loramux.model.fingerprint import fingerprint
from loramux.model.loader import Progress
from loramux.model.runner import ModelRunner
from loramux.request import BASE_MODEL_ID, DRAFT_MODEL_ID, SMALL_MODEL_ID
from loramux.sampling.sampler import Sampler
from loramux.speculation import suffix, trigram
from loramux.speculation.acceptance import read_head
from loramux.speculation.draft_model import DraftModel
from loramux.speculation.drafter import Drafter
from loramux.speculation.drafting import Drafting
from loramux.speculation.heads import Medusa, base_heads
from loramux.speculation.lookup import COPYSPEC_MATCH, Lookup
from loramux.speculation.own_heads import OwnHeads, reader
from loramux.speculation.planner import Planner
from loramux.speculation.suffix import Suffix
from loramux.speculation.trigram import Trigram
from loramux.wire import Ready
from loramux_kernels.jit import keep_compiled_in, set_num_threads

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU_POOL_SHARE = 0.25
"""Of the free memory, when --pool-memory is auto on CPU: the machine is rarely ours alone."""
CPU_POOL_MOST = 4 << 30
CUDA_POOL_SHARE = 0.9


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
    weights = read_weights(config, config.model, architecture, dtype, device, progress)
    timer.done("weights")
    # A base that was not seen before is hashed while the kernels compile.
    hashing = ThreadPoolExecutor(1).submit(fingerprint, config.model, architecture, config.data_dir)
    kv = _kv_format(architecture, config.page_tokens, dtype)
    frames = num_frames or _num_frames(config, kv, device)
    arena = Arena(frames, kv.frame, device, poison=poison)
    table = adapter_table(architecture, kv.frame, device)
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
    compile_kernels(decoder, kv, table)
    sampler.warm_up()
    timer.done("kernels")
    base = hashing.result()
    timer.done("fingerprint")
    pool = Pool(arena.num_frames, arena.freed)
    beside = partners(config, architecture, arena, pool, dtype)
    timer.done("partners")
    residency = adapters_of(config, base, BASE_MODEL_ID, arena, pool, table)
    engine = _connect(config, epoch, pool, kv, decoder, residency, sampler, base, beside, overlap)
    timer.done("graphs and costs")
    ready = Ready(
        engine_epoch=epoch,
        base=described(config, architecture, config.model, base, arena, dtype),
        vocab_size=architecture.vocab_size,
        max_model_len=_max_model_len(config, architecture),
        page_tokens=config.page_tokens,
        num_frames=frames,
        frame_bytes=kv.frame.frame_bytes,
        max_num_seqs=config.max_num_seqs,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        drafters=tuple(
            name for name, each in engine.drafting.drafters.items() if _is_for_all(each)
        ),
        partners={model_id: partner.description for model_id, partner in beside.items()},
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


def _connect(
    config: ServerConfig,
    epoch: int,
    pool: Pool,
    kv: KvFormat,
    decoder: Decoder,
    residency: Residency,
    sampler: Sampler,
    base: str,
    beside: dict[int, Partner],
    overlap: bool | None,
) -> Engine:
    scheduler = Scheduler(
        pool=pool,
        kv=kv,
        adapters=residency,
        limits=Limits(
            config.max_num_seqs,
            config.max_batch_tokens,
            config.fairness_debt_tokens,
            config.prefix_caching,
            config.first_token_slo_s,
        ),
        fingerprint=base,
        partners={
            model_id: Served(partner.kv, partner.residency, partner.description.fingerprint)
            for model_id, partner in beside.items()
            if model_id == SMALL_MODEL_ID
        },
    )
    runner = ModelRunner(decoder, kv, residency)
    lm_head, like = decoder.weights.lm_head, decoder.weights.norm
    own_heads = OwnHeads(reader(config.data_dir, lm_head, like), HEADS_BYTES)
    medusa = Medusa(base_heads(config.model, lm_head, like), own_heads.get)
    planner = None
    if config.speculation != "off":
        planner = Planner(measure_costs(runner, sampler, config.max_batch_tokens))
    return Engine(
        pool=pool,
        residency=residency,
        scheduler=scheduler,
        runner=runner,
        sampler=sampler,
        drafting=Drafting(drafters(medusa) | draft_model(config, beside, pool, sampler), planner),
        partners=beside,
        own_heads=own_heads,
        epoch=epoch,
        overlap=decoder.arena.is_cuda if overlap is None else overlap,
    )


def drafters(medusa: Medusa) -> dict[str, Drafter]:
    """Those that are no model, which are asked before the one that is."""
    return {
        suffix.NAME: Suffix(),
        "lookup": Lookup(),
        "copyspec": Lookup(shortest=COPYSPEC_MATCH, longest=COPYSPEC_MATCH, first=True),
        trigram.NAME: Trigram(),
        "medusa": medusa,
    }


def _is_for_all(drafter: Drafter) -> bool:
    """Not if only the heads of adapters are there to guess with."""
    return not isinstance(drafter, Medusa) or drafter.base is not None


def draft_model(
    config: ServerConfig, beside: dict[int, Partner], pool: Pool, sampler: Sampler
) -> dict[str, Drafter]:
    """The one that is a model, if there is one. Raises ConfigError if its head does not fit."""
    partner = beside.get(DRAFT_MODEL_ID)
    if partner is None or config.draft_model is None:
        return {}
    width = partner.decoder.architecture.hidden_size
    head = read_head(config.draft_model, width, partner.decoder.arena.device)
    return {"draft": DraftModel(partner, pool, sampler, head)}


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


def _num_frames(config: ServerConfig, kv: KvFormat, device: torch.device) -> int:
    asked = parse_memory(config.pool_memory)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        size = part_of(asked, free, CUDA_POOL_SHARE, free)
    else:
        size = part_of(asked, free_memory(), CPU_POOL_SHARE, CPU_POOL_MOST)
    frames = size // kv.frame.frame_bytes
    if frames < 2:
        raise ConfigError(
            f"--pool-memory: {size} bytes hold {frames} frames of {kv.frame.frame_bytes} bytes",
            param="pool_memory",
        )
    return frames


class _Stopwatch:
    """Seconds of each part of the start-up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def done(self, part: str) -> None:
        now = time.monotonic()
        self.seconds[part] = round(now - self._last, 3)
        self._last = now
