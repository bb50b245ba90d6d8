"""The base: 2.4 million parameters, about 2.5 million tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from . import corpus, tokenizer
from .induction import begin_with_induction
from .loop import llama, next_token, train

# steps, seed of the text, factor of the learning rates
CYCLES = ((1200, corpus.TRAIN_SEED, 1.0), (3000, corpus.TRAIN_SEED + 4, 0.8))
LONG = 2  # added to the seed for the long rows


def train_base(folder: Path) -> None:
    """Train the tokenizer and the base into ``folder``; weights are stored in half precision."""
    tok: Tokenizer = tokenizer.train(folder)
    torch.manual_seed(0)
    model = llama(
        hidden=192, inner=512, layers=5, heads=6, kv_heads=2, vocabulary=tokenizer.VOCABULARY
    )
    begin_with_induction(model)

    @torch.compile
    def loss_of(ids: Tensor) -> Tensor:
        return next_token(model(input_ids=ids, use_cache=False).logits, ids)

    for steps, seed, rate in CYCLES:

        def rows(width: int, seed: int = seed) -> Iterator[NDArray[np.int64]]:
            return corpus.rows(seed if width == 512 else seed + LONG, tok, width)

        train(model, rows, steps, "base", loss_of, muon_lr=0.02 * rate, adam_lr=0.006 * rate)
    model.half().save_pretrained(folder)
