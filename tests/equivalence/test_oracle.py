"""What the engine serves is what transformers and PEFT compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests import tiny
from tests.harness import Harness

NEAR_TIE = 1e-4
"""Where an oracle's two best logits are closer than this, either may win; see the contract."""


class Excuses:
    """Counts positions excused for a near tie; more than 1 % of them is a failure."""

    def __init__(self) -> None:
        self.compared = self.excused = 0

    def compare(self, got: Sequence[int], want: Sequence[int], gaps: Sequence[float]) -> None:
        assert len(got) == len(want)
        for index, (a, b, gap) in enumerate(zip(got, want, gaps, strict=True)):
            if gap < NEAR_TIE:
                self.excused += len(got) - index
                return
            assert a == b, f"position {index}: {list(got)} is not {list(want)} (gap {gap})"
            self.compared += 1

    def check(self) -> None:
        assert self.compared > 0
        assert self.excused < 0.01 * (self.compared + self.excused)


def prompts(num: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(4, tiny.VOCAB_SIZE, rng.integers(1, 40)).tolist() for _ in range(num)]


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_greedy_ids_are_those_of_transformers(
    arch: tiny.Arch, checkpoints: Callable[[tiny.Arch], Path]
) -> None:
    model = checkpoints(arch)
    harness = Harness(model)
    requests = {harness.submit(p, max_tokens=24): p for p in prompts(6)}
    outputs = harness.run()
    excuses = Excuses()
    for request_id, prompt in requests.items():
        excuses.compare(outputs[request_id], *tiny.greedy(model, prompt, 24))
    excuses.check()
    harness.close()


def test_ten_adapters_in_one_batch_answer_as_peft_and_as_alone(
    llama: Path, adapters: dict[str, Path]
) -> None:
    harness = Harness(llama)
    everyone: list[Path | None] = [None, *adapters.values()]
    prompt = prompts(1, seed=3)[0]
    mixed = {harness.submit(prompt, adapter, max_tokens=16): adapter for adapter in everyone}
    outputs = harness.run()
    assert max(step.stats.get("batch_adapters", 0) for step in harness.steps) == len(everyone)
    excuses = Excuses()
    for request_id, adapter in mixed.items():
        excuses.compare(outputs[request_id], *tiny.greedy(llama, prompt, 16, adapter))
        alone = harness.generate(prompt, adapter, max_tokens=16, tenant="nothing cached")
        assert alone == outputs[request_id], adapter
    excuses.check()
    answers = {tuple(outputs[request_id]) for request_id in mixed}
    assert len(answers) > len(everyone) // 2, "adapters too weak to tell a mix-up"
    harness.close()


def test_log_probabilities_are_those_of_the_oracle(llama: Path, adapters: dict[str, Path]) -> None:
    import torch

    harness = Harness(llama, max_batch_tokens=16)
    prompt = prompts(1, seed=5)[0][:20] + [7] * 3
    name = harness.submit(prompt, adapters["rank8"], max_tokens=4, logprobs=3, prompt_logprobs=2)
    harness.run()
    ids = prompt + harness.outputs[name]
    table = torch.log_softmax(tiny.logits(llama, ids, adapters["rank8"]), -1)
    details = harness.details[name]
    prompt_logprobs = details[0].prompt_logprobs
    assert prompt_logprobs is not None and prompt_logprobs[0] is None
    assert all(output.prompt_logprobs is None for output in details[1:])
    got = [*prompt_logprobs[1:], *(output.logprobs[0] for output in details if output.logprobs)]
    assert len(got) == len(ids) - 1
    for position, entry in enumerate(got):
        assert entry is not None
        row = table[position]
        assert entry.token_id == ids[position + 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        best = row.topk(len(entry.top))
        assert [i for i, _ in entry.top] == best.indices.tolist()
    harness.close()
