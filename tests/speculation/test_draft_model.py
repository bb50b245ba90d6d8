"""A draft model beside its target: what it guesses, what it computes for it, whose frames it
takes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.harness import Harness
from tests.speculation.drafting import DRAFTED, Bench

from loramux.memory.frames import Owner
from loramux.request import DRAFT_MODEL_ID, Kv, Request, SamplingParams
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.followers import Follower, Followers
from loramux.speculation.prospects import Priced

PROCESSED: dict[str, Any] = {
    "temperature": 0.9,
    "seed": 6,
    "top_p": 0.9,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.3,
    "logit_bias": {9: 3.0},
    "min_tokens": 5,
    "stop_token_ids": tuple(range(30, 60)),
}


@pytest.mark.parametrize("knobs", [{}, {"temperature": 1.0, "seed": 4}, PROCESSED])
def test_the_target_as_its_own_draft_is_always_right(
    models: dict[str, Path], knobs: dict[str, Any]
) -> None:
    """Also where penalties see the guesses before."""
    harness = Harness(models["target"], draft_model=models["target"], page_tokens=4)
    for index in range(3):
        harness.submit(
            range(60, 66 + 5 * index),
            name=f"{index}",
            speculation=DRAFTED,
            **{"max_tokens": 23, "stop_token_ids": (), "choice": index, **knobs},
        )
    harness.run()
    guessed = 0
    for name, outputs in harness.details.items():
        for output in outputs:
            stops = output.token_ids[-1] in knobs.get("stop_token_ids", ())
            if output.drafted is not None:
                guessed += output.drafted[1]
                assert len(output.token_ids) == output.drafted[1] + 1 or stops, name
    tokens = sum(map(len, harness.outputs.values()))
    assert guessed >= 0.6 * tokens
    harness.close()


def test_what_it_computes_in_pieces_is_what_a_fresh_prefill_computes(
    bench: Callable[..., Bench],
) -> None:
    """Whatever came true of its guesses, whoever drafts beside it, in steps of few tokens."""
    made, other = bench(max_batch_tokens=16), bench()
    rng = np.random.default_rng(0)
    requests = [
        made.request(f"{i}", rng.integers(60, 300, 5 + 14 * i).tolist(), temperature=1.0, seed=i)
        for i in range(3)
    ]
    for _ in range(14):
        asked = [(r, int(rng.integers(1, 6))) for r in requests if rng.random() < 0.7]
        guesses = made.propose(*asked)
        came = {r: guess for (r, _), guess in zip(asked, guesses, strict=True)}
        for request in requests:
            right = came.get(request, [])[: int(rng.integers(0, 6))]
            made.goes_on(request, *right, int(rng.integers(60, 300)))
    lengths = [len(ids) for ids, _ in made.scored]
    assert len(lengths) > 60
    for ids, logits in made.scored:
        assert torch.equal(logits, other.fresh(ids)), len(ids)


def test_a_round_is_one_ragged_pass_and_one_for_each_guess_more(
    bench: Callable[..., Bench],
) -> None:
    made = bench()
    first, second = made.request("a", range(60, 65)), made.request("b", range(70, 93))
    assert [len(guess) for guess in made.propose((first, 2))] == [2]
    assert made.passes == [[("a", 0, 5)], [("a", 5, 1)]]
    made.goes_on(first, 7)
    made.passes.clear()
    assert [len(guess) for guess in made.propose((second, 1), (first, 3))] == [1, 3]
    assert made.passes == [[("a", 5, 1), ("b", 0, 23)], [("a", 6, 1)], [("a", 7, 1)]]


def test_only_what_came_true_is_kept(bench: Callable[..., Bench]) -> None:
    made = bench()
    request = made.request("a", range(60, 65))

    def round_after(*token_ids: int) -> tuple[list[int], tuple[int, int]]:
        """What is guessed next, and where its first pass begins: (first token, number)."""
        made.goes_on(request, *token_ids)
        made.passes.clear()
        (guess,) = made.propose((request, 3))
        return guess, made.passes[0][0][1:]

    guess, _ = round_after(9)  # 6 known
    guess, began = round_after(*guess, 9)
    assert began == (8, 2), "the last guess was not computed yet, nor what came after it"
    guess, began = round_after(guess[0], guess[1] + 1)  # 12 known
    assert began == (11, 1)
    guess, began = round_after(guess[0] + 1)
    assert began == (12, 1)
    guess, began = round_after(guess[0])  # a cut guess: what came is what it had guessed
    assert began == (13, 1), "the last known id is computed again: what comes after it is wanted"
    guess, began = round_after(guess[0], guess[1])
    assert began == (15, 1)
    assert made.propose((request, 3)) == [guess], "asked again, it says the same"


def test_guesses_whose_pages_are_gone_are_forgotten_with_them() -> None:
    request = Request("a", prompt_ids=[7, 7, 7], sampling=SamplingParams(seed=0))
    follower = Follower(request, Kv(DRAFT_MODEL_ID))
    follower.ahead = [7, 7]
    follower.forget()
    follower.catch()
    assert follower.lag == 3, "they look like the text's beginning"


def test_who_is_far_behind_waits_and_holds_nobody_up(bench: Callable[..., Bench]) -> None:
    made = bench(max_batch_tokens=16)
    far, near = made.request("far", range(60, 85)), made.request("near", range(70, 74))
    assert [len(guess) for guess in made.propose((far, 2), (near, 2))] == [0, 2]
    assert made.passes[0] == [("near", 0, 4), ("far", 0, 12)]
    made.goes_on(near, 8)
    made.goes_on(far, 8)
    assert [len(guess) for guess in made.propose((far, 2), (near, 2))] == [2, 2]
    assert made.passes[2] == [("near", 4, 1), ("far", 12, 14)]


def test_its_own_context_is_the_end(bench: Callable[..., Bench]) -> None:
    made = bench("deep", "wide")  # 40 positions
    request = made.request("a", range(60, 98))
    assert [len(guess) for guess in made.propose((request, 9))] == [3]
    assert max(first + number for passed in made.passes for _, first, number in passed) == 40
    made.goes_on(request, 7, 7)
    assert [len(guess) for guess in made.propose((request, 9))] == [1]
    made.goes_on(request, 7)
    assert made.propose((request, 9)) == [[]]


def test_nothing_is_guessed_behind_a_stop(bench: Callable[..., Bench]) -> None:
    made = bench("target", "target")
    request = made.request("a", range(60, 70))
    (guess,) = made.propose((request, 4))
    assert len(set(guess)) == 4
    stopping = made.request("b", range(60, 70), stop_token_ids=(guess[2],))
    assert made.propose((stopping, 4)) == [guess[:2]]
    assert len(made.passes) == 4 + 3


def test_it_takes_only_what_is_worth_less(bench: Callable[..., Bench]) -> None:
    made = bench(num_frames=12)
    held = made.pool.obtain(11, Owner.KV)
    assert held is not None
    made.pool.prefix.insert(b"page", held[0])
    made.pool.prefix.release(held[:1])
    one, other = made.request("a", [60] * 3), made.request("b", [70] * 3)
    assert made.partner.kv.num_pages(4) == 1
    assert [len(guess) for guess in made.propose((one, 2), (other, 2))] == [2, 0]
    assert len(made.pool.prefix) == 1, "a cached page is worth more than a guess"
    assert [len(guess) for guess in made.propose((other, 2))] == [0], "so is another's page"
    assert made.pool.num_available == 2
    assert made.pool.obtain(2, Owner.KV) is not None
    made.goes_on(one, 7)
    assert made.propose((one, 2)) == [[]]
    made.drafter.ended(one)
    made.drafter.ended(other)
    made.pool.frames.give_back(held[1:], Owner.KV)
    made.drafter.ended(made.request("never asked about", [5]))


def test_it_goes_before_a_row_of_the_target_does(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that just holds the requests: with a draft model in it nobody is preempted."""
    forgotten = 0
    forget = Follower.forget

    def counted(follower: Follower) -> list[int]:
        nonlocal forgotten
        forgotten += follower.kv.num_pages
        return forget(follower)

    monkeypatch.setattr(Follower, "forget", counted)
    told = []
    for speculation in (None, DRAFTED):
        harness = Harness(
            models["target"], draft_model=models["other"], page_tokens=4, num_frames=3 * 8
        )
        for index in range(3):
            harness.submit([60 + index] * 8, max_tokens=24, speculation=speculation)
        harness.run()
        assert sum(step.stats.get("preemptions", 0) for step in harness.steps) == 0
        told.append(dict(harness.outputs))
        harness.close()
    assert told[0] == told[1]
    assert forgotten > 0


