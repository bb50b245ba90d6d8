"""MiSS (arXiv 2409.15371): the inputs, summed in r interleaved groups, times a matrix [r, out]."""

from __future__ import annotations

from functools import partial

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import Computed
from loramux.adapters.formats.biases import PARTS as BIASES
from loramux.adapters.formats.biases import read_biases
from loramux.adapters.formats.fields import Rules, as_rank, targets_of, value_of
from loramux.adapters.formats.upload import Upload, values_of
from loramux.adapters.safetensors_file import FileTensor
from loramux.adapters.strict_json import shown

RULES = Rules(
    implemented=frozenset(["r", "init_weights", "mini_r", "bias"]),
    neutral={"miss_dropout": "training only"},
    refused={},
)
PARTS = {"miss_block": "block", **BIASES}


def read(upload: Upload) -> None:
    """See ``formats.FORMATS``."""
    config, problems = upload.config, upload.problems
    RULES.check(config, problems)
    rank = value_of(config, "r", as_rank, problems)
    variant = config.get("init_weights", True)
    columns = None
    if variant == "mini":
        columns = value_of(config, "mini_r", as_rank, problems)
    elif variant is not None and not isinstance(variant, bool):
        problems.add(f"init_weights is {shown(variant)}: its change depends on the base's weights")
    targets = targets_of(config, problems, upload.warnings)
    upload.match(PARTS)
    upload.refuse_rest()
    read_biases(upload, "MiSS_only")
    empty = []
    for at in upload.ordered():
        block = upload.modules[at]["block"]
        if not upload.scan(block):
            empty.append(at)
        width_in, width_out = upload.base.widths[at[1]]
        held = columns or width_out
        if rank is None or not upload.fits(block, rank, held) or not upload.good_rank(at, rank):
            continue
        if width_out % held:
            text = f"{upload.name(at)}: mini_r {held} does not divide its {width_out} outputs"
            problems.add(text)
            continue
        a = Computed((rank, width_in), partial(_groups, rank, width_in))
        b = Computed((width_out, rank), partial(_repeated, block, width_out // held))
        upload.add_pair(at, 1.0, a, b)
    upload.check_targets(targets)
    upload.warn_of_empty(empty)


def _groups(rank: int, width: int) -> Float32:
    """[rank, width]: input i belongs to group i mod rank."""
    a = np.zeros((rank, width), np.float32)
    a[np.arange(width) % rank, np.arange(width)] = 1
    return a


def _repeated(block: FileTensor, times: int) -> Float32:
    return np.tile(values_of(block), (1, times)).T
