"""The decoder against transformers and PEFT, over pools laid out as badly as possible."""

from __future__ import annotations

import copy
import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux.model import decoder
from loramux.model.architecture import read_architecture
from loramux.model.loader import load_weights
from loramux_kernels import dispatch
from loramux_kernels.linear import Matrix
from loramux_kernels.testing import counting
from tests import tiny
from tests.model.allocations import Allocations
from tests.model.paged import Paged, Request

Checkpoint = Callable[..., Path]

TOLERANCE = 1e-4
"""Logits have a standard deviation of 2 to 3; float32 sums in another order differ by 1e-5."""

# beyond llama3's original 32 positions and well beyond mistral's window of 8
LENGTH = 45


def prompt(length: int = LENGTH, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(4, tiny.VOCAB_SIZE), k=length)


def chunks_of(total: int, source: random.Random) -> list[int]:
    sizes: list[int] = []
    while total:
        sizes.append(source.randint(1, min(total, 13)))
        total -= sizes[-1]
    return sizes


VARIANTS: dict[str, tuple[tiny.Arch, dict[str, Any]]] = {
    **{arch: (arch, {}) for arch in tiny.ARCHS},
    "llama_all_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3_bias_and_window": (
        "qwen3",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 1,
        },
    ),
    "llama_yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("page_tokens", [1, 4, 16])
def test_logits_are_those_of_transformers(
    checkpoint: Checkpoint, variant: str, page_tokens: int
) -> None:
    arch, options = VARIANTS[variant]
    directory = checkpoint(arch, **options)
    ours = Paged.load(directory, page_tokens=page_tokens).run(prompt())
    torch.testing.assert_close(
        ours, tiny.logits(directory, prompt()), atol=TOLERANCE, rtol=0, check_stride=False
    )


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_greedy_ids_are_those_of_transformers(checkpoint: Checkpoint, arch: tiny.Arch) -> None:
    directory = checkpoint(arch)
    model = Paged.load(directory, page_tokens=4)
    excused = total = 0
    for seed, length in enumerate((1, 2, 7, 20)):
        start = prompt(length, seed)
        expected, gaps = tiny.greedy(directory, start, 40)
        request = Request(list(start))
        step = len(start)
        for token, gap in zip(expected, gaps, strict=True):
            logits = model.step([(request, step)])[0][-1]
            step = 1
            request.ids.append(token)
            total += 1
            if gap < 1e-4:
                excused += 1
            else:
                assert int(logits.argmax()) == token
        model.finish(request)
    assert excused < 0.01 * total


@pytest.mark.parametrize("arch", tiny.ARCHS)
@pytest.mark.parametrize("page_tokens", [1, 4, 16])
def test_the_chunks_a_prompt_comes_in_do_not_change_a_bit(
    checkpoint: Checkpoint, arch: tiny.Arch, page_tokens: int
) -> None:
    model = Paged.load(checkpoint(arch), page_tokens=page_tokens)
    source = random.Random(page_tokens)
    whole = model.run(prompt())
    assert torch.equal(whole, model.run(prompt(), [1] * LENGTH))
    for _ in range(3):
        assert torch.equal(whole, model.run(prompt(), chunks_of(LENGTH, source)))


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_requests_decoded_together_give_the_bits_they_give_alone(
    checkpoint: Checkpoint, arch: tiny.Arch
) -> None:
    model = Paged.load(checkpoint(arch))
    prompts = [prompt(length, seed=length) for length in (1, 3, 12, 30, 31)]
    alone = [model.run(ids) for ids in prompts]
    requests = [Request(list(ids)) for ids in prompts]
    got: list[list[torch.Tensor]] = [[] for _ in requests]
    while parts := [(r, 1) for r in requests if r.done < len(r.ids)]:
        for (request, _), logits in zip(parts, model.step(parts), strict=True):
            got[requests.index(request)].append(logits)
    for rows, expected in zip(got, alone, strict=True):
        assert torch.equal(torch.cat(rows), expected)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_every_row_wears_its_own_adapter(
    checkpoint: Checkpoint, arch: tiny.Arch, tmp_path: Path
) -> None:
    directory = checkpoint(arch)
    model = Paged.load(directory, page_tokens=16)
    adapters = [
        tiny.write_adapter(tmp_path / str(r), directory, r=r, seed=r, targets=targets)
        for r, targets in ((1, tiny.MODULES), (5, tiny.MODULES), (8, ("v_proj", "down_proj")))
    ]
    slots = [model.add_adapter(adapter) for adapter in adapters]
    wearing: list[tuple[Path | None, tuple[tuple[int, float], ...]]] = [
        (None, ()),
        *((path, ((slot, 1.0),)) for path, slot in zip(adapters, slots, strict=True)),
        (None, ()),
    ]
    requests = [Request(prompt(11, seed), worn) for seed, (_, worn) in enumerate(wearing)]
    rows = model.step([(request, 11) for request in requests])
    for request, (path, _), logits in zip(requests, wearing, rows, strict=True):
        # in float64: a rank 1 of scale 16 makes PEFT's own float32 logits 8e-5 wrong
        exact = copy.deepcopy(tiny.oracle(directory, path)).double()
        with torch.no_grad():
            expected = exact(torch.tensor([request.ids]), use_cache=False).logits[0]
        torch.testing.assert_close(
            logits.double(), expected, atol=TOLERANCE, rtol=0, check_stride=False
        )
        alone = model.run(request.ids, [4, 7], adapters=request.adapters)
        assert torch.equal(logits, alone)


