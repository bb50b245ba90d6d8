"""The base: 2.4 million parameters, about six million tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import corpus, tokenizer
from .loop import llama, train

STEPS = 1500
LONG_SEED = 3


def train_base(folder: Path, snapshot: Path | None = None) -> None:
    """Train the tokenizer and the base into ``folder``; weights are stored in half precision."""
    tok: Tokenizer = tokenizer.train(folder)
    torch.manual_seed(0)
    model = llama(
        hidden=192, inner=512, layers=5, heads=6, kv_heads=2, vocabulary=tokenizer.VOCABULARY
    )

    def rows(width: int) -> Iterator[NDArray[np.int64]]:
        return corpus.rows(corpus.TRAIN_SEED if width == 512 else LONG_SEED, tok, width)

    train(model, rows, STEPS, "base", muon_lr=0.02, adam_lr=0.006, snapshot=snapshot)
    model.half().save_pretrained(folder)
