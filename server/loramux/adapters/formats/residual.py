"""PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775): pairs trained beside the rest of a weight.

PEFT takes ``s B0 A0``, where training begins, out of the base's weight and saves neither. To the
whole weight the adapter adds ``s (B A - B0 A0)``, a pair of twice the rank. The factors B0 and A0
have signs that differ between machines, but their product is a projection of the weight: on its
leading singular vectors for PiSSA, on its first columns for OLoRA. So it can be computed again.
"""

from __future__ import annotations

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import Computed, Matrix
from loramux.adapters.formats.upload import Module, Upload, values_of
from loramux.wire import MODULES

CLEAR = 1e-5
"""How far apart, in parts of the largest, singular values must be for float32, in which training
computed them, to tell them apart."""
MAX_WORK = 1e12
"""Largest sum over modules of the cube of their smaller side: minutes of one core for PiSSA."""
_BLOCK = 4096

Factors = tuple[Float32, Float32]


def init_of(init: object) -> str | None:
    """What ``init_lora_weights`` means to PEFT, if it is "pissa" or "olora"."""
    if isinstance(init, str) and (init == "pissa" or init.lower() == "olora"):
        return init.lower()
    return None


def check(upload: Upload, init: str) -> bool:
    """Whether this server can compute again what was taken out of its base; problems when not."""
    why = None
    if upload.base.quantized:
        why = "what it took out of the original weights cannot be told from quantized ones"
    elif init == "pissa" and _work(upload) > MAX_WORK:
        why = "to compute again what it took out of so large a base would take too long"
    elif any(module == "lm_head" for _, module in upload.modules):
        why = "what it took out of lm_head is not computed again"
    if why is not None:
        upload.problems.add(
            f"init_lora_weights is '{init}': {why}; save the adapter converted to plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
        return False
    upload.warnings.append(
        f"init_lora_weights is '{init}': what it took out of the base's weights was computed again "
        "from this server's base, and every rank is doubled"
    )
    return True


def _work(upload: Upload) -> float:
    widths = [upload.base.widths[module] for _, module in upload.modules if module in MODULES]
    return sum(float(min(pair)) ** 3 for pair in widths)


def factors(
    upload: Upload, at: Module, init: str, scale: float, a: Matrix, b: Matrix
) -> tuple[Matrix, Matrix] | None:
    """A [2r, in] and B [out, 2r] of the change to the whole weight; None with a problem when what
    training began with is not clear."""
    weight = np.concatenate(list(upload.weights.blocks(*at)))
    rank = a.shape[0]
    start = _leading(weight, rank) if init == "pissa" else _first_columns(weight, rank)
    if start is None:
        upload.problems.add(
            f"{upload.name(at)}: where its training began is not clear from the base's weight "
            f"(init_lora_weights: '{init}', rank {rank}); save the adapter converted to plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
        return None
    # PiSSA takes out the projection itself, OLoRA s times it.
    b0, a0 = start[0] / np.float32(scale if init == "pissa" else 1), start[1]
    return (
        Computed((2 * rank, a.shape[1]), lambda: np.concatenate([values_of(a), a0])),
        Computed((b.shape[0], 2 * rank), lambda: np.concatenate([values_of(b), -b0], axis=1)),
    )


def _leading(weight: Float32, rank: int) -> Factors | None:
    """The sum of the ``rank`` leading singular components, as [out, rank] and [rank, in]."""
    tall = weight.shape[0] > weight.shape[1]
    wide = weight.T if tall else weight
    gram = np.zeros((len(wide), len(wide)))
    for start in range(0, wide.shape[1], _BLOCK):
        block = wide[:, start : start + _BLOCK].astype(np.float64)
        gram += block @ block.T
    squares, vectors = np.linalg.eigh(gram)
    values = np.sqrt(np.maximum(squares, 0))[::-1]
    if rank < len(values) and values[rank - 1] - values[rank] <= CLEAR * values[0]:
        return None
    basis = vectors[:, -rank:].astype(np.float32)
    return (weight @ basis, basis.T) if tall else (basis, basis.T @ weight)


def _first_columns(weight: Float32, rank: int) -> Factors | None:
    """The projection on the space of the first ``rank`` columns, as [out, rank] and [rank, in]."""
    basis, triangle = np.linalg.qr(weight[:, :rank].astype(np.float64))
    diagonal = np.abs(np.diag(triangle))
    if diagonal.min() <= CLEAR * diagonal.max():
        return None
    basis = basis.astype(np.float32)
    return basis, basis.T @ weight
