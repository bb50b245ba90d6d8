"""The planner against the best that could be done, in a server that only pretends."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.speculation.simulated import (
    LONG,
    MOST_TOKENS,
    WARM,
    Model,
    Scripted,
    Server,
    World,
    fixed,
    near,
    request,
    served,
    table,
    usual,
)

from loramux.batch import Row
from loramux.request import AdapterRef, Request
from loramux.speculation.costs import Costs, CostTable, Load
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.planner import MARGIN, Answer, Planner, _worth
from loramux.speculation.prospects import PRICES, Table
from loramux.speculation.record import Class, kind_of


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.sampled_from([1, 3, 16]),
    token_s=st.sampled_from([1e-5, 1e-4, 3e-4, 1e-3, 4e-3]),
    knee=st.sampled_from([0, 8, 32]),
    chance=st.sampled_from([0.05, 0.2, 0.4, 0.6, 0.8, 0.97]),
    each=st.sampled_from([0.0, 5e-5, 3e-4]),
)
def test_it_is_as_fast_as_the_best_fixed_length(
    seed: int, rows: int, token_s: float, knee: int, chance: float, each: float
) -> None:
    costs = Costs.alike(table(0.01, token_s, knee))

    def rate(luck: int) -> float:
        server = served(Scripted(World(luck), lambda _: [chance] * 8, each), costs, rows)
        server.run(WARM)
        return server.run(LONG)

    near(usual(rate, seed), fixed(costs, rows, [chance] * 8, lambda _: rows * each))


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.sampled_from([1, 4, 16]),
    token_s=st.sampled_from([1e-5, 3e-4, 2e-3]),
    chance=st.sampled_from([0.1, 0.5, 0.8, 0.95]),
    step_s=st.sampled_from([0.0003, 0.001, 0.003]),
)
def test_a_model_is_asked_for_what_pays(
    seed: int, rows: int, token_s: float, chance: float, step_s: float
) -> None:
    """Its time is counted before it is spent: cutting afterwards would be too late."""
    costs = Costs.alike(table(0.01, token_s))

    def rate(luck: int) -> float:
        drafter = Model(World(luck), lambda _: [chance] * 8, step=step_s)
        server = served(drafter, costs, rows)
        server.run(WARM)
        return server.run(LONG)

    near(usual(rate, seed), fixed(costs, rows, [chance] * 8, lambda most: most * step_s))


def test_a_recorded_step_is_only_left_for_more_than_it_saves() -> None:
    """On a device a plain decode is a replay; a guess means launching everything."""
    for launched_s, pays in ((0.012, True), (0.06, False)):
        costs = Costs(table(0.01, 0.0), table(launched_s, 0.0))
        server = served(Scripted(World(1), lambda _: [0.8] * 8), costs, 4)
        server.run(WARM)
        assert bool(server.run(LONG) > 2 * 4 / 0.01) is pays
        near(server.run(LONG), fixed(costs, 4, [0.8] * 8, lambda _: 0.0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_cut_is_the_best_of_all_cuts(data: st.DataObject) -> None:
    """Every combination of beginnings, by brute force."""
    lengths = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    chances = [
        np.cumprod(data.draw(st.lists(st.sampled_from([0.1, 0.5, 0.9, 1]), min_size=n, max_size=n)))
        for n in lengths
    ]
    prompt = data.draw(st.sampled_from([0, 0, 7]))
    rows = len(lengths) + data.draw(st.integers(0, 2))
    slopes = data.draw(st.lists(st.sampled_from([0, 1e-4, 3e-3]), min_size=40, max_size=40))
    seconds = dict(enumerate((0.01 + np.cumsum(slopes)).tolist(), 1))
    costs = Costs.alike(CostTable(seconds, 40))
    spent = data.draw(st.sampled_from([0.0, 0.004]))
    load = Load(rows, rows + prompt, data.draw(st.integers(1, 16)))
    planner = Planner(costs)
    chosen = planner._best(np.concatenate(chances), load, spent).tolist()

    def goodput(cut: Sequence[int]) -> float:
        right = sum(float(c[:n].sum()) for c, n in zip(chances, cut, strict=True))
        paid = seconds[load.tokens] - seconds[rows]
        return (rows + right) / (seconds[load.tokens + sum(cut)] - paid + spent)

    cuts = [c for c in itertools.product(*(range(n + 1) for n in lengths)) if sum(c) <= load.budget]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    cut = np.bincount(owner[chosen].astype(int), minlength=len(lengths)).tolist()
    starts = np.cumsum([0, *lengths[:-1]])
    assert sorted(chosen) == [
        s + i for s, n in zip(starts.tolist(), cut, strict=True) for i in range(n)
    ], "not beginnings"
    best, nothing = max(map(goodput, cuts)), goodput([0] * len(lengths))
    if best > MARGIN * nothing * (1 + 1e-9):
        assert goodput(cut) == pytest.approx(best, rel=1e-9)
    elif best < MARGIN * nothing * (1 - 1e-9):
        assert cut == [0] * len(lengths)


@pytest.mark.parametrize(("gain", "guesses"), [(0.04, 0), (0.06, 1)])
def test_nothing_is_guessed_for_five_per_cent(gain: float, guesses: int) -> None:
    costs = Costs.alike(CostTable({1: 1.0, 2: 1.9 / (1 + gain)}, 16))
    chosen = Planner(costs)._best(np.array([0.9]), Load(1, 1, 1), 0.0)
    assert len(chosen) == guesses


@pytest.mark.parametrize(("gain", "asks"), [(0.03, False), (0.09, True)])
def test_nobody_is_asked_for_five_per_cent(gain: float, asks: bool) -> None:
    """Whose guesses would all be cut need not guess."""
    costs = Costs.alike(CostTable({1: 0.01, 2: 0.01 * 1.5 / (1 + gain)}, MOST_TOKENS))
    drafter = Scripted(World(19), lambda _: [0.5])
    server = served(drafter, costs, 1, most=1)
    server.run(3000)
    asked = drafter.rows_asked
    server.run(400)
    assert (drafter.rows_asked - asked > 200) is asks


def test_what_prompts_take_is_no_reason_to_guess() -> None:
    """Beside a long prompt a guess looks cheap, but the prompt has to be computed either way."""
    costs = Costs.alike(table(0.01, 0.004))
    server = served(Scripted(World(2), lambda _: [0.5] * 8), costs, 4)
    server.run(WARM, prompt_tokens=100)
    before = len(server.verified)
    server.run(100, prompt_tokens=100)
    assert sum(server.verified[before:]) == 0


def test_adapters_have_lengths_of_their_own() -> None:
    """One text is easy for one adapter and hard for the next, in the same batch."""
    lucky = {"easy": [0.95] * 8, "hard": [0.05] * 8}
    world = World(3)
    drafter = Scripted(world, lambda r: lucky[r.adapters[0].digest])
    costs = Costs.alike(table(0.01, 0.001))
    requests = [request(f"{name}{i}", adapter=name) for name in lucky for i in range(4)]
    server = Server(world, {"scripted": drafter}, costs, requests, Planner(costs))
    server.run(WARM)
    lengths: dict[str, list[int]] = {"easy": [], "hard": []}
    for _ in range(50):
        asks = [Ask(r, 8) for r in requests]
        for ask, draft in zip(asks, server.drafting.propose(asks, Load(8, 8, 200)), strict=True):
            name = ask.request.adapters[0].digest
            lengths[name].append(len(draft.guess.token_ids) if draft else 0)
    assert np.mean(lengths["easy"]) > 3
    assert np.mean(lengths["hard"]) < 0.5


def test_a_mixed_load_is_faster_than_with_any_fixed_length() -> None:
    """A crowd with a hard text by day, one with an easy text by night."""
    luck = [0.5]
    rates: dict[int | None, float] = {}
    costs = Costs.alike(table(0.01, 0.0006, 8))
    for most in (None, 0, 1, 2, 4, 8):
        drafter = Scripted(World(4), lambda _: luck * 8)
        server = served(drafter, costs, 24, planned=most is None, most=8 if most is None else most)
        crowd, began = server.requests, server.world.now
        for period in range(4):
            luck[0] = 0.9 if period % 2 else 0.3
            server.requests = crowd[:1] if period % 2 else crowd
            server.run(600 if period % 2 else 60)
        rates[most] = server.tokens / (server.world.now - began)
    planned = rates.pop(None)
    assert planned > 1.05 * max(rates.values()), rates


def test_the_sure_guesses_of_a_drafter_are_taken_and_the_others_not() -> None:
    costs = Costs.alike(table(0.01, 0.004))
    drafter = Scripted(World(5), lambda _: [0.97] * 8, grades=True)
    server = served(drafter, costs, 4)
    server.run(WARM)
    rates = fixed(costs, 4, [0.97] * 8, lambda _: 0.0)
    assert server.run(LONG) > 1.15 * rates[0]
    lengths: dict[int, list[int]] = {0: [], 1: []}
    planner = server.drafting.planner
    assert planner is not None
    for _ in range(20):
        asks = [Ask(r, 8) for r in server.requests]
        answers = [
            Answer(i, ask, "scripted", guess)
            for i, (ask, guess) in enumerate(zip(asks, drafter.propose(asks), strict=True))
        ]
        numbers = planner.choose(answers, Load(4, 4, 100), 0.0)
        for answer, number in zip(answers, numbers, strict=True):
            lengths[answer.guess.grade].append(number)
    assert max(lengths[0]) == 0 < min(lengths[1])


def test_a_drafter_that_is_never_right_is_left_alone_but_for_probes() -> None:
    costs = Costs.alike(table(0.01, 0.001))
    server = served(drafter := Scripted(World(6), lambda _: [0.0] * 8, each=2e-4), costs, 8)
    server.run(WARM)
    asked, began = drafter.rows_asked, server.world.now
    server.run(1000)
    probes, plain_s = drafter.rows_asked - asked, float(costs.plain.seconds[8])
    assert 0 < probes * 2e-4 <= 0.02 * (server.world.now - began)
    assert sum(server.verified[-900:]) == 0
    assert server.world.now - began < 1000 * plain_s * 1.02


def test_a_model_that_is_never_right_is_left_alone_but_for_probes() -> None:
    costs = Costs.alike(table(0.01, 0.0))
    drafter = Model(World(7), lambda _: [0.02] * 8, step=0.004)
    server = served(drafter, costs, 4)
    server.run(WARM)
    began, asked = server.world.now, drafter.rows_asked
    server.run(1000)
    assert server.world.now - began < 1000 * 0.01 * 1.02
    assert drafter.rows_asked > asked


@pytest.mark.parametrize("model", [False, True])
def test_it_notices_when_a_text_changes(model: bool) -> None:
    """From hopeless to easy, by probes alone, and back."""
    luck = [0.02]
    costs = Costs.alike(table(0.01, 0.0002))
    world = World(8)
    drafter = (
        Model(world, lambda _: luck * 8, step=0.002)
        if model
        else Scripted(world, lambda _: luck * 8, each=2e-4)
    )
    server = served(drafter, costs, 8)
    server.run(WARM)
    assert sum(server.verified[-50:]) == 0
    luck[0] = 0.9
    server.run(2000)
    cost = (lambda most: most * 0.002) if model else (lambda _: 8 * 2e-4)
    near(server.run(LONG), fixed(costs, 8, [0.9] * 8, cost))
    luck[0] = 0.02
    server.run(600)
    near(server.run(LONG), fixed(costs, 8, [0.02] * 8, cost))


def test_guesses_that_were_cut_are_compared_with_what_came() -> None:
    """All are cut while steps are dear; how often they would have been right is known anyhow."""
    world = World(9)
    chance = [0.9, 0.9, 0.5, 0.9]
    costs = Costs.alike(table(0.01, 0.05))
    server = served(Scripted(world, lambda _: chance), costs, 2, most=4)
    server.run(2000)
    assert sum(server.verified[-1500:]) == 0
    planner = server.drafting.planner
    assert planner is not None
    planner._record.learn()
    of = Class(kind_of(server.requests[0]), "scripted", 0)
    assert planner._record.survival([of])[0, :4] == pytest.approx(np.cumprod(chance), abs=0.12)


def test_a_tree_that_was_cut_is_compared_by_its_paths() -> None:
    asked = request("r", most=5)
    planner = Planner(Costs.alike(table(0.01, 1.0)))
    # 0 -> 1 (wrong), 0 -> 2 (right) -> 3 (right), 2 -> 4 (wrong), 3 -> 5 (right)
    guess = Guess([9, 5, 6, 9, 7], [0, 0, 2, 2, 3])
    planner.choose([Answer(0, Ask(asked, 5), "scripted", guess)], Load(1, 1, 20), 0.0)
    asked.ids[1:5] = [5, 6, 7, 8]
    asked.num_ids = 3
    planner._record.compare([asked])
    assert not planner._record._seen, "not all of it came yet"
    asked.num_ids = 4
    planner._record.compare([asked])
    assert [(seen.length, list(seen.right)) for seen in planner._record._seen] == [(5, [1, 2, 4])]


def test_a_guess_is_learned_from_once() -> None:
    """Verified in part, compared as a whole: not both."""
    asked = request("r", most=4)
    planner = Planner(Costs.alike(table(0.01, 0.005)))
    answer = Answer(0, Ask(asked, 4), "scripted", Guess([5, 6, 7, 8]))
    (number,) = planner.choose([answer], Load(1, 1, 2), 0.0)
    assert 0 < number < 4
    row = Row(asked, 1)
    row.drafts, row.drafter = [5, 6, 7, 8][:number], "scripted"
    planner.learned(row, [1])
    assert not planner._record._seen
    planner.ended(asked)
    assert not planner._record._shadows


@pytest.mark.parametrize("chance", [0.2, 0.6])
def test_the_next_drafter_is_asked_first_if_it_is_better(chance: float) -> None:
    """A chain is the request's order; what is better than its first is not kept waiting."""
    world = World(10)
    costs = Costs.alike(table(0.01, 0.0003))
    poor = Scripted(world, lambda _: [chance] * 8, silent=0.2)
    good = Scripted(world, lambda _: [0.9] * 8)
    requests = [request(f"r{i}", ("poor", "good")) for i in range(4)]
    server = Server(world, {"poor": poor, "good": good}, costs, requests, Planner(costs))
    server.run(WARM)
    asked = poor.rows_asked, good.rows_asked
    rate = server.run(LONG)
    assert poor.rows_asked - asked[0] < 0.3 * (good.rows_asked - asked[1])
    assert rate > 0.9 * fixed(costs, 4, [0.9] * 8, lambda _: 0.0).max()


