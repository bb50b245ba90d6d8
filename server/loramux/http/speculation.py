"""Two ways to need fewer steps of the large model, as a request asks for them and as it is told.

``speculation``: drafters guess ahead. Whatever it says, the tokens are the same (but for
``"acceptance": "typical"``). ``entropy_adaptive``: a small model takes over where the text is easy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, UnsetType
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from loramux.errors import InvalidRequest
from loramux.front.catalog import Served
from loramux.front.drafts import Drafted
from loramux.front.generation import Done
from loramux.http.answers import (
    ByModel,
    DrafterUsage,
    EntropyAdaptiveUsage,
    PredictionDetails,
    SpeculationUsage,
    UsageDetails,
)
from loramux.http.failures import invalid
from loramux.request import SMALL_MODEL_ID, EntropyAdaptive, Speculation
from loramux.wire import Ready

MAX_DRAFTERS = 8
MAX_DRAFT_TOKENS = 64
MAX_WINDOW = 64
MAX_DWELL = 1024

HEADS_DRAFTER = "medusa"
"""Guesses with heads, the base's or an adapter's own. Typical acceptance is for its guesses."""


class _Exact(BaseModel):
    """Strict like the request itself, and no key may be unknown: a misspelt one would be a wish
    that is silently not met."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        hide_input_in_errors=True,
    )


class SpeculationChoice(_Exact):
    """Who guesses ahead, in this order; without ``drafters`` every one that the server has."""

    drafters: Annotated[list[str], Field(min_length=1, max_length=MAX_DRAFTERS)] | None = None
    max_draft_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] | None = None
    tree: bool | None = None
    acceptance: Literal["exact", "typical"] | None = None


class EntropyAdaptiveChoice(_Exact):
    """The large model takes over while the mean entropy of the last ``window`` distributions is
    above ``threshold`` bits, the small one otherwise; neither goes before ``min_dwell`` tokens."""

    threshold: Annotated[float, Field(ge=-1)]
    window: Annotated[int, Field(ge=1, le=MAX_WINDOW)] | None = None
    min_dwell: Annotated[int, Field(ge=0, le=MAX_DWELL)] | None = None
    start: Literal["small", "large"] | None = None

    def wanted(self) -> EntropyAdaptive:
        """The same with nothing left to default."""
        return EntropyAdaptive(**self.model_dump(exclude_none=True))


Choice = TypeVar("Choice", bound=_Exact)


def _object(name: str, kind: type[Choice], value: Any) -> Choice:
    if not isinstance(value, dict):
        raise InvalidRequest(f"{name}: must be an object", param=name)
    if value.keys() - kind.model_fields.keys():
        known = ", ".join(kind.model_fields)
        raise InvalidRequest(f"{name}: has a key that is none of {known}", param=name)
    try:
        return kind.model_validate(value)
    except ValidationError as exc:
        errors = exc.errors(include_input=False, include_context=False, include_url=False)
        field, *rest = errors[0]["loc"]
        raise invalid([{**errors[0], "loc": (f"{name}.{field}", *rest)}]) from None


def _speculation(value: Any) -> Any:
    if value is None or (isinstance(value, str) and value in ("auto", "off")):
        return value
    if isinstance(value, str):
        raise InvalidRequest('speculation: must be "auto", "off" or an object', param="speculation")
    choice = _object("speculation", SpeculationChoice, value)
    drafters = choice.drafters or []
    for index, name in enumerate(drafters):
        if name in drafters[:index]:
            param = f"speculation.drafters[{index}]"
            raise InvalidRequest(f"{param}: is there twice", param=param)
    return choice


def _entropy_adaptive(value: Any) -> Any:
    return None if value is None else _object("entropy_adaptive", EntropyAdaptiveChoice, value)


SpeculationField = Annotated[
    Literal["auto", "off"] | SpeculationChoice | None,
    PlainValidator(
        _speculation,
        json_schema_input_type=Literal["auto", "off"] | SpeculationChoice | None,
    ),
]
EntropyAdaptiveField = Annotated[
    EntropyAdaptiveChoice | None,
    PlainValidator(_entropy_adaptive, json_schema_input_type=EntropyAdaptiveChoice | None),
]


def heads_of(served: Served) -> str:
    """The digest of the Medusa heads that go with what a request wears, where it is not the base's
    ("") that do: they are made for one adapter, so not when two that are worn have some."""
    own = [digest for digest in served.heads if digest]
    return own[0] if len(own) == 1 else ""


