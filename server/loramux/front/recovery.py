"""What the unfinished requests do when a new engine is there: go on, the suspects of the last
death first, each set of them apart."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from loramux.errors import Overloaded, PoisonRequest
from loramux.front.ledger import Entry, Ledger
from loramux.front.suspects import Suspects
from loramux.front.vital import Vital

log = logging.getLogger(__name__)


class Recovery:
    """Gives the unfinished requests of ``ledger`` to one engine after the other.

    ``give`` hands a choice to the engine. ``take_back`` returns when the engine has forgotten
    choices, and all it had made of them is in the ledger. ``probe`` returns when the engine has
    made a token that is no client's, or has refused to: then the next death is not its own fault.
    False: it was the wrong one, and the engine's end is near.
    """

    def __init__(
        self,
        ledger: Ledger,
        suspects: Suspects,
        vital: Vital,
        *,
        give: Callable[[Entry], None],
        take_back: Callable[[Sequence[str]], Awaitable[None]],
        probe: Callable[[], Awaitable[bool]],
    ) -> None:
        self._ledger = ledger
        self._suspects = suspects
        self._vital = vital
        self._give_to_engine = give
        self._take_back = take_back
        self._probe = probe
        self._waiting: set[str] = set()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def going_on(self) -> bool:
        """Suspects are running apart: nobody else is let in."""
        return self._task is not None and not self._task.done()

    def give(self, entry: Entry) -> None:
        """The engine is to work on this choice."""
        self._waiting.discard(entry.spec.request_id)
        self._give_to_engine(entry)

    def begin(self, *, doubted: bool = False) -> None:
        """A new engine is there, and has nothing yet; ``doubted``: nor shall it get anything before
        its probe."""
        if doubted or self._suspects.next(self._ledger):
            self._task = self._vital.spawn(self._run(), "recovery")
        else:
            self._give_the_rest()

    def changed(self) -> None:
        """Something came of a choice, or it ended."""
        self._news.set()

    def died(self, running: Sequence[str], *, blamed: bool) -> None:
        """The engine is gone, and was computing ``running``. ``blamed``: it died of what it did. If
        it does not say of what, it may be anything it had."""
        if self._task is not None:
            self._task.cancel()
            self._task = None
        unfinished = [entry.spec.request_id for entry in self._ledger.unfinished()]
        before, self._waiting = self._waiting, set(unfinished)
        if not blamed:
            return
        named = [request_id for request_id in running if request_id in self._ledger]
        if not running:
            named = [request_id for request_id in unfinished if request_id not in before]
        poison = self._suspects.died(named, beside=len(running) > len(named))
        log.warning("%d requests may be what the engine died of", len(named))
        if poison is not None:
            log.error("%s ends engines and is given up", poison)
            self._ledger.fail(
                poison,
                PoisonRequest("the engine died each time it computed this request alone"),
            )

    async def _run(self) -> None:
        try:
            with contextlib.suppress(Overloaded):  # with no room for it the engine is there as well
                if not await self._probe():
                    return
            while apart := self._suspects.next(self._ledger):
                await self._run_apart(apart)
                self._suspects.passed()
                if self._suspects.next(self._ledger):
                    left = [request_id for request_id in apart if request_id in self._ledger]
                    await self._take_back(left)
                    self._waiting.update(left)
            self._give_the_rest()
        except Overloaded:
            pass  # the engine is gone

    async def _run_apart(self, request_ids: Sequence[str]) -> None:
        wanted: dict[str, int] = {}
        for request_id in request_ids:
            entry = self._ledger[request_id]
            wanted[request_id] = len(entry.output_ids) + self._suspects.patience(request_id)
            self.give(entry)
        while any(
            request_id in self._ledger and len(self._ledger[request_id].output_ids) < num
            for request_id, num in wanted.items()
        ):
            self._news.clear()
            await self._news.wait()

    def _give_the_rest(self) -> None:
        for entry in self._ledger.unfinished():
            if entry.spec.request_id in self._waiting:
                self.give(entry)
