"""The model, adapters and requests of the throughput measurements, all random and reproducible.

The model is a Llama of 135M parameters in fp32 (the shape of SmolLM-135M) with a made-up tokenizer.
Two sets of adapters (a *mix*): ``rank16`` has rank 16 on all seven linear modules; ``mixed`` has
ranks 8, 16, 32 and 64 in turn, half of each on q, k, v, o, the other half on all seven.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
RANK = 16

Mix = Literal["base", "rank16", "mixed"]


@dataclass(frozen=True)
class Job:
    """One request: which adapter it names (-1: the base), its prompt, how many tokens it wants."""

    adapter: int
    prompt: list[int]
    num_new: int


@dataclass(frozen=True)
class Cell:
    """One place of the table: at most ``concurrency`` requests at a time over ``adapters``."""

    concurrency: int
    adapters: int

    @property
    def jobs(self) -> list[Job]:
        """One request per place; with more adapters than places, two per place (at least four)."""
        num = max(self.concurrency, min(self.adapters, max(4, 2 * self.concurrency)))
        jobs = make_jobs(range(num), seed=1000 * self.concurrency + self.adapters)
        return [
            replace(job, adapter=i % self.adapters if self.adapters else -1)
            for i, job in enumerate(jobs)
        ]


def make_jobs(
    adapters: Sequence[int],
    *,
    seed: int,
    prompt: tuple[int, int] = (64, 129),
    new: tuple[int, int] = (32, 65),
    vocabulary: int = SHAPE["vocab_size"],
) -> list[Job]:
    """A request for each of ``adapters``, in order; lengths are uniform in [low, high)."""
    rng = np.random.default_rng(seed)
    return [
        Job(
            adapter=int(adapter),
            prompt=rng.integers(10, vocabulary, rng.integers(*prompt)).tolist(),
            num_new=int(rng.integers(*new)),
        )
        for adapter in adapters
    ]


def adapter_shape(mix: Mix, index: int) -> tuple[int, list[str]]:
    """Rank and modules of one adapter of a set."""
    if mix == "rank16":
        return RANK, TARGETS
    return (8, 16, 32, 64)[index % 4], (TARGETS if (index + index // 4) % 2 else ATTENTION)


def write_base(folder: Path, shape: dict[str, Any]) -> Path:
    """A random Llama of ``shape`` (fields of the transformers config), without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).float().save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path) -> Path:
    """The base model and its tokenizer, in ``folder/base``."""
    base = write_base(folder / "base", SHAPE)
    _write_tokenizer(base)
    return base


def _write_tokenizer(base: Path) -> None:
    """Byte-level BPE of exactly the model's vocabulary: all bytes, then 'words' of four letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = (
        "abcdefghijklmnopqrstuvwxyz\u0120"  # the last one is how byte-level BPE spells a space
    )
    special = ["<unk>", "<s>", "</s>"]
    ids = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [a + b for a, b in product(letters, repeat=2)]
    merges = list(product(letters, repeat=2)) + list(product(pairs, repeat=2))
    merges = merges[: SHAPE["vocab_size"] - len(ids)]
    ids += [a + b for a, b in merges]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(ids)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(base / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": SHAPE["max_position_embeddings"],
    }
    (base / "tokenizer_config.json").write_text(json.dumps(settings))


def write_adapters(folder: Path, base: Path, num: int, mix: Mix = "rank16") -> list[Path]:
    """``num`` adapters of a set, as PEFT saves them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    paths = [folder / f"adapter{index}" for index in range(num)]
    shapes = [adapter_shape(mix, index) for index in range(num)]
    for rank, targets in {(rank, tuple(targets)) for rank, targets in shapes}:
        config = LoraConfig(
            r=rank, lora_alpha=rank, target_modules=list(targets), task_type="CAUSAL_LM"
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
        for index, path in enumerate(paths):
            if shapes[index] != (rank, list(targets)):
                continue
            torch.manual_seed(index)
            for name, parameter in model.named_parameters():
                if "lora_" in name:  # strong enough to change most tokens the base would say
                    std = 0.4 / rank**0.5 if "lora_B" in name else 0.02
                    torch.nn.init.normal_(parameter, std=std)
            model.save_pretrained(path)
    return paths
