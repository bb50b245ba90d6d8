"""Tokens a second with drafting, beside the same requests without: the demo model and its adapters.

    python loadtests/serving/drafting.py [--quick] [--pairs 10]

*free*: openings of held-out texts, each for one of six adapters or the base in turn, temperature
0.7. *editing*: a text and the wish for the same about somebody else (the adapter ``edit``), greedy.
Outputs are the same tokens on both sides, which is asserted, so a ratio of times is one of tokens a
second. A request that ends makes place for the next, so the concurrency stays what it is until the
last ones; prompts are new in every pair, and each run is a tenant's of its own, so that no store
knows the answer from the other side. A ratio is the median over pairs (A B B A ...), with a
bootstrap 95 % interval, beside that of off against itself; of the times, and of the CPU seconds,
which other programs disturb less.

*mixed* is what adaptive lengths are for: half of the requests edit, half tell freely; the planner's
choice beside every fixed length.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import report
import throughput
from pairs import header, median_interval, self_ratio
from tokenizers import Tokenizer

from loramux.config import DEMO_DIR, ServerConfig
from loramux.demo.training import corpus
from loramux.demo.training.manners import MANNERS
from loramux.engine.assemble import assemble
from loramux.request import AdapterRef, SamplingParams, Speculation
from loramux.speculation.planner import Planner
from loramux.wire import Output, Submit

NUM_NEW = 128
WARM_UP = 2
FOLLOWING = 2
"""So many requests a place."""
OFF = "off"


@dataclass(frozen=True)
class Ask:
    """One request: its adapter's name ("": the base), its prompt, its temperature."""

    adapter: str
    prompt: list[int]
    temperature: float


@dataclass
class Run:
    """What came of a run: every request's tokens, and how they came about."""

    seconds: float
    cpu_s: float = 0.0
    steps: int = 0
    outputs: dict[str, list[int]] = field(default_factory=dict)
    verified: int = 0
    by_drafter: dict[str, list[int]] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs.values()))

    @property
    def drafted(self) -> int:
        return sum(drafted for drafted, _ in self.by_drafter.values())

    @property
    def accepted(self) -> int:
        return sum(accepted for _, accepted in self.by_drafter.values())

    def count(self, outputs: Sequence[Output]) -> None:
        """A step's outputs."""
        self.steps += bool(outputs)
        for output in outputs:
            name = output.request_id.partition("-")[2]
            self.outputs.setdefault(name, []).extend(output.token_ids)
            self.verified += 1
            if output.drafted is not None:
                drafter, drafted, _ = output.drafted
                tally = self.by_drafter.setdefault(drafter, [0, 0])
                tally[0] += drafted
                tally[1] += len(output.token_ids) - 1


class Side:
    """How requests are drafted for: not at all, by ``drafters``, with the planner or without."""

    def __init__(
        self, *drafters: str, most: int = 8, tree: bool = False, planned: bool = True
    ) -> None:
        self.planned = planned
        self.speculation = (
            Speculation(drafters=drafters, max_draft_tokens=most, tree=tree) if drafters else None
        )


class Demo:
    """The demo's engine with its draft model and every adapter."""

    def __init__(self, data_dir: Path, threads: int = 0) -> None:
        config = ServerConfig(
            model=DEMO_DIR / "base",
            draft_model=DEMO_DIR / "draft",
            threads=threads,
            data_dir=data_dir,
            device="cpu",
            pool_memory="1G",
            prefix_caching=False,
        )
        assembled = assemble(config)
        self.engine = assembled.engine
        self.digests = {
            folder.name: throughput.install_adapter(folder, data_dir, assembled.ready.base)
            for folder in sorted((DEMO_DIR / "adapters").iterdir())
        }
        self._planner = self.engine.drafting.planner
        self._serial = 0

    def run(self, asks: Sequence[Ask], side: Side, at_once: int) -> Run:
        """All of ``asks``, of which ``at_once`` are served at any time: one that ends makes place
        for the next."""
        self._serial += 1
        self.engine.drafting.planner = self._planner if side.planned else None
        waiting = enumerate(asks)
        for index, ask in islice(waiting, at_once):
            self._submit(index, ask, side)
        start, cpu = time.perf_counter(), time.process_time()
        found = Run(0.0)
        while self.engine.has_work:
            done = self.engine.step()
            assert not done.failed, done.failed
            found.count(done.outputs)
            for index, ask in islice(waiting, len(done.finished)):
                self._submit(index, ask, side)
        found.seconds, found.cpu_s = time.perf_counter() - start, time.process_time() - cpu
        return found

    def _submit(self, index: int, ask: Ask, side: Side) -> None:
        refs = (AdapterRef(self.digests[ask.adapter]),) if ask.adapter else ()
        self.engine.submit(
            Submit(
                request_id=f"{self._serial}-{index}",
                tenant=str(self._serial),
                model_id=0,
                adapters=refs,
                prompt_ids=ask.prompt,
                sampling=SamplingParams(
                    seed=index,
                    temperature=ask.temperature,
                    max_tokens=NUM_NEW,
                    stop_token_ids=(1,),
                ),
                speculation=side.speculation,
            )
        )


