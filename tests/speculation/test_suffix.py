"""The suffix drafter: whose text it guesses from, when it has caught up, and how much it keeps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculation.asking import OWNERS, go_on, guess, request_of

from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.suffix import Suffix
from loramux_kernels.suffix import SuffixTree

STORY = list(range(100, 140))


def answered(drafter: Suffix, output: list[int], name: str = "before", **whose: object) -> None:
    """A request that had ``output`` for an answer came and went."""
    drafter.ended(request_of(name, [1, 2], output, **whose))


def test_what_an_owner_was_answered_before_is_guessed() -> None:
    drafter = Suffix()
    answered(drafter, STORY)
    assert guess(drafter, request_of("r", [5, *STORY[:8]])) == Guess(STORY[8:16], None, 7)
    assert guess(drafter, request_of("s", [5, *STORY[:3]]), most=2) == Guess(STORY[3:5], None, 3)
    assert guess(drafter, request_of("t", [5])) == Guess()


def test_prompts_are_not_answers() -> None:
    drafter = Suffix()
    before = request_of("before", STORY, [7, 8])
    guess(drafter, before)
    drafter.ended(before)
    assert guess(drafter, request_of("r", STORY[:8])) == Guess()


@pytest.mark.parametrize("differs", OWNERS)
def test_nothing_is_guessed_from_what_is_another_owners(differs: str) -> None:
    drafter = Suffix()
    theirs = OWNERS[differs]
    answered(drafter, STORY, **theirs)
    running = request_of("running", STORY, STORY, **theirs)
    assert guess(drafter, running).token_ids
    assert guess(drafter, request_of("mine", STORY[:8])) == Guess()
    assert guess(drafter, request_of("theirs", STORY[:8], **theirs)).token_ids == STORY[8:16]
    answered(drafter, STORY[20:])
    assert guess(drafter, request_of("t", STORY[:8], **theirs)).token_ids == STORY[8:16]
    assert guess(drafter, request_of("m", STORY[20:28])).token_ids == STORY[28:36]
    assert guess(drafter, request_of("n", STORY[:8])) == Guess()


def test_a_running_request_shows_nothing_to_another() -> None:
    drafter = Suffix()
    guess(drafter, request_of("running", STORY, STORY))
    assert guess(drafter, request_of("other", STORY[:8])) == Guess()


@settings(deadline=None, max_examples=50)
@given(
    prompt=st.lists(st.integers(0, 2), min_size=1, max_size=20),
    steps=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=8),
    asked=st.lists(st.booleans(), min_size=8, max_size=8),
    tree=st.booleans(),
)
def test_what_came_step_by_step_is_as_if_it_came_at_once(
    prompt: list[int], steps: list[list[int]], asked: list[bool], tree: bool
) -> None:
    """Wrong guesses behind the known ids leave no trace, and nor does not being asked."""
    drafter, fresh = Suffix(), Suffix()
    for learned in (drafter, fresh):
        answered(learned, [0, 1, 2, 2, 1, 0, 0])
    request = request_of("r", prompt, tree=tree)
    for drawn, ask in zip(steps, asked, strict=False):
        if ask:
            guess(drafter, request)
        go_on(request, drawn, wrong=[2, 2, 2, 2, 2])
    whole = request.ids[: request.num_ids].tolist()
    assert guess(drafter, request) == guess(fresh, request_of("r", whole, tree=tree))
    drafter.ended(request)
    answered(fresh, whole[len(prompt) :])
    again = request_of("again", [9, 0, 1, 2], tree=tree)
    assert guess(drafter, again) == guess(fresh, again)


def test_an_id_that_is_still_expected_is_not_learned() -> None:
    drafter = Suffix()
    request = request_of("r", [1], STORY[:5])
    request.ids[request.num_ids] = 77
    request.expect()
    drafter.ended(request)
    assert guess(drafter, request_of("s", [*STORY[:5]])) == Guess()


def test_between_its_own_text_and_answers_what_expects_more_decides() -> None:
    drafter = Suffix()
    answered(drafter, [1, 2, 3, 4, 5])
    answered(drafter, [1, 2, 9], name="b")
    sure = request_of("sure", [1, 2, 6, 7, 1, 2])
    assert guess(drafter, sure).token_ids == [6, 7]  # always so here, half of the times there
    answered(drafter, [8, 9, 3, 4], name="c")
    even = request_of("even", [8, 9, 6, 7, 8, 9])
    assert guess(drafter, even).token_ids == [6, 7]  # the same odds: its own text
    longer = request_of("longer", [3, 6, 3, 6, 1, 2, 3])
    assert guess(drafter, longer).token_ids == [4, 5]


def test_a_tree_where_it_may_be_one() -> None:
    drafter = Suffix()
    for name, next_ in enumerate(([3], [3], [5, 6])):
        answered(drafter, [8, 9, 1, 2, *next_], name=str(name))
    prompt = [0, 8, 9, 1, 2]
    assert guess(drafter, request_of("r", prompt)) == Guess([3], None, 4)
    found = guess(drafter, request_of("s", prompt, tree=True))
    assert found == Guess([3, 5, 6], [0, 0, 2], 4)
    found = guess(drafter, request_of("t", prompt, tree=True), most=2)
    assert found == Guess([3, 5], [0, 0], 4)


def test_little_in_prospect_is_left_to_the_next_drafter() -> None:
    drafter = Suffix()
    for name, next_ in enumerate((5, 6, 7)):
        answered(drafter, [1, next_], name=str(name))
    assert guess(drafter, request_of("r", [1])) == Guess()
    answered(drafter, [1, 7, 1, 7], name="more")
    assert guess(drafter, request_of("s", [1])) == Guess([7], None, 0)


def test_all_asks_are_answered_in_their_order() -> None:
    drafter = Suffix()
    answered(drafter, STORY)
    requests = [request_of(str(at), STORY[at : at + 4]) for at in (0, 7, 3)]
    answers = drafter.propose([Ask(request, 2) for request in requests])
    assert [answer.token_ids for answer in answers] == [STORY[4:6], STORY[11:13], STORY[7:9]]


def test_answers_that_were_not_to_be_guessed_are_not_learned() -> None:
    drafter = Suffix()
    answered(drafter, STORY, drafters=())
    answered(drafter, STORY, drafters=("lookup",))
    assert len(drafter._shared) == 0


def test_an_owners_latest_answers_stay() -> None:
    drafter = Suffix(shared_tokens=100)
    answers = [list(range(first, first + 30)) for first in range(0, 300, 30)]
    for name, answer in enumerate(answers):
        answered(drafter, answer, name=str(name))
    known = [bool(guess(drafter, request_of("r", [*answer[:5]])).token_ids) for answer in answers]
    assert known == [False] * 7 + [True] * 3
    answered(drafter, list(range(2000, 2150)), name="long")
    assert guess(drafter, request_of("s", [2049])) == Guess()  # only its last hundred
    assert guess(drafter, request_of("s", [2050])).token_ids == [2051]
    assert guess(drafter, request_of("s", answers[-1][:5])) == Guess()


def test_memory_has_one_bound() -> None:
    one = SuffixTree.bytes_for(1)
    drafter = Suffix(most_bytes=6 * one)
    for owner in range(5):
        answered(drafter, STORY, tenant=str(owner))
        if owner > 1:
            guess(drafter, request_of("uses", STORY[:4], tenant="1"))
            drafter.ended(request_of("uses", STORY[:4]))
    assert len(drafter._shared) == 3
    assert drafter._shared.num_bytes == 3 * one
    for owner, known in enumerate([False, True, False, True, True]):
        request = request_of("r", STORY[:4], tenant=str(owner))
        assert bool(guess(drafter, request).token_ids) is known
        drafter.ended(request)
    requests = [request_of(f"r{at}", [3, 4, 3, 4, 3]) for at in range(4)]
    answers = drafter.propose([Ask(request, 2) for request in requests])
    assert [bool(answer.token_ids) for answer in answers] == [True, True, True, False]
    assert drafter.num_bytes <= 6 * one
    drafter.ended(requests[0])
    assert guess(drafter, requests[3]).token_ids  # there is room again
    for request in requests:
        drafter.ended(request)
    assert not drafter._own and drafter._room == 3 * one
