"""Weights an adapter replaces: embeddings, lm_head and norms trained whole (``modules_to_save``),
and single tokens (``trainable_token_indices``). Only what differs from the base is kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import TOKEN_MODULES, Computed, TokenModule, TokenRows
from loramux.adapters.formats.upload import Module, Upload, values_of
from loramux.adapters.safetensors_file import FileTensor
from loramux.adapters.strict_json import shown
from loramux.wire import MODULES, TABLE_MODULES

PARTS = {
    "weight": "whole",
    "base_layer.weight": "copy",
    "token_adapter.trainable_tokens_delta": "tokens",
}
_NORMS = TABLE_MODULES[len(MODULES) : -2]


def read_whole(upload: Upload) -> None:
    """Take the parts above out of ``upload.modules`` and put what they change into the upload."""
    saved = _names(upload, "modules_to_save")
    indices = _indices(upload)
    for at in upload.ordered():
        parts = upload.modules[at]
        taken = {part: parts.pop(part) for part in PARTS.values() if part in parts}
        if not parts:
            del upload.modules[at]
        for part, tensor in taken.items():
            upload.scan(tensor)
            if part == "tokens":
                _tokens(upload, at, tensor, indices.pop(at[1], None))
            elif part == "copy" or at[1] in TOKEN_MODULES:
                _whole_rows(upload, at, tensor)
            elif not any(upload.name(at).endswith(key) for key in saved):
                text = f"tensor {shown(tensor.name)}: modules_to_save does not name it"
                upload.problems.add(text)
            else:
                _norm(upload, at, tensor)
    _check_saved(upload, saved)
    for module in indices:
        upload.problems.add(
            f"trainable_token_indices name {module}, and the file has no rows of it"
        )


def _names(upload: Upload, field: str) -> list[str]:
    value = upload.config.get(field) or []
    if not isinstance(value, list) or not all(type(item) is str for item in value):
        upload.problems.add(f"{field} is {shown(value)}, not a list of names")
        return []
    return value


def _indices(upload: Upload) -> dict[str, list[int]]:
    """The trained tokens of each module."""
    value: Any = upload.config.get("trainable_token_indices")
    if value is None:
        return {}
    named = value if isinstance(value, dict) else {"embed_tokens": value}
    found = {}
    for name, ids in named.items():
        module = name.rpartition(".")[2]
        good = isinstance(ids, list) and all(type(i) is int for i in ids)
        if module not in TOKEN_MODULES or not good:
            upload.problems.add(f"trainable_token_indices: {shown({name: ids})} is not understood")
            continue
        found[module] = ids
    return found


def _check_saved(upload: Upload, saved: list[str]) -> None:
    """What modules_to_save means was in the file."""
    last = upload.base.num_layers - 1
    places = [(layer, module) for layer in range(last + 1) for module in TABLE_MODULES]
    exist = [
        (layer, module)
        for layer, module in places
        if not (module == "embed_tokens" and layer)
        and not (module in ("norm", "lm_head") and layer < last)
    ]
    for key in saved:
        meant = [at for at in exist if upload.name(at).endswith(key)]
        if not meant:
            upload.problems.add(f"modules_to_save: the base has no module {shown(key)}")
        for at in meant:
            if at[1] in MODULES:
                text = f"modules_to_save: {upload.name(at)}: linear modules are not served whole"
                upload.problems.add(text)
            elif at not in upload.replaced:
                text = f"modules_to_save: {upload.name(at)} has no weight in the file"
                upload.problems.add(text)


def _norm(upload: Upload, at: Module, tensor: FileTensor) -> None:
    upload.replaced.add(at)
    if at[1] not in _NORMS:
        return
    own = np.concatenate([block.reshape(-1) for block in upload.weights.blocks(*at)])
    if upload.fits(tensor, len(own)):
        new = values_of(tensor)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(new == own, np.float32(0), new / own - np.float32(1))
        upload.add_vector(at, "gain", gain.astype(np.float32))


def _whole_rows(upload: Upload, at: Module, tensor: FileTensor) -> None:
    """Embeddings or lm_head. PEFT also saves those it did not train, beside LoRA on one of them."""
    if at[1] not in TOKEN_MODULES:
        upload.problems.add(f"tensor {shown(tensor.name)}: it is no weight of its format")
        return
    upload.replaced.add(at)
    hidden = upload.base.table_widths["lm_head"][0]
    if upload.fits(tensor, upload.base.vocab_size, hidden):
        _add_rows(upload, at, tensor, _differing(upload, at, tensor))


def _tokens(upload: Upload, at: Module, tensor: FileTensor, ids: list[int] | None) -> None:
    problems, name = upload.problems, shown(tensor.name)
    hidden = upload.base.table_widths["lm_head"][0]
    if at[1] not in TOKEN_MODULES or ids is None:
        problems.add(f"tensor {name}: trainable_token_indices do not name its module")
        return
    if len(set(ids)) < len(ids) or not all(0 <= i < upload.base.vocab_size for i in ids):
        problems.add(
            f"trainable_token_indices: not all are different tokens of the base: {shown(ids)}"
        )
        return
    if not upload.fits(tensor, len(ids), hidden):
        return
    order = np.argsort(ids)
    chosen = np.asarray(ids, np.int64)[order]
    rows = values_of(tensor)[order] - _base_rows(upload, at, chosen)
    modules: list[TokenModule] = [at[1]]
    if upload.base.tied:
        # PEFT trains a tied lm_head's rows along.
        modules = list(TOKEN_MODULES)
    for module in modules:
        matrix = Computed(rows.shape, lambda: rows)
        upload.tokens[module] = TokenRows(module, chosen.astype(np.int32), matrix)


def _differing(upload: Upload, at: Module, tensor: FileTensor) -> npt.NDArray[np.int64]:
    """The rows whose values are not the base's."""
    new, row, found = values_of(tensor), 0, []
    for block in upload.weights.blocks(*at):
        differs = (new[row : row + len(block)] != block).any(axis=1)
        found.append(np.flatnonzero(differs) + row)
        row += len(block)
    return np.concatenate(found)


def _add_rows(upload: Upload, at: Module, tensor: FileTensor, ids: npt.NDArray[np.int64]) -> None:
    if len(ids):
        rows = Computed((len(ids), tensor.shape[1]), partial(_row_changes, upload, at, tensor, ids))
        module: TokenModule = at[1]  # type: ignore[assignment]
        upload.tokens[module] = TokenRows(module, ids.astype(np.int32), rows)


def _row_changes(
    upload: Upload, at: Module, tensor: FileTensor, ids: npt.NDArray[np.int64]
) -> Float32:
    return values_of(tensor)[ids] - _base_rows(upload, at, ids)


def _base_rows(upload: Upload, at: Module, ids: npt.NDArray[np.int64]) -> Float32:
    row, found = 0, []
    for block in upload.weights.blocks(*at):
        here = ids[(ids >= row) & (ids < row + len(block))] - row
        found.append(block[here])
        row += len(block)
    return np.concatenate(found)
