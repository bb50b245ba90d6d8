"""What a draft model is worth at a given acceptance: the 135M shape, a draft of a tenth its cost.

    python loadtests/serving/synthetic.py [--quick] [--pairs 10]

Both models are random, so the draft would never be right. Its forward passes are run and paid for,
then its guesses are exchanged for what the target will draw, known from a run without drafting,
each with the asked-for probability, and else for another token. So the lengths, the costs and the
acceptance are real and the tokens are not. The speed is compared with the formula
``E / (c K + 1)``, ``E = (1 - a^(K+1)) / (1 - a)`` at the acceptance ``a`` and the cost ``c`` that
were measured: c is the time of a drafting step over that of a plain step, both in this process. The
formula takes a step of K + 1 tokens for as long as one of one token; on a CPU it is not, so the
speed is also given beside ``E / (c K + v)``, v being the measured time of a step of K + 1 tokens
over that of a plain one.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import report
import throughput
from cases import write_base
from pairs import header, median_interval, self_ratio

from loramux.config import ServerConfig
from loramux.engine.assemble import assemble
from loramux.request import Request, SamplingParams, Speculation
from loramux.speculation.drafter import Ask, Drafter, Guess
from loramux.wire import Submit

DRAFT_SHAPE = throughput.SHAPE | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 384,
}
NUM_NEW, PROMPT = 64, 64


class Lucky:
    """``inner``'s guesses at their price, right with probability ``acceptance``."""

    def __init__(self, inner: Drafter, acceptance: float) -> None:
        self._inner = inner
        self._acceptance = acceptance
        self._rng = np.random.default_rng(0)
        self.truth: dict[str, list[int]] = {}
        self.seconds: list[float] = []

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        """See Drafter."""
        start = time.perf_counter()
        guesses = self._inner.propose(asks)
        self.seconds.append(time.perf_counter() - start)
        return [
            self._exchanged(ask.request, guess) for ask, guess in zip(asks, guesses, strict=True)
        ]

    def _exchanged(self, request: Request, guess: Guess) -> Guess:
        future = self.truth[request.id][request.num_outputs :][: len(guess.token_ids)]
        lucky = self._rng.random(len(future)) < self._acceptance
        return Guess([t if ok else t ^ 1 for t, ok in zip(future, lucky, strict=True)])

    def ended(self, request: Request) -> None:
        """See Drafter."""
        self._inner.ended(request)


class Pair:
    """The engine with both models, and its runs."""

    def __init__(self, folder: Path, acceptance: float) -> None:
        base = write_base(folder / "base", throughput.SHAPE)
        draft = write_base(folder / "draft", DRAFT_SHAPE)
        config = ServerConfig(
            model=base,
            draft_model=draft,
            data_dir=folder / "data",
            device="cpu",
            pool_memory="2G",
            prefix_caching=False,
        )
        self.engine = assemble(config).engine
        self.engine.drafting.planner = None
        self.lucky = Lucky(self.engine.drafting.drafters["draft"], acceptance)
        self.engine.drafting.drafters["draft"] = self.lucky
        self._serial = 0

    def run(self, rows: int, length: int) -> dict[str, Any]:
        """``rows`` requests with guesses of ``length`` tokens, or none; decoding steps only."""
        engine, rng = self.engine, np.random.default_rng(rows)
        speculation = Speculation(drafters=("draft",), max_draft_tokens=length) if length else None
        for index in range(rows):
            engine.submit(
                Submit(
                    request_id=str(index),
                    tenant="",
                    model_id=0,
                    adapters=(),
                    prompt_ids=rng.integers(10, 40000, PROMPT).tolist(),
                    sampling=SamplingParams(seed=index, max_tokens=NUM_NEW),
                    speculation=speculation,
                )
            )
        outputs: dict[str, list[int]] = {str(index): [] for index in range(rows)}
        drafted = accepted = 0
        self.lucky.seconds.clear()
        start, seconds, before = 0.0, [], 0
        while engine.has_work:
            decoding = not len(engine.scheduler.waiting) and all(
                request.num_pending == 1 for request in engine.scheduler.running
            )
            if decoding and not start:
                start, before = time.perf_counter(), sum(map(len, outputs.values()))
            began = time.perf_counter()
            done = engine.step()
            seconds.append(time.perf_counter() - began)
            for output in done.outputs:
                outputs[output.request_id] += output.token_ids
                if output.drafted is not None:
                    drafted += output.drafted[1]
                    accepted += len(output.token_ids) - 1
        tokens = sum(map(len, outputs.values())) - before
        return {
            "outputs": outputs,
            "token_s": (time.perf_counter() - start) / tokens,
            "step_s": statistics.median(seconds[1:]),
            "draft_s": statistics.median(self.lucky.seconds) if length else 0.0,
            "drafted": drafted,
            "accepted": accepted,
        }


