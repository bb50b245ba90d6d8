"""The front with a real child process on the other side of the socket."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.front.house import ENGINE, SERVER, collect, configure, expected, running, spec, until

from loramux.errors import (
    ConfigError,
    Conflict,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    LoramuxError,
    Overloaded,
    PoisonRequest,
)
from loramux.front.admission import Claim
from loramux.front.front import Front, lock_data_dir
from loramux.front.observations import Observations
from loramux.request import AdapterRef


async def engine_pid(front: Front) -> int:
    pid = (await front.command("state"))["pid"]
    assert isinstance(pid, int) and pid != os.getpid()
    return pid


def test_tokens_come_as_the_engine_sends_them(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            assert front.info is not None and front.info.max_model_len == 512
            with front.admit(Claim(choices=3)):
                generations = [front.submit(spec(f"r{i}", f"burst={i + 1}")) for i in range(3)]
            for delta in await asyncio.gather(*map(collect, generations)):
                assert delta.token_ids == expected(8)
                assert delta.text == await front.tokenizer.decode(expected(8))
            done = generations[0].done
            assert done is not None and done.finish_reason == "length"
            assert (done.num_output_tokens, done.cached_tokens, done.queue_s) == (8, 1, 0.25)
            assert done.first_token_at is not None and done.first_token_at <= done.finished_at
            assert front.snapshot.finished == {"length": 3}
            assert front.snapshot.adapter_tokens == {"": [15, 24]}
            assert front.snapshot.steps > 0 and front.snapshot.unfinished == 0

    asyncio.run(main())


def test_noise_on_the_wire_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            scripts = ["stale=0", "stale=4", "repeat=0", "repeat=5 burst=2"]
            streams = [front.submit(spec(f"r{i}", each)) for i, each in enumerate(scripts)]
            for delta in await asyncio.gather(*map(collect, streams)):
                assert delta.token_ids == expected(8)

    asyncio.run(main())


def test_a_gap_fails_that_request_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            bad, good = front.submit(spec("bad", "skip=3")), front.submit(spec("good"))
            with pytest.raises(EngineFailed, match="skipped from token 3 to 4"):
                await collect(bad)
            assert (await collect(good)).token_ids == expected(8)
            assert (await front.command("state"))["aborted"] == ["bad"]

    asyncio.run(main())


def test_stop_strings_abort_in_the_engine(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            whole = await front.tokenizer.decode(expected(5))
            generation = front.submit(spec("r", max_tokens=400, stop=(whole[2:4],)))
            delta = await collect(generation)
            assert delta.text == whole[:2]
            assert generation.done is not None and generation.done.stop_reason == whole[2:4]
            assert (await front.command("state"))["aborted"] == ["r"]

    asyncio.run(main())


def test_cancel_aborts_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            generation = front.submit(spec("r", "delay=0.01", max_tokens=400))
            await anext(generation)
            generation.cancel()
            generation.cancel()
            await collect(generation)
            assert generation.done is not None and generation.done.finish_reason == "abort"
            assert (await front.command("state"))["aborted"] == ["r"]
            generation.cancel()
            assert (await front.command("state"))["aborted"] == ["r"]

    asyncio.run(main())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_kill_9_is_a_pause_and_another_engine_starts(
    tmp_path: Path, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            victim = front.submit(spec("r", "delay=0.01", max_tokens=200))
            whole = await anext(victim)
            pid = await engine_pid(front)
            os.kill(pid, signal.SIGKILL)
            command = asyncio.create_task(front.command("state"))
            await until(lambda: front.not_ready() == ["engine_starting"])
            with pytest.raises(Overloaded) as caught:
                front.admit(Claim(choices=1))
            assert caught.value.code == "engine_starting" and caught.value.retry_after_s > 0
            with pytest.raises(Overloaded):
                front.submit(spec("late"))
            with pytest.raises(Overloaded):
                await front.command("state")
            await until(lambda: front.not_ready() == [])
            assert front.snapshot.engine_epoch == 2 and front.snapshot.engine_restarts == 1
            with pytest.raises(Overloaded):
                await command
            whole.extend(await collect(victim))
            assert whole.token_ids == expected(200)
            assert victim.done is not None and victim.done.cached_tokens == 1
            assert front.snapshot.resumed == 1 and front.snapshot.failed == {}

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize(
    ("script", "fields", "reason"),
    [
        ("die=2@1", {}, "exit"),
        ("garbage@1", {}, "protocol"),
        ("mute@1 hang@1", {"heartbeat_timeout_s": 1.5}, "heartbeat"),
        ("hang@1", {"step_timeout_s": 0.3}, "step_timeout"),
    ],
)
def test_every_way_to_die(
    tmp_path: Path,
    script: str,
    fields: dict[str, float],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(Observations, "engine_restarted", lambda _, each: reasons.append(each))

    async def main() -> None:
        async with running(configure(tmp_path, **fields)) as front:
            assert (await collect(front.submit(spec("r", script)))).token_ids == expected(8)
            assert reasons == [reason] and front.snapshot.engine_epoch == 2
            await until(lambda: front.not_ready() == [])
            assert (await collect(front.submit(spec("next")))).token_ids == expected(8)

    asyncio.run(main())


def test_five_deaths_in_a_row_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.front.supervisor._BACKOFF_S", (0.0,) * 5)

    async def main() -> None:
        config = configure(tmp_path)
        async with running(config, ready=False, engine=(*ENGINE, "--die", "3")) as front:
            await until(lambda: front.not_ready() == ["engine_failed"])
            assert front.snapshot.engine_epoch == front.snapshot.engine_restarts == 5
            with pytest.raises(Overloaded, match="engine_failed"):
                front.admit(Claim(choices=1))

    asyncio.run(main())


def test_a_configuration_that_cannot_work_is_tried_once(tmp_path: Path) -> None:
    async def main() -> None:
        engine = (*ENGINE, "--die", "2")
        async with running(configure(tmp_path), ready=False, engine=engine) as front:
            await until(lambda: front.never_started)
            assert front.snapshot.engine_restarts == 1

    asyncio.run(main())


def test_a_completed_step_forgives_earlier_deaths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.front.supervisor._BACKOFF_S", (0.0,) * 5)

    async def main() -> None:
        script = " ".join(f"kill={death}@{death}" for death in range(1, 8))
        async with running(configure(tmp_path)) as front:
            delta = await collect(front.submit(spec("r", script, max_tokens=10)))
            assert delta.token_ids == expected(10) and front.snapshot.engine_epoch == 8

    asyncio.run(main())


def test_an_engine_that_is_given_up_fails_what_is_unfinished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.front.supervisor._BACKOFF_S", (0.0,) * 5)

    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            generations = [front.submit(spec(f"r{i}", "kill=0")) for i in range(3)]
            for generation in generations:
                with pytest.raises(EngineFailed, match="exit -9") as caught:
                    await collect(generation)
                assert type(caught.value) is EngineFailed, "an external signal blames nobody"
            assert front.not_ready() == ["engine_failed"] and front.snapshot.engine_restarts == 5

    asyncio.run(main())


def test_an_engine_that_cannot_be_started(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(
            configure(tmp_path), ready=False, engine=("/nonexistent/engine",)
        ) as front:
            await until(lambda: front.snapshot.engine_restarts > 1)

    asyncio.run(main())


def test_admission_counts_reserved_and_running(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path, max_num_seqs=2, max_waiting=2)) as front:
            with pytest.raises(InvalidRequest, match="holds 4"):
                front.admit(Claim(choices=5))
            with front.admit(Claim(choices=3)), pytest.raises(Overloaded):
                front.admit(Claim(choices=2))
            long = [front.submit(spec(f"r{i}", "delay=0.01", 400)) for i in range(3)]
            reserved = front.admit(Claim(choices=1))
            with pytest.raises(Overloaded):
                front.admit(Claim(choices=1))
            reserved.release()
            reserved.release()
            front.admit(Claim(choices=1)).release()
            long[0].cancel()
            with front.admit(Claim(choices=2)):
                pass
            assert front.snapshot.rejected == {"overloaded": 2}
            for generation in long:
                generation.cancel()

    asyncio.run(main())


REFUSED: list[tuple[type[LoramuxError], dict[str, Any]]] = [
    (InvalidRequest, {"prompt_ids": []}),
    (InvalidRequest, {"prompt_ids": [288]}),
    (InvalidRequest, {"prompt_ids": [5, -1]}),
    (ContextLengthExceeded, {"prompt_ids": [5] * 505}),
    (ContextLengthExceeded, {"max_tokens": 508}),
    (DeadlineExceeded, {"deadline_s": 1.0, "arrived_at": time.monotonic() - 2}),
    (Conflict, {"adapters": (AdapterRef("f" * 64),)}),
]


def test_what_the_engine_could_not_take_never_reaches_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            for error, fields in REFUSED:
                with pytest.raises(error):
                    front.submit(spec("r", **fields))
                assert front.snapshot.unfinished == 0
            longest = spec("ok", prompt_ids=[287] * 504)
            assert len((await collect(front.submit(longest))).token_ids) == 8

    asyncio.run(main())


def test_stop_drains_and_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            running_one = front.submit(spec("r", "delay=0.02"))
            pid = await engine_pid(front)
            stopping = asyncio.create_task(front.stop())
            await until(lambda: front.not_ready() == ["draining"])
            with pytest.raises(Overloaded, match="draining"):
                front.admit(Claim(choices=1))
            assert (await collect(running_one)).token_ids == expected(8)
            await stopping
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    asyncio.run(main())


@pytest.mark.parametrize("script", ["kill=3@1", "die=3@1", "die=3"])
def test_draining_outlives_the_engine(tmp_path: Path, script: str) -> None:
    async def main() -> None:
        async with running(configure(tmp_path, drain_s=20)) as front:
            victim = front.submit(spec("r", script))
            await front.stop()
            if script == "die=3":
                with pytest.raises(PoisonRequest):
                    await collect(victim)
            else:
                assert (await collect(victim)).token_ids == expected(8)

    asyncio.run(main())


def test_what_does_not_drain_fails(tmp_path: Path) -> None:
    async def main() -> None:
        async with running(configure(tmp_path, drain_s=0.05)) as front:
            generation = front.submit(spec("r", "hang"))
            await front.stop()
            with pytest.raises(Overloaded, match="stops") as caught:
                await collect(generation)
            assert caught.value.code == "draining"

    asyncio.run(main())


def test_the_front_never_imports_torch(tmp_path: Path) -> None:
    config = configure(tmp_path).model_dump_json()
    code = f"""
import asyncio, sys
sys.path.insert(0, {str(SERVER.parent)!r})
from loramux.config import ServerConfig
from loramux.front.front import Front, lock_data_dir
from tests.front.house import ENGINE, INGEST, collect, spec, until

async def main():
    front = Front(ServerConfig.model_validate_json({config!r}), engine=ENGINE, ingest=INGEST)
    await front.start()
    await until(lambda: front.not_ready() == [])
    await collect(front.submit(spec()))
    await front.stop()

asyncio.run(main())
print([name for name in ("torch", "triton", "numba", "transformers") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_two_servers_cannot_share_a_data_directory(tmp_path: Path) -> None:
    first = lock_data_dir(tmp_path)
    with pytest.raises(ConfigError, match="in use by another server"):
        lock_data_dir(tmp_path)
    first.close()
    lock_data_dir(tmp_path).close()
