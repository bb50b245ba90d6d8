"""What became of guesses, as counters: by adapter and drafter, and by position.

vLLM's names have vLLM's meaning and its positions, which begin at 0; ours begin at 1, and those
beyond 8 are one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, Metric

from loramux.metrics.labels import OTHERS, adapter_label

POSITIONS = 8
BEYOND = f"{POSITIONS + 1}+"


class Drafted(Protocol):
    """Of one drafter, perhaps for one adapter."""

    steps: int
    drafted: int
    accepted: int


class DrafterTotals(Drafted, Protocol):
    """``depths[n]``: steps with guesses for n positions; ``runs[n]``: steps that got n right."""

    depths: dict[int, int]
    runs: dict[int, int]


class Totals(Protocol):
    """What the front counts (``front.drafts.DraftTotals``)."""

    @property
    def by_drafter(self) -> Mapping[str, DrafterTotals]:
        """Every guess."""

    @property
    def others(self) -> Mapping[str, Drafted]:
        """Those for adapters that had no seat, by drafter."""

    @property
    def seated(self) -> Mapping[str, Mapping[str, Drafted]]:
        """Those for adapters that have a seat, by digest and drafter."""

    def reseat(self) -> None:
        """Choose anew who has one."""


def families(
    totals: Totals, base_name: str, names: Mapping[str, Sequence[str]]
) -> Iterator[Metric]:
    """Every family; ``names`` of the digests."""
    yield from _by_adapter(totals, base_name, names)
    yield from _by_position(totals)
    yield from _vllm(totals, base_name)


def _by_adapter(
    totals: Totals, base_name: str, names: Mapping[str, Sequence[str]]
) -> Iterator[Metric]:
    lines: dict[tuple[str, str], list[int]] = {}
    seated = [(adapter_label(d, base_name, names), line) for d, line in totals.seated.items()]
    for label, line in [*seated, (OTHERS, totals.others)]:
        for drafter, counts in line.items():
            sums = lines.setdefault((label, drafter), [0, 0])
            sums[0] += counts.drafted
            sums[1] += counts.accepted
    for index, (name, about) in enumerate(
        (
            ("draft_tokens", "Tokens guessed and verified"),
            ("accepted_draft_tokens", "Tokens guessed, right and delivered"),
        )
    ):
        family = CounterMetricFamily(f"loramux_{name}", about, labels=["adapter", "drafter"])
        for labels, sums in lines.items():
            family.add_metric(labels, sums[index])
        yield family


def _by_position(totals: Totals) -> Iterator[Metric]:
    steps = CounterMetricFamily(
        "loramux_draft_steps", "Times that guesses of a request were verified", labels=["drafter"]
    )
    for drafter, counts in totals.by_drafter.items():
        steps.add_metric([drafter], counts.steps)
    yield steps
    for name, about, field in (
        ("draft_positions", "Times that a position was guessed", "depths"),
        ("accepted_draft_positions", "Times that it was right and delivered", "runs"),
    ):
        family = CounterMetricFamily(f"loramux_{name}", about, labels=["drafter", "position"])
        for drafter, counts in totals.by_drafter.items():
            reached = _reached(getattr(counts, field))
            for position, num in enumerate(reached[:POSITIONS], 1):
                family.add_metric([drafter, str(position)], num)
            if beyond := sum(reached[POSITIONS:]):
                family.add_metric([drafter, BEYOND], beyond)
        yield family


def _vllm(totals: Totals, base_name: str) -> Iterator[Metric]:
    every = list(totals.by_drafter.values())
    labels = [base_name, "0"]
    for name, about, num in (
        ("drafts", "Times that guesses of a request were verified", sum(d.steps for d in every)),
        ("draft_tokens", "Tokens guessed and verified", sum(d.drafted for d in every)),
        ("accepted_tokens", "Tokens guessed, right", sum(d.accepted for d in every)),
    ):
        family = CounterMetricFamily(
            f"vllm:spec_decode_num_{name}", about, labels=["model_name", "engine"]
        )
        family.add_metric(labels, num)
        yield family
    runs: dict[int, int] = {}
    for counts in every:
        for length, num in counts.runs.items():
            runs[length] = runs.get(length, 0) + num
    family = CounterMetricFamily(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Times that the guess for a position was right",
        labels=["model_name", "engine", "position"],
    )
    for position, num in enumerate(_reached(runs)):
        family.add_metric([*labels, str(position)], num)
    yield family


def _reached(lengths: Mapping[int, int]) -> list[int]:
    """How many of the runs had at least 1, 2, 3 ... tokens; ``lengths[n]`` of them had n."""
    longest = max(lengths, default=0)
    reached, num = [0] * longest, 0
    for length in range(longest, 0, -1):
        num += lengths.get(length, 0)
        reached[length - 1] = num
    return reached
