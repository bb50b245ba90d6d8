"""What an adapter_config.json of PEFT says, and whether we can do exactly that.

A field is implemented, or neutral (it changes nothing once training is over), or refused by name
unless it is switched off. Fields this list has never heard of are refused too: the next LoRA
variant will arrive as one, and ignoring it would serve wrong tokens.

Facts checked against PEFT 0.21; the upload is never handed to PEFT or to ``re``.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import re2

from loramux.adapters.problems import Problems
from loramux.adapters.strict_json import shown

MAX_SCALE = 65504.0
"""Largest value of float16. Scales and weights beyond it are no result of training, and would
overflow in half precision."""
MAX_PATTERNS = 4096
MAX_PATTERN_CHARS = 256

IMPLEMENTED = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern init_lora_weights"
    " target_modules exclude_modules layers_to_transform layers_pattern".split()
)

NEUTRAL = {
    "base_model_name_or_path": "informational; shapes are checked against the base served",
    "revision": "informational",
    "task_type": "a head of its own would be in the file's tensors, where it is refused",
    "auto_mapping": "names Python classes; nothing is imported",
    "peft_version": "informational",
    "inference_mode": "training only",
    "lora_dropout": "training only",
    "velora_config": "compresses activations for the backward pass",
    "runtime_config": "how PEFT itself moves weights",
    "eva_config": "initialisation only",
    "corda_config": "read by an initialisation that is refused",
    "loftq_config": "read by an initialisation that is refused",
    "lora_ga_config": "read by an initialisation that is refused",
    "megatron_core": "read only with megatron_config, which is refused",
    "qalora_group_size": "read only with use_qalora, which is refused",
}

REFUSED = {
    "bias": "trained biases are not served",
    "use_dora": "DoRA is not served",
    "lora_bias": "biases of B are not served",
    "fan_in_fan_out": "transposed base weights are not served",
    "modules_to_save": "fully trained modules are not served",
    "target_parameters": "LoRA on bare parameters is not served",
    "trainable_token_indices": "trained token embeddings are not served",
    "ensure_weight_tying": "tied adapters are not served",
    "layer_replication": "replicated layers are not served",
    "alora_invocation_tokens": "activated LoRA is not served",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "kasa_config": "KaSA changes the base weights",
    "monteclora_config": "Monte Carlo LoRA is not served",
    "arrow_config": "Arrow routing is not served",
    "megatron_config": "Megatron layers are not served",
}

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""These choose where training starts and leave the base as it is. The others (pissa, olora, corda,
loftq, lora_ga) change the base weights, so the adapter is right only on that changed base."""

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
class LoraConfig:
    """The implemented fields. ``rank`` is None when it was refused."""

    rank: int | None
    alpha: float | None
    use_rslora: bool
    rank_pattern: Pattern
    alpha_pattern: Pattern
    targets: Targets
    notes: list[str] = field(default_factory=list)

    def rank_of(self, module_name: str) -> int | None:
        """The rank the config gives a module."""
        return None if self.rank is None else self.rank_pattern.lookup(module_name, self.rank)

    def scale_of(self, module_name: str, rank: int) -> float | None:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), in double precision."""
        if self.alpha is None:
            return None
        alpha = self.alpha_pattern.lookup(module_name, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(config: Mapping[str, Any], problems: Problems) -> LoraConfig:
    """Read the fields of an adapter_config.json, adding to ``problems`` all that are refused."""
    if config.get("peft_type") != "LORA":
        problems.add(f"peft_type is {shown(config.get('peft_type'))}; only LORA is served")
    for name, value in config.items():
        if name in IMPLEMENTED or name in NEUTRAL or _off(value):
            continue
        if name == "bias" and value == "none":
            continue
        reason = REFUSED.get(name, "the field is unknown, so its effect is too")
        problems.add(f"{shown(name)} is {shown(value)}: {reason}")
    init = config.get("init_lora_weights")
    plain = isinstance(init, str) and init.lower() in _PLAIN_INITS
    if not plain and not (init is None or isinstance(init, bool)):
        problems.add(
            f"init_lora_weights is {shown(init)}: it changes the base weights; save the adapter "
            "converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    use_rslora = config.get("use_rslora")
    if use_rslora is not None and not isinstance(use_rslora, bool):
        problems.add(f"use_rslora is {shown(use_rslora)}, not true or false")
    notes: list[str] = []
    return LoraConfig(
        rank=_value(config, "r", _rank, problems),
        alpha=_value(config, "lora_alpha", _alpha, problems),
        use_rslora=use_rslora is True,
        rank_pattern=_pattern(config, "rank_pattern", _rank, problems),
        alpha_pattern=_pattern(config, "alpha_pattern", _alpha, problems),
        targets=_targets(config, problems, notes),
        notes=notes,
    )


def _off(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _rank(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError("is not an integer of at least 1")
    return value


def _alpha(value: object) -> float:
    if type(value) not in (int, float):
        raise ValueError("is not a number")
    try:
        alpha = float(value)  # type: ignore[arg-type]
    except OverflowError:
        alpha = math.inf
    if not math.isfinite(alpha) or alpha == 0:
        raise ValueError("is not a finite number other than 0")
    return alpha


def _value(
    config: Mapping[str, Any], name: str, parse: Callable[[object], T], problems: Problems
) -> T | None:
    if name not in config:
        problems.add(f"{name} is missing")
        return None
    try:
        return parse(config[name])
    except ValueError as error:
        problems.add(f"{name} is {shown(config[name])}: it {error}")
        return None


def _pattern(
    config: Mapping[str, Any], name: str, parse: Callable[[object], T], problems: Problems
) -> Pattern:
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


def _targets(config: Mapping[str, Any], problems: Problems, notes: list[str]) -> Targets:
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
