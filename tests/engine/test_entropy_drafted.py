"""Guesses and refusals of requests that move between two models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.engine.routed import (
    NEVER_LARGE,
    NEVER_SMALL,
    PROMPT,
    SAMPLINGS,
    drawn_by,
    engine,
    run,
)
from tests.harness import Harness

from loramux.request import (
    BASE_MODEL_ID,
    SMALL_MODEL_ID,
    EntropyAdaptive,
    Request,
    Speculation,
)
from loramux.speculation.drafter import Ask, Guess


class Knowing:
    """Guesses what was said before, as a chain or as a comb with a wrong sibling everywhere."""

    def __init__(self, future: Sequence[int], *, tree: bool) -> None:
        self._future, self._tree = future, tree
        self.asked: list[int] = []

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._guess(ask.request, ask.most) for ask in asks]

    def ended(self, request: Request) -> None: ...

    def _guess(self, request: Request, most: int) -> Guess:
        self.asked.append(request.kv.model_id)
        future = self._future[request.num_outputs :]
        if not self._tree:
            return Guess(future[:most])
        tokens: list[int] = []
        parents: list[int] = []
        parent = 0
        for token in future[: most // 2]:
            tokens += [(token + 1) % tiny.VOCAB_SIZE, token]
            parents += [parent, parent]
            parent = len(tokens)
        return Guess(tokens, parents)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("knobs", SAMPLINGS.values(), ids=SAMPLINGS)
def test_guesses_change_nothing_and_never_reach_over_a_move(
    shared: Harness, how: EntropyAdaptive, knobs: dict[str, Any], tree: bool
) -> None:
    name = run(shared, entropy=how, **knobs)
    knowing = Knowing(shared.outputs[name], tree=tree)
    shared.engine.drafting.drafters["knowing"] = knowing
    speculation = Speculation(drafters=("knowing",), max_draft_tokens=6, tree=tree)
    guessed = run(shared, tenant="guessed", entropy=how, speculation=speculation, **knobs)
    assert shared.outputs[guessed] == shared.outputs[name]
    assert drawn_by(shared, guessed) == drawn_by(shared, name)
    ends = [[(o.ledger or ())[:2] for o in shared.details[each]][-1] for each in (guessed, name)]
    assert ends[0] == ends[1]
    accepted = sum(len(o.token_ids) - 1 for o in shared.details[guessed])
    assert accepted >= 4 and {BASE_MODEL_ID, SMALL_MODEL_ID} == set(knowing.asked)
    again = run(shared, tenant="guessed", entropy=how, speculation=speculation, **knobs)
    assert shared.outputs[again] == shared.outputs[name]


def test_who_knows_only_the_target_is_not_asked_about_the_small_model(
    shared: Harness, how: EntropyAdaptive
) -> None:
    name = run(shared, entropy=how, **SAMPLINGS["sampled"])
    of_target, free = (Knowing(shared.outputs[name], tree=False) for _ in range(2))
    shared.engine.drafting.drafters.update({"draft": of_target, "free": free})
    for chain in (("draft",), ("draft", "free")):
        speculation = Speculation(drafters=chain, max_draft_tokens=2)
        again = run(shared, entropy=how, speculation=speculation, **SAMPLINGS["sampled"])
        assert shared.outputs[again] == shared.outputs[name]
    del shared.engine.drafting.drafters["draft"]
    assert set(of_target.asked) == {BASE_MODEL_ID}
    assert set(free.asked) == {SMALL_MODEL_ID}, "the draft has an answer on the target"


# -- refusals --------------------------------------------------------------------------------------


def refused(harness: Harness, **knobs: Any) -> tuple[str, str]:
    name = harness.submit(PROMPT, **knobs)
    harness.run()
    return harness.failed[name].code, harness.failed[name].message


def test_what_cannot_be_done_is_refused_by_name(
    models: tuple[Path, Path], shared: Harness, how: EntropyAdaptive, tmp_path: Path
) -> None:
    code, message = refused(shared, entropy=how, output_ids=[5], resume=b"?")
    assert code == "invalid_request" and "resume" in message
    without = Harness(models[0])
    code, message = refused(without, entropy=how)
    assert (
        code == "invalid_request" and "entropy_adaptive" in message and "--small-model" in message
    )
    without.close()
    short = tiny.write_model(tmp_path / "short", max_position_embeddings=32)
    harness = engine((models[0], short), num_frames=20)
    code, message = refused(harness, entropy=how, max_tokens=20)
    assert code == "invalid_request" and "entropy_adaptive" in message
    assert len(harness.generate(PROMPT, max_tokens=20)) == 20, "nobody else is bound by it"
    assert len(harness.generate(PROMPT, max_tokens=19, entropy=how)) == 19
    harness.close()


def test_it_must_fit_on_both_models_at_once(
    models: tuple[Path, Path], how: EntropyAdaptive
) -> None:
    probe = engine(models, num_frames=64)
    formats = [model.kv for model in probe.engine.scheduler._models.values()]
    need = sum(kv.num_pages(len(PROMPT) + 40) for kv in formats)
    probe.close()
    for num_frames, fits in ((need, True), (need - 1, False)):
        harness = engine(models, num_frames=num_frames)
        if fits:
            assert len(harness.generate(PROMPT, max_tokens=40, entropy=how)) == 40
        else:
            assert refused(harness, max_tokens=40, entropy=how)[0] == "request_too_large"
        harness.close()


def test_a_broken_row_fails_alone(
    shared: Harness, how: EntropyAdaptive, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = shared.engine.partners[SMALL_MODEL_ID].decoder
    forward: Callable[[Any], torch.Tensor] = decoder.forward

    def poisoned(inputs: Any) -> torch.Tensor:
        logits = forward(inputs)
        logits[:] = torch.nan
        return logits

    monkeypatch.setattr(decoder, "forward", poisoned)
    bad = shared.submit(PROMPT, tenant="bad", entropy=NEVER_LARGE)
    good = shared.submit(PROMPT, tenant="bad", entropy=NEVER_SMALL)
    shared.run()
    assert shared.failed[bad].code == "numerical_error" and len(shared.outputs[good]) == 8
