"""What a random history is made of: a server with its folder, the model beside it, and the actions
to choose from."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis.stateful import RuleBasedStateMachine
from tests.front.played import Errors, House
from tests.front.visible_model import SHARED, Model, Refused

from loramux.errors import LoramuxError
from loramux.front.uploads import UploadWriter

T = TypeVar("T")
TENANTS = ["alice", "bob", SHARED]
NAMES = ["cat", "dog", "pet"]

# What arguments are drawn from; some more often than others, so that histories of one name go deep.
TENANT = ["alice", "alice", "alice", "bob", SHARED]
NAME = ["cat", "cat", "cat", "dog"]
USERS = ["ann", "ben"]
EXPECTED = ["right", "right", "right", None, 0, 7]
PICK = range(100)
EITHER = [False, True]
TTL = [None, None, 10**6]

ACTIONS: list[tuple[Any, tuple[Sequence[Any], ...]]] = []


def action(*options: Sequence[Any], often: int = 1) -> Callable[[T], T]:
    """A step of a history, with what each of its arguments is one of. These are not rules of
    Hypothesis's own, of which it leaves some out at random: without uploads, nothing happens."""

    def remember(method: T) -> T:
        ACTIONS.extend([(method, options)] * often)
        return method

    return remember


class Machine(RuleBasedStateMachine):
    """A server that starts, is asked, and stops."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.data_dir = Path(self.folder.name) / "data"
        self.model = Model()
        self.loop = asyncio.new_event_loop()
        self.errors = Errors()
        logging.getLogger("loramux").addHandler(self.errors)
        self.open()

    def open(self) -> None:
        """A server starts."""
        self.writers: list[tuple[UploadWriter, bytes]] = []
        self.running: list[str] = []
        self.resolved: list[str] = []

        async def start() -> None:
            self.house = House(self.data_dir)
            await self.house.start()

        self.loop.run_until_complete(start())
        self.service, self.stock = self.house.service, self.house.stock
        self.ingest, self.engine = self.house.ingest, self.house.engine

    def do(self, work: Awaitable[T]) -> T:
        """Run it, and then all that it has set going, up to the verdicts that are held back."""

        async def whole() -> T:
            try:
                return await work
            finally:
                await self.house.settle()

        return self.loop.run_until_complete(whole())

    def told(self, work: Awaitable[T], expected: Refused | None) -> T | None:
        """The answer, which is a refusal exactly when the model says so, and with its code."""
        try:
            answer = self.do(work)
        except LoramuxError as error:
            assert expected is not None, error
            assert error.code == expected.code
            return None
        assert expected is None, f"it should have been refused: {expected.code}"
        return answer

    def act(self, choose: Callable[[Sequence[Any]], Any]) -> None:
        """One action, chosen like its arguments."""
        method, arguments = choose(ACTIONS)
        method(self, *map(choose, arguments))

    def close(self) -> None:
        self.loop.run_until_complete(self.house.stop())

    def teardown(self) -> None:
        self.close()
        self.loop.close()
        logging.getLogger("loramux").removeHandler(self.errors)
        self.folder.cleanup()
