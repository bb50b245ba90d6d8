"""The weight files of a model directory: which tensors they hold, and where their bytes are.

Only safetensors are read: a header is a length and a JSON object, and nothing in it can run. No
torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from loramux.adapters.canonical import Dtype
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid, ConfigError

_MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorBytes:
    """One tensor in a file: ``nbytes`` at ``offset`` from the file's start, row-major."""

    path: Path
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def weight_files(directory: Path) -> tuple[Path, ...]:
    """The safetensors files that make up the model, in a fixed order."""
    index = _read_index(directory)
    return (directory / _SINGLE,) if index is None else tuple(sorted(set(index.values())))


def read_checkpoint(directory: Path) -> dict[str, TensorBytes]:
    """Every tensor of the model by name.

    Raises ``ConfigError`` when a file is missing or malformed, a tensor is in two files, or the
    index and the files disagree.
    """
    tensors: dict[str, TensorBytes] = {}
    for path in weight_files(directory):
        for name, tensor in _read_header(path).items():
            if name in tensors:
                raise ConfigError(f"{path}: {name} is in {tensors[name].path} too", param="model")
            tensors[name] = tensor
    index = _read_index(directory)
    if index is not None:
        found = {name: tensor.path for name, tensor in tensors.items()}
        astray = sorted(name for name, _ in index.items() ^ found.items())
        if astray:
            names = ", ".join(dict.fromkeys(astray))
            raise ConfigError(
                f"{directory / _INDEX} and its files disagree on {names}", param="model"
            )
    return tensors


def _read_index(directory: Path) -> dict[str, Path] | None:
    """Tensor name to file, or None for a model in a single file."""
    if (directory / _SINGLE).is_file():
        return None
    path = directory / _INDEX
    try:
        index = {
            name: directory / file
            for name, file in json.loads(path.read_bytes())["weight_map"].items()
        }
    except OSError as error:
        raise ConfigError(
            f"{directory} holds neither {_SINGLE} nor {_INDEX} (only safetensors are read)",
            param="model",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} has no readable weight_map: {error!r}", param="model") from error
    for file in index.values():
        if file.parent != directory or not file.is_file():
            raise ConfigError(f"{path} names {file}, which is not in that directory", param="model")
    return index


def _read_header(path: Path) -> dict[str, TensorBytes]:
    with path.open("rb") as file:
        try:
            found = read_tensors(file, _MAX_HEADER_BYTES)
        except AdapterInvalid as error:
            problems = "".join(f"\n  {problem}" for problem in error.problems)
            raise ConfigError(
                f"{path} is not a safetensors file of weights:{problems}", param="model"
            ) from error
    return {
        name: TensorBytes(path, t.dtype, t.shape, t.start, t.num_bytes) for name, t in found.items()
    }
