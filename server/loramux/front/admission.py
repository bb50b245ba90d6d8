"""Who comes in, decided before anything is tokenized: places, tokens, and nobody takes all of them.

A request reserves its choices and the tokens that it may need, prompts that came as text by their
bytes. Once it is tokenized its choices count with what they really are; that estimates were too low
is borne, so nobody who was tokenized is refused for want of room.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from loramux.errors import InvalidRequest, Overloaded
from loramux.front.generation import GenerationSpec
from loramux.front.quotas import Quotas
from loramux.request import Adapters

BYTES_PER_TOKEN = 3
"""Tokenizers make more of a token in most texts, so that most estimates are too high."""
MOST_OUTPUT = 4096
"""Of one choice's ``max_tokens`` so many are counted: chats that set none may fill the context and
seldom do, and when frames run out rows are preempted, not refused."""
QUEUED_POOLS = 8
"""Unless told otherwise, requests may wait whose tokens would fill the pool so many times."""
SHARE = 8
"""A tenant may hold this many times what is still free, and its traffic on one adapter list this
many times what is left of that: one tenant has eight ninths of the room at most, one adapter eight
ninths of those, and who comes after a flood still finds some."""
_MAX_RETRY_S = 60.0
_ENDS = 64


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a request asks for, as far as it is known before its prompts are tokenized.

    ``prompt_tokens`` are those of all its choices, counted where prompts came as ids and estimated
    where they are text; ``output_tokens`` are one choice's at most; ``certain`` tokens of all that
    are no estimate.
    """

    choices: int = 1
    tenant: str = ""
    adapters: Adapters = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    certain: int = 0

    @property
    def tokens(self) -> int:
        """All it may need."""
        return self.prompt_tokens + self.choices * self.output_tokens

    @property
    def counted(self) -> int:
        """What of it takes room."""
        return self.prompt_tokens + self.choices * min(self.output_tokens, MOST_OUTPUT)


