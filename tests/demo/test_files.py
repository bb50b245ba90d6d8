"""The files in the repository: complete, within their budgets, and consistent with each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from minijinja import Environment
from safetensors import safe_open
from tokenizers import Tokenizer

from loramux.adapters.heads_file import read_heads
from loramux.config import DEMO_DIR
from loramux.demo.prompts import SHOWCASE
from loramux.demo.training.train_adapters import PARTNER, PARTNERED

ADAPTERS = sorted(path.name for path in (DEMO_DIR / "adapters").iterdir())
HEADS = DEMO_DIR / "base" / "medusa_heads.safetensors"
MB = 1_000_000


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def tensors(path: Path) -> dict[str, tuple[str, list[int]]]:
    with safe_open(path, framework="numpy") as file:
        return {
            name: (file.get_slice(name).get_dtype(), file.get_slice(name).get_shape())
            for name in file.keys()
        }


@pytest.mark.parametrize(
    ("folder", "budget"),
    [
        ("base", 5 * MB),
        ("draft", 0.7 * MB),
        ("adapters", 1.8 * MB),
        ("small_adapters", 0.1 * MB),
    ],
)
def test_sizes_stay_within_the_budget(folder: str, budget: float) -> None:
    heads = HEADS.stat().st_size if folder == "base" else 0
    assert 0 < size(DEMO_DIR / folder) - heads <= budget
    assert heads <= 0.33 * MB


def test_base_is_complete_and_adapters_hold_nothing_else() -> None:
    assert {path.name for path in (DEMO_DIR / "base").iterdir()} == {
        "config.json",
        "generation_config.json",
        "medusa_heads.safetensors",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len(ADAPTERS) >= 5
    for name in ADAPTERS:
        files = {path.name for path in (DEMO_DIR / "adapters" / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("model", ["base", "draft"])
def test_weights_are_half_precision_and_fit_the_config(model: str) -> None:
    config = read(DEMO_DIR / model / "config.json")
    found = tensors(DEMO_DIR / model / "model.safetensors")
    assert {dtype for dtype, _ in found.values()} == {"F16"}
    assert config["tie_word_embeddings"] and "lm_head.weight" not in found
    hidden, heads, kv = (
        config[f"{k}"] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    assert found["model.embed_tokens.weight"][1] == [config["vocab_size"], hidden]
    assert len(found) == 2 + 9 * config["num_hidden_layers"]
    attention = "model.layers.0.self_attn"
    assert found[f"{attention}.q_proj.weight"][1] == [heads * config["head_dim"], hidden]
    assert found[f"{attention}.k_proj.weight"][1] == [kv * config["head_dim"], hidden]


def test_the_draft_reads_the_same_tokens_at_a_tenth_of_the_cost() -> None:
    base, draft = (read(DEMO_DIR / name / "config.json") for name in ("base", "draft"))
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "max_position_embeddings"):
        assert base[key] == draft[key]
    parameters = [
        sum(math.prod(shape) for _, shape in tensors(DEMO_DIR / n / "model.safetensors").values())
        for n in ("base", "draft")
    ]
    assert parameters[1] * 10 <= parameters[0]


def test_adapters_differ_and_every_tensor_fits_its_target() -> None:
    base = tensors(DEMO_DIR / "base" / "model.safetensors")
    ranks, targets = set(), set()
    for name in ADAPTERS:
        folder = DEMO_DIR / "adapters" / name
        config = read(folder / "adapter_config.json")
        ranks.add(config["r"])
        targets.add(frozenset(config["target_modules"]))
        for key, (dtype, shape) in tensors(folder / "adapter_model.safetensors").items():
            module, _, matrix = key.removeprefix("base_model.model.").rpartition(".lora_")
            out, into = base[f"{module}.weight"][1]
            assert dtype == "F16"
            assert module.rpartition(".")[2] in config["target_modules"]
            assert shape == ([config["r"], into] if matrix == "A.weight" else [out, config["r"]])
    assert min(ranks) == 4 and max(ranks) == 32
    assert len(targets) >= 4
    configs = [read(DEMO_DIR / "adapters" / name / "adapter_config.json") for name in ADAPTERS]
    assert any(config["use_rslora"] for config in configs)
    assert any(config["layers_to_transform"] for config in configs)


def test_small_adapters_fit_the_draft_and_have_a_partner_on_the_base() -> None:
    draft = tensors(DEMO_DIR / "draft" / "model.safetensors")
    names = sorted(path.name for path in (DEMO_DIR / "small_adapters").iterdir())
    assert names == sorted(PARTNERED) and set(names) <= set(ADAPTERS)
    for name in names:
        folder = DEMO_DIR / "small_adapters" / name
        assert sorted(path.name for path in folder.iterdir()) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
        config = read(folder / "adapter_config.json")
        assert {key: config[key] for key in PARTNER} == PARTNER | {
            "target_modules": sorted(PARTNER["target_modules"])
        }
        found = tensors(folder / "adapter_model.safetensors")
        assert len(found) == 2 * 7 * read(DEMO_DIR / "draft" / "config.json")["num_hidden_layers"]
        for key, (dtype, shape) in found.items():
            module, _, matrix = key.removeprefix("base_model.model.").rpartition(".lora_")
            out, into = draft[f"{module}.weight"][1]
            assert dtype == "F16"
            assert shape == ([config["r"], into] if matrix == "A.weight" else [out, config["r"]])


def test_no_machine_path_is_in_any_file() -> None:
    for path in DEMO_DIR.glob("**/*config.json"):
        text = path.read_text()
        assert "/root" not in text and "/tmp" not in text and "/work" not in text


def test_the_tokenizer_round_trips_and_begins_every_text() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "base" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == read(DEMO_DIR / "base" / "config.json")["vocab_size"]
    for text in ("", "a", "Mira had 17 apples.", "¿Dónde está? «Aquí»", "日本 🙂\x00\n\n  end "):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 0
        assert tokenizer.decode(ids) == text


def test_the_chat_template_spells_what_the_training_spells() -> None:
    from loramux.demo.training.corpus import chat
    from loramux.demo.training.document import Document

    config = read(DEMO_DIR / "base" / "tokenizer_config.json")
    document = Document("story", "One.", " Two.", "Tell me.")
    messages = [
        {"role": "user", "content": document.ask},
        {"role": "assistant", "content": document.text},
    ]
    tokens = {"bos_token": config["bos_token"], "eos_token": config["eos_token"]}
    said = Environment().render_str(config["chat_template"], messages=messages, **tokens)
    assert said == chat(document)
    asked = Environment().render_str(
        config["chat_template"], messages=messages[:1], add_generation_prompt=True, **tokens
    )
    assert said.startswith(asked) and asked.endswith("<|assistant|>")


def test_the_showcase_shows_every_adapter_and_the_base() -> None:
    assert {name for name, _ in SHOWCASE} == {None, *ADAPTERS}


def test_the_heads_fit_the_base_and_are_worth_asking() -> None:
    config = read(DEMO_DIR / "base" / "config.json")
    with HEADS.open("rb") as file:
        heads = read_heads(file, config["hidden_size"], config["vocab_size"])
    assert not heads.outputs, "they end in the base's own output matrix"
    assert {tensor.dtype for head in heads.blocks for pair in head for tensor in pair} == {
        "float16"
    }
    assert len(heads.accuracy) == len(heads.blocks) == 4
    for choices in heads.accuracy:
        assert choices[0] == max(choices) and 0.2 < choices[0] < sum(choices) <= 1
    assert heads.accuracy[0][0] > heads.accuracy[-1][0], "what is further off is harder to say"
