"""Medusa-1 heads on the frozen base: what comes after the next token, from its hidden state alone
(Medusa, arXiv 2401.10774). They end in the base's own output matrix, which is not stored again.

An adapter's own: ``python -m loramux.demo.training.train_heads ADAPTER``, to push with its folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu
from transformers import LlamaForCausalLM

from loramux.adapters.heads_file import FILE_NAME
from loramux.config import DEMO_DIR

from . import corpus
from .loop import train
from .train_adapters import spoken

Rows = Iterator[NDArray[np.int64]]

HEADS, RANKS = 4, 10
STEPS, SEED = 130, 31
DECAY = 0.8
"""The published weight of head j's loss is this to the power of j."""
HELD_OUT_ROWS = 32


class Heads(nn.Module):
    """One residual block for each head, ``x + silu(W x + b)``, which is the identity to begin with:
    head j starts from what the base says, about another token."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(HEADS))
        for block in self.blocks:
            for parameter in block.parameters():
                nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """What each head gives the output matrix for ``hidden [..., hidden]``."""
        return [hidden + silu(block(hidden)) for block in self.blocks]


def train_heads(base: Path) -> None:
    """Train into ``base``, beside its weights."""
    tok = Tokenizer.from_file(str(base / "tokenizer.json"))

    def rows(width: int) -> Rows:
        return corpus.rows(SEED + (width != 512), tok, width)

    held_out = corpus.rows(corpus.HELD_OUT_SEED, tok, 512)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    _train(model, rows, held_out, base / FILE_NAME, STEPS)


def train_adapter_heads(base: Path, adapter: Path, steps: int = STEPS) -> None:
    """Train into ``adapter``, beside its weights: on what ``base`` computes when it wears it, of
    lessons in the manner that the folder is called after."""
    tok = Tokenizer.from_file(str(base / "tokenizer.json"))
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    worn: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()

    def rows(width: int) -> Rows:
        return lessons(SEED + (width != 512), adapter.name, tok, width)

    held_out = lessons(corpus.HELD_OUT_SEED, adapter.name, tok, 512)
    _train(worn, rows, held_out, adapter / FILE_NAME, steps)


def lessons(seed: int, name: str, tok: Tokenizer, width: int) -> Rows:
    """Rows of ``width`` ids, lesson after lesson; the last one in a row is cut off."""
    rng, row = Random(seed), list[int]()
    while True:
        row += tok.encode("".join(spoken(rng, name)), add_special_tokens=False).ids
        if len(row) >= width:
            yield np.array(row[:width], dtype=np.int64)
            row = []


def _train(
    model: LlamaForCausalLM,
    rows: Callable[[int], Rows],
    held_out: Rows,
    path: Path,
    steps: int,
) -> None:
    """With the heads goes how often each head's first, second, ... choice was right on held-out
    text: the shape of trees is made of it."""
    torch.manual_seed(2)
    model.eval()
    output = model.lm_head.weight.detach()
    heads = Heads(output.shape[1])

    def states(ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
        return hidden

    def loss_of(ids: Tensor) -> Tensor:
        """Head j sees the text up to t and is asked for the token at t + j + 2."""
        hidden = states(ids)
        total = hidden.new_zeros(())
        for head, given in enumerate(heads(hidden)):
            ahead = head + 2
            logits = linear(given[:, :-ahead], output).flatten(0, 1)
            total = total + DECAY**head * cross_entropy(logits, ids[:, ahead:].flatten())
        return total

    train(heads, rows, steps, "heads", loss_of, muon_lr=0.1, adam_lr=0.02)
    found = {}
    for head, block in enumerate(heads.half().blocks):
        for name, tensor in block.state_dict().items():
            found[f"{head}.0.linear.{name}"] = tensor
    texts = [torch.from_numpy(row) for row in islice(held_out, HELD_OUT_ROWS)]
    found["accuracy"] = _accuracy(heads.float(), output, [(states(t[None])[0], t) for t in texts])
    save_file(found, path)


@torch.inference_mode()
def _accuracy(heads: Heads, output: Tensor, texts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """``[HEADS, RANKS]``: how often head j's choice of that rank is the token at t + j + 2."""
    right = torch.zeros(HEADS, RANKS)
    asked = torch.zeros(HEADS, 1)
    for hidden, ids in texts:
        for head, given in enumerate(heads(hidden)):
            ahead = head + 2
            best = linear(given[:-ahead], output).topk(RANKS).indices
            right[head] += (best == ids[ahead:, None]).sum(0)
            asked[head] += len(best)
    return right / asked


def main() -> None:
    parser = argparse.ArgumentParser(description="Train an adapter Medusa heads of its own.")
    parser.add_argument("adapter", type=Path, help="its folder, called after its manner")
    parser.add_argument("--base", type=Path, default=DEMO_DIR / "base", help="what wears it")
    args = parser.parse_args()
    train_adapter_heads(args.base, args.adapter)


if __name__ == "__main__":
    main()