def test_the_first_of_two_good_ones_is_followed_by_the_second() -> None:
    world = World(11)
    costs = Costs.alike(table(0.01, 0.0003))
    first = Scripted(world, lambda _: [0.9] * 8, silent=0.5)
    second = Scripted(world, lambda _: [0.8] * 8)
    requests = [request(f"r{i}", ("first", "second")) for i in range(4)]
    server = Server(world, {"first": first, "second": second}, costs, requests, Planner(costs))
    server.run(WARM)
    first.rows_asked = second.rows_asked = 0
    server.run(LONG)
    assert first.rows_asked == pytest.approx(4 * LONG, rel=0.1)
    assert second.rows_asked == pytest.approx(2 * LONG, rel=0.2)


def test_who_never_says_anything_is_left_alone() -> None:
    costs = Costs.alike(table(0.01, 0.0))
    drafter = Scripted(World(15), lambda _: [0.9] * 8, each=5e-4, silent=1.0)
    server = served(drafter, costs, 4)
    server.run(WARM)
    asked = drafter.rows_asked
    server.run(400)
    assert drafter.rows_asked - asked <= 400 / 8
    drafter.silent = 0.0
    server.run(1000)
    near(server.run(LONG), fixed(costs, 4, [0.9] * 8, lambda _: 4 * 5e-4))