def test_only_the_scored_rows_are_returned_in_the_order_asked(checkpoint: Checkpoint) -> None:
    model = Paged.load(checkpoint("llama"))
    expected = model.run(prompt(10))
    inputs = model.inputs([(Request(prompt(10)), 10)])
    for scored in ([9], [3, 0, 9], [], list(range(10))):
        asked = dataclasses.replace(inputs, scored=torch.tensor(scored, dtype=torch.int64))
        logits = model.decoder.forward(asked)
        assert logits.shape == (len(scored), tiny.VOCAB_SIZE)
        assert torch.equal(logits, expected[scored])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_half_precision_model_are_float32(
    checkpoint: Checkpoint, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device: computed in the model's dtype, handed on in the sampler's."""
    monkeypatch.setattr(decoder, "_layer_table", lambda *_: None)  # float32's alone
    directory = checkpoint("llama")
    architecture = read_architecture(directory)
    weights = load_weights(directory, architecture, dtype=dtype, device=torch.device("cpu"))
    with dispatch.using("reference"):
        model = Paged(architecture, weights)
        inputs = model.inputs([(Request(prompt(10)), 10)])
        all_rows = model.decoder.forward(inputs).clone()
        for scored in ([9], [3, 0, 9], []):
            asked = dataclasses.replace(inputs, scored=torch.tensor(scored, dtype=torch.int64))
            assert torch.equal(model.decoder.forward(asked), all_rows[scored])
    assert all_rows.dtype == torch.float32
    assert torch.equal(all_rows, all_rows.to(dtype).float())
    exact = tiny.logits(directory, prompt(10))
    assert (all_rows - exact).std() < exact.std() / 30


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_layers_in_one_call_are_the_operations_one_by_one(
    checkpoint: Checkpoint, arch: tiny.Arch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint(arch)
    model = Paged.load(directory, page_tokens=4)
    adapter = tiny.write_adapter(tmp_path / "adapter", directory, r=5, seed=1)
    worn = ((model.add_adapter(adapter), 0.5),)
    with counting() as calls:
        together = model.run(prompt(21), adapters=worn, chunks=(13, 1, 7))
    assert calls["cpu:run_layers"] == 3 and not calls["cpu:paged_attention"]
    monkeypatch.setattr(model.decoder, "_layers", None)
    with counting() as calls:
        apart = model.run(prompt(21), adapters=worn, chunks=(13, 1, 7))
    assert calls["cpu:paged_attention"] == 3 * model.architecture.num_layers
    assert torch.equal(together, apart)


def test_an_int8_base_is_the_model_of_its_rounded_weights(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    directory = checkpoint("qwen2")
    rounded = shutil.copytree(directory, tmp_path / "rounded")
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            tensors[name] = Matrix.of(tensor, torch.int8).dense().contiguous()
    save_file(tensors, rounded / "model.safetensors", {"format": "pt"})
    architecture = read_architecture(directory)
    weights = load_weights(
        directory, architecture, dtype=torch.float32, device=torch.device("cpu"), quantize=True
    )
    logits = Paged(architecture, weights).run(prompt(), chunks=(20, 25))
    torch.testing.assert_close(logits, tiny.logits(rounded, prompt()), atol=TOLERANCE, rtol=0)
    assert (logits - tiny.logits(directory, prompt())).abs().max() > 10 * TOLERANCE


def test_a_batch_larger_than_the_workspace_is_refused(checkpoint: Checkpoint) -> None:
    model = Paged.load(checkpoint("llama"), max_tokens=5)
    assert model.run(prompt(5)).shape == (5, tiny.VOCAB_SIZE)
    with pytest.raises(ValueError, match="6 rows"):
        model.run(prompt(6))


def test_a_step_allocates_nothing_of_the_size_of_its_activations(checkpoint: Checkpoint) -> None:
    model = Paged.load(checkpoint("llama"))
    inputs = model.inputs([(Request(prompt(64)), 64)])
    model.decoder.forward(inputs)
    with Allocations() as allocations:
        model.decoder.forward(inputs)
    assert max(allocations.sizes, default=0) < 64 * model.architecture.hidden_size * 4


def test_positions_reach_the_end_of_the_context(checkpoint: Checkpoint) -> None:
    directory = checkpoint("llama_mha_tied", max_position_embeddings=24)
    assert read_architecture(directory).context_length == 24
    logits = Paged.load(directory).run(prompt(24))
    expected = tiny.logits(directory, prompt(24))
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0, check_stride=False)
