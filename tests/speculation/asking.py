"""What the tests of drafters share: requests of any owner, asked one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loramux.request import AdapterRef, Request, SamplingParams, Speculation
from loramux.speculation.drafter import Ask, Drafter, Guess

ADAPTER = (AdapterRef("a" * 64),)
OWNERS: dict[str, dict[str, Any]] = {
    "tenant": {"tenant": "other"},
    "adapter": {"adapters": ADAPTER},
    "scale": {"adapters": (AdapterRef("a" * 64, 0.5),)},
    "two adapters": {"adapters": (*ADAPTER, AdapterRef("b" * 64))},
    "salt": {"cache_salt": "other"},
}
"""In what text of two owners may differ."""


def request_of(
    name: str,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    *,
    drafters: tuple[str, ...] = ("suffix", "trigram"),
    tree: bool = False,
    **whose: Any,
) -> Request:
    return Request(
        name,
        prompt_ids=prompt,
        output_ids=output,
        sampling=SamplingParams(seed=0, max_tokens=200),
        speculation=Speculation(drafters=drafters, tree=tree) if drafters else None,
        **whose,
    )


def guess(drafter: Drafter, request: Request, most: int = 8) -> Guess:
    return drafter.propose([Ask(request, most)])[0]


def go_on(request: Request, token_ids: Sequence[int], wrong: Sequence[int] = ()) -> None:
    """As a step does: guesses are written behind what is known, then what was drawn."""
    end = request.num_ids + len(wrong)
    request.ids[request.num_ids : end] = wrong
    request.expect()
    request.receive(token_ids)
