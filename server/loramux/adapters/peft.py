"""Strict import of LoRA adapters as PEFT saves them.

Every tensor of the file must be the A or the B of a linear module of the base, every field of the
config must be one whose meaning we implement or know to be neutral, and the two must agree.
Whatever does not is listed, all of it, and nothing is imported: an adapter that runs with half of
its weights looks like a bad adapter, not like an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loramux.adapters.canonical import CanonicalAdapter, Dtype, LoraPair
from loramux.adapters.lora_config import MAX_SCALE, LoraConfig, read_config, suffixes
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import FileTensor
from loramux.adapters.strict_json import NotStrictJson, parse_object, shown
from loramux.errors import AdapterInvalid
from loramux.wire import MODULES, BaseDescription

MAX_CONFIG_BYTES = 1 << 20

_NAME = re.compile(
    r"(?P<prefix>(?:base_model\.model\.)?)"
    r"(?P<module>(?P<model>(?:model\.)?)layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    r"(?:self_attn\.(?P<attn>[qkvo]_proj)|mlp\.(?P<mlp>gate_proj|up_proj|down_proj)))"
    r"\.lora_(?P<side>[AB])(?:\.default)?\.weight"
)
_BLOCK = {m: "self_attn" if m in MODULES[:4] else "mlp" for m in MODULES}

_WHY_NOT = (
    ("lora_magnitude_vector", "DoRA is not served"),
    ("lora_embedding", "LoRA on embeddings is not served"),
    ("lm_head", "changes of lm_head are not served"),
    ("embed_tokens", "changes of the embeddings are not served"),
    ("modules_to_save", "fully trained modules are not served"),
    ("lora_diag", "KaSA is not served"),
    (".bias", "biases are not served"),
    ("norm", "changes of norms are not served"),
    ("lora_A", "the base has no such linear module"),
    ("lora_B", "the base has no such linear module"),
)
"""Why a tensor that is not a LoRA half is refused, by what its name contains; the first counts."""


@dataclass(frozen=True, slots=True)
class _Bits:
    """A floating-point format as integers: without the sign bit they sort like the values."""

    unsigned: str
    magnitude: int
    infinity: int
    limit: int  # MAX_SCALE, or the next value below


_BITS: dict[Dtype, _Bits] = {
    "float32": _Bits("<u4", 0x7FFFFFFF, 0x7F800000, 0x477FE000),
    "float16": _Bits("<u2", 0x7FFF, 0x7C00, 0x7BFF),
    "bfloat16": _Bits("<u2", 0x7FFF, 0x7F80, 0x477F),
}

_Halves = dict[tuple[int, str], dict[str, FileTensor]]


def parse_config(data: bytes) -> dict[str, Any]:
    """The object in an adapter_config.json; AdapterInvalid when it is not plain JSON."""
    if len(data) > MAX_CONFIG_BYTES:
        text = f"the config is larger than {MAX_CONFIG_BYTES} bytes"
        raise AdapterInvalid(text, problems=[text])
    try:
        return parse_object(data)
    except NotStrictJson as error:
        text = f"the config is not valid: {error}"
        raise AdapterInvalid(text, problems=[text]) from None


def import_lora(
    config: Mapping[str, Any], tensors: Mapping[str, FileTensor], base: BaseDescription
) -> CanonicalAdapter:
    """The adapter that ``config`` and ``tensors`` describe, checked against ``base``.

    Every value is read once, in blocks. Raises AdapterInvalid with every problem (codes
    rank_mismatch, rank_too_large, non_finite, out_of_range, adapter_invalid).
    """
    problems = Problems()
    lora = read_config(config, problems)
    warnings = list(lora.notes)
    model_prefix, halves = _match_names(tensors, base, problems)
    pairs = []
    empty = 0
    for (layer, module), sides in sorted(
        halves.items(), key=lambda item: (item[0][0], MODULES.index(item[0][1]))
    ):
        name = _module_name(model_prefix, layer, module)
        pair = _pair(lora, layer, module, name, sides, base, problems)
        # Also when something else is wrong: the uploader learns all of it at once.
        nonzero = {side: _scan(tensor, problems) for side, tensor in sides.items()}
        empty += not nonzero.get("B", True)
        if pair is not None:
            pairs.append(pair)
    _check_targets(lora, model_prefix, halves, base, problems)
    problems.raise_any()
    if empty:
        warnings.append(f"B is all zero in {empty} of {len(pairs)} modules: these change nothing")
    for field, pattern in (
        ("rank_pattern", lora.rank_pattern),
        ("alpha_pattern", lora.alpha_pattern),
    ):
        warnings += [f"{field} {shown(key)} decides no module" for key in pattern.unused()]
    dtypes = {half.dtype for pair in pairs for half in (pair.a, pair.b)}
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return CanonicalAdapter(dtype, tuple(pairs), tuple(warnings))


def _match_names(
    tensors: Mapping[str, FileTensor], base: BaseDescription, problems: Problems
) -> tuple[str, _Halves]:
    """Tensors by (layer, module) and side, and what stands before ``layers`` in module names."""
    halves: _Halves = {}
    prefixes: dict[tuple[str, str], str] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            why = next((w for part, w in _WHY_NOT if part in name), "it is no LoRA weight")
            problems.add(f"tensor {shown(name)}: {why}")
            continue
        layer, module = int(match["layer"]), match["attn"] or match["mlp"]
        if layer >= base.num_layers:
            problems.add(f"tensor {shown(name)}: the base has {base.num_layers} layers")
        elif module not in base.widths:
            problems.add(f"tensor {shown(name)}: the base has no such linear module")
        elif match["side"] in halves.setdefault((layer, module), {}):
            problems.add(f"tensor {shown(name)}: the same weight is given twice")
        else:
            halves[layer, module][match["side"]] = tensor
            prefixes.setdefault((match["prefix"], match["model"]), name)
    if len(prefixes) > 1:
        problems.add(f"tensor names begin differently: {shown(list(prefixes.values()))}")
    return next((model for _, model in prefixes), "model."), halves


def _module_name(model_prefix: str, layer: int, module: str) -> str:
    return f"{model_prefix}layers.{layer}.{_BLOCK[module]}.{module}"


def _pair(
    lora: LoraConfig,
    layer: int,
    module: str,
    name: str,
    sides: dict[str, FileTensor],
    base: BaseDescription,
    problems: Problems,
) -> LoraPair | None:
    """The pair of one module, or None with what is wrong added to ``problems``."""
    if len(sides) < 2:
        (side,) = sides
        problems.add(f"{name} has lora_{side} without lora_{'B' if side == 'A' else 'A'}")
        return None
    a, b = sides["A"], sides["B"]
    width_in, width_out = base.widths[module]
    fits = True
    if len(a.shape) != 2 or a.shape[1] != width_in:
        problems.add(f"tensor {shown(a.name)} is {list(a.shape)}; the base needs [r, {width_in}]")
        fits = False
    if len(b.shape) != 2 or b.shape[0] != width_out:
        problems.add(f"tensor {shown(b.name)} is {list(b.shape)}; the base needs [{width_out}, r]")
        fits = False
    if not fits:
        return None
    rank, configured = a.shape[0], lora.rank_of(name)
    if b.shape[1] != rank:
        problems.add(f"{name}: A has rank {rank} and B has rank {b.shape[1]}", "rank_mismatch")
        return None
    if configured is not None and configured != rank:
        problems.add(
            f"{name} has rank {rank} in the file and {configured} in the config", "rank_mismatch"
        )
        return None
    if rank > base.max_rank:
        problems.add(
            f"{name} has rank {rank}; this server takes up to {base.max_rank}", "rank_too_large"
        )
        return None
    scale = lora.scale_of(name, rank)
    if scale is None:
        return None
    if abs(scale) > MAX_SCALE or np.float32(scale) == 0:
        problems.add(f"{name}: its scale would be {scale:g}", "out_of_range")
        return None
    return LoraPair(layer, module, rank, float(np.float32(scale)), a, b)


def _scan(tensor: FileTensor, problems: Problems) -> bool:
    """Whether any value is not zero; values that are not finite or too large are problems."""
    bits = _BITS[tensor.dtype]
    nonzero, largest = False, 0
    for block in tensor.blocks():
        top = int((block.view(bits.unsigned) & bits.magnitude).max())
        nonzero = nonzero or top > 0
        largest = max(largest, top)
    if largest >= bits.infinity:
        problems.add(f"tensor {shown(tensor.name)} holds NaN or infinity", "non_finite")
    elif largest > bits.limit:
        problems.add(
            f"tensor {shown(tensor.name)} holds values beyond {MAX_SCALE:g}", "out_of_range"
        )
    return nonzero


def _check_targets(
    lora: LoraConfig,
    model_prefix: str,
    halves: _Halves,
    base: BaseDescription,
    problems: Problems,
) -> None:
    """target_modules and layers_to_transform must name exactly what the file holds."""
    targets = lora.targets
    for layer in sorted(targets.layers or ()):
        if not 0 <= layer < base.num_layers:
            problems.add(f"layers_to_transform: {layer}; the base has {base.num_layers} layers")
    if targets.modules is None:
        return
    present = {
        (layer, module): _module_name(model_prefix, layer, module)
        for layer in range(base.num_layers)
        for module in MODULES
        if module in base.widths
    }
    known = {suffix for name in present.values() for suffix in suffixes(name)}
    for entry in sorted(targets.modules - known):
        problems.add(f"target_modules: {shown(entry)} is no linear module of the base's layers")
    for (layer, module), name in present.items():
        held, selected = (layer, module) in halves, targets.selects(name, layer)
        if held and not selected:
            problems.add(f"{name} has weights, but the config does not target it")
        if selected and not held and targets.exact:
            problems.add(f"{name} is targeted by the config and has no weights in the file")
