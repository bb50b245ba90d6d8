"""A server that somebody else started: what it serves, prompts for it, and a plan sent to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from loramux.bench import traffic
from loramux.bench.figures import formulas, told
from loramux.bench.live import shown
from loramux.bench.open_loop import Bounds, Now, Record, Run, send
from loramux.bench.openai import OpenAi
from loramux.bench.traffic import Arrival, Traffic

PROBE = 2**31
"""The index of the first request's prompt, which is no other's: prefix caches get to know it."""
PROBE_WORDS = 16
PROBE_S = 60.0
DRAIN_S = 60.0


class Refused(Exception):
    """The server does not answer the first request; the message is the kind of failure."""


def listed(url: str, key: str = "") -> tuple[str, list[str]]:
    """The base and the adapters of a server's /v1/models. Raises httpx.HTTPError, and ValueError
    for an answer that names no base."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    where = f"{url.rstrip('/')}/v1/models"
    answer = httpx.get(where, headers=headers, timeout=30).raise_for_status()
    try:
        cards = answer.json()["data"]
        bases = [card["id"] for card in cards if not card.get("parent")]
        adapters = [card["id"] for card in cards if card.get("parent")]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{where} is no list of models: is it a server with OpenAI's API?"
        ) from None
    if not bases:
        raise ValueError(f"{where} lists no base model")
    return bases[0], adapters


@dataclass
class Words:
    """Prompts of random words: nobody here knows the server's vocabulary."""

    seed: int
    a_token: float = 1.0

    def prompt(self, index: int, tokens: int) -> str:
        """About so many tokens."""
        return traffic.prompt_words(self.seed, index, max(1, round(tokens * self.a_token)))


class Bench:
    """Traffic for a server, whose adapters are ``models``, by name. Raises ValueError for a URL
    that is no address."""

    def __init__(self, url: str, models: Sequence[str], traffic: Traffic, key: str = "") -> None:
        self.traffic, self.words = traffic, Words(traffic.seed)
        self._openai = OpenAi(
            url,
            models[0],
            models,
            self.words.prompt,
            keys=[key] if key else [],
            extra={"ignore_eos": True},
        )

    async def run(self) -> dict[str, Any]:
        """Ask once, to know how long words are, then everything; a report. ``failed`` in it says
        why nothing was measured. Raises Refused."""
        plan = traffic.draw(self.traffic)
        try:
            self.words.a_token = await self._words_a_token()
            with shown("bench", len(plan)) as show:
                run = await send(plan, self._openai.ask, drain_s=DRAIN_S, show=show)
        finally:
            await self._openai.close()
        found = {"formulas": formulas(), "words_a_token": self.words.a_token, "failed": failed(run)}
        return told(run) | found

    async def _words_a_token(self) -> float:
        async def ask(_: int, record: Record, now: Now) -> None:
            await self._openai.ask(PROBE, record, now)

        probe = Arrival(0.0, 0, 0, 0, PROBE_WORDS, 1, False)
        [record] = (await send([probe], ask, drain_s=PROBE_S)).records
        if record.status != "ok":
            raise Refused(record.error or f"no answer within {PROBE_S:g} s")
        return PROBE_WORDS / max(1, record.prompt_tokens)


def failed(run: Run) -> str | None:
    """Why a run measured nothing, or None."""
    if not any(record.status == "ok" for record in run.records):
        return f"none of {len(run.records)} requests ended well"
    return run.bottleneck(Bounds())
