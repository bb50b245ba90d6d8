"""How far to guess: a head on the draft model's hidden state that foresees rejections (SpecDec++,
arXiv 2405.19715).

Its blocks are one block used several times, as in the published checkpoints: ``x + SiLU(W x + b)``,
then two logits, of which the second is for a token that will be accepted.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from loramux.adapters.canonical import widen
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid, ConfigError

FILE = "acceptance_head.safetensors"
"""In the draft model's folder."""
REJECTED = 0.7
"""A round ends when one of its guesses was rejected with more than this probability, as the head
says it, which was taught to fear rejections sixfold. The published example has 0.3, which here ends
rounds too soon at any cost of a guess: see docs/decoding.md."""


class AcceptanceHead:
    """``num_blocks`` times the block (``weight`` [H, H], ``bias`` [H]), then (``out_weight``
    [2, H], ``out_bias`` [2]); all float32."""

    def __init__(
        self, num_blocks: int, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor
    ) -> None:
        self._num_blocks = num_blocks
        self._block = weight, bias
        self._out = out_weight, out_bias

    @torch.inference_mode()
    def __call__(self, hidden: Tensor) -> list[float]:
        """For each line of ``hidden`` [S, H], computed from a guessed token and all before it: how
        likely the guess is to be right if those before it are."""
        x = hidden.float()
        for _ in range(self._num_blocks):
            x = x + silu(linear(x, *self._block))
        chances: list[float] = linear(x, *self._out).softmax(-1)[:, 1].tolist()
        return chances


def stops(chance: float) -> bool:
    """Whether a round ends whose guesses but the newest are all right with ``chance``. The newest
    has no say: which it is must not decide how many there are."""
    return 1.0 - chance > REJECTED


def read_head(directory: Path, hidden_size: int, device: torch.device) -> AcceptanceHead | None:
    """The head in a draft model's folder, if there is one. Raises ConfigError when it does not fit
    a model of that width."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            found = {
                name: torch.from_numpy(widen(tensor.read(), tensor.dtype))
                for name, tensor in read_tensors(file).items()
            }
    except AdapterInvalid as error:
        raise ConfigError(f"--draft-model: {path}: {error}", param="draft_model") from error
    blocks = max((int(n[1]) for n in map(_OUT.fullmatch, found) if n is not None), default=0)
    shapes = {
        "model.0.linear.weight": (hidden_size, hidden_size),
        "model.0.linear.bias": (hidden_size,),
        f"model.{blocks}.weight": (2, hidden_size),
        f"model.{blocks}.bias": (2,),
    }
    for block in range(1, blocks):  # the same block again, where they are written out
        for part in ("weight", "bias"):
            again = found.pop(f"model.{block}.linear.{part}", None)
            if again is not None and not torch.equal(again, found[f"model.0.linear.{part}"]):
                raise _unfit(path, "its blocks are not one block repeated")
    if blocks == 0 or {name: tuple(t.shape) for name, t in found.items()} != shapes:
        raise _unfit(path, f"it is not a head of a model of width {hidden_size}")
    return AcceptanceHead(blocks, *(found[name].to(device) for name in shapes))


_OUT = re.compile(r"model\.(\d+)\.weight")


def _unfit(path: Path, why: str) -> ConfigError:
    return ConfigError(f"--draft-model: {path}: {why}", param="draft_model")