def test_a_wait_for_a_compiler_silences_nobody() -> None:
    world = World(12)
    costs = Costs.alike(table(0.01, 0.0))
    drafter = Scripted(world, lambda _: [0.9] * 8, each=3.0)
    server = served(drafter, costs, 1)
    server.step()
    drafter.each = 1e-4
    server.run(WARM)
    near(server.run(LONG), fixed(costs, 1, [0.9] * 8, lambda _: 1e-4))


def test_requests_that_ended_leave_nothing() -> None:
    costs = Costs.alike(table(0.01, 0.02))
    server = served(Scripted(World(13), lambda _: [0.5] * 8), costs, 6)
    server.run(20)
    planner = server.drafting.planner
    assert planner is not None and planner._record._shadows
    for each in server.requests:
        server.drafting.ended(each)
    assert not planner._record._shadows


def test_adapters_come_and_go() -> None:
    """More adapters than are told apart."""
    world = World(14)
    costs = Costs.alike(table(0.01, 0.0001))
    requests = [request("r0")]
    server = Server(world, {"scripted": Scripted(world, lambda _: [0.8] * 8)}, costs, requests)
    server.drafting.planner = planner = Planner(costs)
    right, brought = planner._record._right, planner._prospects._asked
    right._most_owners = brought._most_owners = 16
    for number in range(200):
        newest: Request = request(f"r{number}")
        newest.adapters = (AdapterRef(f"{number:064x}"),)
        server.requests = [newest]
        server.run(3)
        server.drafting.ended(newest)
    assert len(right._owned) <= 16
    assert len(right._counts) == 64
    assert MOST_TOKENS >= max(server.verified) > 0, "a new adapter begins with what is known"


