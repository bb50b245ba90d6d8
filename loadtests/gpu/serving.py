"""An 8B-shaped model with random weights, served end to end by an engine in this process."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from document import Cell, table
from timing import Ceilings

from loramux.adapters import pack
from loramux.adapters.canonical import CanonicalAdapter, LoraPair
from loramux.config import ServerConfig
from loramux.engine import assemble
from loramux.model import loader
from loramux.request import AdapterRef, SamplingParams
from loramux.wire import MODULES, Submit

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
RANK, PROMPT, NEW, SEATS = 16, 128, 64, 64


class _Numbers:
    """A random bf16 matrix that exists only while it is read."""

    dtype = "bfloat16"

    def __init__(self, seed: int, rows: int, columns: int) -> None:
        self.shape = (rows, columns)
        self._seed = seed

    def read(self) -> Any:
        values = np.random.default_rng(self._seed).standard_normal(self.shape, np.float32) * 0.02
        return (values.view(np.uint32) >> 16).astype("<u2")

    def blocks(self) -> Any:
        yield self.read().reshape(-1)


class Served:
    """The engine, its adapters and what it took to start. ``pool`` is in bytes."""

    def __init__(self, num_adapters: int, pool: int) -> None:
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(CONFIG))
        self.config = ServerConfig(
            model=folder,
            data_dir=folder,
            device="cuda",
            dtype="bfloat16",
            pool_memory=str(pool),
            max_num_seqs=SEATS,
            max_batch_tokens=1024,
            prefix_caching=False,
        )
        torch.cuda.reset_peak_memory_stats()
        # The checkpoint is the one thing made up: weights are drawn where they will lie.
        assemble.load_weights = _random_weights  # type: ignore[assignment]
        assemble.fingerprint = lambda *_: "0" * 64
        assembled = assemble.assemble(self.config)
        self.engine, self.ready = assembled.engine, assembled.ready
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool_of_threads:
            self.digests = list(pool_of_threads.map(self._pack, range(num_adapters)))
        self.packing_s = time.monotonic() - began
        self.forward: Any = self.engine._loop._runner._on_device
        self._serial = 0

    def _pack(self, number: int) -> str:
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        base = self.ready.base
        pairs = []
        for layer in range(base.num_layers):
            for index, module in enumerate(MODULES):
                width_in, width_out = base.widths[module]
                seed = (number * base.num_layers + layer) * len(MODULES) + index
                a, b = _Numbers(seed, RANK, width_in), _Numbers(seed, width_out, RANK)
                pairs.append(LoraPair(layer, module, RANK, 1.0, a, b))
        adapter = CanonicalAdapter("bfloat16", tuple(pairs))
        path = pack.packed_path(self.config.data_dir, digest, base.fingerprint)
        pack.pack(adapter, base, digest, path)
        return digest

    def run(self, requests: int, num_adapters: int, new: int = NEW) -> Run:
        """``requests`` at once, adapters in turn (none: the base), every step timed."""
        rng = np.random.default_rng(0)
        names = []
        for i in range(requests):
            self._serial += 1
            names.append(f"r{self._serial}")
            digest = self.digests[i % num_adapters] if num_adapters else None
            self.engine.submit(
                Submit(
                    request_id=names[-1],
                    tenant="",
                    model_id=0,
                    adapters=() if digest is None else (AdapterRef(digest, 1.0),),
                    prompt_ids=rng.integers(10, 128000, PROMPT).tolist(),
                    output_ids=[],
                    sampling=SamplingParams(seed=i, temperature=0.0, max_tokens=new),
                )
            )
        return Run(self, names)


class Run:
    """What came of a set of requests: tokens by request, seconds, and the decode steps' phases."""

    def __init__(self, served: Served, names: Sequence[str]) -> None:
        engine = served.engine
        self.tokens: dict[str, list[int]] = {name: [] for name in names}
        self.decode_s: list[float] = []
        self.phases: dict[str, list[float]] = {}
        torch.cuda.synchronize()
        began = time.perf_counter()
        while engine.has_work:
            start = time.perf_counter()
            done = engine.step()
            took = time.perf_counter() - start
            if done.failed:
                raise RuntimeError(f"{done.failed[0].code}: {done.failed[0].message}")
            for output in done.outputs:
                self.tokens[output.request_id] += output.token_ids
            stats = done.stats
            if stats.get("batch_tokens") == len(names) and len(done.outputs) == len(names):
                self.decode_s.append(took)
                for phase, seconds in stats["phase_s"].items():  # type: ignore[attr-defined]
                    self.phases.setdefault(phase, []).append(seconds)
        self.seconds = time.perf_counter() - began

    @property
    def per_second(self) -> float:
        return sum(map(len, self.tokens.values())) / self.seconds

    @property
    def step_s(self) -> float | None:
        return statistics.median(self.decode_s) if self.decode_s else None

    def phase_us(self, name: str) -> float | None:
        found = self.phases.get(name)
        return statistics.median(found) * 1e6 if found else None


