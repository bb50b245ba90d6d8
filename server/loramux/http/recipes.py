"""The ``blend`` of a registration: from JSON to a recipe and its sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from loramux.adapters.blend import FIELDS
from loramux.adapters.formats.fields import MAX_SCALE
from loramux.errors import InvalidRequest
from loramux.wire import BlendMethod, BlendRecipe

MAX_SOURCES = 32
MAX_SEED = 2**63 - 1
MAX_RANK = 1 << 16
_ALONE = ("scale_layers", "compress")
_REQUIRED = {
    "ties": ("rank", "density"),
    "dare_ties": ("rank", "density"),
    "dare_linear": ("rank", "density"),
    "scale_layers": ("alpha", "beta"),
    "compress": ("rank",),
}


def parse_blend(blend: Any) -> tuple[BlendRecipe, list[tuple[str, float]]]:
    """The recipe, and every source's name and weight. Raises InvalidRequest naming the field."""
    if not isinstance(blend, dict):
        raise _bad("blend", "must be an object")
    method: Any = blend.get("method")
    if method not in get_args(BlendMethod):
        raise _bad("blend.method", f"must be one of {', '.join(get_args(BlendMethod))}")
    for key in blend:
        if key not in ("method", "sources", *FIELDS[method]):
            raise InvalidRequest(
                f"blend: {method} takes {', '.join(('sources', *FIELDS[method]))} and no others",
                param="blend",
            )
    for key in _REQUIRED.get(method, ()):
        if key not in blend:
            raise _bad(f"blend.{key}", "this field is required")
    return _recipe(method, blend), _sources(method, blend.get("sources"))


def _recipe(method: BlendMethod, blend: Mapping[str, Any]) -> BlendRecipe:
    given: dict[str, Any] = {}
    for key, (least, most) in {"rank": (1, MAX_RANK), "seed": (0, MAX_SEED)}.items():
        if key in blend:
            value = given[key] = blend[key]
            if type(value) is not int or not least <= value <= most:
                raise _bad(f"blend.{key}", f"must be an integer from {least} to {most}")
    for key in ("density", "alpha", "beta"):
        if key in blend:
            given[key] = _number(blend[key], f"blend.{key}")
    if not 0 < given.get("density", 1) <= 1:
        raise _bad("blend.density", "must be above 0 and at most 1")
    sign: Literal["total", "frequency"] = blend.get("majority_sign_method", "total")
    if sign not in ("total", "frequency"):
        raise _bad("blend.majority_sign_method", "must be total or frequency")
    return BlendRecipe(method=method, majority_sign_method=sign, **given)


def _sources(method: BlendMethod, sources: Any) -> list[tuple[str, float]]:
    most = 1 if method in _ALONE else MAX_SOURCES
    if not isinstance(sources, list) or not 1 <= len(sources) <= most:
        text = "must be a list of one adapter" if most == 1 else f"must be a list of 1 to {most}"
        raise _bad("blend.sources", text)
    uniform = 1 / len(sources) if method == "soup" else 1.0
    parsed = []
    for number, source in enumerate(sources):
        param = f"blend.sources[{number}]"
        weighed = () if method in _ALONE else ("weight",)
        if not isinstance(source, dict) or not {"id"} <= source.keys() <= {"id", *weighed}:
            fields = "an id and perhaps a weight" if weighed else "an id"
            raise _bad(param, f"must be an object with {fields}, and nothing else")
        if not isinstance(source["id"], str):
            raise _bad(f"{param}.id", "must be a string")
        parsed.append((source["id"], _number(source.get("weight", uniform), f"{param}.weight")))
    weighted = ["weight" in source for source in sources]
    if method == "soup" and any(weighted) and not all(weighted):
        # The default depends on how many there are, which nobody means beside other weights.
        raise _bad("blend.sources", "give every source a weight, or none")
    return parsed


def _number(value: Any, param: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _bad(param, "must be a number")
    if not -MAX_SCALE <= value <= MAX_SCALE:  # NaN is neither
        raise _bad(param, f"must be from {-MAX_SCALE:g} to {MAX_SCALE:g}")
    return float(value)


def _bad(param: str, text: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {text}", param=param)
