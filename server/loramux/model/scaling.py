"""How rotary positions are stretched: the rope fields of a config, in both spellings; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from loramux.model.fields import Fields

_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    # the dynamic base depends on max_position_embeddings alone; old configs name the other as well
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset(
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    ),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale "
        "mscale_all_dim truncate".split()
    ),
}
_SHARED_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and its context extension.

    ``kind``: default; linear (positions divided by ``factor``); dynamic (NTK scaling, which up to
    the trained length is the default); llama3 (Llama 3.1's interpolation by wavelength); yarn
    (arXiv 2309.00071). ``attention_factor`` multiplies cos and sin.
    """

    kind: str
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def read_rope(config: Fields, max_positions: int) -> Rope:
    """The rope of a config; what is wrong or not implemented goes to ``config.problems``.

    Both spellings are read: ``rope_theta`` and ``rope_scaling`` at the top, or ``rope_parameters``
    with everything in it. Two spellings that disagree are refused.
    """
    scaling = _scaling(config)
    kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
    if kind not in _KEYS:
        scaling.refuse("rope_type", f"{kind!r} is not implemented ({', '.join(_KEYS)} are)")
        return Rope("default", 1.0)
    if scaling.values.get("type") not in (None, kind):
        scaling.refuse("type", f"{scaling.values['type']!r} contradicts rope_type {kind!r}")
    for key, value in scaling.values.items():
        if key not in _SHARED_KEYS | _KEYS[kind] and value is not None:
            scaling.refuse(key, f"is not implemented for rope type {kind}")
    for fields in (config, scaling):
        if fields.values.get("partial_rotary_factor") not in (None, 1):
            fields.refuse("partial_rotary_factor", "is not implemented (1 is)")
    theta = _theta(config, scaling)
    if kind == "default":
        return Rope(kind, theta)
    factor = scaling.number("factor", least=1.0)
    if kind in ("linear", "dynamic"):
        return Rope(kind, theta, factor)
    original = scaling.integer("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if low >= high:
            scaling.refuse("high_freq_factor", f"{high} must be above low_freq_factor {low}")
        return Rope(kind, theta, factor, original, low, high)
    return Rope(
        kind,
        theta,
        factor,
        original,
        attention_factor=scaling.number("attention_factor", _yarn_attention(scaling, factor)),
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )


def _scaling(config: Fields) -> Fields:
    old, new = config.nested("rope_scaling"), config.nested("rope_parameters")
    if old.values and new.values:
        for key, value in old.values.items():
            if key in new.values and new.values[key] != value:
                old.refuse(key, f"{value!r} contradicts rope_parameters {new.values[key]!r}")
    return new if new.values else old


def _theta(config: Fields, scaling: Fields) -> float:
    inner, outer = scaling.values.get("rope_theta"), config.values.get("rope_theta")
    if inner is not None and outer not in (None, inner):
        scaling.refuse("rope_theta", f"{inner!r} contradicts rope_theta {outer!r}")
    # 10000 is the paper's base, and what a missing field means in every release of transformers
    source = scaling if inner is not None else config
    theta = source.number("rope_theta", 10000.0)
    if theta <= 1:
        source.refuse("rope_theta", f"must be above 1, is {theta:g}")
    return theta


def _yarn_attention(scaling: Fields, factor: float) -> float:
    """The paper's 0.1 ln(s) + 1, or DeepSeek's quotient of two such."""

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):
        return temperature(scaling.number("mscale")) / temperature(scaling.number("mscale_all_dim"))
    return temperature(1.0)