def _random_weights(*args: Any, **options: Any) -> loader.Weights:
    architecture, dtype, device = args[1], options["dtype"], options["device"]
    stored = dict.fromkeys(loader._shapes(architecture), dtype)
    weights = loader._allocate(architecture, stored, dtype, device)
    for tensor in weights._tensors():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(1.0)
        else:
            tensor.data.normal_(0, 0.02)
    return weights


def start(served: Served) -> str:
    """What the start cost and what lies where."""
    gib = 2**30
    rows: list[Sequence[Cell]] = [[k, v] for k, v in served.ready.startup_s.items()]
    rows.append([f"packing {len(served.digests)} adapters (not part of a start)", served.packing_s])
    rows.append(["peak device memory, GiB", torch.cuda.max_memory_allocated() / gib])
    rows.append(["reserved by torch, GiB", torch.cuda.memory_reserved() / gib])
    rows.append(["pool, GiB", served.ready.num_frames * served.ready.frame_bytes / gib])
    return "Seconds unless said otherwise.\n\n" + table(["what", "how much"], rows)


def throughput(served: Served, ceiling: Ceilings) -> str:
    """Tokens/s and decode steps with graphs and without, over numbers of adapters."""
    weights = 2 * (32 * (4096 * (4096 * 2 + 2 * 1024) + 3 * 4096 * 14336) + 4096 * 128256)
    adapter = 2 * RANK * 32 * (4 * 4096 + 4096 * 2 + 2 * 1024 + 3 * (4096 + 14336))
    rows: list[Sequence[Cell]] = []
    served.run(SEATS, len(served.digests), new=2)  # the adapters come into the pool
    for requests, count in (
        (1, 0),
        (1, 1),
        (8, 8),
        (SEATS, 0),
        *((SEATS, n) for n in (1, 8, 32, 64)),
    ):
        served.run(requests, count, new=8)
        replays = served.forward.num_replays
        graphed = served.run(requests, count)
        replays = served.forward.num_replays - replays
        recorder, served.forward._recorder = served.forward._recorder, None
        eager = served.run(requests, count)
        served.forward._recorder = recorder
        same = sum(
            a == b for a, b in zip(graphed.tokens.values(), eager.tokens.values(), strict=True)
        )
        kv = requests * (PROMPT + NEW / 2) * 2 * 8 * 128 * 2 * 32
        moved = weights + count * adapter + kv
        floor = ceiling.floor(moved, requests * (weights + adapter * (count > 0)))
        step = graphed.step_s
        rows.append(
            [requests, count, graphed.per_second, eager.per_second]
            + [step and step * 1e3, eager.step_s and eager.step_s * 1e3, floor * 1e3]
            + [step and step / floor, graphed.phase_us("schedule"), graphed.phase_us("forward")]
            + [
                graphed.phase_us("sample"),
                graphed.phase_us("commit"),
                replays,
                f"{same}/{requests}",
            ]
        )
    columns = ["requests", "adapters", "tokens/s", "tokens/s, no graphs", "decode step ms"]
    columns += ["no graphs ms", "floor ms", "over floor", "schedule us", "forward us", "sample us"]
    columns += ["commit us", "replays", "same ids"]
    return (
        f"Adapters of rank {RANK} on all modules, prompts of {PROMPT}, {NEW} new tokens, greedy; "
        "the time holds the prompts. *forward* and *sample* are the host's: the first hands the "
        "step to the device, the second waits for the ids. *same ids*: requests whose tokens are "
        "equal with graphs and without.\n\n" + table(columns, rows)
    )


def syncs(served: Served) -> str:
    """Calls that make the host wait, as torch counts them, in ten decode steps."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run = served.run(8, 8, new=10)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = [f"{Path(w.filename).name}:{w.lineno}" for w in seen if "synchroniz" in str(w.message)]
    counted = {place: where.count(place) for place in sorted(set(where))}
    return (
        f"{len(run.decode_s)} decode steps of 8 rows: {len(where)} synchronising calls besides the "
        f"wait for the sampled ids (an event, which torch does not count). {counted or ''}"
    )
