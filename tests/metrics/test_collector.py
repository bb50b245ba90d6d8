"""Gauges of what lies between two looks, and how large the text becomes."""

from __future__ import annotations

import pytest
from tests.metrics.test_minute import Clock
from tests.metrics.test_prometheus import Source, digest, done, samples, spec, value

from loramux.errors import DeadlineExceeded, InvalidRequest, NumericalError
from loramux.metrics.collector import TOP_ADAPTERS, SnapshotCollector
from loramux.metrics.minute import SLOT_S, SLOTS
from loramux.metrics.prometheus import ERROR_TYPES, Exporter
from loramux.metrics.stats import AdapterLoad, PoolStats, StepStats

MANY = 5000


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def exporter(source: Source, clock: Clock) -> Exporter:
    names = {digest(n): [f"customer-{n:05d}-support"] for n in range(MANY)}
    exporter = Exporter(source, lambda: names)
    exporter.registry.unregister(exporter._collector)
    exporter._collector = SnapshotCollector(source, clock)
    exporter.registry.register(exporter._collector)
    source.observations.observer = exporter
    return exporter


def test_readiness(source: Source, exporter: Exporter) -> None:
    assert value(exporter, "loramux_ready") == 1
    source.reasons = ["draining"]
    assert value(exporter, "loramux_ready") == 0


def test_how_long_the_oldest_waits(source: Source, exporter: Exporter, clock: Clock) -> None:
    name = "loramux_oldest_waiting_seconds"
    assert value(exporter, name) == 0
    source.observations.step(StepStats(num_waiting=2, oldest_waiting_s=3.0))
    clock.now += 2
    assert value(exporter, name) == 5
    source.observations.step(StepStats(num_waiting=2))
    assert value(exporter, name) == 5, "as told before, and older by now"
    source.observations.step(StepStats(num_waiting=2, oldest_waiting_s=0.5))
    assert value(exporter, name) == 0.5
    source.observations.engine_started(2)
    assert value(exporter, name) == 0, "a new engine has nobody waiting"
    source.observations.step(StepStats(num_waiting=1, oldest_waiting_s=4.0))
    source.observations.step(StepStats())
    source.observations.step(StepStats(num_waiting=1))
    assert value(exporter, name) == 0


def test_the_pools_lowest(source: Source, exporter: Exporter, clock: Clock) -> None:
    def lows() -> tuple[float, float]:
        name = "loramux_pool_frames_minimum"
        return value(exporter, name, kind="free"), value(exporter, name, kind="available")

    for pool in (PoolStats(100, 50, 30, 10, 5, 3, 2), PoolStats(100, 4, 60, 10, 5, 20, 1)):
        source.observations.step(StepStats(pool=pool))
    source.observations.step(StepStats(pool=PoolStats(100, 80, 0, 10, 0, 10, 0)))
    assert lows() == (4, 34), "free; and with it what prefix pages and warm adapters hold"
    clock.now += SLOT_S * SLOTS
    assert lows() == (80, 100)


def test_adapters_by_requests_a_minute(source: Source, exporter: Exporter, clock: Clock) -> None:
    for number, times in {1: 1, 2: 2, 3: 3, 4: 6000}.items():
        for _ in range(times):
            source.observations.submitted(spec(number))
    source.observations.submitted(spec())  # the base has no adapter
    name = "loramux_adapter_requests_per_minute"
    found = [value(exporter, f"{name}_bucket", le=le) for le in ("1.0", "2.0", "5.0", "5000.0")]
    assert found == [1, 2, 3, 3]
    assert value(exporter, f"{name}_bucket", le="+Inf") == 4
    assert value(exporter, f"{name}_gcount") == 4 and value(exporter, f"{name}_gsum") == 6006
    clock.now += SLOT_S * SLOTS
    assert value(exporter, f"{name}_gcount") == 0


def test_validations(source: Source, exporter: Exporter) -> None:
    source.observations.validated(0.25, "")
    source.observations.validated(0.5, "rank_mismatch")
    assert value(exporter, "loramux_adapter_validation_seconds_sum") == 0.75
    name = "loramux_adapter_validation_failures_total"
    assert value(exporter, name, code="rank_mismatch") == 1
    assert sum(n for (found, _), n in samples(exporter).items() if found == name) == 1


def test_errors_before_and_in_an_answer(exporter: Exporter) -> None:
    exporter.erred(InvalidRequest("no"), False)
    exporter.erred(DeadlineExceeded("late"), True)
    found = {
        (dict(labels)["type"], dict(labels)["stage"]): number
        for (name, labels), number in samples(exporter).items()
        if name == "loramux_errors_total"
    }
    assert set(found) == {(kind, stage) for kind in ERROR_TYPES for stage in ("answer", "stream")}
    assert {key for key, number in found.items() if number} == {
        ("invalid_request_error", "answer"),
        ("timeout_error", "stream"),
    }


def test_the_worst_of_those_flagged_are_named_and_the_others_added_up(
    source: Source, exporter: Exporter
) -> None:
    name, rest = "loramux_flagged_adapter_errors", 5
    for number in range(TOP_ADAPTERS + rest):
        for _ in range(4 if number < TOP_ADAPTERS else 3):
            source.observations.failed(spec(number), NumericalError("not finite"))
    source.observations.failed(spec(999), NumericalError("once is an accident"))
    for _ in range(9):
        source.observations.failed(spec(MANY), NumericalError("no name means it any more"))
    found = {
        dict(labels)["adapter"]: n for (f, labels), n in samples(exporter).items() if f == name
    }
    named = {f"customer-{number:05d}-support": 4 for number in range(TOP_ADAPTERS)}
    assert found == {**named, "(other)": 3 * rest}


def busy(source: Source, number: int) -> None:
    """One of everything for one adapter."""
    watch = source.observations
    watch.submitted(spec(number))
    watch.tokens(spec(number), 2, None, 0.0, 100.5)
    watch.drafted(spec(number), "lookup", 3, 3, 1)
    watch.finished(spec(number), done())
    watch.step(StepStats(loads=[AdapterLoad(digest(number), 0.5, 10)], batch_rows=1))


def test_five_thousand_adapters_take_no_more_text_than_fifty(
    source: Source, exporter: Exporter
) -> None:
    for number in range(50):
        busy(source, number)
    samples(exporter)  # who has a seat is chosen when somebody looks
    for number in range(50):
        busy(source, number)
    few, small = len(samples(exporter)), len(exporter._rendered)
    for number in range(MANY):
        busy(source, number)
    many, large = len(samples(exporter)), len(exporter._rendered)
    assert many <= few + TOP_ADAPTERS and large < small + 4000
    assert large < 100_000

    # The protocol wants the names of all that are in the pool: these cost their own bytes, once.
    every = [digest(n) for n in range(MANY)]
    source.observations.step(StepStats(resident=every, waiting_adapters=every))
    assert len(samples(exporter)) == many
    names = 2 * MANY * len("customer-00000-support,")
    assert len(exporter._rendered) <= large + names + 1000
