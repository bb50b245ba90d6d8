"""The tri-gram drafter: whose text it learns from, how often, and that learning helps."""

from __future__ import annotations

import numpy as np
import pytest
from tests.speculation.asking import OWNERS, go_on, guess, request_of

from loramux.request import Request
from loramux.speculation.drafter import Guess
from loramux.speculation.stores import owner
from loramux.speculation.trigram import Trigram

STORY = list(range(100, 140))


def weights(drafter: Trigram, request: Request, a: int, b: int) -> dict[int, float]:
    table = drafter._tables.use(owner(request))
    return {} if table is None else table.successors(a, b)


def test_every_occurrence_counts_once() -> None:
    """Of prompt and output, however they come and however often it is asked."""
    drafter = Trigram()
    request = request_of("r", [1, 2, 3, 1, 2])
    guess(drafter, request)
    guess(drafter, request)
    assert weights(drafter, request, 1, 2) == pytest.approx({3: 0.04})
    go_on(request, [3, 1], wrong=[8, 8, 8])
    guess(drafter, request)
    go_on(request, [2, 4])
    drafter.ended(request)
    assert weights(drafter, request, 1, 2) == pytest.approx({3: 0.08, 4: 0.04})
    assert weights(drafter, request, 3, 1) == pytest.approx({2: 0.08})
    assert weights(drafter, request, 2, 8) == {}
    assert not drafter._seen
    for turn in range(100):
        drafter.ended(request_of(str(turn), [1, 2, 3]))
    assert weights(drafter, request, 1, 2) == pytest.approx({3: 3.0, 4: 0.04})


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_the_first_tokens_of_a_request(cut: int) -> None:
    drafter = Trigram()
    request = request_of("r", [1, 2, 3][:cut] or [1])
    assert guess(drafter, request) == Guess()
    drafter.ended(request)
    assert weights(drafter, request, 1, 2) == ({3: pytest.approx(0.04)} if cut == 3 else {})


@pytest.mark.parametrize("differs", OWNERS)
def test_nothing_is_guessed_from_what_is_another_owners(differs: str) -> None:
    drafter = Trigram()
    theirs = OWNERS[differs]
    drafter.ended(request_of("before", STORY, **theirs))
    guess(drafter, request_of("running", STORY, **theirs))
    assert guess(drafter, request_of("mine", STORY[:2])) == Guess()
    assert guess(drafter, request_of("theirs", STORY[:2], **theirs)).token_ids == STORY[2:6]


def test_an_id_that_is_still_expected_is_not_learned() -> None:
    drafter = Trigram()
    request = request_of("r", [1, 2, 3])
    request.ids[request.num_ids] = 77
    request.expect()
    drafter.ended(request)
    assert weights(drafter, request, 2, 3) == {}


def test_a_tree_where_it_may_be_one_and_a_grade() -> None:
    drafter = Trigram()
    for name, output in enumerate(([1, 2, 3], [1, 2, 3], [1, 2, 4])):
        drafter.ended(request_of(str(name), output))
    tree = guess(drafter, request_of("r", [1, 2], tree=True))
    assert tree == Guess([3, 4], [0, 0], 4 + 2)
    line = guess(drafter, request_of("s", [1, 2]))
    assert line == Guess([3], None, 4 + 2)
    drafter.ended(request_of("once", [5, 6, 7]))
    assert guess(drafter, request_of("t", [5, 6])).grade == 3
    assert len(guess(drafter, request_of("t", [1, 2], tree=True), most=1).token_ids) == 1


def test_what_was_not_to_be_guessed_is_not_learned() -> None:
    drafter = Trigram()
    drafter.ended(request_of("r", STORY, drafters=()))
    drafter.ended(request_of("s", STORY, drafters=("suffix",)))
    assert len(drafter._tables) == 0


def right(drafter: Trigram, text: list[int], name: str) -> int:
    """How many tokens of ``text`` were guessed right while it came."""
    request, found, at = request_of(name, text[:2]), 0, 2
    while at < len(text):
        guessed = list(guess(drafter, request, 4).token_ids)
        num = 0
        while num < len(guessed) and at + num < len(text) and guessed[num] == text[at + num]:
            num += 1
        found += num
        go_on(request, text[at : at + num + 1], wrong=guessed)
        at = request.num_ids
    drafter.ended(request)
    return found


def test_what_repeats_is_learned() -> None:
    drafter = Trigram()
    rng = np.random.default_rng(1)
    text = rng.integers(0, 400, 100).tolist()
    assert right(drafter, text, "first") <= 5
    assert right(drafter, text, "second") >= 70
    drafter = Trigram()
    assert right(drafter, text[:10] * 8, "loop") >= 48


def test_memory_has_one_bound_and_the_owners_that_came_last_stay() -> None:
    drafter = Trigram()
    drafter.ended(request_of("r", STORY))
    one = drafter.num_bytes
    drafter = Trigram(most_bytes=3 * one)
    for tenant in range(5):
        drafter.ended(request_of("r", STORY, tenant=str(tenant)))
    assert len(drafter._tables) == 3 and drafter.num_bytes == 3 * one
    for tenant, known in enumerate([False, False, True, True, True]):
        request = request_of("r", STORY[:2], tenant=str(tenant))
        assert bool(guess(drafter, request).token_ids) is known
