"""Per-token perplexity on held-out text: the base, the draft and a 5-gram, over the same tokens.

python -m loramux.demo.training.perplexity
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import LlamaForCausalLM

from .corpus import HELD_OUT_SEED, texts
from .loop import BATCH_TOKENS
from .ngram import KneserNey, pad
from .train_base import CYCLES

DEMO = Path(__file__).parent.parent
HELD_OUT = 1000


def documents(
    tokenizer: Tokenizer, seed: int, tokens: int | None, limit: int | None
) -> list[list[int]]:
    """Ids of the first documents of a seed, until there are so many tokens or documents."""
    found: list[list[int]] = []
    seen = 0
    for text in islice(texts(seed), limit):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        found.append(ids)
        seen += len(ids)
        if tokens is not None and seen >= tokens:
            break
    return found


@torch.inference_mode()
def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """``[len(ids) - 1, vocabulary]``: of what follows each token."""
    return log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1)


def main() -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "base/tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    draft = LlamaForCausalLM.from_pretrained(DEMO / "draft", dtype=torch.float32)
    held_out = documents(tokenizer, HELD_OUT_SEED, None, HELD_OUT)
    trained = [
        ids
        for steps, seed, _ in CYCLES
        for ids in documents(tokenizer, seed, steps * BATCH_TOKENS, None)
    ]
    seen = {tuple(ids) for ids in trained}
    fresh = [ids for ids in held_out if tuple(ids) not in seen]
    print(
        f"{len(fresh)} held-out documents; {len(held_out) - len(fresh)} left out, seen in training"
    )

    losses: list[list[float]] = [[], []]
    overlap: list[float] = []
    same: list[float] = []
    for ids in track(fresh, description="held out"):
        p, q = log_probabilities(base, ids), log_probabilities(draft, ids)
        next_ids = torch.tensor(ids[1:])[:, None]
        for loss, logs in zip(losses, (p, q), strict=True):
            loss += (-logs.gather(1, next_ids)[:, 0]).tolist()
        overlap += torch.minimum(p.exp(), q.exp()).sum(-1).tolist()
        same += (p.argmax(-1) == q.argmax(-1)).float().tolist()
    of_base, of_draft = (float(np.exp(np.mean(loss))) for loss in losses)
    model = KneserNey(pad([ids[1:] for ids in trained], 5, 0), tokenizer.get_vocab_size(), 0)
    of_grams = model.perplexity(pad([ids[1:] for ids in fresh], 5, 0))
    print(f"tokens: {len(losses[0])} held out, {sum(map(len, trained))} for training")
    print(f"perplexity: base {of_base:.3f}, draft {of_draft:.3f}, 5-gram {of_grams:.3f}")
    print(f"base / 5-gram: {of_base / of_grams:.1%}")
    print(
        f"draft against base: same first choice {np.mean(same):.1%}, overlap of the "
        f"distributions {np.mean(overlap):.1%}"
    )


if __name__ == "__main__":
    main()
