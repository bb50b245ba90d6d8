"""An engine that computes wrongly is replaced: its requests go on, and it is not heard any more."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.front.fake_engine import ready
from tests.front.house import HERE, collect, configure, expected, running, spec, until
from tests.front.scripted import Scripted

from loramux import wire
from loramux.errors import EngineFailed, Overloaded
from loramux.front.admission import Claim
from loramux.front.canary import TIE, Canary
from loramux.front.supervisor import MAX_DEATHS


def off_key(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A file of the epochs that sing wrongly, and the engine that reads it."""
    file = folder / "off-key"
    engine = (sys.executable, str(HERE / "fake_engine.py"), "--off-key", str(file))
    return file, {"engine": engine}


def test_the_engine_is_replaced_and_its_requests_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        file, commands = off_key(tmp_path)
        gate = tmp_path / "gate"
        async with running(configure(tmp_path), **commands) as front:
            assert await front.canary(), "the first one is right"
            generation = front.submit(spec("r", f"gate={gate}"))
            await until(lambda: front.snapshot.generation_tokens)
            file.write_text("1")
            assert not await front.canary()
            assert front.not_ready() == ["engine_recovering"]
            with pytest.raises(Overloaded) as refused:
                front.admit(Claim())
            assert refused.value.code == "engine_recovering"
            gate.touch()
            assert (await collect(generation)).token_ids == expected(8)
            assert front.snapshot.engine_epoch == 2 and front.snapshot.resumed == 1
            await until(lambda: front.not_ready() == [])
            assert await front.canary() and front.snapshot.canary_misses == 1

    with caplog.at_level(logging.WARNING, "loramux.front.recovery"):
        asyncio.run(main())
    assert "may be what the engine died of" not in caplog.text, "no request is to blame"


def test_engines_that_all_compute_wrongly_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.front.supervisor._BACKOFF_S", (0.0,) * 5)

    async def main() -> None:
        file, commands = off_key(tmp_path)
        async with running(configure(tmp_path), **commands) as front:
            assert await front.canary()
            gate = tmp_path / "gate"
            generation = front.submit(spec("r", f"gate={gate}@1"))
            await until(lambda: front.snapshot.generation_tokens)
            file.write_text(" ".join(map(str, range(1, 30))))
            assert not await front.canary()
            gate.touch()
            with pytest.raises(EngineFailed, match="canary"):
                await collect(generation)
            assert front.not_ready() == ["engine_failed"]
            assert front.snapshot.canary_misses == MAX_DEATHS == front.snapshot.engine_restarts

    asyncio.run(main())


def test_nothing_counts_that_came_with_the_wrong_token_or_after_it(tmp_path: Path) -> None:
    async def main() -> None:
        it = Scripted(configure(tmp_path), tmp_path)
        it.birth()
        it.hear()
        for sings in (5, 6):
            asked = asyncio.create_task(it.client.canary())
            if sings == 6:
                it.submit("r", seed=0, max_tokens=9)
            await it.settle()
            it.take()
            (canary,) = (name for name in it.rows if name.startswith("canary"))
            del it.rows[canary]
            it.step()
            done = wire.decode_from_engine(it.outbox.pop())
            assert isinstance(done, wire.StepDone)
            done.outputs.append(wire.Output(canary, 0, [sings]))
            it.say(done)
            it.hear(1)
        it.step()
        it.hear()
        assert len(it.ledger["r"].output_ids) == 0 and not await asked
        for epoch, sings in ((2, 6), (3, 5)):
            it.die("canary")
            it.birth()
            await it.turn()
            assert set(it.rows) == {f"canary-{epoch + 1}"} and not it.open, "before all others"
            it.rows.clear()
            output = wire.Output(f"canary-{epoch + 1}", 0, [sings])
            it.say(wire.StepDone(engine_epoch=epoch, step=0, outputs=[output]))
            await it.turn()
            assert set(it.rows) == ({"r"} if sings == 5 else set())
        assert it.open
        await it.finish()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("gap", "right"), [(TIE / 2, True), (TIE * 2, False), (None, False)], ids=str
)
def test_a_tie_is_no_mismatch(gap: float | None, right: bool) -> None:
    async def main() -> None:
        canary, info = Canary(), ready(1)

        def sing(token: int, top: list[tuple[int, float]]) -> tuple[bool | None, bool]:
            submit, answer = canary.ask(info)
            assert submit.sampling.logprobs == 2
            logprob = wire.TokenLogprob(token, -1.0, 1, top)
            output = wire.Output(submit.request_id, 0, [token], [logprob])
            heard = canary.hear(wire.StepDone(engine_epoch=1, step=0, outputs=[output]))
            return heard, answer.result()

        assert sing(5, []) == (True, True)
        top = [(6, -1.0), (7 if gap is None else 5, -1.0 - (gap or 0.0))]
        assert sing(6, top) == (right, right)

    asyncio.run(main())


def test_a_canary_that_finds_no_memory_says_nothing_of_the_engine() -> None:
    async def main() -> None:
        canary, info = Canary(), ready(1)
        for code, verdict in (("overloaded", None), ("numerical_error", False)):
            submit, answer = canary.ask(info)
            failed = wire.Failed(submit.request_id, code, "as scripted")
            heard = canary.hear(wire.StepDone(engine_epoch=1, step=0, failed=[failed]))
            assert heard is verdict
            if verdict is None:
                with pytest.raises(Overloaded):
                    answer.result()

    asyncio.run(main())


def test_a_probe_that_is_refused_holds_nobody_up(scripted: Callable[[], Scripted]) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        for index in range(2):
            it.submit(f"r{index}", seed=index, max_tokens=9)
        it.box.note(["r0"])
        it.die("exit -11")
        it.birth()
        await it.turn()
        (name,) = it.rows
        it.rows.clear()
        failed = [wire.Failed(name, "overloaded", "its first token would come too late")]
        it.client.received(wire.encode(wire.StepDone(engine_epoch=2, step=0, failed=failed)))
        await it.settle()
        it.take()
        assert set(it.rows) == {"r0"} and not it.open
        await it.finish()

    asyncio.run(main())
