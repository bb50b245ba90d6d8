"""Medusa: heads that say what comes after the next token, from the hidden state alone
(arXiv 2401.10774).

Head j of H reads what the output matrix read where the last known token was drawn, and guesses the
token j + 1 after it. It does so whatever stands between, so a tree of guesses is a product: at
depth d every node has the same children, head d's choices by rank. Which of them are worth a row is
what the measured accuracy of each (head, rank) says.

A head's choices come in the order of the race that the sampler runs, with the request's own noise
at that position: where a head's distribution is the target's, its first choice is the token that is
drawn. Bias, penalties and masks are left out, which costs acceptance only.

The state is the adapted one, so the heads of the base serve adapters too; one may bring its own
(``own_heads``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import silu

from loramux.adapters.canonical import widen
from loramux.adapters.heads_file import FILE_NAME, Accuracy, read_heads
from loramux.adapters.safetensors_file import FileTensor
from loramux.errors import AdapterInvalid, ConfigError
from loramux.request import Request
from loramux.sampling.sampler import draw_params
from loramux.speculation.drafter import Ask, Guess
from loramux_kernels import sampling as kernels
from loramux_kernels.linear import Matrix, project
from loramux_kernels.sampling import reference

GRADES = 4
"""A guess's grade is how likely its head thinks the first token, in so many equal classes."""
CONSIDERED = 64
"""The most likely tokens of a head take part in the race for the ranks behind the first."""
RANKS = 10
ACCURACY: Accuracy = tuple(tuple(0.6 * 0.8**j * 0.4**r for r in range(RANKS)) for j in range(16))
"""For heads that come without a table: each choice and each head is less often right."""

WORD = 0xFFFFFFFF
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Heads:
    """H heads. ``blocks[j]`` are (W, b) of head j: ``x + silu(W x + b)``, one after the other; then
    ``outputs[j]``, or ``outputs[0]`` for all of them."""

    blocks: tuple[tuple[tuple[Matrix, torch.Tensor], ...], ...]
    outputs: tuple[Matrix, ...]
    accuracy: Accuracy

    def logits(self, hidden: torch.Tensor, depth: int) -> torch.Tensor:
        """float32 ``[depth, R, vocab]`` of the first ``depth`` heads for ``hidden [R, hidden]``."""
        states = hidden.repeat(depth, 1, 1)
        change = torch.empty_like(hidden)
        for state, blocks in zip(states, self.blocks, strict=False):
            for weight, bias in blocks:
                project(change, state, weight)
                state += silu(change + bias)
        rows, vocab = len(hidden), self.outputs[0].width_out
        logits = states.new_empty(depth, rows, vocab)
        if len(self.outputs) == 1:
            project(logits.view(-1, vocab), states.view(-1, states.shape[-1]), self.outputs[0])
        else:
            for head in range(depth):
                project(logits[head], states[head], self.outputs[head])
        return logits.float()


class Shape(NamedTuple):
    """A tree: ``parents`` as in a Guess, and which choice of which head each of its guesses is."""

    parents: list[int]
    heads: list[int]
    ranks: list[int]


@lru_cache(maxsize=256)
def shape_of(accuracy: Accuracy, most: int) -> Shape:
    """The ``most`` nodes that are right most often, if the heads err independently: a node is as
    good as the product of the accuracies on its way. The best come first, parents before children.
    """
    shape = Shape([], [], [])
    heap: list[tuple[float, int, int, int]] = []

    def grow(chance: float, node: int, head: int) -> None:
        if head < len(accuracy):
            for rank, right in enumerate(accuracy[head]):
                heapq.heappush(heap, (-chance * right, node, head, rank))

    grow(1.0, 0, 0)
    while heap and len(shape.parents) < most:
        chance, parent, head, rank = heapq.heappop(heap)
        shape.parents.append(parent)
        shape.heads.append(head)
        shape.ranks.append(rank)
        grow(-chance, len(shape.parents), head + 1)
    return shape


class Medusa:
    """The drafter: the ``base``'s heads, if it has any, those of adapters by the digest of their
    file (``own``; None: not at hand), and the hidden state each request was last drawn from."""

    def __init__(
        self, base: Heads | None, own: Callable[[str], Heads | None] = lambda digest: None
    ) -> None:
        self.base = base
        self._own = own
        self._seen: dict[str, tuple[int, torch.Tensor]] = {}

    def saw(self, requests: Sequence[Request], hidden: torch.Tensor) -> None:
        """See HiddenReader."""
        for request, state in zip(requests, hidden.unbind(), strict=True):
            self._seen[request.id] = request.num_ids, state

    def ended(self, request: Request) -> None:
        """See Drafter."""
        self._seen.pop(request.id, None)

    @torch.inference_mode()
    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        """See Drafter. There is nothing to say about a request whose last token was drawn where
        nobody looked, which is made good with the next, and while its heads are not at hand."""
        guesses = [Guess()] * len(asks)
        by_heads: dict[str, list[int]] = {}
        for index, ask in enumerate(asks):
            if self._is_known(ask.request):
                by_heads.setdefault(_heads_of(ask), []).append(index)
        for digest, known in by_heads.items():
            heads = self._own(digest) if digest else self.base
            if heads is not None:
                those = [asks[index] for index in known]
                for index, guess in zip(known, self._guess(those, heads), strict=True):
                    guesses[index] = guess
        return guesses

    def _is_known(self, request: Request) -> bool:
        seen = self._seen.get(request.id)
        return seen is not None and seen[0] == request.num_ids

    def _guess(self, asks: Sequence[Ask], heads: Heads) -> list[Guess]:
        hidden = torch.stack([self._seen[ask.request.id][1] for ask in asks])
        depth = min(len(heads.blocks), max(ask.most for ask in asks))
        shapes = [
            shape_of(heads.accuracy, ask.most) if ask.may_branch else chain(depth, ask.most)
            for ask in asks
        ]
        ranks = 1 + max(max(shape.ranks) for shape in shapes)
        logits = heads.logits(hidden, depth)
        choices = _choices(logits, [ask.request for ask in asks], ranks)
        grades = _grades(logits[0], choices[0, :, 0])
        return [_filled(shape, choices[:, row], grades[row]) for row, shape in enumerate(shapes)]


