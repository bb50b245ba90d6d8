"""The factories keep their promises: other tests lean on them without looking."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from tests import tiny


def prompts(num: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [
        [rng.randrange(tiny.VOCAB_SIZE) for _ in range(rng.randint(1, length))] for _ in range(num)
    ]


def test_tokenizer_round_trips_any_text_and_knows_the_chat_format(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.write_tokenizer(tmp_path, 300))
    assert len(tokenizer) == 300
    for text in ("", "hello\n\n  world", "naïve 你好 🜚\x00", tiny.SENTENCES[0]):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tiny.BOS
        assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.convert_tokens_to_ids(list(tiny.SPECIALS)) == [0, 1, 2, 3]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat, add_special_tokens=False)["input_ids"][0] == tiny.IM_START


def test_tokenizer_refuses_a_size_it_cannot_reach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="100000"):
        tiny.write_tokenizer(tmp_path, 100_000)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_greedy_ids_vary_clear_gaps_and_adapters_matter(arch: tiny.Arch, tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model", arch)
    adapter = tiny.write_adapter(tmp_path / "adapter", model)
    gaps: list[float] = []
    distinct: list[int] = []
    for prompt in prompts(6):
        base_ids, base_gaps = tiny.greedy(model, prompt, 16)
        ids, adapter_gaps = tiny.greedy(model, prompt, 16, adapter)
        assert ids != base_ids
        gaps += base_gaps + adapter_gaps
        distinct.append(len(set(base_ids)))
    assert sum(gap < 1e-4 for gap in gaps) < 0.01 * len(gaps)
    assert sum(distinct) >= 4 * len(distinct)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_greedy_with_cache_agrees_with_whole_sequence_logits(
    arch: tiny.Arch, tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path, arch)
    prompt = prompts(1, seed=3)[0]
    ids, _ = tiny.greedy(model, prompt, 12)
    scored = tiny.logits(model, prompt + ids)
    assert scored.shape == (len(prompt) + 12, tiny.VOCAB_SIZE) and scored.dtype == torch.float32
    assert scored[len(prompt) - 1 : -1].argmax(1).tolist() == ids


def test_models_are_functions_of_their_arguments(tmp_path: Path) -> None:
    one = tiny.write_model(tmp_path / "one") / "model.safetensors"
    same = tiny.write_model(tmp_path / "same") / "model.safetensors"
    other = tiny.write_model(tmp_path / "other", seed=1) / "model.safetensors"
    assert one.read_bytes() == same.read_bytes() != other.read_bytes()


def test_shards_dtype_and_overrides(tmp_path: Path) -> None:
    whole = tiny.write_model(tmp_path / "whole", "qwen2", dtype="bfloat16", num_hidden_layers=1)
    parts = tiny.write_model(
        tmp_path / "parts", "qwen2", dtype="bfloat16", num_hidden_layers=1, shards=2
    )
    assert len(list(parts.glob("*.safetensors"))) == 2
    config = json.loads((parts / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["dtype"] == "bfloat16"
    assert torch.equal(tiny.logits(whole, [5, 6, 7]), tiny.logits(parts, [5, 6, 7]))


def test_adapter_knobs_reach_peft(tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path / "model")
    adapter = tiny.write_adapter(
        tmp_path / "adapter",
        model,
        r=3,
        alpha=6,
        targets=("q_proj", "down_proj"),
        use_rslora=True,
        rank_pattern={"down_proj": 5},
        alpha_pattern={"layers.1.mlp.down_proj": 7},
        layers=(0, 1),
        dtype="float16",
    )
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert len(tensors) == 2 * 2 * 2
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(tensor.abs().sum() > 0 for tensor in tensors.values())
    layers = tiny.oracle(model, adapter).base_model.model.model.layers
    assert layers[0].self_attn.q_proj.scaling["default"] == pytest.approx(6 / 3**0.5)
    assert layers[0].mlp.down_proj.scaling["default"] == pytest.approx(6 / 5**0.5)
    assert layers[1].mlp.down_proj.scaling["default"] == pytest.approx(7 / 5**0.5)


@pytest.mark.parametrize(("arch", "through"), [("llama", "mlp"), ("qwen3", "attention")])
def test_every_shouting_adapter_says_its_own_token_everywhere(
    arch: tiny.Arch, through: Literal["mlp", "attention"], tmp_path: Path
) -> None:
    model = tiny.write_model(tmp_path / "model", arch, shoutable=True)
    ranks, dtypes = (1, 2, 3, 8, 33, 64), ("float32", "float16", "bfloat16")
    for index, prompt in enumerate(prompts(32)):
        token = (index * 10 + 1) % tiny.VOCAB_SIZE
        adapter = tiny.shouting_adapter(
            tmp_path / str(index),
            model,
            token,
            rank=ranks[index % len(ranks)],
            dtype=dtypes[index % len(dtypes)],
            through=through,
        )
        scored = tiny.logits(model, prompt, adapter)
        own = scored[:, token].clone()
        scored[:, token] = -torch.inf
        assert (own - scored.amax(1)).min() > 5
        if index == 0:
            assert tiny.greedy(model, prompt, 8, adapter)[0] == [token] * 8
        assert (tiny.logits(model, prompt).argmax(1) == token).float().mean() < 0.5


def test_a_shoutable_model_has_its_own_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        tiny.write_model(tmp_path, "llama_mha_tied", shoutable=True)
