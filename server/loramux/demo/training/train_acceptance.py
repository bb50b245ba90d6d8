"""The draft's acceptance head: which of its guesses the base will draw too (SpecDec++,
arXiv 2405.19715). Base and draft stay as they are.

The base goes on from beginnings of the corpus; at most places of that text a guess of the draft
stands in for the base's token, as in the middle of a round, and the head learns from the draft's
hidden state there how likely the guess was to be right. Both draw with the same noise E the token
of the least E/q, so y is right with probability (1/q_y) / sum_x max(p_x/p_y, q_x/q_y).
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import log_softmax, silu
from transformers import LlamaForCausalLM

from loramux.sampling.agreement import acceptance
from loramux.speculation.acceptance import FILE, read_head

from . import corpus

BLOCKS = 3
TEXTS, HELD_OUT, GIVEN, LENGTH = 640, 128, 16, 192
TEXT_SEED, SEED = 41, 43
KEPT = 0.15
"""Of the places hold the base's own token, and teach nothing: published."""
REJECTED_WEIGHT = 6.0
"""Of what is rejected in the loss, accepted counting 1: published."""
EPOCHS, BATCH, RATE = 12, 2048, 2e-3
ROUND = 4
BINS = 10
AT_A_TIME = 32


class Head(nn.Module):
    """As :class:`~loramux.speculation.acceptance.AcceptanceHead`, to be trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Linear(width, width)
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(BLOCKS):
            x = x + silu(self.block(x))
        out: Tensor = self.out(x)
        return out

    def save(self, path: Path) -> None:
        tensors = {
            "model.0.linear.weight": self.block.weight,
            "model.0.linear.bias": self.block.bias,
            f"model.{BLOCKS}.weight": self.out.weight,
            f"model.{BLOCKS}.bias": self.out.bias,
        }
        halves = {name: t.detach().half().contiguous() for name, t in tensors.items()}
        save_file(halves, path, {"format": "pt"})


def probabilities(model: Any, ids: Tensor) -> Tensor:
    """``[rows, width, V]``: of what follows each token."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.softmax(-1)


def drawn(p: Tensor) -> Tensor:
    return torch.multinomial(p.flatten(0, -2), 1).reshape(p.shape[:-1])


@torch.inference_mode()
def continued(base: Any, ids: Tensor) -> Tensor:
    """``ids`` [rows, GIVEN] as the base goes on with them: [rows, LENGTH]."""
    cache, newest = None, ids
    while ids.shape[1] < LENGTH:
        out = base(input_ids=newest, past_key_values=cache, use_cache=True)
        cache, newest = out.past_key_values, drawn(out.logits[:, -1:].softmax(-1))
        ids = torch.cat([ids, newest], 1)
    return ids


@torch.inference_mode()
def lessons(base: Any, draft: Any, texts: Tensor) -> tuple[Tensor, Tensor]:
    """What the head reads [N, H] and what it should say [N], at the guessed places of ``texts``."""
    p, q = probabilities(base, texts)[:, :-1], probabilities(draft, texts)[:, :-1]
    guesses = drawn(q)
    right = acceptance(p, q, guesses)
    guessed = torch.rand(guesses.shape) >= KEPT
    guessed[:, : GIVEN - 1] = False
    mixed = texts.clone()
    mixed[:, 1:] = torch.where(guessed, guesses, texts[:, 1:])
    hidden = draft.model(input_ids=mixed, use_cache=False).last_hidden_state[:, 1:]
    return hidden[guessed], right[guessed]


@torch.inference_mode()
def rounds(base: Any, draft: Any, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The same as it is when the draft guesses ``ROUND`` tokens in a row somewhere in ``texts``:
    [rows, ROUND, H] and [rows, ROUND]."""
    where = int(torch.randint(GIVEN, LENGTH - ROUND, ()))
    ids, right = texts[:, :where], []
    for _ in range(ROUND):
        p, q = probabilities(base, ids)[:, -1], probabilities(draft, ids)[:, -1]
        guess = drawn(q[:, None])
        right.append(acceptance(p, q, guess[:, 0]))
        ids = torch.cat([ids, guess], 1)
    hidden = draft.model(input_ids=ids, use_cache=False).last_hidden_state[:, -ROUND:]
    return hidden, torch.stack(right, 1)


def learn(hidden: Tensor, right: Tensor) -> Head:
    head = Head(hidden.shape[1])
    opt = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.01)
    steps = EPOCHS * (len(hidden) // BATCH)
    done = 0
    for _ in track(range(EPOCHS), description="acceptance head"):
        for batch in torch.randperm(len(hidden)).chunk(len(hidden) // BATCH):
            opt.param_groups[0]["lr"] = RATE * min((done + 1) / 20, 1 - done / steps)
            said, yes = log_softmax(head(hidden[batch]), -1), right[batch]
            weights = torch.stack([REJECTED_WEIGHT * (1 - yes), yes], -1)
            loss = -(weights * said).sum() / weights.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            opt.step()
            opt.zero_grad()
            done += 1
    return head


def calibration(said: Tensor, right: Tensor) -> None:
    """Print how often guesses were right among those of which the head said about the same, and
    how well it orders them. What it says is what the weights of its loss make of the truth."""
    meant = said / (said + (1 - said) / REJECTED_WEIGHT)
    bins = (meant * BINS).long().clamp(max=BINS - 1)
    print("| said | meant | right | guesses |\n|---|---|---|---|")
    for which in range(BINS):
        mine = bins == which
        if n := int(mine.sum()):
            means = (float(t[mine].mean()) for t in (said, meant, right))
            print("| " + " | ".join(f"{mean:.3f}" for mean in means) + f" | {n} |")
    came = torch.rand(right.shape) < right
    ranks = torch.from_numpy(np.argsort(np.argsort(said.numpy(), kind="stable"))).double() + 1
    yes, no = int(came.sum()), int((~came).sum())
    auc = (float(ranks[came].sum()) - yes * (yes + 1) / 2) / (yes * no)
    print(f"{len(said)} guesses, {float(right.mean()):.1%} right; AUC {auc:.3f}")


def train_acceptance(folder: Path, base_folder: Path) -> None:
    """Train the head of the draft in ``folder``, into it, and print how well it does."""
    tok = Tokenizer.from_file(str(base_folder / "tokenizer.json"))
    base = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    draft = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(SEED)
    begun = np.stack([*islice(corpus.rows(TEXT_SEED, tok, GIVEN), TEXTS + HELD_OUT)])
    pieces = track(torch.from_numpy(begun).chunk(len(begun) // 64), description="the base's texts")
    texts = torch.cat([continued(base, piece) for piece in pieces])
    taught = [lessons(base, draft, some) for some in texts[:TEXTS].chunk(TEXTS // AT_A_TIME)]
    hidden, right = (torch.cat(parts).clone() for parts in zip(*taught, strict=True))
    learn(hidden, right).save(folder / FILE)
    head = read_head(folder, hidden.shape[1], torch.device("cpu"))
    assert head is not None
    seen = [
        rounds(base, draft, some) for some in texts[TEXTS:].chunk(HELD_OUT // 8) for _ in range(4)
    ]
    hidden, right = (torch.cat(parts).flatten(0, 1) for parts in zip(*seen, strict=True))
    calibration(torch.tensor(head(hidden)), right)
