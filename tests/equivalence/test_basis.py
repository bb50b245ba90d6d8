"""LoRA-XS on a shared basis answers as the same adapters without one, whoever comes and goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import formats
from tests.equivalence.test_oracle import prompts
from tests.harness import Harness

from loramux.adapters.residency import Residency
from loramux.memory.frames import Owner

NUM = 10
LATENT = ".default_lora_latent_mapping.weight"


@pytest.fixture(scope="module")
def twins(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Ten adapters of one A and B, each beside the pair that it is: B R in B's place."""
    folder = tmp_path_factory.mktemp("basis")
    first = formats.write(folder / "first", llama, "lora_xs")
    config = json.loads((first / "adapter_config.json").read_text())
    tensors = load_file(first / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    made = []
    for index in range(NUM):
        own, plain = dict(tensors), {}
        for name in (n for n in tensors if n.endswith(LATENT)):
            path = name.removesuffix(LATENT)
            own[name] = 0.4 * torch.randn(tensors[name].shape, generator=generator)
            b = tensors[f"{path}.lora_B.weight"].double() @ own[name].double()
            plain[f"{path}.lora_A.weight"] = tensors[f"{path}.lora_A.weight"]
            plain[f"{path}.lora_B.weight"] = b.float()
        pair = folder / f"shared{index}", folder / f"plain{index}"
        for directory, values in zip(pair, (own, plain), strict=True):
            directory.mkdir()
            (directory / "adapter_config.json").write_text(json.dumps(config))
            save_file(values, directory / "adapter_model.safetensors")
        made.append(pair)
    return made


def test_ten_on_one_basis_answer_as_ten_pairs(llama: Path, twins: list[tuple[Path, Path]]) -> None:
    harness = Harness(llama, num_frames=2000, max_num_seqs=32)
    prompt = prompts(1, seed=11)[0]
    asked = [[harness.submit(prompt, path, max_tokens=12) for path in pair] for pair in twins]
    half = [harness.submit(prompt, [(p, 0.5) for p in (a, b)], max_tokens=12) for a, b in twins]
    outputs = harness.run()
    assert not harness.failed
    for ours, plain in asked:
        assert outputs[ours] == outputs[plain]
    for both, (_, plain) in zip(half, asked, strict=True):
        assert outputs[both] == outputs[plain], "half of one and half of the other"
    assert len({tuple(outputs[ours]) for ours, _ in asked}) > NUM / 2
    for index, (ours, _) in enumerate(twins):
        alone = harness.generate(prompt, ours, max_tokens=12, tenant="nothing cached")
        assert alone == outputs[asked[index][0]]
    harness.close()


def test_a_basis_is_in_the_pool_once(llama: Path, twins: list[tuple[Path, Path]]) -> None:
    harness = Harness(llama, num_frames=2000, max_num_seqs=32)
    residency: Residency = harness.engine.residency
    frames = harness.engine.scheduler._pool.frames
    prompt = [5, 6, 7]
    harness.generate(prompt, twins[0][0], max_tokens=1)
    digests = [harness.install(ours) for ours, _ in twins]
    first = frames.count(Owner.ADAPTER)
    assert first == residency.num_frames(digests[0])
    for ours, _ in twins:
        harness.submit(prompt, ours, max_tokens=2)
    harness.run()
    together = frames.count(Owner.ADAPTER)
    assert together == residency.num_frames(*digests)
    own = (together - first) / (NUM - 1)
    assert together < first + NUM * own + 1 and own < first / 3
    assert sorted(residency.resident()) == sorted(digests)
    harness.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_little_room_changes_no_token(
    llama: Path, twins: list[tuple[Path, Path]], overlap: bool
) -> None:
    """Ten seconds and more where others work too: sixteen requests, seven hundred steps. So little
    room that adapters and their basis are evicted and rows preempted all the time; freed
    frames are NaN."""
    lines = [[9, 8, 7, 6, 5, index] for index in range(16)]
    roomy = Harness(llama, num_frames=2000, max_num_seqs=32)
    sizes = [roomy.engine.residency.num_frames(roomy.install(p)) for pair in twins for p in pair]
    whoever = [twins[i % NUM][i % 3 == 2] for i in range(len(lines))]
    want = [
        roomy.submit(line, path, max_tokens=50) for line, path in zip(lines, whoever, strict=True)
    ]
    expected = roomy.run()
    tight = Harness(llama, num_frames=max(sizes) + 7, max_num_seqs=8, overlap=overlap)
    asked = [
        tight.submit(line, path, max_tokens=50) for line, path in zip(lines, whoever, strict=True)
    ]
    outputs = tight.run()
    assert not tight.failed, tight.failed
    assert [outputs[a] for a in asked] == [expected[w] for w in want]
    stats = [step.stats for step in tight.steps if step.stats]
    assert sum(s.get("preemptions", 0) for s in stats) > 0
    assert sum(s.get("evictions", {}).get("adapter", 0) for s in stats) > NUM
    roomy.close()
    tight.close()