def _heads_of(ask: Ask) -> str:
    speculation = ask.request.speculation
    return "" if speculation is None else speculation.heads


def chain(depth: int, most: int) -> Shape:
    """The first choice of each head."""
    heads = list(range(min(depth, most)))
    return Shape(heads, heads, [0] * len(heads))


def _grades(logits: torch.Tensor, token_ids: npt.NDArray[np.int64]) -> list[int]:
    """The class of each row's first token; of a bad row whatever comes."""
    chosen = torch.from_numpy(token_ids).to(logits.device).clamp(min=0)[:, None]
    likely = logits.softmax(dim=-1).gather(1, chosen)[:, 0].nan_to_num()
    grades: list[int] = (likely * GRADES).int().clamp(max=GRADES - 1).tolist()
    return grades


def _filled(shape: Shape, choices: npt.NDArray[np.int64], grade: int) -> Guess:
    """``choices [depth, ranks]`` on a tree; nothing for a state that was not finite."""
    token_ids: list[int] = choices[shape.heads, shape.ranks].tolist()
    return Guess() if -1 in token_ids else Guess(token_ids, shape.parents, grade)


def _choices(
    logits: torch.Tensor, requests: Sequence[Request], ranks: int
) -> npt.NDArray[np.int64]:
    """Token ids ``[depth, R, ranks]``: the first is what the request would draw from the head's
    distribution at that position, then those that come next in the race. -1: not finite."""
    depth, _, vocab = logits.shape
    flat = logits.view(-1, vocab)
    params = [request.sampling for request in requests]
    keys = [kernels.stream_key(p.seed, p.choice) for p in params]
    draw = draw_params(params * depth, keys * depth)
    nexts = np.array([request.num_outputs for request in requests], np.int64)
    position = (np.arange(depth)[:, None] + nexts).ravel()
    choices = kernels.draw(flat, draw, position)[0][:, None]
    if ranks > 1:
        choices = _ranked(flat, choices, draw, position)[:, :ranks]
    return choices.reshape(depth, len(requests), -1)


def _ranked(
    logits: torch.Tensor,
    first: npt.NDArray[np.int64],
    params: kernels.DrawParams,
    position: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """``first`` [R, 1] and behind it the likely others, the least E / w first."""
    top = logits.topk(min(CONSIDERED, logits.shape[1]))
    drawn = torch.from_numpy(first).to(logits.device)
    temperature = torch.from_numpy(params.temperature).to(logits.device)[:, None]
    race = _noise(params.key, position, top.indices).log() - top.values / temperature
    score = torch.where(temperature > 0, race, -top.values.double())
    score = score.masked_fill(top.indices == drawn, torch.inf)  # it stands in front already
    others = top.indices.gather(1, score.argsort(dim=1, stable=True))[:, :-1]
    return torch.cat([drawn, others], dim=1).cpu().numpy()


def _noise(
    key: npt.NDArray[np.uint64], position: npt.NDArray[np.int64], ids: torch.Tensor
) -> torch.Tensor:
    """The sampler's E float64 [R, N] (see ``loramux_kernels.sampling``) of ``ids`` [R, N] alone."""
    keys = torch.from_numpy(key.view(np.int64)).to(ids.device)[:, None]
    at = torch.from_numpy(position).to(ids.device)[:, None]
    counter = (at & WORD, at >> 32, ids // 4, torch.zeros_like(ids))
    lanes = reference.philox(counter, (keys & WORD, (keys >> 32) & WORD))
    hashed = lanes.gather(-1, (ids % 4)[..., None]).squeeze(-1)
    return -torch.log1p(-(hashed.double() + 0.5) * 2.0**-32)


def base_heads(directory: Path, lm_head: Matrix, like: torch.Tensor) -> Heads | None:
    """The heads beside a model's weights, to compute in the dtype of ``like`` on its device; None
    when it has none. Raises ConfigError listing what is wrong with them."""
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    try:
        return load_heads(path, lm_head, like)
    except AdapterInvalid as error:
        listing = "".join(f"\n  {problem}" for problem in error.problems)
        raise ConfigError(
            f"{path} does not hold this model's heads:{listing}", param="model"
        ) from error


def load_heads(path: Path, lm_head: Matrix, like: torch.Tensor) -> Heads:
    """The heads in a file. Raises AdapterInvalid listing what is wrong with them."""
    keep = like.dtype == torch.float32 and like.device.type == "cpu"

    def matrix(tensor: FileTensor) -> Matrix:
        return Matrix.of(_tensor(tensor, like), _DTYPES[tensor.dtype] if keep else like.dtype)

    with path.open("rb") as file:
        found = read_heads(file, lm_head.width_in, lm_head.width_out)
        return Heads(
            tuple(
                tuple((matrix(weight), _tensor(bias, like)) for weight, bias in head)
                for head in found.blocks
            ),
            tuple(map(matrix, found.outputs)) or (lm_head,),
            found.accuracy or ACCURACY[: len(found.blocks)],
        )


def _tensor(tensor: FileTensor, like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(widen(tensor.read(), tensor.dtype)).to(like)
