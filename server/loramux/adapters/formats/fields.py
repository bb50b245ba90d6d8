"""What the fields of an adapter_config.json mean in every format of PEFT.

A field is implemented, or neutral (it changes nothing once training is over), or refused by name
unless it is switched off. Fields nobody here has heard of are refused too: the next variant will
arrive as one, and ignoring it would serve wrong tokens.

Facts checked against PEFT 0.21; the upload is never handed to PEFT or to ``re``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import re2

from loramux.adapters.problems import Problems
from loramux.adapters.strict_json import shown

MAX_SCALE = 65504.0
"""Largest value of float16. Scales and weights beyond it are no result of training, and would
overflow in half precision."""
MAX_PATTERNS = 4096
MAX_PATTERN_CHARS = 256

TARGETING = frozenset(
    "peft_type target_modules exclude_modules layers_to_transform layers_pattern".split()
)
_NEUTRAL = {
    "base_model_name_or_path": "informational; shapes are checked against the base served",
    "revision": "informational",
    "task_type": "a head of its own would be in the file's tensors, where it is refused",
    "auto_mapping": "names Python classes; nothing is imported",
    "peft_version": "informational",
    "inference_mode": "training only",
    "runtime_config": "how PEFT itself moves weights",
    "fan_in_fan_out": "says how Conv1D weights lie; PEFT ignores it for linear modules, as here",
}
_REFUSED = {
    "bias": "trained biases are not served for this format",
    "modules_to_save": "fully trained modules are not served for this format",
    "target_parameters": "adapters on bare parameters are not served",
    "trainable_token_indices": "trained tokens are not served for this format",
    "ensure_weight_tying": "tied adapters are not served",
}

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""These choose where training starts and leave the base as it is. The others (pissa_niter, corda,
loftq, lora_ga) change the base weights, so the adapter is right only on that changed base; where
the change can be computed again see ``residual``."""

T = TypeVar("T", int, float)


