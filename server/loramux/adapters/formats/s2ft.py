"""S2FT (arXiv 2412.06289): rows or columns of the base's weights, trained and the rest left alone.

Its authors save whole models, so this is a format of our own, with the least that says it all:

    config   ``{"peft_type": "S2FT", "s2_indices": {module: [channel, ...]}}``
    weights  ``<module>.s2_delta``, what was added to those channels, in the order of the indices

A module is named in full, ``model.layers.0.self_attn.o_proj``; the tensor's name may begin with
PEFT's ``base_model.model.``. Channels are inputs, columns of the weight, of o_proj and down_proj:
``s2_delta`` is [out, n]. They are outputs, rows of the weight, of the other modules: [n, in]. Each
is a pair of rank n of which one half picks the channels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import Computed
from loramux.adapters.formats.fields import TARGETING, Rules
from loramux.adapters.formats.upload import Module, Upload
from loramux.adapters.strict_json import shown
from loramux.wire import MODULES

RULES = Rules(implemented=frozenset(["s2_indices"]), neutral={}, refused={})
PARTS = {"s2_delta": "delta"}
_BY_INPUT = ("o_proj", "down_proj")


def read(upload: Upload) -> None:
    """See ``formats.FORMATS``."""
    config, problems = upload.config, upload.problems
    RULES.check(config, problems)
    for field in sorted(TARGETING - {"peft_type"}):
        if config.get(field):
            problems.add(f"{field} is {shown(config[field])}: s2_indices alone names modules")
    upload.match(PARTS)
    upload.refuse_rest()
    indices = _indices(upload)
    empty = []
    for at in upload.ordered():
        delta, name = upload.modules[at]["delta"], upload.name(at)
        if not upload.scan(delta):
            empty.append(at)
        chosen = indices.pop(name, None)
        if chosen is None:
            problems.add(f"tensor {shown(delta.name)}: s2_indices do not name its module")
        elif at[1] not in MODULES:
            problems.add(f"tensor {shown(delta.name)}: S2FT of {at[1]} is not served")
        elif _good(upload, at, chosen):
            _add(upload, at, chosen)
    for name in indices:
        problems.add(f"s2_indices name {shown(name)}, which has no s2_delta in the file")
    upload.warn_of_empty(empty)


def _indices(upload: Upload) -> dict[str, list[int]]:
    """The channels by module name, in the order of s2_delta."""
    value: Any = upload.config.get("s2_indices")
    if not isinstance(value, dict):
        upload.problems.add("s2_indices is missing or not an object of lists by module")
        return {}
    found = {}
    for name, channels in value.items():
        if isinstance(channels, list) and channels and all(type(i) is int for i in channels):
            found[name] = channels
        else:
            upload.problems.add(f"s2_indices {shown(name)}: not a list of channel numbers")
            found[name] = []
    return found


def _good(upload: Upload, at: Module, channels: list[int]) -> bool:
    if not channels:
        return False
    width_in, width_out = upload.base.widths[at[1]]
    width = width_in if at[1] in _BY_INPUT else width_out
    if len(set(channels)) < len(channels) or not all(0 <= i < width for i in channels):
        upload.problems.add(
            f"s2_indices {shown(upload.name(at))}: they are different numbers from 0 to {width - 1}"
        )
        return False
    count = len(channels)
    shape = (width_out, count) if at[1] in _BY_INPUT else (count, width_in)
    return upload.fits(upload.modules[at]["delta"], *shape) and upload.good_rank(at, count)


def _add(upload: Upload, at: Module, channels: list[int]) -> None:
    width_in, width_out = upload.base.widths[at[1]]
    delta, count = upload.modules[at]["delta"], len(channels)
    if at[1] in _BY_INPUT:
        pick = Computed((count, width_in), partial(_one_hot, channels, width_in))
        upload.add_pair(at, 1.0, pick, delta)
    else:
        put = Computed((width_out, count), lambda: _one_hot(channels, width_out).T)
        upload.add_pair(at, 1.0, delta, put)


def _one_hot(channels: list[int], width: int) -> Float32:
    """[channels, width], a single 1 in each row."""
    rows = np.zeros((len(channels), width), np.float32)
    rows[np.arange(len(channels)), channels] = 1
    return rows
