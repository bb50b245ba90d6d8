"""Every format in PEFT's own words: alone, and mixed with all the others in one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests import formats, tiny
from tests.equivalence.test_oracle import Excuses, prompts
from tests.harness import Harness

ARCHS: tuple[tiny.Arch, ...] = ("llama", "qwen2", "llama_mha_tied")


@pytest.fixture(scope="module", params=ARCHS)
def arch(request: pytest.FixtureRequest) -> tiny.Arch:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model(arch: tiny.Arch, checkpoints: Callable[[tiny.Arch], Path]) -> Path:
    return checkpoints(arch)


@pytest.fixture(scope="module")
def adapters(
    arch: tiny.Arch, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp(f"formats-{arch}")
    return {
        name: formats.write(folder / name, model, name, seed=seed)
        for seed, name in enumerate(formats.FORMATS)
    }


def test_all_formats_in_one_batch_answer_as_peft_and_as_alone(
    model: Path, adapters: dict[str, Path]
) -> None:
    harness = Harness(model, max_num_seqs=32, num_frames=1500)
    prompt = prompts(1, seed=5)[0]
    base = harness.generate(prompt, max_tokens=16)
    mixed = {harness.submit(prompt, path, max_tokens=16): name for name, path in adapters.items()}
    outputs = harness.run()
    excuses = Excuses()
    for request_id, name in mixed.items():
        assert request_id in harness.finished, (name, harness.failed.get(request_id))
        excuses.compare(outputs[request_id], *tiny.greedy(model, prompt, 16, adapters[name]))
        alone = harness.generate(prompt, adapters[name], max_tokens=16, tenant="nothing cached")
        assert alone == outputs[request_id], name
    excuses.check()
    same = [name for request_id, name in mixed.items() if outputs[request_id] == base]
    assert not same, "too weak to tell from the base"
    harness.close()


def test_log_probabilities_of_a_prompt_are_pefts(model: Path, adapters: dict[str, Path]) -> None:
    """Closer than ids can tell: a bias forgotten, a gain off by a little."""
    harness = Harness(model, max_num_seqs=32, num_frames=1500)
    prompt = prompts(1, seed=6)[0][:20] + [7] * 5
    asked = {
        harness.submit(prompt, path, max_tokens=1, prompt_logprobs=0): name
        for name, path in adapters.items()
    }
    harness.run()
    for request_id, name in asked.items():
        (first,) = [o for o in harness.details[request_id] if o.prompt_logprobs]
        got = torch.tensor([p.logprob for p in first.prompt_logprobs[1:] if p])  # type: ignore[index]
        logits = tiny.logits(model, prompt, adapters[name]).log_softmax(-1)
        want = logits[torch.arange(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(
            got, want, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    harness.close()


def test_several_adapters_at_once_are_pefts_weighted_sum(
    model: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Mixed into one adapter by PEFT (``cat``: exact), entries of one work list here."""
    names, weights = ["lora", "rslora", "patterns"], [0.5, -0.75, 1.5]
    folder = formats.write_sum(
        tmp_path / "sum", model, {name: adapters[name] for name in names}, weights
    )
    harness = Harness(model)
    prompt = prompts(1, seed=8)[0]
    chosen = [(adapters[name], weight) for name, weight in zip(names, weights, strict=True)]
    together = harness.submit(prompt, chosen, max_tokens=16)
    first = harness.submit(prompt, chosen[:1], max_tokens=16)
    outputs = harness.run()
    excuses = Excuses()
    excuses.compare(outputs[together], *tiny.greedy(model, prompt, 16, folder))
    excuses.check()
    assert outputs[together] != outputs[first]
    harness.close()


def test_a_scale_multiplies_the_whole_change(model: Path, adapters: dict[str, Path]) -> None:
    """Of a gain, a shift, an input gain as of a pair: nothing of it is left at zero."""
    harness = Harness(model, max_num_seqs=32, num_frames=1500)
    prompt = prompts(1, seed=9)[0]
    base = harness.generate(prompt, max_tokens=12)
    off = {harness.submit(prompt, [(path, 0.0)], max_tokens=12): n for n, path in adapters.items()}
    half = {harness.submit(prompt, [(path, 0.5)], max_tokens=12): n for n, path in adapters.items()}
    full = {harness.submit(prompt, [(path, 1.0)], max_tokens=12): n for n, path in adapters.items()}
    outputs = harness.run()
    assert all(outputs[request_id] == base for request_id in off)
    between = [outputs[h] not in (base, outputs[f]) for h, f in zip(half, full, strict=True)]
    assert sum(between) > len(between) / 2, "half a change looks like none or all of it"
    harness.close()