def speculation_of(
    asked: Literal["auto", "off"] | SpeculationChoice | None,
    default: Literal["auto", "off"],
    info: Ready,
    heads: str = "",
) -> Speculation | None:
    """What a request asks for, or else the server's ``default``, on this engine; None: nothing.
    ``heads`` of an adapter (see ``heads_of``) guess also where the base has none.

    Raises InvalidRequest for drafters it does not have.
    """
    there = info.drafters
    if heads and HEADS_DRAFTER not in there:
        there = (*there, HEADS_DRAFTER)
    asked = asked or default
    if asked == "off":
        return None
    every = there[:MAX_DRAFTERS]
    if not isinstance(asked, SpeculationChoice):
        return Speculation(drafters=every, heads=heads) if every else None
    for index, name in enumerate(asked.drafters or ()):
        if name not in there:
            param, names = f"speculation.drafters[{index}]", ", ".join(there) or "none"
            raise InvalidRequest(
                f"{param}: no such drafter on this server; there are: {names}", param=param
            )
    if not every:
        raise InvalidRequest("speculation: this server has no drafters", param="speculation")
    typical = asked.acceptance == "typical"
    if typical and HEADS_DRAFTER not in there:
        param = "speculation.acceptance"
        raise InvalidRequest(f"{param}: typical is not supported by this server", param=param)
    return Speculation(
        drafters=tuple(asked.drafters or every),
        max_draft_tokens=asked.max_draft_tokens or 8,
        tree=bool(asked.tree),
        typical=typical,
        heads=heads,
    )


def entropy_of(
    asked: EntropyAdaptiveChoice | None, served: Served, info: Ready
) -> EntropyAdaptive | None:
    """What a request asks for. Raises InvalidRequest when there is no small model, or none that
    goes with what the request wears."""
    if asked is None:
        return None
    reason = ""
    if SMALL_MODEL_ID not in info.partners:
        reason = "this server has no small model"
    elif len(served.adapters) > 1:
        reason = "not for several adapters at once"
    elif served.adapters and not served.companions.get(SMALL_MODEL_ID):
        reason = "the adapter has no companion for the small model"
    if reason:
        raise InvalidRequest(f"entropy_adaptive: {reason}", param="entropy_adaptive")
    return asked.wanted()


def usage_details(
    speculation: Speculation | None, entropy: EntropyAdaptive | None, ends: Sequence[Done]
) -> UsageDetails:
    """What a finished request is told of both; ``ends`` of all its choices."""
    details = UsageDetails(
        "off" if speculation is None else _speculation_usage(speculation, ends),
        lossless=entropy is None and not (speculation is not None and speculation.typical),
    )
    if entropy is not None:
        details.entropy_adaptive = _entropy_usage(entropy, ends)
    return details


def predictions(details: UsageDetails) -> PredictionDetails | UnsetType:
    """OpenAI's words for it; UNSET when nobody guessed."""
    told = details.speculation
    if not isinstance(told, SpeculationUsage):
        return UNSET
    return PredictionDetails(told.accepted, told.drafted - told.accepted)


def _speculation_usage(speculation: Speculation, ends: Sequence[Done]) -> SpeculationUsage:
    by_drafter = {
        name: _sum(done.drafts[name] for done in ends if name in done.drafts)
        for name in dict.fromkeys((*speculation.drafters, *(n for d in ends for n in d.drafts)))
    }
    total = _sum(by_drafter.values())
    return SpeculationUsage(
        speculation.drafters,
        speculation.max_draft_tokens,
        speculation.tree,
        "typical" if speculation.typical else "exact",
        total.steps,
        total.drafted,
        total.accepted,
        by_drafter,
        (speculation.heads or "base") if HEADS_DRAFTER in speculation.drafters else UNSET,
    )


def _sum(counts: Iterable[Drafted | DrafterUsage]) -> DrafterUsage:
    total = DrafterUsage()
    for each in counts:
        total.steps += each.steps
        total.drafted += each.drafted
        total.accepted += each.accepted
    return total


def _entropy_usage(entropy: EntropyAdaptive, ends: Sequence[Done]) -> EntropyAdaptiveUsage:
    ledgers = [done.by_model or (0, 0, 0, 0) for done in ends]
    large, small, *computed = (sum(column) for column in zip(*ledgers, strict=True))
    made = large + small
    return EntropyAdaptiveUsage(
        entropy.threshold,
        entropy.window,
        entropy.min_dwell,
        entropy.start,
        ByModel(large, small),
        ByModel(*computed),
        large / made if made else None,
    )