class Pattern:
    """rank_pattern or alpha_pattern: values by module name, the first key in file order wins.

    A key means what it means to PEFT, ``(.*\\.)?(key)$`` on the module's full name, but runs in a
    linear-time engine.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[str, Any, Any]] = []
        self._used: set[str] = set()

    def add(self, key: str, value: int | float) -> None:
        """Raises ValueError when the key is not an expression both engines read alike."""
        self._entries.append((key, compile_key(key), value))

    def lookup(self, module_name: str, default: T) -> T:
        """The value for a module, e.g. ``model.layers.0.self_attn.q_proj``."""
        for key, expression, value in self._entries:
            if expression.match(module_name):
                self._used.add(key)
                return value  # type: ignore[no-any-return]
        return default

    def unused(self) -> list[str]:
        """Keys that no lookup so far has ended at."""
        return [key for key, _, _ in self._entries if key not in self._used]


def compile_key(key: str) -> Any:
    """A pattern key as an RE2 expression equal to the one PEFT builds.

    RE2 and Python read nearly the same language. What only one of them reads is refused by asking
    both (Python only compiles it); what they read differently is refused by hand.
    """
    if len(key) > MAX_PATTERN_CHARS or not key.isascii() or not key.isprintable():
        raise ValueError(f"is not printable ASCII of at most {MAX_PATTERN_CHARS} characters")
    if "[:" in key or "{," in key:
        raise ValueError("uses [: or {, which regex engines read differently")
    whole = rf"(.*\.)?({key})$"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            re.compile(whole)
        options = re2.Options()
        options.log_errors = False
        return re2.compile(whole, options)
    except (re.error, re2.error, RecursionError, OverflowError, Warning):
        raise ValueError("is not a regular expression without backtracking") from None


@dataclass(frozen=True)
class Targets:
    """Which modules PEFT would have adapted.

    ``modules`` is None when target_modules is an expression, which is not run: then nothing is
    claimed. ``layers`` None: all of them.
    """

    modules: frozenset[str] | None = None
    excluded: frozenset[str] = frozenset()
    layers: frozenset[int] | None = None
    exact: bool = True
    """False when exclude_modules is an expression: then ``selects`` is only an upper bound."""

    def selects(self, module_name: str, layer: int) -> bool:
        """Whether PEFT would adapt this module. Always true when modules is None."""
        if self.modules is None:
            return True
        meant_by = suffixes(module_name)
        if not self.excluded.isdisjoint(meant_by):
            return False
        if module_name in self.modules:
            return True  # a full name is not subject to layers_to_transform
        in_layers = self.layers is None or layer in self.layers
        return in_layers and not self.modules.isdisjoint(meant_by)


def suffixes(module_name: str) -> list[str]:
    """What a list entry may say to mean this module: its name, or the end of it after a dot."""
    parts = module_name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


@dataclass(frozen=True)
class Rules:
    """The fields of one format: those it implements, those that change nothing once training is
    over (and why), those that would (and are refused unless switched off)."""

    implemented: frozenset[str]
    neutral: Mapping[str, str]
    refused: Mapping[str, str]

    def check(self, config: Mapping[str, Any], problems: Problems) -> None:
        """Every field that is none of the first two and is not switched off is a problem."""
        for name, value in config.items():
            known = name in self.implemented or name in self.neutral or name in _NEUTRAL
            if known or _off(value) or name in TARGETING or (name, value) == ("bias", "none"):
                continue
            reason = self.refused.get(name) or _REFUSED.get(name)
            reason = reason or "the field is unknown, so its effect is too"
            problems.add(f"{shown(name)} is {shown(value)}: {reason}")


def flag(config: Mapping[str, Any], name: str, problems: Problems) -> bool:
    """A switch that may be missing or null; anything but true and false is a problem."""
    value = config.get(name)
    if value is not None and not isinstance(value, bool):
        problems.add(f"{name} is {shown(value)}, not true or false")
    return value is True


def check_init(init: object, problems: Problems) -> None:
    """``init_lora_weights``: where training began, as long as that left the base as it is."""
    plain = isinstance(init, str) and init.lower() in _PLAIN_INITS
    if not plain and not (init is None or isinstance(init, bool)):
        problems.add(
            f"init_lora_weights is {shown(init)}: it changes the base weights; save the adapter "
            "converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )


def _off(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def as_rank(value: object) -> int:
    """ValueError unless it is a rank."""
    if type(value) is not int or value < 1:
        raise ValueError("is not an integer of at least 1")
    return value


def as_alpha(value: object) -> float:
    """ValueError unless it is a finite number other than 0."""
    if type(value) not in (int, float):
        raise ValueError("is not a number")
    try:
        alpha = float(value)  # type: ignore[arg-type]
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError("is not a finite number other than 0")
    return alpha


def value_of(
    config: Mapping[str, Any], name: str, parse: Callable[[object], T], problems: Problems
) -> T | None:
    """A field that has to be there, parsed; None with a problem when it is not or is off."""
    if name not in config:
        problems.add(f"{name} is missing")
        return None
    try:
        return parse(config[name])
    except ValueError as error:
        problems.add(f"{name} is {shown(config[name])}: it {error}")
        return None


def pattern_of(
    config: Mapping[str, Any], name: str, parse: Callable[[object], T], problems: Problems
) -> Pattern:
    """A field of values by module name; empty when it is missing or null."""
    pattern = Pattern()
    entries = config.get(name)
    if entries is None:
        return pattern
    if not isinstance(entries, dict):
        problems.add(f"{name} is not an object")
        return pattern
    if len(entries) > MAX_PATTERNS:
        problems.add(f"{name} has {len(entries)} keys; at most {MAX_PATTERNS} are taken")
        return pattern
    for key, value in entries.items():
        try:
            pattern.add(key, parse(value))
        except ValueError as error:
            problems.add(f"{name} {shown(key)}: {shown(value)}: it {error}")
    return pattern


def targets_of(config: Mapping[str, Any], problems: Problems, notes: list[str]) -> Targets:
    """Which modules the config says were adapted; ``notes`` are for the uploader."""
    modules = config.get("target_modules")
    if isinstance(modules, str):
        notes.append(
            "target_modules is an expression, which is not run: the tensors in the file decide"
        )
    elif not _is_list_of(modules, str):
        what = "missing" if modules is None else "not a list of names"
        problems.add(f"target_modules is {what}")
    excluded = config.get("exclude_modules") or []
    if not isinstance(excluded, str) and not _is_list_of(excluded, str):
        problems.add("exclude_modules is not a list of names")
    layers = config.get("layers_to_transform")
    if type(layers) is int:
        layers = [layers]
    if layers is not None and not _is_list_of(layers, int):
        problems.add("layers_to_transform is not a list of layer numbers")
        layers = None
    container = config.get("layers_pattern")
    if layers and container not in (None, "", [], "layers", ["layers"]):
        problems.add(f"layers_pattern is {shown(container)}; the base calls its layers 'layers'")
    return Targets(
        modules=frozenset(modules) if _is_list_of(modules, str) else None,
        excluded=frozenset(excluded) if _is_list_of(excluded, str) else frozenset(),
        layers=frozenset(layers) if layers else None,
        exact=not isinstance(excluded, str),
    )


def _is_list_of(value: Any, kind: type) -> TypeGuard[list[Any]]:
    # type() and not isinstance(): true and false are ints to Python.
    return isinstance(value, list) and all(type(item) is kind for item in value)
