"""The training loop that the base and the draft share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from .muon import Muon

BATCH_TOKENS = 2048


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> Any:
    """A Llama with tied embeddings; head width 32, positions up to 1024."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def next_token(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of every token given those before it, in nats."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def optimizers(model: Any, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        Muon(matrices, muon_lr),
        torch.optim.AdamW(rest, adam_lr, (0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int) -> float:
    """Warm up, hold, then fall linearly to zero over the last half (a trapezoid)."""
    return min((step + 1) / 40, 1.0, 2.0 * (1 - step / steps))


def train(
    model: Any,
    rows_of: Callable[[int], Iterator[NDArray[np.int64]]],
    steps: int,
    title: str,
    loss_of: Callable[[Tensor], Tensor],
    muon_lr: float,
    adam_lr: float,
) -> None:
    """Train on ``steps`` batches of ``BATCH_TOKENS``, the last eighth on rows twice as wide.

    ``loss_of`` maps ``ids [rows, width]`` to the loss; ``rows_of`` maps a width to its rows.
    """
    short, long = rows_of(512), rows_of(1024)
    model.train()
    opts = optimizers(model, muon_lr, adam_lr)
    base_lrs = [opt.param_groups[0]["lr"] for opt in opts]
    columns = (
        *Progress.get_default_columns()[:-1],
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(title, total=steps, loss="")
        for step in range(steps):
            source = short if step < steps * 7 // 8 else long
            first = next(source)
            batch = [first, *islice(source, BATCH_TOKENS // len(first) - 1)]
            loss = loss_of(torch.from_numpy(np.stack(batch)))
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt, lr in zip(opts, base_lrs, strict=True):
                opt.param_groups[0]["lr"] = lr * schedule(step, steps)
                opt.step()
                opt.zero_grad()
            progress.update(bar, advance=1, loss=f"loss {loss.item():.3f}")
    model.eval()
