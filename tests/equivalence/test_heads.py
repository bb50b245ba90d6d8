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
from tests.harness import Harness
from tests.heads import write_heads

from loramux.request import Request, Speculation
from loramux.speculation.drafter import Ask, Guess

HIDDEN = 64
HEADS = 3
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5},
    "processed": {
        "temperature": 0.9,
        "seed": 6,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "logit_bias": {9: 3.0},
        "min_tokens": 5,
        "stop_token_ids": tuple(range(30, 60)),
        "logprobs": 2,
    },
}
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


def served(
    model: Path, adapters: dict[str, Path], drafter: str, tree: bool = False, **knobs: Any
) -> Harness:
    """The base, three adapters, and three choices of one prompt."""
    harness = Harness(model, page_tokens=4)
    submit_all(harness, adapters, drafter, tree, **knobs)
    return harness


def submit_all(
    harness: Harness, adapters: dict[str, Path], drafter: str, tree: bool, **knobs: Any
) -> None:
    speculation = None
    if drafter:
        speculation = Speculation(drafters=(drafter,), max_draft_tokens=5, tree=tree)
    rng = np.random.default_rng(3)
    for index, name in enumerate([None, *list(adapters)[:3], "three"]):
        prompt = rng.integers(60, tiny.VOCAB_SIZE, 9 + index).tolist()
        adapter = list(adapters.values())[0] if name == "three" else adapters.get(name or "")
        for choice in range(3 if name == "three" else 1):
            harness.submit(
                prompt,
                adapter,
                name=f"{name}-{choice}",
                speculation=speculation,
                **{"max_tokens": 14, "choice": choice, **knobs},
            )


def told(harness: Harness) -> dict[str, Any]:
    """All that a client sees: ids, log-probabilities, how it ended."""
    return {
        name: (
            ids,
            [entry for output in harness.details[name] for entry in output.logprobs or ()],
            (harness.finished[name].reason, harness.finished[name].stop_token_id),
        )
        for name, ids in harness.outputs.items()
    }


def accepted(harness: Harness) -> int:
    """Guesses that were right."""
    return sum(
        len(output.token_ids) - 1 for outputs in harness.details.values() for output in outputs
    )


def with_heads(model: Path, folder: Path) -> Path:
    """A copy of the model, for heads to be put beside its weights."""
    shutil.copytree(model, folder)
    return folder


@pytest.fixture(scope="module", params=SAMPLINGS)
def knobs(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SAMPLINGS[request.param]


@pytest.fixture(scope="module")
def plain(llama: Path, adapters: dict[str, Path], knobs: dict[str, Any]) -> dict[str, Any]:
    harness = served(llama, adapters, "", **knobs)
    harness.run()
    harness.close()
    return told(harness)


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
    harness = Harness(llama, page_tokens=4)
    harness.engine.drafting.drafters["watching"] = watching
    submit_all(harness, adapters, "watching", False, **knobs)
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
    harness = served(trained, adapters, "medusa", TREES[shape], **knobs)
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
    rng = np.random.default_rng(7)
    for overlap in (False, True):
        harness = Harness(folder, page_tokens=4, overlap=overlap, max_batch_tokens=24)
        submit_all(harness, adapters, "medusa", TREES[shape], **knobs)
        while harness.engine.has_work:
            harness.step()
            running = harness.engine.scheduler.running
            if running and rng.random() < 0.2 and not overlap:
                harness.engine.scheduler._preempt(running[int(rng.integers(len(running)))])
        assert told(harness) == plain
        harness.close()


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
        while harness.engine.has_work:
            harness.step()
            running = harness.engine.scheduler.running
            if running and rng.random() < 0.2 and not overlap:
                harness.engine.scheduler._preempt(running[int(rng.integers(len(running)))])
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
    for drafter in ("", "lookup"):
        harness = Harness(trained, page_tokens=4)
        monkeypatch.setattr(harness.engine.drafting, "saw", lambda *_: pytest.fail("copied"))
        submit_all(harness, adapters, drafter, False)
        harness.run()
        harness.close()
    harness = Harness(trained, page_tokens=4)
    harness.engine.drafting.drafters["watching"] = watching
    submit_all(harness, adapters, "watching", False)
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
