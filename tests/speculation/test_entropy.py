"""Who serves the next token, told from scripted entropies alone."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux.errors import InvalidRequest
from loramux.request import BASE_MODEL_ID, SMALL_MODEL_ID, EntropyAdaptive
from loramux.speculation.entropy import Router

L, S = BASE_MODEL_ID, SMALL_MODEL_ID


def trace(router: Router, entropies: list[float]) -> str:
    """Which model is to draw after each of them."""
    return "".join("LS"[router.observe(entropy) == S] for entropy in entropies)


def how(threshold: float, **knobs: Any) -> EntropyAdaptive:
    return EntropyAdaptive(threshold=threshold, **{"window": 3, "min_dwell": 4, **knobs})


def test_the_published_rule_step_by_step() -> None:
    router = Router(how(2.0))
    # Three entropies fill the window, the fourth token is the first that may move.
    assert trace(router, [9, 9, 9]) == "SSS"
    assert trace(router, [0]) == "L", "mean of the last three is 6"
    # The window was emptied: neither the nines nor the small model's 0 count any more.
    assert trace(router, [1, 1, 1]) == "LLL"
    assert trace(router, [4]) == "S", "(1 + 1 + 4) / 3 is 2: what equals the threshold is small"
    assert trace(router, [2, 2, 2, 2, 2.5]) == "SSSSL"


def test_a_window_that_is_not_full_moves_nobody() -> None:
    router = Router(how(1.0, window=6, min_dwell=2))
    assert trace(router, [9] * 7) == "SSSSSLL"
    assert trace(router, [0] * 5) == "LLLLL", "the window began anew: one 9 and five 0"
    assert trace(router, [0]) == "S"


def test_the_dwell_is_counted_from_the_move_and_not_from_where_the_mean_crossed() -> None:
    router = Router(how(1.0, window=1, min_dwell=5))
    assert trace(router, [9, 0, 9, 0, 9, 0, 0, 0, 0, 0, 9]) == "SSSSLLLLLSS"


@pytest.mark.parametrize(("start", "model"), [("large", "L"), ("small", "S")])
def test_infinite_thresholds_never_move_from_where_they_belong(start: Any, model: str) -> None:
    threshold = -1.0 if start == "large" else math.inf
    router = Router(how(threshold, start=start, min_dwell=0))
    assert trace(router, [0.0, 9.0] * 20) == model * 40


def plainly(how: EntropyAdaptive, entropies: list[float]) -> str:
    """The same from the whole past."""
    model, since, told = how.start[0].upper(), 0, ""
    for at in range(1, len(entropies) + 1):
        if at - since >= max(how.window, how.min_dwell, 1):
            mean = sum(map(float, entropies[at - how.window : at])) / how.window
            wanted = "L" if mean > how.threshold else "S"
            if wanted != model:
                model, since = wanted, at
        told += model
    return told


ENTROPIES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 4.0]), max_size=60)


@settings(deadline=None)
@given(
    entropies=ENTROPIES,
    window=st.integers(1, 6),
    min_dwell=st.integers(0, 9),
    start=st.sampled_from(["small", "large"]),
    cut=st.integers(0, 60),
)
def test_every_trace_and_its_continuation_from_bytes(
    entropies: list[float], window: int, min_dwell: int, start: Any, cut: int
) -> None:
    choice = how(1.0, window=window, min_dwell=min_dwell, start=start)
    whole = Router(choice)
    told = trace(whole, entropies)
    assert told == plainly(choice, entropies)
    first = Router(choice)
    first.computed(7)
    begun = trace(first, entropies[:cut])
    resumed = Router.resumed(choice, first.state, len(begun))
    assert begun + trace(resumed, entropies[cut:]) == told
    assert resumed.ledger[:2] == whole.ledger[:2]
    by = [start[0].upper(), *told][: len(entropies)]  # who drew each
    assert whole.ledger[:2] == (by.count("L"), by.count("S"))
    assert sum(resumed.ledger[2:]) == 7


def test_an_accepted_run_ends_with_the_token_that_calls_for_the_other() -> None:
    router = Router(how(1.0, window=1, min_dwell=3))
    # By node: only those on the path count, in its order.
    entropies = [0.0, 9.0, 0.0, 9.0, 0.0]
    assert router.follow([0, 2, 3, 4], entropies) == [0, 2, 3]
    assert router.model_id == L and router.ledger[:2] == (0, 3)
    assert router.follow([0, 1], entropies) == [0, 1]
    assert router.ledger[:2] == (2, 3)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: b"",
        lambda s: b"\xff" + s,
        lambda s: s[:-1],
        lambda s: changed(s, 0, 2),
        lambda s: changed(s, 1, 1),
        lambda s: changed(s, 2, -1),
        lambda s: changed(s, 3, [1.0] * 4),
        lambda s: changed(s, 3, [math.nan]),
        lambda s: changed(s, 4, [0, 1]),
        lambda s: changed(s, 4, [-1, 3]),
        lambda s: changed(s, 5, [0, -1]),
        lambda s: msgspec.msgpack.encode([*msgspec.msgpack.decode(s), 1]),
    ],
)
def test_bytes_that_are_not_of_this_request_are_refused(spoil: Any) -> None:
    router = Router(how(1.0))
    trace(router, [1.0, 2.0])
    assert Router.resumed(how(1.0), router.state, 2).ledger == (0, 2, 0, 0)
    with pytest.raises(InvalidRequest, match="resume"):
        Router.resumed(how(1.0), spoil(router.state), 2)


def changed(state: bytes, field: int, value: Any) -> bytes:
    fields = msgspec.msgpack.decode(state)
    fields[field] = value
    return msgspec.msgpack.encode(fields)


def test_outputs_without_the_state_they_came_with_are_refused() -> None:
    assert Router.resumed(how(1.0), None, 0).model_id == S
    with pytest.raises(InvalidRequest, match="resume"):
        Router.resumed(how(1.0), None, 1)


@pytest.mark.parametrize("knobs", [{"window": 0}, {"min_dwell": -1}])
def test_what_cannot_be_followed_is_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="entropy_adaptive"):
        Router(how(1.0, **knobs))
    with pytest.raises(InvalidRequest, match="entropy_adaptive"):
        Router(how(math.nan))