@pytest.mark.parametrize(("answers", "first", "kept"), [(0.5, 1.0, False), (0.1, 1.0, True)])
def test_what_answers_only_stands_in_the_way_of_what_is_better(
    answers: float, first: float, kept: bool
) -> None:
    """The second of a chain brings 5 tokens, and is only asked where the first has no answer."""
    shape = (2, 1, len(PRICES))
    table = Table(*np.zeros((5, *shape)))
    table.right[:, 0], table.answers[:, 0] = [[first], [5.0]], [[answers], [1.0]]
    worth, chain = _worth(table, 1.0, np.zeros(len(PRICES)))
    assert chain[0].all() == chain[0].any() == kept and chain[1].all()
    assert worth[1] == pytest.approx(first + (1 - answers) * 5 if kept else 5.0)


def test_nothing_of_a_probe_is_verified() -> None:
    costs = Costs.alike(table(0.01, 0.0))
    planner, guess = Planner(costs), Guess([1, 2, 3, 4])
    ask = Ask(request("r"), 8)
    answers = [Answer(0, ask, "scripted", guess), Answer(0, ask, "scripted", guess, probe=True)]
    numbers = planner.choose(answers, Load(1, 1, 64), 0.0)
    assert numbers[0] > 0 and numbers[1] == 0
