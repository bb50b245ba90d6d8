"""Why adapters and KV share one pool: the same memory, divided three ways.

    python loadtests/serving/pool_split.py [--quick]

    shared    loramux as it is: whoever needs a frame takes it, idle adapters give way
    split     30 % of the frames for adapters, 70 % for KV; either side evicts and waits by itself
    padded    the same split, and an adapter of any rank occupies a slot of the largest rank, as
              where ``max_loras`` slots of ``max_lora_rank`` are reserved at the start

The divisions are made here, around ``Pool`` and ``AdapterFormat``; the server has none. All else
(scheduler, kernels, loads beside the steps) is the same code.

The model is a small random Llama in the proportions of Llama-3.1-8B (hidden 256, 4 layers, KV a
quarter and MLP 3.5 times as wide): as there, a rank-16 adapter on all linear modules takes as much
memory as 640 tokens of KV. The pool holds 20,000 tokens, which for the 8B model would be 2.5 GB in
bf16. Adapters have rank 8, 16, 32 or 64 in turn; each request names one of n, drawn uniformly; half
the prompts have 16 to 63 tokens, half 128 to 383, outputs 16 to 63. 96 requests are kept open, of
which at most 64 are admitted, so there is always a line. A pass measures 300 steps of that after a
ramp of 80: the scheduler lets a request be passed over for 64 steps, so a shorter pass would not
see who was left waiting. There is no prefix cache: what is not leased is a warm adapter.

Output tokens a second are this machine's; requests in flight and output tokens a step are what the
memory allows, on any machine. Rounds run the three in turn, forwards and backwards; ratios are
medians over rounds with a bootstrap 95 % interval, A/A is *shared* against itself a round later.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import report
import throughput
from cases import make_jobs, write_base
from throughput import Job
from workload import Pass, Served

from loramux.engine import assemble as assembly
from loramux.engine import models as engine_models
from loramux.memory.formats import AdapterFormat
from loramux.memory.frames import Owner
from loramux.memory.pool import Pool

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 896,
    "vocab_size": 1024,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
RANKS = (8, 16, 32, 64)
ADAPTER_SHARE = 0.3
POOL_TOKENS = 20_000
PAGE_TOKENS = 16
OPEN = 96
DRAWN = 400
POLICIES = ("shared", "split", "padded")


class SplitPool(Pool):
    """``adapter_frames`` of the frames are for adapters only, the rest for KV only."""

    def __init__(
        self,
        num_frames: int,
        on_free: Callable[[list[int]], None] | None = None,
        *,
        adapter_frames: int,
    ) -> None:
        super().__init__(num_frames, on_free)
        self._adapter_frames = adapter_frames

    @property
    def num_available(self) -> int:
        """What KV can have: this is asked about before a request is admitted."""
        kv_frames = self.frames.num_frames - self._adapter_frames
        return kv_frames - self.frames.count(Owner.KV)

    def obtain(self, num: int, owner: Owner, below: float = math.inf) -> list[int] | None:
        if owner is Owner.KV:
            return self.frames.take(num, owner) if num <= self.num_available else None
        # Without a prefix cache the order of eviction holds adapters only.
        held = self.frames.count(Owner.ADAPTER) + self.frames.count(Owner.LOADING)
        missing = held + num - self._adapter_frames
        if missing > 0 and not self.order.evict(missing, below):
            return None
        return self.frames.take(num, owner)


class PaddedFormat(AdapterFormat):
    """Every adapter takes ``slot_bytes``, the size of one of the largest rank."""

    slot_bytes = 0

    def num_frames(self, num_bytes: int) -> int:
        assert num_bytes <= self.slot_bytes
        return super().num_frames(self.slot_bytes)


def adapter_bytes(shape: dict[str, Any], rank: int) -> int:
    """An fp32 adapter of ``rank`` on all linear modules, if no width needs padding."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    widths = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
    return 4 * rank * widths * shape["num_hidden_layers"]


@contextmanager
def divided(policy: str, frames: int, slot_bytes: int) -> Iterator[None]:
    """An engine that is assembled within has its memory divided by ``policy``; ``slot_bytes``: of
    the largest adapter."""
    adapter_frames = int(ADAPTER_SHARE * frames)
    padded = type("Padded", (PaddedFormat,), {"slot_bytes": slot_bytes})
    pool = Pool if policy == "shared" else partial(SplitPool, adapter_frames=adapter_frames)
    layout = padded if policy == "padded" else AdapterFormat
    with (
        mock.patch.object(assembly, "Pool", pool),
        mock.patch.object(engine_models, "AdapterFormat", layout),
    ):
        yield


def make_served(
    policy: str, base: Path, data_dir: Path, frames: int, slot_bytes: int, **config: Any
) -> Served:
    """An engine that is ``divided``."""
    with divided(policy, frames, slot_bytes):
        return Served(base, data_dir, frames, page_tokens=PAGE_TOKENS, **config)


