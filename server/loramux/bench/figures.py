"""What the records of a run say: every figure with the formula that made it.

Tools disagree about what the words mean, so the formula is part of the figure. "Asked" are all
requests of the plan; "ok" those that ended well. What failed or was not done in time counts against
every share (goodput, attainment, satisfaction) and is in no latency.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loramux.bench.open_loop import Record, Run

PERCENTILES = (50, 90, 95, 99)
GOOD_TTFT_S = 1.0
GOOD_TPOT_S = 0.05
SLORA_SLO_S = 6.0
FEWEST = 3
"""Fairness looks at adapters with so many answers at least."""


@dataclass(frozen=True)
class Figure:
    """A number and what it is; None where nothing could be counted."""

    name: str
    value: float | None
    unit: str
    formula: str


def figures(records: Sequence[Record]) -> list[Figure]:
    """All of them, in the order in which they are shown."""
    ok = [record for record in records if record.status == "ok"]
    found = [*_counts(records, ok), *_rates(records, ok)]
    for name, unit, values, formula in _latencies(ok):
        found += [
            Figure(f"{name}_p{p}_s", percentile(values, p), unit, formula.format(p=p))
            for p in PERCENTILES
        ]
    return found + _shares(records) + _fairness(ok) + _cold(ok)


def by_name(found: Sequence[Figure]) -> dict[str, float | None]:
    """The values alone."""
    return {figure.name: figure.value for figure in found}


def percentile(values: Sequence[float], p: float) -> float | None:
    """Linear between the ranks around p/100 * (n - 1)."""
    return float(np.percentile(values, p)) if len(values) else None


def elapsed_s(records: Sequence[Record]) -> float:
    """From the first planned time to the last end."""
    ends = [record.finished_s for record in records if record.status != "incomplete"]
    begin = min((record.arrival.at_s for record in records), default=0.0)
    return max(ends, default=begin) - begin


def told(run: Run) -> dict[str, Any]:
    """A run as a report has it: figures, failures, how the client did, and TTFT's percentiles."""
    ok = [record.ttft_s for record in run.records if record.status == "ok"]
    return {
        "figures": by_name(figures(run.records)),
        "errors": errors(run.records),
        "client": {
            "lag_p99_s": run.lag_p99_s,
            "stall_p99_s": run.stall_p99_s,
            "cpu_share": run.cpu_share,
        },
        "ttft_s_percentiles": [percentile(ok, p) for p in range(101)],
    }


def formulas() -> dict[str, tuple[str, str]]:
    """The unit and the formula of every figure."""
    return {figure.name: (figure.unit, figure.formula) for figure in figures([])}


def errors(records: Sequence[Record]) -> dict[str, int]:
    """How often each kind of failure happened; "incomplete" is one of them."""
    kinds = Counter(record.error for record in records if record.status == "error")
    kinds["incomplete"] = sum(record.status == "incomplete" for record in records)
    return dict(+kinds)


def is_good(record: Record) -> bool:
    """Within both bounds of goodput; a single token has no TPOT to be late with."""
    in_time = record.status == "ok" and record.ttft_s <= GOOD_TTFT_S
    return in_time and (record.tpot_s is None or record.tpot_s <= GOOD_TPOT_S)


def satisfaction(record: Record) -> float:
    """S-LoRA's: 1 for an answer at once, 0 from 6 s on."""
    if record.status != "ok" or record.ttft_s >= SLORA_SLO_S:
        return 0.0
    return 1.0 - record.ttft_s**2 / SLORA_SLO_S**2


