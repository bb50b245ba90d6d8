"""When an engine is taken for hung, and which ends are its own fault: the bounds themselves."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from tests.front.house import configure
from tests.front.scripted import Scripted

from loramux import wire
from loramux.config import ServerConfig
from loramux.front.supervisor import external

OWN_FAULTS = {"SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL"}


@pytest.mark.parametrize(
    ("predicted_s", "limit_s"),
    [(0.0, 30.0), (1.4, 30.0), (1.6, 32.0), (10.0, 200.0)],
)
def test_a_step_has_twenty_times_what_was_predicted_and_half_a_minute_at_least(
    tmp_path: Path, predicted_s: float, limit_s: float
) -> None:
    async def main() -> None:
        it = Scripted(configure(tmp_path), tmp_path)
        it.birth()

        def running(seconds: float) -> str | None:
            it.client.received(wire.encode(wire.Heartbeat(1, seconds, predicted_s)))
            return it.client.overdue()

        assert running(1e6) is None, "it has all the time it wants to start"
        it.hear()
        assert running(limit_s - 0.01) is None
        assert running(limit_s + 0.01) == "step_timeout"
        assert running(0.0) is None
        await it.client.stop()

    asyncio.run(main())


def test_the_minimum_is_a_setting(tmp_path: Path) -> None:
    assert ServerConfig.model_fields["step_timeout_s"].default == 30
    assert ServerConfig.model_fields["heartbeat_timeout_s"].default == 5

    async def main() -> None:
        it = Scripted(configure(tmp_path, step_timeout_s=2), tmp_path)
        it.birth()
        it.hear()
        for seconds, reason in ((1.99, None), (2.01, "step_timeout")):
            it.client.received(wire.encode(wire.Heartbeat(1, seconds, 0.09)))
            assert it.client.overdue() == reason
        await it.client.stop()

    asyncio.run(main())


def test_silence_counts_as_long_as_this_process_was_there_to_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("loramux.front.engine_client.time.monotonic", lambda: now[0])

    async def main() -> None:
        it = Scripted(configure(tmp_path, heartbeat_timeout_s=1.0), tmp_path)
        it.birth()
        it.hear()
        for _ in range(4):
            assert it.client.overdue() is None
            now[0] += 0.25
        assert it.client.overdue() is None
        now[0] += 0.25
        assert it.client.overdue() == "heartbeat"
        now[0] += 50.0
        assert it.client.overdue() is None, "held up itself: there may be words unread"
        await it.client.stop()

    asyncio.run(main())


@pytest.mark.parametrize("each", list(signal.Signals), ids=lambda each: each.name)
def test_a_signal_that_a_process_gets_for_what_it_does_is_its_own_fault(
    each: signal.Signals,
) -> None:
    assert external(f"exit -{int(each)}") == (each.name not in OWN_FAULTS)


@pytest.mark.parametrize(
    "reason", ["exit 1", "exit 70", "exit 0", "heartbeat", "step_timeout", "protocol", "start: no"]
)
def test_any_other_end_is_its_own(reason: str) -> None:
    assert not external(reason)
