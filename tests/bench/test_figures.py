"""The figures of a run, by hand."""

from __future__ import annotations

import pytest

from loramux.bench import figures
from loramux.bench.figures import by_name
from loramux.bench.open_loop import Record, Run
from loramux.bench.traffic import Arrival


def record(
    at: float,
    chunks: tuple[float, ...],
    tokens: int,
    *,
    end: float | None = None,
    adapter: int = 0,
    tenant: int = 0,
    cold: bool = False,
) -> Record:
    """One that ended well; ``end`` is its last chunk's time unless given."""
    made = Record(Arrival(at, adapter, 8, tenant, 10, tokens, cold), at, list(chunks))
    made.finish(chunks[-1] if end is None else end, 10, tokens)
    return made


def failed(at: float, error: str, end: float) -> Record:
    made = Record(Arrival(at, 0, 8, 0, 10, 5, False), at)
    made.fail(end, error)
    return made


RUN = [
    record(1.0, (1.5, 1.6, 1.9), 5),  # TTFT 0.5, TPOT 0.1
    record(2.0, (2.25, 2.33), 5),  # TTFT 0.25, TPOT 0.02: good
    record(3.0, (6.0,), 1, end=6.0),  # TTFT 3, no TPOT
    record(4.0, (4.9,), 1, end=5.0),  # good: a single token
    record(5.0, (14.0, 14.01), 2, end=14.01),  # TTFT 9
    failed(5.5, "503 overloaded", 5.6),
    failed(5.6, "ReadError", 15.0),
    failed(5.7, "503 overloaded", 5.8),
    Record(Arrival(6.0, 0, 8, 0, 10, 5, False), 6.0),
]
VALUES = by_name(figures.figures(RUN))


def test_counts_and_rates() -> None:
    counted = [VALUES[name] for name in ("requests", "ok", "errors", "incomplete")]
    assert counted == [9, 5, 3, 1]
    assert figures.errors(RUN) == {"503 overloaded": 2, "ReadError": 1, "incomplete": 1}
    assert VALUES["elapsed_s"] == 14.0, "from 1.0 to the failure at 15.0"
    assert VALUES["throughput_rps"] == pytest.approx(5 / 14)
    assert VALUES["output_tok_s"] == pytest.approx((5 + 5 + 1 + 1 + 2) / 14)
    assert VALUES["total_tok_s"] == pytest.approx((14 + 50) / 14)
    assert VALUES["offered_rps"] == pytest.approx(9 / 6)
    assert VALUES["goodput_rps"] == pytest.approx(2 / 14)
    assert VALUES["error_share"] == pytest.approx(3 / 9)


def test_latencies_count_from_the_planned_time() -> None:
    late = record(1.0, (2.0, 2.1), 2)
    late.sent_s = 1.9
    assert late.ttft_s == pytest.approx(1.0) and late.e2e_s == pytest.approx(1.1)
    assert [r.ttft_s for r in RUN[:5]] == pytest.approx([0.5, 0.25, 3.0, 0.9, 9.0])
    assert VALUES["ttft_p50_s"] == pytest.approx(0.9)
    assert VALUES["ttft_p90_s"] == pytest.approx(3.0 + 0.6 * 6.0)
    assert VALUES["e2e_p50_s"] == pytest.approx(1.0)


def test_tpot_divides_by_the_tokens_of_usage_and_not_by_chunks() -> None:
    assert RUN[0].tpot_s == pytest.approx(0.4 / 4), "five tokens in three chunks"
    assert RUN[1].tpot_s == pytest.approx(0.02)
    assert [r.tpot_s for r in RUN[2:4]] == [None, None]
    assert record(0.0, (4.0,), 30).tpot_s is None, "an answer in one piece"
    assert VALUES["tpot_p50_s"] == pytest.approx(0.02)


def test_itl_is_every_gap() -> None:
    assert RUN[0].itl_s == pytest.approx([0.1, 0.3])
    assert VALUES["itl_p50_s"] == pytest.approx((0.08 + 0.1) / 2), "of 0.01, 0.08, 0.1, 0.3"


def test_shares_are_of_all_that_was_asked() -> None:
    assert VALUES["attainment_6s"] == pytest.approx(4 / 9)
    assert VALUES["attainment_1s"] == pytest.approx(3 / 9)
    satisfied = [1 - t**2 / 36 for t in (0.5, 0.25, 3.0, 0.9)]
    assert VALUES["satisfaction"] == pytest.approx(sum(satisfied) / 9)


def test_fairness_between_adapters() -> None:
    waits = {0: 1.0, 1: 1.0, 2: 4.0}
    run = [record(0.0, (w,), 1, adapter=a) for a, w in waits.items() for _ in range(3)]
    run += [record(0.0, (50.0,), 1, adapter=9)] * 2  # too few answers to say anything
    values = by_name(figures.figures(run))
    assert values["adapters_compared"] == 3
    assert values["adapter_wait_max_over_median"] == 4.0
    assert values["adapter_wait_jain"] == pytest.approx(36 / (3 * 18))
    assert values["tenant_wait_jain"] is None, "there is one"
    assert figures.jain([2.0, 2.0]) == 1.0 and figures.jain([3.0, 0.0]) == 0.5


def test_cold_and_warm_apart() -> None:
    run = [record(0.0, (t,), 1, cold=c) for t, c in ((3.0, True), (1.0, False), (2.0, False))]
    values = by_name(figures.figures(run))
    assert values["ttft_cold_p50_s"] == 3.0 and values["ttft_warm_p50_s"] == 1.5


def test_nothing_to_count_is_none_and_not_zero() -> None:
    values = by_name(figures.figures([failed(0.0, "x", 1.0)]))
    assert values["ttft_p50_s"] is None and values["throughput_rps"] == 0


def test_every_figure_says_its_formula() -> None:
    found = figures.figures(RUN)
    assert len({figure.name for figure in found}) == len(found)
    assert all(figure.formula and "{" not in figure.formula for figure in found)


def test_a_report_says_how_the_client_did() -> None:
    told = figures.told(Run(RUN, 15.0, [0.0] * 9 + [0.2], 0.3))
    assert told["figures"] == VALUES and told["errors"] == figures.errors(RUN)
    client = {name: round(value, 3) for name, value in told["client"].items()}
    assert client == {"lag_p99_s": 0.0, "stall_p99_s": 0.182, "cpu_share": 0.3}
    assert told["ttft_s_percentiles"][50] == VALUES["ttft_p50_s"]
    assert figures.formulas().keys() == VALUES.keys()
