"""Medusa heads in the engine: what they read, and that nobody sees them in the output."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests import tiny
from tests.equivalence.drafted import MOST, disturbed, served, told
from tests.harness import Harness
from tests.heads import write_heads

from loramux.request import Request, Speculation
from loramux.speculation.drafter import Ask, Guess

HIDDEN = 64
HEADS = 3
TREES = {"chain": False, "tree": True}


class Watching:
    """Guesses nothing; keeps the states it is shown, each beside how many ids there were."""

    def __init__(self, guesses: dict[str, list[int]] | None = None) -> None:
        self.states: dict[tuple[str, int], torch.Tensor] = {}
        self.calls = 0
        self._guesses = guesses or {}

    def saw(self, requests: Sequence[Request], hidden: torch.Tensor) -> None:
        self.calls += 1
        assert hidden.shape == (len(requests), HIDDEN)
        for request, state in zip(requests, hidden, strict=True):
            self.states[request.id, request.num_ids] = state

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._guess(ask) for ask in asks]

    def _guess(self, ask: Ask) -> Guess:
        """Two right ones and a wrong one; in a tree two wrong ones stand before them."""
        come = self._guesses.get(ask.request.id, [])[ask.request.num_outputs :][: ask.most]
        if len(come) < 3:
            return Guess()
        wrong = (come[2] + 1) % tiny.VOCAB_SIZE
        if not ask.may_branch:
            return Guess([*come[:2], wrong])
        other = (come[0] + 1) % tiny.VOCAB_SIZE
        tree = [other, other, come[0], come[1], wrong][: ask.most]
        return Guess(tree, [0, 1, 0, 3, 4][: ask.most])

    def ended(self, request: Request) -> None: ...


def guessing(model: Path, adapters: dict[str, Path], knobs: dict[str, Any], shape: str) -> Harness:
    return served(model, adapters, knobs, None, by_heads(shape))


def by_heads(shape: str) -> Speculation:
    return Speculation(drafters=("medusa",), max_draft_tokens=MOST, tree=TREES[shape])


def accepted(harness: Harness) -> int:
    """Guesses that were right."""
    return sum(
        len(output.token_ids) - 1 for outputs in harness.details.values() for output in outputs
    )


def with_heads(model: Path, folder: Path) -> Path:
    """A copy of the model, for heads to be put beside its weights."""
    shutil.copytree(model, folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    llama: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    plain: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The model with heads that were fitted, by least squares, to how these very texts go on."""
    watching = Watching()
    harness = served(llama, adapters, knobs, watching)
    lengths = {id: len(r.ids) - r.max_ids + r.num_prompt for id, r in _requests(harness).items()}
    harness.run()
    harness.close()
    states: list[list[torch.Tensor]] = [[] for _ in range(HEADS)]
    says: list[list[int]] = [[] for _ in range(HEADS)]
    for (name, num_ids), state in watching.states.items():
        come = plain[name][0][num_ids - lengths[name] :]
        for head in range(min(HEADS, len(come))):
            states[head].append(state)
            says[head].append(come[head])
    tensors = {"accuracy": torch.tensor([[0.9, 0.3]] * HEADS)}
    for head in range(HEADS):
        wanted = torch.nn.functional.one_hot(torch.tensor(says[head]), tiny.VOCAB_SIZE).double()
        found = torch.linalg.lstsq(torch.stack(states[head]).double(), wanted).solution
        tensors[f"{head}.0.weight"] = (40 * found.T).float().contiguous()
    folder = with_heads(llama, tmp_path_factory.mktemp("trained") / "base")
    save_file(tensors, folder / "medusa_heads.safetensors")
    return folder


def _requests(harness: Harness) -> dict[str, Request]:
    return harness.engine._requests


@pytest.mark.parametrize("shape", TREES)
def test_drafted_is_plain_and_some_of_it_was_guessed(
    trained: Path, adapters: dict[str, Path], knobs: dict[str, Any], plain: Any, shape: str
) -> None:
    harness = guessing(trained, adapters, knobs, shape)
    assert harness.ready.drafters[-1] == "medusa"
    harness.run()
    assert told(harness) == plain
    assert accepted(harness) >= 5
    assert {o.drafted[0] for d in harness.details.values() for o in d if o.drafted} == {"medusa"}
    depths = {o.drafted[2] for d in harness.details.values() for o in d if o.drafted}
    assert max(depths) == HEADS
    harness.close()