def mixed_jobs(adapters: int, requests: int, seed: int) -> list[Job]:
    """Requests for adapters drawn uniformly, short and long prompts in turn."""
    drawn = np.random.default_rng([seed, adapters]).integers(0, adapters, requests)
    sizes = ((16, 64), (128, 384))
    parts = [
        make_jobs(drawn[i::2], prompt=size, new=(16, 64), vocabulary=SHAPE["vocab_size"], seed=i)
        for i, size in enumerate(sizes)
    ]
    return [job for pair in zip(*parts, strict=True) for job in pair]


def interleave(digests: dict[int, list[str]], adapters: int) -> list[str]:
    """The first ``adapters`` adapters: ranks in turn."""
    return [digests[RANKS[i % len(RANKS)]][i // len(RANKS)] for i in range(adapters)]


def measure(
    served: dict[str, Served], digests: list[str], rounds: int, ramp: int, steps: int
) -> list[dict[str, Any]]:
    """Cases of all policies with these adapters."""
    passes: dict[str, list[Pass]] = {policy: [] for policy in POLICIES}
    for round_ in range(rounds):
        jobs = mixed_jobs(len(digests), DRAWN, seed=round_)
        for policy in POLICIES if round_ % 2 == 0 else reversed(POLICIES):
            one = served[policy].saturate(jobs, digests, OPEN, ramp=ramp, steps=steps)
            passes[policy].append(one)
    seconds = {policy: [p.seconds / p.tokens for p in done] for policy, done in passes.items()}
    cases = []
    for policy, done in passes.items():
        ratios = [a / b for a, b in zip(seconds[policy], seconds["shared"], strict=True)]
        cases.append(
            {
                "adapters": len(digests),
                "pool": policy,
                "in_flight": statistics.median(p.in_flight for p in done),
                "tokens_per_step": statistics.median(p.tokens / p.steps for p in done),
                "tok_s": statistics.median(p.tok_s for p in done),
                "shared_over_this": throughput.median_interval(ratios)
                if policy != "shared"
                else None,
                "a_a": throughput.self_ratio(seconds["shared"]) if policy == "shared" else None,
                "preemptions": statistics.median(p.preemptions for p in done),
                "loads": statistics.median(p.loads for p in done),
            }
        )
        print(report.markdown(cases[-1:], COLUMNS).splitlines()[-1], flush=True)
    return cases


COLUMNS = {
    "adapters": "adapters",
    "pool": "pool",
    "in_flight": "in flight",
    "tokens_per_step": "tokens a step",
    "tok_s": "tokens/s",
    "shared_over_this": "shared is faster by",
    "a_a": "A/A",
    "preemptions": "preemptions",
    "loads": "loads",
}


def draw_plot(cases: list[dict[str, Any]], where: Path) -> None:
    labels = {
        "in_flight": "requests in flight",
        "tokens_per_step": "output tokens a step",
        "tok_s": "output tokens/s",
    }
    title = "The same memory: one pool, a 30/70 split, a split with padded slots"
    with report.plot(where, "pool_split", panels=len(labels), title=title) as axes:
        for axis, (key, label) in zip(axes, labels.items(), strict=True):
            for policy in POLICIES:
                mine = [c for c in cases if c["pool"] == policy]
                line = [c["adapters"] for c in mine], [c[key] for c in mine]
                axis.plot(*line, marker="o", label=policy)
            axis.set(xscale="log", xlabel="adapters (ranks 8 to 64)", ylabel=label)
            axis.set_xticks(sorted({c["adapters"] for c in cases}))
            axis.xaxis.set_major_formatter("{x:.0f}")
            axis.xaxis.set_minor_formatter(lambda *_: "")
            axis.set_ylim(bottom=0)
        axes[0].legend(frameon=False)


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    counts, rounds, ramp, steps = (1, 5, 20, 50, 100), 3, 80, 300
    if args.quick:
        counts, rounds, ramp, steps = (1, 20), 2, 10, 40
    found = throughput.header()
    with tempfile.TemporaryDirectory() as scratch:
        base = write_base(Path(scratch) / "base", SHAPE)
        data_dir = Path(scratch) / "data"
        frames = POOL_TOKENS // PAGE_TOKENS
        largest = adapter_bytes(SHAPE, max(RANKS))
        served = {p: make_served(p, base, data_dir, frames, largest) for p in POLICIES}
        each = -(-max(counts) // len(RANKS))
        digests = {rank: served["shared"].install(rank, each) for rank in RANKS}
        for count in counts:
            found["cases"] += measure(served, interleave(digests, count), rounds, ramp, steps)
        for one in served.values():
            one.close()
    where = report.folder(args)
    report.save(found, where, "pool_split")
    print("\n" + report.markdown(found["cases"], COLUMNS))
    draw_plot(found["cases"], where)


if __name__ == "__main__":
    main()