@pytest.mark.parametrize("num_frames", [44, 60])
def test_a_draft_of_another_shape_shares_the_pool(
    models: dict[str, Path], tmp_path: Path, num_frames: int
) -> None:
    """Adapters, cached pages, rows that are preempted: the books balance after every step."""
    adapter = tiny.write_adapter(tmp_path / "a", models["deep"], r=4)
    told = []
    for speculation in (None, DRAFTED):
        harness = Harness(
            models["deep"], draft_model=models["wide"], page_tokens=2, num_frames=num_frames
        )
        guest = harness.engine.partners[DRAFT_MODEL_ID].kv
        assert (guest.num_layers, guest.head_dim, guest.page_tokens) == (4, 32, 2)
        rng = np.random.default_rng(2)
        for index in range(5):
            harness.submit(
                rng.integers(60, 300, 4 + index).tolist(),
                adapter if index % 2 else None,
                max_tokens=17,
                speculation=speculation,
            )
        harness.run()
        assert harness.failed == {}
        preempted = sum(step.stats.get("preemptions", 0) for step in harness.steps)
        assert preempted > 0
        drafted = [o for outputs in harness.details.values() for o in outputs if o.drafted]
        assert bool(drafted) == (speculation is not None)
        told.append(dict(harness.outputs))
        harness.close()
    assert told[0] == told[1]


