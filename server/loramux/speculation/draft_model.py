"""A small model that guesses: a second checkpoint on the same pool (speculative decoding,
arXiv 2211.17192, 2302.01318), drawing with the request's own noise.

The rows of a step draft together, one token each at a time:

    catch up: all that is known | guess 1 | guess 2 | ... | a row that stopped is out of the batch

Both models draw the token that minimises E/q with the same E, which is the best that a guess can do
without knowing the target: where q is near p, so are the tokens. A request's adapters change what
the target says; its companion adapters do the same to the draft model.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from loramux.batch import Batch, Row
from loramux.engine.models import Partner
from loramux.errors import LoramuxError
from loramux.memory.pool import Pool
from loramux.model.runner import Plan, Scored
from loramux.request import Adapters, Request
from loramux.sampling.sampler import Sampler
from loramux.speculation.acceptance import AcceptanceHead, stops
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.followers import Follower, Followers

NEWEST_WEIGHT = 0.1
"""Of the newest step in the estimate of what one takes."""


@dataclass(eq=False)
class _Round:
    """The guesses of one request in this step, ``most`` at most, of which all were likely to be
    right with ``chance``."""

    follower: Follower
    most: int
    guesses: list[int] = field(default_factory=list)
    chance: float = 1.0

    def row(self, num_tokens: int) -> Row:
        """The next tokens that the draft model computes."""
        request, kv = self.follower.request, self.follower.kv
        row = Row(request, num_tokens)
        row.kv = kv
        row.samples = kv.num_computed + num_tokens == request.num_ids + len(self.guesses)
        return row


class DraftModel:
    """Guesses by ``partner``, a row's number of them chosen by ``head`` where there is one."""

    def __init__(
        self, partner: Partner, pool: Pool, sampler: Sampler, head: AcceptanceHead | None = None
    ) -> None:
        self._partner = partner
        self._sampler = sampler
        self._head = head
        self._followers = Followers(partner.kv, pool)
        self._bare: set[Request] = set()
        self._step_s: dict[int, float] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        """See Drafter."""
        worn, held = self._worn([ask.request for ask in asks])
        rounds: dict[Request, _Round] = {}
        try:
            for ask in asks:
                # The last token that is guessed is not computed.
                most = min(ask.most, self._partner.max_model_len - ask.request.num_ids + 1)
                if most > 0 and ask.request in worn and not ask.request.wants_prompt_logprobs:
                    follower = self._followers.wake(ask.request, worn[ask.request])
                    rounds[ask.request] = _Round(follower, most)
            plan = self._planned(self._catching_up(rounds.values()))
            while plan is not None:
                plan = self._step(plan, rounds)
        finally:  # also when there is no memory for it: the requests go on without guesses
            for going in rounds.values():
                self._followers.rest(going.follower)
            for digest in held:
                self._partner.residency.release(digest)
        return [
            Guess(rounds[ask.request].guesses) if ask.request in rounds else Guess() for ask in asks
        ]

    def ended(self, request: Request) -> None:
        """See Drafter."""
        self._followers.ended(request)
        self._bare.discard(request)

    def seconds(self, rows: int, most: int) -> float:
        """See Priced; 0 before the first step was measured, and what lags is not counted."""
        if not self._step_s:
            return 0.0
        nearest = min(self._step_s, key=lambda known: abs(known - rows.bit_length()))
        return most * self._step_s[nearest]

    # -- what it wears ---------------------------------------------------------------------------

    def _worn(self, requests: Sequence[Request]) -> tuple[dict[Request, Adapters], list[str]]:
        """What each request's row wears, where all of that is here, and what is held for it; the
        rest is on its way."""
        residency = self._partner.residency
        worn: dict[Request, Adapters] = {}
        held: list[str] = []
        missing: list[str] = []
        for request in requests:
            adapters = () if request in self._bare else self._companions(request)
            here = [ref.digest for ref in adapters if residency.is_resident(ref.digest)]
            for digest in here:
                (residency.hold if request in self._followers else residency.lease)(digest)
            held += here
            if len(here) < len(adapters):
                absent = [ref.digest for ref in adapters if ref.digest not in here]
                if self._load(absent):
                    missing += absent
                    continue
                self._bare.add(request)
                adapters = ()
            worn[request] = adapters
        if missing:
            residency.prioritize(missing)
        return worn, held

    def _companions(self, request: Request) -> Adapters:
        return request.companions.get(self._partner.model_id, ())

    def _load(self, digests: list[str]) -> bool:
        """Have them come in; False if one cannot be had at all: less likely guesses are better than
        none."""
        try:
            for digest in digests:
                self._partner.residency.load(digest, ahead=True)
        except LoramuxError:
            return False
        return True

    # -- drafting --------------------------------------------------------------------------------

    def _catching_up(self, rounds: Iterable[_Round]) -> list[Row]:
        """Everybody's known ids, as far as a step's tokens and the frames go; who is nearly there
        goes first."""
        budget = self._partner.decoder.max_tokens
        rows: list[Row] = []
        for going in sorted(rounds, key=lambda going: going.follower.lag):
            follower = going.follower
            num_tokens = min(follower.lag, budget)
            whole = follower.request.num_ids + going.most - 1
            if num_tokens and self._followers.grow(follower, whole):
                rows.append(going.row(num_tokens))
                budget -= num_tokens
        return rows

    def _step(self, plan: Plan, rounds: dict[Request, _Round]) -> Plan | None:
        """Compute ``plan`` and guess one token more where its rows reach the end; the step after it
        of those that go on."""
        rows, began = plan.batch.rows, time.perf_counter()
        scored = self._partner.runner.forward(plan)
        for row in rows:
            row.kv.num_computed += row.num_tokens
        drawing = [rounds[row.request] for row in rows if row.samples]
        goes_on = self._guess(drawing, scored) if drawing else []
        caught_up = all(row.num_tokens == 1 for row in rows)
        if caught_up:
            self._took(len(rows), time.perf_counter() - began)
        if caught_up and len(goes_on) == len(rows):
            return self._partner.runner.onward(plan)
        return self._planned([going.row(1) for going in goes_on])

    def _planned(self, rows: list[Row]) -> Plan | None:
        """The step of ``rows``; None if there are none."""
        return self._partner.runner.plan(Batch.of(self._partner.model_id, rows)) if rows else None

    def _guess(self, drawing: list[_Round], scored: Scored) -> list[_Round]:
        """One guess more for each of ``drawing``; who shall make another."""
        if self._head is not None and drawing[0].guesses:  # the first step computed what is known
            for going, chance in zip(drawing, self._head(scored.hidden), strict=True):
                going.chance *= chance
        goes_on = []
        for going, token in zip(drawing, self._drawn(drawing, scored.logits), strict=True):
            request = going.follower.request
            if token < 0 or token in request.sampling.stop_token_ids:
                continue  # nothing to guess, or nothing comes after it
            request.ids[request.num_ids + len(going.guesses)] = token
            going.guesses.append(token)
            if len(going.guesses) < going.most and not stops(going.chance):
                goes_on.append(going)
        return goes_on

    def _drawn(self, drawing: list[_Round], logits: Tensor) -> list[int]:
        """The tokens that the draft model draws for itself, -1 where it cannot."""
        lines: list[tuple[str, int]] = []
        guessed: dict[int, Sequence[int]] = {}
        for line, going in enumerate(drawing):
            request = going.follower.request
            lines.append((request.id, request.num_outputs + len(going.guesses)))
            if going.guesses:
                guessed[line] = going.guesses
        tokens: list[int] = self._sampler.sample(logits, lines, guessed).token_ids.tolist()
        return tokens

    def _took(self, rows: int, seconds: float) -> None:
        size = rows.bit_length()
        before = self._step_s.get(size, seconds)
        self._step_s[size] = before + NEWEST_WEIGHT * (seconds - before)