def compare(
    pair: Pair, rows: int, length: int, pairs: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Guesses of ``length`` beside none."""
    plain = pair.run(rows, 0)
    pair.lucky.truth = plain["outputs"]
    pair.run(rows, length)
    ratios, offs, ons = [], [], []
    for number in range(pairs):
        order = (0, length) if number % 2 == 0 else (length, 0)
        found = {side: pair.run(rows, side) for side in order}
        assert found[0]["outputs"] == found[length]["outputs"] == plain["outputs"]
        ratios.append(found[0]["token_s"] / found[length]["token_s"])
        offs.append(found[0])
        ons.append(found[length])
        say(f"{rows} rows, {length} guesses: pair {number + 1}/{pairs}")
    # a guess behind a wrong one is never looked at: solve E for the chance of one
    rounds = sum(on["drafted"] for on in ons) / length
    reached = 1 + sum(on["accepted"] for on in ons) / rounds
    chance = _chance(reached, length)
    step = statistics.median(off["step_s"] for off in offs)
    draft = statistics.median(on["draft_s"] for on in ons) / length / step
    whole = statistics.median(on["step_s"] for on in ons) / step - draft * length
    formula, with_width = reached / (draft * length + 1), reached / (draft * length + whole)
    speed = median_interval(ratios)
    return {
        "rows": rows,
        "length": length,
        "acceptance": chance,
        "tokens_per_step": reached,
        "draft_cost": draft,
        "wide_step": whole,
        "speed": speed,
        "formula": formula,
        "of_formula": speed[0] / formula,
        "with_width": with_width,
        "of_with_width": speed[0] / with_width,
        "a_a": self_ratio([off["token_s"] for off in offs]),
    }


def _chance(expected: float, length: int) -> float:
    """The a of ``expected = 1 + a + ... + a^length``, by halving."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        total = sum(middle**power for power in range(length + 1))
        low, high = (middle, high) if total < expected else (low, middle)
    return low


COLUMNS = {
    "rows": "rows",
    "length": "K",
    "acceptance": "a",
    "tokens_per_step": "E",
    "draft_cost": "c",
    "wide_step": "v",
    "speed": "speed beside off",
    "formula": "E/(cK+1)",
    "of_formula": "share of it",
    "with_width": "E/(cK+v)",
    "of_with_width": "share of it",
    "a_a": "A/A",
}


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--acceptance", type=float, default=0.8)
    args = parser.parse_args()
    pairs, batches, lengths = (2, (1,), (4,)) if args.quick else (args.pairs, (1, 8), (2, 4))
    found = header()
    with tempfile.TemporaryDirectory() as scratch:
        pair = Pair(Path(scratch), args.acceptance)
        for rows in batches:
            for length in lengths:
                case = compare(pair, rows, length, pairs, print)
                found["cases"].append(case)
                print(report.markdown([case], COLUMNS).splitlines()[-1], flush=True)
        pair.engine.close()
    report.save(found, report.folder(args), "synthetic")
    print("\n" + report.markdown(found["cases"], COLUMNS))


if __name__ == "__main__":
    main()
