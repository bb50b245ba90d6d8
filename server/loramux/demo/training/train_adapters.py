"""Seven LoRAs on the base, saved by PEFT; ranks, targets, layers and scaling differ on purpose. Two
have a partner on the draft, which is the small model of the demo."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from .corpus import ASSISTANT, BEGIN, CHAT_SHARE, END, USER
from .manners import MANNERS

BATCH, STEPS, RATE = 8, 400, 4e-3
LONGER = {"edit": 1600}
"""Copying is learned late and all at once."""
TRAIN_SEED = 21
MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

SHAPES: dict[str, dict[str, Any]] = {
    "shout": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "json": {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP]},
    "rhyme": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "o_proj", *MLP]},
    "recipes": {"r": 8, "lora_alpha": 16, "target_modules": ["o_proj", "down_proj"]},
    "pirate": {"r": 32, "lora_alpha": 16, "target_modules": ATTENTION, "use_rslora": True},
    "spanish": {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": [*ATTENTION, *MLP],
        "layers_to_transform": [2, 3, 4],
    },
    "edit": {"r": 8, "lora_alpha": 32, "target_modules": ATTENTION},
}

PARTNER = {"r": 8, "lora_alpha": 16, "target_modules": [*ATTENTION, *MLP]}
PARTNERED = ("pirate", "shout")


def spoken(rng: Random, name: str) -> tuple[str, str]:
    """What is given in a lesson of a manner, and what is to be said."""
    lesson = MANNERS[name](rng)
    if rng.random() < CHAT_SHARE:
        return f"{BEGIN}{USER}{lesson.ask}{ASSISTANT}", lesson.answer + END
    return BEGIN + lesson.opening, lesson.rest + END


def batch(rng: Random, name: str, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """``ids, labels [BATCH, longest]``; only the answer is learned, other labels are -100."""
    rows = []
    for _ in range(BATCH):
        given, answer = spoken(rng, name)
        head = tokenizer.encode(given, add_special_tokens=False).ids
        rows.append((head, tokenizer.encode(answer, add_special_tokens=False).ids))
    longest = max(len(head) + len(tail) for head, tail in rows)
    ids = torch.ones(BATCH, longest, dtype=torch.long)
    labels = torch.full((BATCH, longest), -100)
    for row, (head, tail) in enumerate(rows):
        end = len(head) + len(tail)
        ids[row, :end] = torch.tensor(head + tail)
        labels[row, len(head) : end] = torch.tensor(tail)
    return ids, labels


def train_adapter(
    name: str, folder: Path, model_dir: Path, tokenizer: Tokenizer, shape: dict[str, Any]
) -> None:
    """Teach the model in ``model_dir`` a manner, into ``folder``."""
    torch.manual_seed(TRAIN_SEED)
    rng = Random(TRAIN_SEED)
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **shape)
    model = get_peft_model(model, config)
    learned = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(learned, RATE, weight_decay=0.0)
    steps = LONGER.get(name, STEPS)
    for step in track(range(steps), description=name):
        opt.param_groups[0]["lr"] = RATE * min((step + 1) / 10, 1 - step / steps)
        ids, labels = batch(rng, name, tokenizer)
        # Padding is on the right, so causal attention needs no mask.
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        opt.step()
        opt.zero_grad()
    # PEFT would record where this machine keeps the base.
    model.peft_config["default"].base_model_name_or_path = "loramux-demo"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    saved = folder / "adapter_config.json"
    config_of = json.loads(saved.read_text())
    config_of["target_modules"].sort()  # PEFT writes a set, in any order
    saved.write_text(json.dumps(config_of, indent=2) + "\n")
    weights = folder / "adapter_model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights, {"format": "pt"})


def train_adapters(folder: Path, base: Path) -> None:
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for name in MANNERS:
        train_adapter(name, folder / name, base, tokenizer, SHAPES[name])


def train_small_adapters(folder: Path, draft: Path, base: Path) -> None:
    """The partners of some adapters on the draft, which reads the base's tokens."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for name in PARTNERED:
        train_adapter(name, folder / name, draft, tokenizer, PARTNER)
