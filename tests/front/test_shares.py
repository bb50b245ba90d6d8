"""Shares are as large as their weights say, and a user leaves one only when it must."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from loramux.adapters.aliases import Target
from loramux.front.shares import choose

NUM = 10_000
USERS = [f"user {number}" for number in range(NUM)]
CRITICAL = {1: 15.1, 2: 18.4, 3: 21.1}
"""Of chi-square by degrees of freedom: exceeded by chance once in ten thousand times."""

Choose = Callable[[Sequence[Target], str, str, str | None], Target]


def targets(*weights: int) -> list[Target]:
    """The base, and generations of one adapter."""
    return [
        Target(
            name="cat" if number else "",
            generation=number,
            digest=str(number) * 64 if number else "",
            weight=weight,
        )
        for number, weight in enumerate(weights)
    ]


def excess(shares: list[Target], chosen: list[Target]) -> float:
    """Chi-square over what chance explains: below 1 the shares are as the weights say."""
    counts, total = Counter(chosen), sum(share.weight for share in shares)
    assert set(counts) <= set(shares)
    expected = [len(chosen) * share.weight / total for share in shares]
    square = sum(
        (counts[share] - mean) ** 2 / mean for share, mean in zip(shares, expected, strict=True)
    )
    return square / CRITICAL[len(shares) - 1]


def everyone(shares: list[Target], pick: Choose = choose, alias: str = "prod") -> list[Target]:
    return [pick(shares, "", alias, user) for user in USERS]


def biased(shares: Sequence[Target], tenant: str, alias: str, user: str | None) -> Target:
    """Two in a hundred get the first whatever its share."""
    return shares[0] if random.random() < 0.02 else choose(shares, tenant, alias, user)


WEIGHTS = [(90, 10), (1, 1), (70, 20, 10), (1, 2, 3, 4)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_of_users(weights: tuple[int, ...]) -> None:
    random.seed(1)
    shares = targets(*weights)
    assert excess(shares, everyone(shares)) < 1
    assert excess(shares, everyone(shares, alias="other")) < 1
    assert excess(targets(10, 90), everyone(targets(10, 90), biased)) > 1, "it would be seen"


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_of_requests_without_a_user(weights: tuple[int, ...]) -> None:
    random.seed(2)
    shares = targets(*weights)
    drawn = [choose(shares, "", "prod", None) for _ in range(NUM)]
    assert excess(shares, drawn) < 1
    again = [choose(shares, "", "prod", None) for _ in range(NUM)]
    assert drawn != again
    assert excess(targets(10, 90), [biased(targets(10, 90), "", "p", None) for _ in USERS]) > 1


def moves(before: list[Target], after: list[Target]) -> Counter[tuple[int, int]]:
    """How many users went from one generation to another."""
    pairs = zip(everyone(before), everyone(after), strict=True)
    return Counter((a.generation, b.generation) for a, b in pairs if a.generation != b.generation)


def near(count: int, share: float) -> bool:
    return abs(count - NUM * share) < 5 * (NUM * share * (1 - share)) ** 0.5


def test_only_the_share_that_moves_moves() -> None:
    moved = moves(targets(90, 10), targets(80, 20))
    assert set(moved) == {(0, 1)} and near(moved[0, 1], 0.1)
    assert moves(targets(90, 10), targets(900, 100)) == {}, "the same shares"
    moved = moves(targets(50, 30, 20), targets(50, 30, 40))
    assert set(moved) == {(0, 2), (1, 2)}
    assert near(moved[0, 2], 0.5 - 50 / 120) and near(moved[1, 2], 0.3 - 30 / 120)


def test_a_target_that_comes_or_goes() -> None:
    two, three = targets(50, 30), targets(50, 30, 20)
    came = moves(two, three)
    assert set(came) == {(0, 2), (1, 2)} and near(sum(came.values()), 0.2)
    gone = moves(three, two)
    assert set(gone) == {(2, 0), (2, 1)} and gone[2, 0] == came[0, 2]
    assert moves(three, [three[2], three[0], three[1]]) == {}, "the order plays no part"


def test_who_asks_and_what_for() -> None:
    shares = targets(50, 50)
    assert everyone(shares) == everyone(shares)
    for others in (
        everyone(shares, alias="canary"),
        [choose(shares, "alice", "prod", user) for user in USERS],
    ):
        same = sum(a == b for a, b in zip(everyone(shares), others, strict=True))
        assert near(same, 0.5), "one alias says nothing of another"
    assert choose(shares, "a", "bc", "d") in shares
    for user in ("", "é", "\N{GRINNING FACE}" * 1000):
        assert choose(shares, "", "prod", user) == choose(shares, "", "prod", user)


def test_where_one_text_ends_and_the_next_begins_counts() -> None:
    cut = [
        [choose(targets(1, 1), "a", "b" + user, "c") for user in USERS[:100]],
        [choose(targets(1, 1), "ab", user, "c") for user in USERS[:100]],
    ]
    assert cut[0] != cut[1]


def test_one_target() -> None:
    (only,) = targets(7)
    assert {choose([only], "", "prod", user) for user in ("a", "b", None)} == {only}