@pytest.mark.parametrize("shape", TREES)
def test_with_heads_that_know_nothing_too(
    llama: Path,
    adapters: dict[str, Path],
    knobs: dict[str, Any],
    plain: Any,
    shape: str,
    tmp_path: Path,
) -> None:
    """Across preemptions, and on a schedule that is planned ahead."""
    folder = with_heads(llama, tmp_path / "base")
    write_heads(folder / "medusa_heads.safetensors", HIDDEN, blocks=2, dtype=torch.float16)
    for overlap in (False, True):
        found = disturbed(
            folder,
            adapters,
            knobs,
            None,
            np.random.default_rng(7),
            overlap=overlap,
            speculation=by_heads(shape),
        )
        assert found == plain


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("shape", TREES)
def test_the_states_are_those_the_last_tokens_were_drawn_from(
    llama: Path, adapters: dict[str, Path], shape: str, overlap: bool
) -> None:
    """After chains and trees of which a part is right, small prompt chunks, prompt log-probs and
    preemptions, against a forward pass of transformers."""
    rng = np.random.default_rng(2)
    prompts = {"base": None, **dict(list(adapters.items())[:2])}
    truth: dict[str, list[int]] = {}
    for drafted in (False, True):
        harness = Harness(llama, page_tokens=4, max_batch_tokens=18, overlap=overlap)
        watching = Watching(truth if drafted else None)
        harness.engine.drafting.drafters["watching"] = watching
        ids = {name: list(range(70, 83 + i)) for i, name in enumerate(prompts)}
        for name, adapter in prompts.items():
            harness.submit(
                ids[name],
                adapter,
                name=name,
                max_tokens=12,
                prompt_logprobs=0 if name == "base" else None,
                speculation=Speculation(
                    drafters=("watching",), max_draft_tokens=6, tree=TREES[shape]
                ),
            )
        harness.run_preempting(rng, 0.0 if overlap else 0.2)
        truth = dict(harness.outputs)
        assert (accepted(harness) > 5) == drafted
        for name, adapter in prompts.items():
            text = torch.tensor([[*ids[name], *harness.outputs[name]]])
            oracle = tiny.oracle(llama, adapter)
            inner = oracle.base_model.model.model if adapter else oracle.model
            with torch.no_grad():
                want = inner(input_ids=text, use_cache=False).last_hidden_state[0]
            counts = [count for of, count in watching.states if of == name]
            assert counts[-1] == text.shape[1]
            for count in counts:
                # the id that is number ``count`` was drawn at the one before it
                state = watching.states[name, count]
                torch.testing.assert_close(state, want[count - 2], rtol=1e-3, atol=1e-3)
        harness.close()


def test_nothing_is_copied_when_nobody_asks(
    trained: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    watching = Watching()
    for speculation in (None, Speculation(drafters=("lookup",))):
        harness = served(trained, adapters, {}, None, speculation)
        monkeypatch.setattr(harness.engine.drafting, "saw", lambda *_: pytest.fail("copied"))
        harness.run()
        harness.close()
    harness = served(trained, adapters, {}, watching)
    harness.run()
    assert 0 < watching.calls <= len(harness.steps), "one copy a step, for all of its rows"
    assert len(watching.states) > watching.calls
    harness.close()


def test_what_is_kept_of_a_request_goes_with_it(trained: Path) -> None:
    harness = Harness(trained, page_tokens=4)
    speculation = Speculation(drafters=("medusa",))
    harness.generate([60, 61], speculation=speculation)
    harness.submit([60, 61], speculation=speculation, name="gone", max_tokens=50)
    harness.step()
    harness.step()
    medusa: Any = harness.engine.drafting.drafters["medusa"]
    assert list(medusa._seen) == ["gone"]
    harness.engine.abort(["gone"])
    assert not medusa._seen
    harness.close()
