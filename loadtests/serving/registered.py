"""What it costs to have 1,000 adapters registered instead of one.

    python loadtests/serving/registered.py --concurrency 8 --popularity uniform [--quick]

The model is the 135M shape of ``throughput.py``; every adapter has rank 16 on all linear modules,
and the pool holds about 50 of them. A stream of requests (the same prompts and lengths throughout)
is kept ``concurrency`` in flight; which adapter a request names is drawn as S-LoRA's generator
does it: ``int(numpy.power(alpha) * n)``. numpy's power distribution has the density
``alpha * x**(alpha - 1)``, so alpha = 1 is *uniform* popularity, and the smaller alpha is, the more
of the requests name adapter 0: with 0.1 and n = 1,000 half of them do, and three quarters name one
of the first 50. A registered adapter is a packed file on disk: the engine knows no other
registration (the front's is a row in SQLite). Eight of them have bytes of their own, the others are
hard links (see ``workload.py``), so loads read the page cache, not the disk.

Before a pass the pool holds what it would hold in the long run (400 draws of the same popularity),
and the adapters of the first requests, which stand for those already in flight. The same stream
then runs on a second engine whose pool holds every adapter of the stream. So the loss against
one registered adapter falls into three parts:

    distinct   more different adapters in a batch: the roomy engine against itself with one adapter
    copies     bytes loaded x what a byte takes when the engine is idle
    rest       the small pool against the roomy one, in pairs, less the copies

A/A is the small pool against the roomy one with one adapter, when both do the same work.
Throughput counts output tokens; prompts are in the time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import report
import throughput
from cases import make_jobs, write_base
from workload import Pass, Served

ALPHA = {"uniform": 1.0, "skewed": 0.1}
RANK = 16
ROOM = 50
PROMPT, NEW = (16, 33), (12, 25)
REQUESTS = {8: 40, 32: 64}
STEADY_DRAWS = 400


def draw(alpha: float, count: int, num_adapters: int, rng: np.random.Generator) -> list[int]:
    """The adapters that ``count`` requests name, of ``num_adapters``, as S-LoRA draws them."""
    return (rng.power(alpha, count) * num_adapters).astype(int).tolist()


def lately(adapters: list[int], most: int) -> list[int]:
    """The last ``most`` different ones: what a pool with room for so many would hold."""
    return list(dict.fromkeys(reversed(adapters)))[:most]


def split_loss(one: list[float], small: list[Pass], roomy: list[Pass], s_per_byte: float) -> Any:
    """Where the time went that n adapters took beyond one: shares of the time with one adapter.

    ``one``: seconds of the roomy engine with one adapter; ``small`` and ``roomy``: the same
    streams with n, one pass of each a round. The parts of one round add up to its loss.
    """
    rounds = list(zip(one, small, roomy, strict=True))
    copies = [s.load_bytes * s_per_byte / o for o, s, _ in rounds]
    beyond = [(s.seconds - r.seconds) / o for o, s, r in rounds]
    return {
        "loss": throughput.median_interval([s.seconds / o - 1 for o, s, _ in rounds]),
        "distinct": throughput.median_interval([r.seconds / o - 1 for o, _, r in rounds]),
        "copies": statistics.median(copies),
        "rest": throughput.median_interval([b - c for b, c in zip(beyond, copies, strict=True)]),
    }


class Engines:
    """The two engines, with the same registered adapters."""

    def __init__(self, folder: Path, num_adapters: int, concurrency: int, requests: int) -> None:
        base = write_base(folder / "base", throughput.SHAPE)
        data_dir = folder / "data"
        self.small = Served(base, data_dir, 1)  # to learn the sizes
        digest = self.small.install(RANK, 1)[0]
        ready = self.small.assembled.ready
        frames = self.small.engine.residency.num_frames(digest)
        kv = concurrency * -(-(PROMPT[1] + NEW[1]) // ready.page_tokens)
        self.small.close()
        self.small = Served(base, data_dir, kv + ROOM * frames)
        self.roomy = Served(base, data_dir, kv + (requests + 2) * frames)
        self.digests = self.small.install(RANK, num_adapters)

    def s_per_byte(self, repeats: int = 15) -> float:
        """Seconds that bringing one byte into the pool takes while nothing else runs."""
        residency = self.small.engine.residency
        size = residency._store.header(self.digests[0]).num_bytes
        seconds = []
        for _ in range(repeats):
            residency.evict(self.digests[0])
            start = time.perf_counter()
            self.small.make_resident(self.digests[:1])
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds) / size


def measure(
    engines: Engines, counts: list[int], args: Any, requests: int, rounds: int
) -> tuple[list[dict[str, Any]], tuple[float, float, float]]:
    """A case for each count, and the A/A interval of a pass."""
    alpha = ALPHA[args.popularity]
    small: dict[int, list[Pass]] = {n: [] for n in counts}
    roomy: dict[int, list[Pass]] = {n: [] for n in counts}
    for round_ in range(rounds):
        for n in counts if round_ % 2 == 0 else reversed(counts):
            rng = np.random.default_rng([round_, n])
            steady = draw(alpha, STEADY_DRAWS, n, rng)
            adapters = draw(alpha, requests, n, rng)
            vocabulary = throughput.SHAPE["vocab_size"]
            jobs = make_jobs(adapters, prompt=PROMPT, new=NEW, vocabulary=vocabulary, seed=0)
            here = lately(steady + adapters[: args.concurrency], ROOM)
            engines.small.hold_only(engines.digests[i] for i in here)
            engines.roomy.hold_only(engines.digests[i] for i in adapters)
            sides = [(small, engines.small), (roomy, engines.roomy)]
            for passes, served in sides if round_ % 2 == 0 else reversed(sides):
                passes[n].append(served.run(jobs, engines.digests, args.concurrency))
            print(f"round {round_ + 1}/{rounds}, {n} adapters: {small[n][-1].seconds:.1f} s")
    s_per_byte = engines.s_per_byte()
    one = [p.seconds for p in roomy[1]]
    cases = []
    for n in counts:
        assert not any(p.loads for p in roomy[n]), "the roomy pool had to load"
        cases.append(
            {
                "registered": n,
                "tok_s": statistics.median(p.tok_s for p in small[n]),
                "distinct_per_step": statistics.mean(p.distinct for p in small[n]),
                "loads": statistics.mean(p.loads for p in small[n]),
                "loaded_mb": statistics.mean(p.load_bytes for p in small[n]) / 1e6,
                "load_ms": 1e3
                * sum(p.load_s for p in small[n])
                / max(1, sum(p.loads for p in small[n])),
                **{
                    k: percent(v)
                    for k, v in split_loss(one, small[n], roomy[n], s_per_byte).items()
                },
            }
        )
    same = [s.seconds / r.seconds - 1 for s, r in zip(small[1], roomy[1], strict=True)]
    return cases, percent(throughput.median_interval(same))


def percent(value: Any) -> Any:
    return [100 * v for v in value] if isinstance(value, list | tuple) else 100 * value


COLUMNS = {
    "registered": "registered",
    "tok_s": "tokens/s",
    "distinct_per_step": "adapters a step",
    "loads": "loads",
    "loaded_mb": "MB loaded",
    "load_ms": "ms from asked to landed",
    "loss": "time beyond one adapter, %",
    "distinct": "of it: more adapters in a batch",
    "copies": "copies",
    "rest": "the rest",
}


def draw_plot(where: Path) -> None:
    """Throughput over registered adapters, from every result that is in ``where``."""
    with report.plot(where, "registered", title="Registered adapters, pool for 50") as (axis,):
        for path in sorted(where.glob("registered-*.json")):
            found = json.loads(path.read_text())
            cases = found["cases"]
            axis.plot(
                [c["registered"] for c in cases],
                [c["tok_s"] for c in cases],
                marker="o",
                label=f"{found['popularity']}, {found['concurrency']} in flight",
            )
        axis.set(xscale="log", xlabel="registered adapters", ylabel="output tokens/s")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--concurrency", type=int, choices=REQUESTS, default=8)
    parser.add_argument("--popularity", choices=ALPHA, default="uniform")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    counts, requests, rounds = [1, 10, 100, 1000], REQUESTS[args.concurrency], args.rounds
    if args.quick:
        counts, requests, rounds = [1, 100], args.concurrency + 4, 1
    found = throughput.header()
    found |= {"concurrency": args.concurrency, "popularity": args.popularity}
    with tempfile.TemporaryDirectory() as scratch:
        engines = Engines(Path(scratch), max(counts), args.concurrency, requests)
        found["cases"], found["a_a_percent"] = measure(engines, counts, args, requests, rounds)
        engines.small.close()
        engines.roomy.close()
    where = report.folder(args)
    report.save(found, where, f"registered-{args.concurrency}-{args.popularity}")
    print(f"\n{args.concurrency} in flight, {args.popularity} popularity")
    print(report.markdown(found["cases"], COLUMNS))
    print(f"A/A: {report.text(found['a_a_percent'])} %")
    draw_plot(where)


if __name__ == "__main__":
    main()
