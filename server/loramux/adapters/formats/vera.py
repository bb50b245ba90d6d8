"""VeRA (arXiv 2310.11454): ``diag(b) B diag(d) A``, A and B random and shared by all modules.

A is kept as it is, once for all modules of a width; b and d are folded into a B of each module's
own, ``diag(b) B diag(d)``.
"""

from __future__ import annotations

from functools import partial

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import Computed, Matrix
from loramux.adapters.formats.biases import PARTS as BIASES
from loramux.adapters.formats.biases import read_biases
from loramux.adapters.formats.fields import Rules, as_rank, targets_of, value_of
from loramux.adapters.formats.upload import Module, Upload, values_of
from loramux.adapters.safetensors_file import FileTensor

RULES = Rules(
    implemented=frozenset(["r", "save_projection", "bias"]),
    neutral={
        "projection_prng_key": "the projections are in the file",
        "vera_dropout": "training only",
        "d_initial": "initialisation only",
        "init_weights": "initialisation only",
    },
    refused={},
)
PARTS = {"vera_lambda_b": "b", "vera_lambda_d": "d", **BIASES}


def read(upload: Upload) -> None:
    """See ``formats.FORMATS``."""
    problems = upload.problems
    RULES.check(upload.config, problems)
    rank = value_of(upload.config, "r", as_rank, problems)
    targets = targets_of(upload.config, problems, upload.warnings)
    upload.match(PARTS)
    shared = [
        upload.take(f"base_model.vera_{side}", f"base_model.vera_{side}.default") for side in "AB"
    ]
    upload.refuse_rest()
    read_biases(upload, "vera_only")
    for tensor in (t for t in shared if t is not None):
        upload.scan(tensor)
    if None in shared:
        problems.add(
            "the shared projections are not in the file, and random numbers differ between "
            "machines: load the adapter with PEFT where it was trained, set "
            "peft_config['default'].save_projection = True, and save it again"
        )
    cuts: dict[int, Matrix] = {}
    for at in upload.ordered():
        parts = upload.modules[at]
        for tensor in parts.values():
            upload.scan(tensor)
        if rank is not None and _good(upload, at, parts, rank):
            a, b = shared
            if a is not None and b is not None and _wide_enough(upload, at, rank, a, b):
                width = upload.base.widths[at[1]][0]
                cut = cuts.setdefault(width, Computed((rank, width), partial(_cut, a, width)))
                _add(upload, at, parts, cut, b)
    upload.check_targets(targets)


def _good(upload: Upload, at: Module, parts: dict[str, FileTensor], rank: int) -> bool:
    missing = [f"vera_lambda_{part}" for part in "bd" if part not in parts]
    if missing:
        upload.problems.add(f"{upload.name(at)} lacks {' and '.join(missing)}")
        return False
    fits = [
        upload.fits(parts["b"], upload.base.widths[at[1]][1]),
        upload.fits(parts["d"], rank),
    ]
    return all(fits) and upload.good_rank(at, rank)


def _wide_enough(upload: Upload, at: Module, rank: int, a: FileTensor, b: FileTensor) -> bool:
    width_in, width_out = upload.base.widths[at[1]]
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank
    if fits and a.shape[1] >= width_in and b.shape[0] >= width_out:
        return True
    upload.problems.add(
        f"{upload.name(at)}: the shared projections are {list(a.shape)} and {list(b.shape)}; "
        f"it needs [{rank}, {width_in} or more] and [{width_out} or more, {rank}]"
    )
    return False


def _cut(a: FileTensor, width: int) -> Float32:
    return values_of(a)[:, :width]


def _add(
    upload: Upload, at: Module, parts: dict[str, FileTensor], a: Matrix, b: FileTensor
) -> None:
    width_out = upload.base.widths[at[1]][1]
    mid, out = values_of(parts["d"]), values_of(parts["b"])
    own = Computed((width_out, len(mid)), lambda: out[:, None] * values_of(b)[:width_out] * mid)
    upload.add_pair(at, 1.0, a, own)
