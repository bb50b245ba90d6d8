"""The draft: a tenth of the base's cost, taught by the text first and by the base at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import LlamaForCausalLM

from . import corpus, tokenizer
from .loop import llama, train

TEXT_STEPS, TAUGHT_STEPS = 1500, 250
TEXT_SEED, TAUGHT_SEED = 11, 13


def train_draft(folder: Path, base: Path) -> None:
    """Train into ``folder``; the tokenizer is the base's and is not copied."""
    tok = Tokenizer.from_file(str(base / "tokenizer.json"))
    torch.manual_seed(1)
    draft = llama(
        hidden=64, inner=192, layers=2, heads=2, kv_heads=1, vocabulary=tokenizer.VOCABULARY
    )
    teacher = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def rows(seed: int, width: int) -> Iterator[NDArray[np.int64]]:
        return corpus.rows(seed + (width != 512), tok, width)

    def closer_to_base(logits: Tensor, ids: Tensor) -> Tensor:
        """KL(base || draft), the mean over positions."""
        with torch.no_grad():
            wanted = log_softmax(teacher(input_ids=ids, use_cache=False).logits, -1)
        return kl_div(
            log_softmax(logits, -1).flatten(0, 1),
            wanted.flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )

    train(draft, lambda w: rows(TEXT_SEED, w), TEXT_STEPS, "draft", muon_lr=0.03, adam_lr=0.01)
    train(
        draft, lambda w: rows(TAUGHT_SEED, w), TAUGHT_STEPS, "draft, by the base", closer_to_base,
        muon_lr=0.015, adam_lr=0.005,
    )  # fmt: skip
    draft.half().save_pretrained(folder)