class Pace:
    """How fast choices end, and from that when those who were refused should come back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[float] = deque(maxlen=_ENDS)
        self._told_to_wait = 0.0
        self._told_at = clock()

    def ended(self) -> None:
        """A choice ended, its place is free."""
        self._ends.append(self._clock())

    def rest(self) -> None:
        """There is nothing to do: how long that lasts says nothing of the pace."""
        self._ends.clear()

    def retry_after_s(self, num: int) -> float:
        """When ``num`` places may be free for somebody refused now: behind all who were told to
        come back before, one for each place that frees itself. 1 to 60 seconds."""
        now = self._clock()
        rate = self._rate(now)
        if rate == 0:
            return 1.0
        left = self._told_to_wait - rate * (now - self._told_at)
        self._told_to_wait = min(max(0.0, left) + num, _MAX_RETRY_S * rate)
        self._told_at = now
        return min(max(1.0, self._told_to_wait / rate), _MAX_RETRY_S)

    def _rate(self, now: float) -> float:
        if len(self._ends) < 2 or now <= self._ends[0]:
            return 0.0
        return (len(self._ends) - 1) / (now - self._ends[0])


class Room:
    """What is reserved and in flight, in choices and in tokens, and whose it is.

    ``max_tokens`` is 0 until an engine has said what its pool holds; nobody is let in before.
    """

    def __init__(
        self,
        places: int,
        rejected: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.places = places
        self.max_tokens = 0
        self.choices = 0
        self.tokens = 0
        self.pace = Pace(clock)
        self._rejected = rejected
        self._choices: Counter[Hashable] = Counter()
        self._tokens: Counter[Hashable] = Counter()

    @property
    def full(self) -> bool:
        """There is no place for another choice."""
        return self.choices >= self.places

    def refuse(self, message: str, num: int = 1, *, code: str = Overloaded.code) -> Overloaded:
        """The refusal of ``num`` choices, counted, with the time after which to ask again."""
        self._rejected(code)
        return Overloaded(message, code=code, retry_after_s=self.pace.retry_after_s(num))

    def check(self, claim: Claim) -> None:
        """Whether the claim may come in; takes nothing. Raises Overloaded, and InvalidRequest for
        more choices than there are places. A claim on more tokens than there are waits until the
        room is empty: what it turns out to need may fit."""
        if claim.choices > self.places:
            raise InvalidRequest(
                f"the request asks for {claim.choices} completions; this server holds "
                f"{self.places}",
                param="n",
            )
        tokens = min(claim.counted, self.max_tokens)
        if self.choices + claim.choices > self.places:
            raise self.refuse(f"{self.choices} requests are running or waiting", claim.choices)
        if self.tokens + tokens > self.max_tokens:
            raise self.refuse(
                f"{self.tokens} tokens of requests are running or waiting, and this one may need "
                f"{tokens}; together they may be {self.max_tokens}",
                claim.choices,
            )
        for held, asked, free in (
            (self._choices, claim.choices, self.places - self.choices),
            (self._tokens, tokens, self.max_tokens - self.tokens),
        ):
            of_tenant, of_adapters = (held[key] for key in _keys(claim.tenant, claim.adapters))
            if of_tenant and of_tenant + asked > SHARE * free:
                raise self.refuse(_FLOODED.format("of one tenant"), claim.choices)
            left = math.ceil((SHARE * free - of_tenant) / (SHARE + 1))  # for all of the tenant
            if of_adapters and of_adapters + asked > SHARE * left:
                raise self.refuse(_FLOODED.format("for one adapter"), claim.choices)

    def reserve(self, claim: Claim) -> None:
        """Take room for a claim that was checked, while its choices are not submitted yet."""
        self._add(claim.tenant, claim.adapters, claim.choices, claim.counted)

    def release(self, claim: Claim) -> None:
        """Give it back."""
        self._add(claim.tenant, claim.adapters, -claim.choices, -claim.counted)

    def start(self, spec: GenerationSpec) -> None:
        """A choice was submitted: it takes what it really needs."""
        self._add(spec.tenant, spec.adapters, 1, _needs(spec))

    def end(self, spec: GenerationSpec) -> None:
        """It had its terminal event."""
        self._add(spec.tenant, spec.adapters, -1, -_needs(spec))
        self.pace.ended()
        if not self.choices:
            self.pace.rest()

    def _add(self, tenant: str, adapters: Adapters, choices: int, tokens: int) -> None:
        self.choices += choices
        self.tokens += tokens
        for key in _keys(tenant, adapters):
            for counts, num in ((self._choices, choices), (self._tokens, tokens)):
                counts[key] += num
                if not counts[key]:
                    del counts[key]


class Admission:
    """Room for choices not yet submitted. Use as ``with front.admit(claim): ...``.

    It is held until ``release`` (or the end of the ``with``), so a burst is refused at its first
    byte and not after it was tokenized. Submit everything inside the ``with``, without an ``await``
    after the first ``submit``: a submitted choice holds its own place.
    """

    def __init__(self, room: Room, quotas: Quotas, claim: Claim) -> None:
        self._room, self._quotas, self._claim = room, quotas, claim
        tenant, num = claim.tenant, claim.choices
        self._charged = quotas.hold(tenant, num, claim.tokens, claim.certain)
        try:
            room.check(claim)
        except BaseException:
            quotas.release(tenant, num, self._charged)
            raise
        room.reserve(claim)
        self._held = True

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the room back. Idempotent."""
        if self._held:
            self._held = False
            claim = self._claim
            self._room.release(claim)
            self._quotas.release(claim.tenant, claim.choices, self._charged)


_FLOODED = "requests {} hold most of the room; the rest is for others"


def _keys(tenant: str, adapters: Adapters) -> tuple[Hashable, Hashable]:
    return tenant, (tenant, adapters)


def _needs(spec: GenerationSpec) -> int:
    return len(spec.prompt_ids) + min(spec.sampling.max_tokens, MOST_OUTPUT)


def estimate(prompt: str | list[int]) -> int:
    """Tokens of a prompt that nobody has tokenized."""
    if isinstance(prompt, str):
        return -(-len(prompt.encode()) // BYTES_PER_TOKEN)
    return len(prompt)
