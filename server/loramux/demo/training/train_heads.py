"""Medusa-1 heads on the frozen base: what comes after the next token, from its hidden state alone
(Medusa, arXiv 2401.10774). They end in the base's own output matrix, which is not stored again."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, silu
from transformers import LlamaForCausalLM

from . import corpus
from .loop import train

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
    """Train into ``base``, beside its weights. With the heads goes how often each head's first,
    second, ... choice was right on held-out text: the shape of trees is made of it."""
    tok = Tokenizer.from_file(str(base / "tokenizer.json"))
    torch.manual_seed(2)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
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

    def rows(width: int) -> Iterator[NDArray[np.int64]]:
        return corpus.rows(SEED + (width != 512), tok, width)

    train(heads, rows, STEPS, "heads", loss_of, muon_lr=0.1, adam_lr=0.02)
    found = {}
    for head, block in enumerate(heads.half().blocks):
        for name, tensor in block.state_dict().items():
            found[f"{head}.0.linear.{name}"] = tensor
    held_out = [torch.from_numpy(row) for row in islice(_held_out(tok), HELD_OUT_ROWS)]
    found["accuracy"] = _accuracy(
        heads.float(), output, [(states(r[None])[0], r) for r in held_out]
    )
    save_file(found, base / "medusa_heads.safetensors")


def _held_out(tok: Tokenizer) -> Iterator[NDArray[np.int64]]:
    return corpus.rows(corpus.HELD_OUT_SEED, tok, 512)


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