class Prompts:
    """New requests of a kind for every pair."""

    def __init__(self) -> None:
        self._tokenizer = Tokenizer.from_file(str(DEMO_DIR / "base" / "tokenizer.json"))
        self._documents = corpus.documents(corpus.HELD_OUT_SEED)
        self._editing = Random(corpus.HELD_OUT_SEED)
        self._adapters = cycle(["", *(name for name in MANNERS if name != "edit")])

    def free(self) -> Iterator[Ask]:
        """Openings, for one adapter after the other."""
        for document in self._documents:
            yield Ask(next(self._adapters), self._ids(document.opening), 0.7)

    def editing(self) -> Iterator[Ask]:
        """Texts to be told once more about somebody else."""
        while True:
            yield Ask("edit", self._ids(MANNERS["edit"](self._editing).opening), 0.0)

    def mixed(self) -> Iterator[Ask]:
        """Both in turn."""
        for free, editing in zip(self.free(), self.editing(), strict=False):
            yield free
            yield editing

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(corpus.BEGIN + text, add_special_tokens=False).ids)


def compare(demo: Demo, asks: Iterator[Ask], rows: int, side: Side, pairs: int) -> dict[str, Any]:
    """``side`` beside off."""
    off = Side()
    runs: list[tuple[Run, Run]] = []
    for pair in range(-WARM_UP, pairs):
        batch = list(islice(asks, FOLLOWING * rows))
        sides = (off, side) if pair % 2 == 0 else (side, off)
        found = {id(each): demo.run(batch, each, rows) for each in sides}
        plain, drafted = found[id(off)], found[id(side)]
        assert plain.outputs == drafted.outputs, "drafting changed what is delivered"
        if pair >= 0:
            runs.append((plain, drafted))
    offs, ons = zip(*runs, strict=True)
    names = sorted({name for run in ons for name in run.by_drafter})
    verified, drafted_tokens = sum(run.verified for run in ons), sum(run.drafted for run in ons)
    return {
        "off_tokens_s": statistics.median(run.tokens / run.seconds for run in offs),
        "tokens_per_row": sum(run.tokens for run in ons) / verified,
        "accepted_share": sum(run.accepted for run in ons) / max(1, drafted_tokens),
        "drafted_per_row": drafted_tokens / verified,
        "speed": median_interval([off.seconds / on.seconds for off, on in runs]),
        "a_a": self_ratio([run.seconds / run.tokens for run in offs]),
        "cpu": median_interval([off.cpu_s / on.cpu_s for off, on in runs]),
        "cpu_a_a": self_ratio([run.cpu_s / run.tokens for run in offs]),
        "by_drafter": {
            name: [sum(run.by_drafter.get(name, [0, 0])[i] for run in ons) for i in (0, 1)]
            for name in names
        },
    }


COLUMNS = {
    "kind": "prompts",
    "rows": "rows",
    "drafters": "drafters",
    "off_tokens_s": "off, tokens/s",
    "drafted_per_row": "guessed a row",
    "accepted_share": "right",
    "tokens_per_row": "tokens a row and step",
    "speed": "speed beside off",
    "a_a": "off beside off",
    "cpu": "by CPU seconds",
    "cpu_a_a": "off beside off",
}


def sides(demo: Demo, rows: int) -> dict[str, Side]:
    """What is compared with off: all drafters as planned, and for one request each of them alone,
    its guesses verified whole."""
    names = list(demo.engine.drafting.drafters)
    planned = {"auto": Side(*names)}
    if rows > 1:
        return planned
    found = {f"{name}, 8": Side(name, planned=False) for name in names}
    found |= {f"{name}, 8, tree": Side(name, tree=True, planned=False) for name in ("medusa",)}
    return found | planned | {"draft, planned": Side("draft")}


def fixed(demo: Demo, rows: int) -> dict[str, Side]:
    """Every fixed length of the whole chain of drafters, and the planner's."""
    names = list(demo.engine.drafting.drafters)
    lengths = {f"all, {most}": Side(*names, most=most, planned=False) for most in (1, 2, 4, 8)}
    return lengths | {"auto": Side(*names)}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 8, 32))
    parser.add_argument("--kinds", nargs="*", default=("free", "editing", "mixed"))
    parser.add_argument(
        "--threads", type=int, default=0, help="one: nobody waits for who is not running"
    )
    args = parser.parse_args()
    pairs, batches = (2, (1, 2)) if args.quick else (args.pairs, args.rows)
    found = header()
    with tempfile.TemporaryDirectory() as scratch:
        demo, prompts = Demo(Path(scratch), args.threads), Prompts()
        assert isinstance(demo.engine.drafting.planner, Planner)
        kinds = {"free": prompts.free(), "editing": prompts.editing(), "mixed": prompts.mixed()}
        for kind in args.kinds:
            asks = kinds[kind]
            for rows in batches:
                for name, side in (fixed if kind == "mixed" else sides)(demo, rows).items():
                    case = {"kind": kind, "rows": rows, "drafters": name}
                    case |= compare(demo, asks, rows, side, pairs)
                    found["cases"].append(case)
                    print(report.markdown([case], COLUMNS).splitlines()[-1], flush=True)
        demo.engine.close()
    report.save(found, report.folder(args), "drafting")
    print("\n" + report.markdown(found["cases"], COLUMNS))


if __name__ == "__main__":
    main()
