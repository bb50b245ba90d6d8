"""AdaLoRA (arXiv 2303.10512): ``B diag(E) A``, the ranks pruned module by module."""

from __future__ import annotations

from functools import partial

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import Computed
from loramux.adapters.formats import lora
from loramux.adapters.formats.biases import PARTS as BIASES
from loramux.adapters.formats.biases import read_biases
from loramux.adapters.formats.fields import Rules, check_init, targets_of, value_of
from loramux.adapters.formats.upload import Module, Upload, values_of
from loramux.adapters.safetensors_file import FileTensor

RULES = Rules(
    implemented=frozenset("init_r lora_alpha init_lora_weights bias".split()),
    neutral={
        **lora.RULES.neutral,
        "r": "replaced by init_r",
        "target_r": "training only",
        "tinit": "training only",
        "tfinal": "training only",
        "deltaT": "training only",
        "beta1": "training only",
        "beta2": "training only",
        "orth_reg_weight": "training only",
        "total_step": "training only",
        "rank_pattern": "which ranks were kept; the file holds those alone",
        "alpha_pattern": "not read by AdaLoRA",
        "use_rslora": "not read by AdaLoRA",
    },
    refused={
        **lora.RULES.refused,
        "use_dora": "AdaLoRA with DoRA is not defined",
        "lora_bias": "AdaLoRA with biases of B is not defined",
    },
)
PARTS = {"lora_A": "A", "lora_B": "B", "lora_E": "E", **BIASES}


def read(upload: Upload) -> None:
    """See ``formats.FORMATS``."""
    RULES.check(upload.config, upload.problems)
    check_init(upload.config.get("init_lora_weights"), upload.problems)
    first_rank = value_of(upload.config, "init_r", _as_number, upload.problems)
    alpha = value_of(upload.config, "lora_alpha", _as_number, upload.problems)
    targets = targets_of(upload.config, upload.problems, upload.warnings)
    upload.match(PARTS)
    upload.refuse_rest()
    read_biases(upload, "lora_only")
    empty = []
    for at in upload.ordered():
        parts = upload.modules[at]
        nonzero = {part: upload.scan(tensor) for part, tensor in parts.items() if _any(tensor)}
        if not all(nonzero.get(part, True) for part in "BE"):
            empty.append(at)
        if _good(upload, at, parts) and first_rank is not None and alpha is not None:
            rank = parts["A"].shape[0]
            # PEFT divides by the rank training began with, and so that it cannot be zero.
            scale = (alpha if alpha > 0 else rank) / (np.float32(first_rank) + np.float32(1e-5))
            a, e = parts["A"], parts["E"]
            scaled = Computed(a.shape, partial(_product, a, e))
            if rank:
                upload.add_pair(at, float(scale), scaled, parts["B"])
    upload.check_targets(targets)
    upload.warn_of_empty(empty)


def _as_number(value: object) -> float:
    if type(value) not in (int, float) or not np.isfinite(value):  # type: ignore[call-overload]
        raise ValueError("is not a finite number")
    return float(value)  # type: ignore[arg-type]


def _product(a: FileTensor, e: FileTensor) -> Float32:
    return values_of(a) * values_of(e)


def _any(tensor: FileTensor) -> bool:
    return all(tensor.shape)


def _good(upload: Upload, at: Module, parts: dict[str, FileTensor]) -> bool:
    missing = [part for part in "ABE" if part not in parts]
    if missing:
        names = " and ".join(f"lora_{part}" for part in missing)
        upload.problems.add(f"{upload.name(at)} lacks {names}")
        return False
    width_in, width_out = upload.base.widths[at[1]]
    rank = parts["A"].shape[0] if parts["A"].shape else 0
    fits = [
        upload.fits(parts["A"], rank, width_in),
        upload.fits(parts["E"], rank, 1),
        upload.fits(parts["B"], width_out, rank),
    ]
    return all(fits) and upload.good_rank(at, rank)