def jain(values: Sequence[float]) -> float | None:
    """Jain's index: 1 when all are equal, 1/n when one has everything."""
    squares = sum(value**2 for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _counts(records: Sequence[Record], ok: Sequence[Record]) -> list[Figure]:
    failed = sum(record.status == "error" for record in records)
    unfinished = len(records) - len(ok) - failed
    return [
        Figure("requests", len(records), "", "asked"),
        Figure("ok", len(ok), "", "ended well, with usage"),
        Figure("errors", failed, "", "refused, cut off or failed"),
        Figure("incomplete", unfinished, "", "neither, when the run was over"),
        Figure("error_share", _ratio(failed, len(records)), "", "errors / requests"),
        Figure("prompt_tokens", sum(r.prompt_tokens for r in ok), "", "sum of ok usage"),
        Figure("output_tokens", sum(r.completion_tokens for r in ok), "", "sum of ok usage"),
    ]


def _rates(records: Sequence[Record], ok: Sequence[Record]) -> list[Figure]:
    seconds = elapsed_s(records)
    last = max((record.arrival.at_s for record in records), default=0.0)
    prompt, output = (
        sum(getattr(r, name) for r in ok) for name in ("prompt_tokens", "completion_tokens")
    )
    good = sum(map(is_good, records))
    return [
        Figure("elapsed_s", seconds, "s", "last end - first planned time"),
        Figure("offered_rps", _ratio(len(records), last), "1/s", "requests / last planned time"),
        Figure("throughput_rps", _ratio(len(ok), seconds), "1/s", "ok / elapsed"),
        Figure("output_tok_s", _ratio(output, seconds), "1/s", "output_tokens / elapsed"),
        Figure(
            "total_tok_s",
            _ratio(prompt + output, seconds),
            "1/s",
            "(prompt_tokens + output_tokens) / elapsed",
        ),
        Figure(
            "goodput_rps",
            _ratio(good, seconds),
            "1/s",
            f"(ok, TTFT <= {GOOD_TTFT_S:g} s and TPOT <= {GOOD_TPOT_S * 1e3:g} ms) / elapsed",
        ),
    ]


def _latencies(ok: Sequence[Record]) -> list[tuple[str, str, list[float], str]]:
    return [
        (
            "ttft",
            "s",
            [record.ttft_s for record in ok],
            "p{p} over ok of (first chunk with text - planned time)",
        ),
        (
            "tpot",
            "s",
            [record.tpot_s for record in ok if record.tpot_s is not None],
            "p{p} over ok of (E2E - TTFT) / (output tokens - 1)",
        ),
        (
            "itl",
            "s",
            [gap for record in ok for gap in record.itl_s],
            "p{p} over all gaps between chunks with text (one may hold several tokens)",
        ),
        (
            "e2e",
            "s",
            [record.e2e_s for record in ok],
            "p{p} over ok of (end of the stream - planned time)",
        ),
    ]


def _shares(records: Sequence[Record]) -> list[Figure]:
    def attained(bound_s: float) -> float | None:
        met = sum(r.status == "ok" and r.ttft_s < bound_s for r in records)
        return _ratio(met, len(records))

    return [
        Figure("attainment_6s", attained(SLORA_SLO_S), "", "(ok, TTFT < 6 s) / requests"),
        Figure("attainment_1s", attained(1.0), "", "(ok, TTFT < 1 s) / requests"),
        Figure(
            "satisfaction",
            _ratio(sum(map(satisfaction, records)), len(records)),
            "",
            "mean over requests of 1 - TTFT^2 / 36 if ok and TTFT < 6 s, else 0 (S-LoRA)",
        ),
    ]


def mean_waits(ok: Sequence[Record], key: Callable[[Record], int]) -> Mapping[int, float]:
    """Mean TTFT by ``key``, of keys with enough answers."""
    waits: dict[int, list[float]] = defaultdict(list)
    for record in ok:
        waits[key(record)].append(record.ttft_s)
    return {k: float(np.mean(v)) for k, v in waits.items() if len(v) >= FEWEST}


def _fairness(ok: Sequence[Record]) -> list[Figure]:
    found = []
    for what, key in (("adapter", _adapter), ("tenant", _tenant)):
        means = list(mean_waits(ok, key).values())
        enough = len(means) > 1
        about = f"of mean TTFT over {what}s with at least {FEWEST} ok"
        found += [
            Figure(f"{what}s_compared", len(means), "", f"{what}s with at least {FEWEST} ok"),
            Figure(
                f"{what}_wait_max_over_median",
                _ratio(max(means), float(np.median(means))) if enough else None,
                "",
                f"largest / median {about}",
            ),
            Figure(
                f"{what}_wait_jain",
                jain(means) if enough else None,
                "",
                f"Jain's index (sum x)^2 / (n sum x^2) {about}",
            ),
        ]
    return found


def _adapter(record: Record) -> int:
    return record.arrival.adapter


def _tenant(record: Record) -> int:
    return record.arrival.tenant


def _cold(ok: Sequence[Record]) -> list[Figure]:
    found = []
    for name, cold in (("cold", True), ("warm", False)):
        values = [record.ttft_s for record in ok if record.arrival.cold is cold]
        about = "never named before" if cold else "named among others"
        found += [
            Figure(
                f"ttft_{name}_p{p}_s",
                percentile(values, p),
                "s",
                f"p{p} TTFT over ok whose adapter was {about}",
            )
            for p in (50, 99)
        ]
    return found
