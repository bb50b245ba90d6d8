"""Medusa heads as they lie in a file (arXiv 2401.10774), of a base or of an adapter; no torch.

    {j}.{i}.linear.weight   [hidden, hidden]   block i of head j: x + silu(weight x + bias)
    {j}.{i}.linear.bias     [hidden]
    {j}.{n}.weight          [vocab, hidden]    after its n blocks, an output matrix of its own;
                                               without any, all heads use the base's
    accuracy                [heads, ranks]     how often head j's choice of a rank is right

Names may begin with ``medusa_head.``, as published ones do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from loramux.adapters.canonical import widen
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import FileTensor, read_tensors
from loramux.adapters.strict_json import shown

FILE_NAME = "medusa_heads.safetensors"
MOST_HEADS, MOST_BLOCKS, MOST_RANKS = 16, 8, 64
_NAME = re.compile(r"(?:medusa_head\.)?((\d|1\d)\.(\d)\.(?:(linear)\.(?:weight|bias)|weight))")

Accuracy = tuple[tuple[float, ...], ...]
"""``accuracy[j][r]``: how often head j's choice of rank r is right, the first being rank 0."""


@dataclass(frozen=True)
class HeadsFile:
    """``blocks[j]`` are weight and bias of each of head j's blocks, ``outputs[j]`` its own output
    matrix; all use the base's when there are none. ``accuracy`` is empty when it is not known."""

    blocks: list[list[tuple[FileTensor, FileTensor]]]
    outputs: list[FileTensor]
    accuracy: Accuracy


def read_heads(file: BinaryIO, hidden: int, vocab_size: int) -> HeadsFile:
    """The heads in an open file, for a base of such widths. Every value was looked at; tensors are
    read again when they are used, so the file has to stay open.

    Raises AdapterInvalid listing each tensor that is unknown, missing, of another shape, or holds
    what is not a number.
    """
    problems = Problems()
    found = read_tensors(file)
    table = found.pop("accuracy", None)
    tensors: dict[str, FileTensor] = {}
    heads = blocks = 0
    has_outputs = False
    for name, tensor in found.items():
        match = _NAME.fullmatch(name)
        if match is None or int(match[2]) >= MOST_HEADS or int(match[3]) > MOST_BLOCKS:
            problems.add(f"tensor {shown(name)}: not a part of Medusa heads")
            continue
        if match[1] in tensors:
            problems.add(f"tensor {shown(name)}: {match[1]} is in the file twice")
        tensors[match[1]] = tensor
        heads = max(heads, int(match[2]) + 1)
        if match[4]:
            blocks = max(blocks, int(match[3]) + 1)
        else:
            has_outputs = True
    _check(tensors, _shapes(heads, blocks, has_outputs, hidden, vocab_size), problems)
    accuracy = _accuracy(table, heads, problems)
    problems.raise_any()
    names = [[f"{j}.{i}.linear." for i in range(blocks)] for j in range(heads)]
    return HeadsFile(
        [[(tensors[f"{name}weight"], tensors[f"{name}bias"]) for name in head] for head in names],
        [tensors[f"{j}.{blocks}.weight"] for j in range(heads) if has_outputs],
        accuracy,
    )


def _shapes(
    heads: int, blocks: int, has_outputs: bool, hidden: int, vocab_size: int
) -> dict[str, tuple[int, ...]]:
    """Every tensor that so many heads have, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for j in range(heads):
        for i in range(blocks):
            shapes[f"{j}.{i}.linear.weight"] = (hidden, hidden)
            shapes[f"{j}.{i}.linear.bias"] = (hidden,)
        if has_outputs:
            shapes[f"{j}.{blocks}.weight"] = (vocab_size, hidden)
    return shapes


def _check(
    tensors: dict[str, FileTensor], shapes: dict[str, tuple[int, ...]], problems: Problems
) -> None:
    if not tensors:
        problems.add("the file holds no Medusa heads")
    for name in shapes:
        if name not in tensors:
            problems.add(f"tensor {name} is missing")
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.add(f"tensor {name}: a head's own output matrix comes after all its blocks")
        elif tensor.shape != shapes[name]:
            text = f"shape {shown(list(tensor.shape))}, for this base it is {list(shapes[name])}"
            problems.add(f"tensor {name}: {text}")
        elif not all(np.isfinite(widen(part, tensor.dtype)).all() for part in tensor.blocks()):
            problems.add(f"tensor {name} holds a value that is not finite")


def _accuracy(table: FileTensor | None, heads: int, problems: Problems) -> Accuracy:
    if table is None:
        return ()
    shape = table.shape
    if len(shape) != 2 or shape[0] != heads or shape[1] > MOST_RANKS:
        problems.add(
            f"tensor accuracy: shape {shown(list(shape))} is not [{heads}, up to {MOST_RANKS}]"
        )
        return ()
    values = widen(table.read(), table.dtype)
    if not ((values >= 0) & (values <= 1)).all():
        problems.add("tensor accuracy holds a value that is not from 0 to 1")
    return tuple(map(tuple, values.tolist()))
