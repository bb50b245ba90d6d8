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
from .induction import begin_with_induction
from .loop import llama, next_token, train

TEXT_STEPS, TAUGHT_STEPS = 900, 200
TEXT_SEED, TAUGHT_SEED = 11, 13


def train_draft(folder: Path, base: Path) -> None:
    """Train into ``folder``; the tokenizer is the base's and is not copied."""
    tok = Tokenizer.from_file(str(base / "tokenizer.json"))
    torch.manual_seed(1)
    draft = llama(
        hidden=64, inner=192, layers=2, heads=2, kv_heads=1, vocabulary=tokenizer.VOCABULARY
    )
    begin_with_induction(draft)
    teacher = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def text_loss(ids: Tensor) -> Tensor:
        return next_token(draft(input_ids=ids, use_cache=False).logits, ids)

    def taught_loss(ids: Tensor) -> Tensor:
        """KL(base || draft), the mean over positions."""
        with torch.no_grad():
            wanted = log_softmax(teacher(input_ids=ids, use_cache=False).logits, -1).flatten(0, 1)
        given = log_softmax(draft(input_ids=ids, use_cache=False).logits, -1).flatten(0, 1)
        return kl_div(given, wanted, log_target=True, reduction="batchmean")

    def text_rows(width: int) -> Iterator[NDArray[np.int64]]:
        return corpus.rows(TEXT_SEED + (width != 512), tok, width)

    def taught_rows(width: int) -> Iterator[NDArray[np.int64]]:
        return corpus.rows(TAUGHT_SEED + (width != 512), tok, width)

    train(draft, text_rows, TEXT_STEPS, "draft", text_loss, muon_lr=0.02, adam_lr=0.01)
    train(draft, taught_rows, TAUGHT_STEPS, "draft, by the base", taught_loss, 0.01, 0.005)
    draft.half().save_pretrained(folder)
