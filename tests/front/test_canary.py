"""The canary: what it says of an engine, and what it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.front.scripted import Scripted

from loramux import wire
from loramux.errors import Overloaded


def test_a_canary_that_sings_otherwise_is_noticed(scripted: Callable[[], Scripted]) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        answers = []
        for token in (5, 5, 6):
            asked = asyncio.create_task(it.client.canary())
            await it.settle()
            it.take()
            (name,) = it.rows
            output = wire.Output(name, 0, [token])
            done = wire.StepDone(
                engine_epoch=1,
                step=0,
                outputs=[output],
                finished=[wire.Finished(name, "length")],
            )
            it.client.received(wire.encode(done))
            it.rows.clear()
            answers.append(await asked)
        assert answers == [True, True, False]
        assert it.observations.snapshot.canary_misses == 1
        await it.client.stop()

    asyncio.run(main())


@pytest.mark.parametrize(("code", "misses"), [("overloaded", 0), ("numerical_error", 1)])
def test_a_canary_that_there_was_no_room_for_has_not_sung_otherwise(
    scripted: Callable[[], Scripted], code: str, misses: int
) -> None:
    async def main() -> None:
        it = scripted()
        it.birth()
        it.hear()
        asked = asyncio.create_task(it.client.canary())
        await it.settle()
        it.take()
        (name,) = it.rows
        failed = [wire.Failed(name, code, "its first token would come too late")]
        it.client.received(wire.encode(wire.StepDone(engine_epoch=1, step=0, failed=failed)))
        if code == "overloaded":
            with pytest.raises(Overloaded, match="too late"):
                await asked
        else:
            assert not await asked
        assert it.observations.snapshot.canary_misses == misses
        await it.client.stop()

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
        it.hear()
        await it.settle()
        it.take()
        (name,) = it.rows
        it.rows.clear()
        failed = [wire.Failed(name, "overloaded", "its first token would come too late")]
        it.client.received(wire.encode(wire.StepDone(engine_epoch=2, step=0, failed=failed)))
        await it.settle()
        it.take()
        assert set(it.rows) == {"r0"} and not it.open
        await it.finish()

    asyncio.run(main())