def test_abort_gives_back_what_the_draft_model_had(models: dict[str, Path]) -> None:
    harness = Harness(models["target"], draft_model=models["other"], prefix_caching=False)
    name = harness.submit([60] * 20, max_tokens=40, speculation=DRAFTED)
    while len(harness.outputs[name]) < 3:
        harness.step()
    assert harness.engine.pool.order.num_frames > 0
    harness.engine.abort([name])
    harness.engine.check()
    assert harness.engine.pool.frames.num_free == 400
    harness.close()


def test_rows_whose_prompt_is_still_scored_are_not_drafted(models: dict[str, Path]) -> None:
    harness = Harness(models["target"], draft_model=models["target"])
    harness.submit([60], max_tokens=9, prompt_logprobs=2, speculation=DRAFTED, name="a")
    harness.run()
    first = harness.details["a"][0]
    assert first.prompt_logprobs == [None] and first.drafted is None
    assert any(output.drafted for output in harness.details["a"])
    harness.close()


# -- its cost, and its head ------------------------------------------------------------------------


def test_it_tells_what_its_steps_take(bench: Callable[..., Bench]) -> None:
    made = bench()
    assert isinstance(made.drafter, Priced)
    assert made.drafter.seconds(4, 3) == 0.0
    for rows, seconds in [(1, 0.5), (1, 0.5), (4, 2.0), (5, 2.0)]:
        made.drafter._took(rows, seconds)
    assert made.drafter.seconds(1, 3) == pytest.approx(1.5)
    assert made.drafter.seconds(6, 1) == made.drafter.seconds(7, 1) == pytest.approx(2.0)
    assert made.drafter.seconds(64, 2) == pytest.approx(4.0)


def test_a_round_ends_where_the_head_foresees_a_rejection(bench: Callable[..., Bench]) -> None:
    """Each row for itself, by the product over the round; what was known is not judged."""
    made = bench("target", "target")
    short, longer = made.request("a", range(60, 64)), made.request("b", range(90, 99))
    judged: list[int] = []

    def head(hidden: torch.Tensor) -> list[float]:
        judged.append(len(hidden))
        return [0.0 if name == "a" else 0.6 for name, _, _ in made.passes[-1]]

    made.drafter._head = head
    for _ in range(2):
        made.passes.clear()
        judged.clear()
        assert [len(g) for g in made.propose((short, 8), (longer, 8))] == [2, 4]  # .6^3 < .3
        assert judged == [2, 1, 1]
        assert [len(passed) for passed in made.passes] == [2, 2, 1, 1]
        made.goes_on(short, 7)
        made.goes_on(longer, 7)
    assert [len(g) for g in made.propose((short, 1), (longer, 3))] == [1, 3]


def test_the_head_reads_what_the_output_matrix_reads(bench: Callable[..., Bench]) -> None:
    made = bench("target", "target")
    request = made.request("a", range(60, 64))
    seen: list[torch.Tensor] = []

    def head(hidden: torch.Tensor) -> list[float]:
        seen.append(hidden.clone())
        return [1.0] * len(hidden)

    made.drafter._head = head
    (guess,) = made.propose((request, 3))
    model = tiny.oracle(made.harness.config.model)
    with torch.no_grad():
        ids = torch.tensor([[*range(60, 64), *guess]])
        known = model.model(ids, use_cache=False).last_hidden_state[0, 4:6]
    torch.testing.assert_close(torch.cat(seen), known, rtol=1e-4, atol=1e-4)


def test_followers_are_of_one_request_each(bench: Callable[..., Bench]) -> None:
    made = bench()
    followers: Followers = made.drafter._followers
    request = made.request("a", [60, 61])
    assert request not in followers
    made.propose((request, 2))
    assert request in followers and followers.wake(request, ()) is followers.wake(request, ())
    assert isinstance(made.drafter.propose([])[0:], list)
    assert made.drafter.propose([Ask(request, 0)]) == [Guess()]
