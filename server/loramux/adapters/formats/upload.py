"""One upload while it is read: what its tensors are parts of, and what was found so far."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loramux.adapters.base_weights import BaseWeights, Float32
from loramux.adapters.canonical import (
    CanonicalAdapter,
    Dtype,
    LoraPair,
    Matrix,
    ModuleVector,
    TokenModule,
    TokenRows,
    VectorKind,
    widen,
)
from loramux.adapters.formats.fields import MAX_SCALE, Targets, suffixes
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import FileTensor
from loramux.adapters.strict_json import shown
from loramux.wire import MODULES, TABLE_MODULES, BaseDescription, module_path

_NAME = re.compile(
    r"(?P<prefix>(?:base_model\.model\.)?)"
    r"(?P<model>(?:model\.)?)layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    r"(?:self_attn\.(?P<attn>[qkvo]_proj)|mlp\.(?P<mlp>gate_proj|up_proj|down_proj)|"
    r"(?P<norm>input_layernorm|post_attention_layernorm))"
    r"(?:\.|(?=_lora_latent))(?P<part>.+)"
)
_END = re.compile(
    r"(?:base_model\.model\.)?(?:(?:model\.)?(?P<inner>embed_tokens|norm)|(?P<head>lm_head))"
    r"\.(?P<part>.+)"
)
_WHY_NOT = (
    ("lora_magnitude_vector", "the base has no such linear module"),
    ("modules_to_save", "it is not named as PEFT saves it"),
    ("lora_diag", "KaSA is not served"),
    (".bias", "the bias is of no linear module of the base"),
    ("norm", "the base has no such norm, or it is one of heads, whose changes are not served"),
    ("lora_", "the base has no such linear module"),
)
"""Why a tensor that is a part of nothing is refused: the first text that its name contains."""


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

Module = tuple[int, str]
Parts = dict[str, FileTensor]


@dataclass
class Upload:
    """``modules`` and ``rest`` are there after ``match``: the parts of every linear module by
    name, and the tensors that are parts of none. ``placed``: what each tensor taken is, by name:
    (module, part), or None for what modules share."""

    config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]
    base: BaseDescription
    weights: BaseWeights
    problems: Problems
    warnings: list[str] = field(default_factory=list)
    pairs: dict[Module, LoraPair] = field(default_factory=dict)
    vectors: dict[tuple[Module, VectorKind], Float32] = field(default_factory=dict)
    tokens: dict[TokenModule, TokenRows] = field(default_factory=dict)
    modules: dict[Module, Parts] = field(default_factory=dict)
    rest: dict[str, FileTensor] = field(default_factory=dict)
    replaced: set[Module] = field(default_factory=set)
    placed: dict[str, tuple[Module, str] | None] = field(default_factory=dict)
    _model_prefix: str = "model."

    def match(self, parts: Mapping[str, str]) -> None:
        """Sort the tensors into ``modules`` and ``rest``. ``parts``: what a tensor's name may say
        after the module's, and how that part is called here."""
        prefixes: dict[tuple[str, str], str] = {}
        for name, tensor in self.tensors.items():
            match = _NAME.fullmatch(name)
            end = None if match else _END.fullmatch(name)
            found = match or end
            part = found and parts.get(found["part"].replace(".default", "", 1))
            if end and part:
                self._match_end(end["inner"] or end["head"], part, tensor)
                continue
            if not match or part is None:
                self.rest[name] = tensor
                continue
            layer, module = int(match["layer"]), match["attn"] or match["mlp"] or match["norm"]
            if layer >= self.base.num_layers:
                why = f"the base has {self.base.num_layers} layers"
            elif module not in self.base.table_widths:
                why = "the base has no such linear module"
            elif part in self.modules.setdefault((layer, module), {}):
                why = "the same weight is given twice"
            else:
                self.modules[layer, module][part] = tensor
                self.placed[name] = (layer, module), part
                prefixes.setdefault((match["prefix"], match["model"]), name)
                continue
            self.problems.add(f"tensor {shown(name)}: {why}")
        if len(prefixes) > 1:
            names = shown(list(prefixes.values()))
            self.problems.add(f"tensor names begin differently: {names}")
        self._model_prefix = next((model for _, model in prefixes), "model.")

    def _match_end(self, module: str, part: str, tensor: FileTensor) -> None:
        at = (0 if module == "embed_tokens" else self.base.num_layers - 1), module
        if part in self.modules.setdefault(at, {}):
            self.problems.add(f"tensor {shown(tensor.name)}: the same weight is given twice")
        self.modules[at][part] = tensor
        self.placed[tensor.name] = at, part

    def take(self, *names: str) -> FileTensor | None:
        """The first of ``names`` among ``rest``, which it leaves."""
        found = next((name for name in names if name in self.rest), None)
        if found is None:
            return None
        self.placed[found] = None
        return self.rest.pop(found)

    def refuse_rest(self) -> None:
        """Whatever is left in ``rest`` is a problem."""
        for name in self.rest:
            why = next((w for part, w in _WHY_NOT if part in name), "it is no weight of its format")
            self.problems.add(f"tensor {shown(name)}: {why}")

    def name(self, module: Module) -> str:
        """A module as the file calls it, like ``model.layers.0.self_attn.q_proj``."""
        path = module_path(*module)
        return path if module[1] == "lm_head" else f"{self._model_prefix}{path}"

    def ordered(self) -> list[Module]:
        """The keys of ``modules`` by layer, then as MODULES."""
        return sorted(self.modules, key=lambda at: (at[0], TABLE_MODULES.index(at[1])))

    def fits(self, tensor: FileTensor, *shape: int | None) -> bool:
        """Whether the tensor has ``shape`` (None: any length); a problem when not."""
        good = len(tensor.shape) == len(shape) and all(
            want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not good:
            wanted = ", ".join("r" if want is None else str(want) for want in shape)
            self.problems.add(
                f"tensor {shown(tensor.name)} is {list(tensor.shape)}; the base needs [{wanted}]"
            )
        return good

    def scan(self, tensor: FileTensor) -> bool:
        """Whether any value is not zero; values that are not finite or too large are problems."""
        bits = _BITS[tensor.dtype]
        nonzero, largest = False, 0
        for block in tensor.blocks():
            top = int((block.view(bits.unsigned) & bits.magnitude).max())
            nonzero = nonzero or top > 0
            largest = max(largest, top)
        name = shown(tensor.name)
        if largest >= bits.infinity:
            self.problems.add(f"tensor {name} holds NaN or infinity", "non_finite")
        elif largest > bits.limit:
            self.problems.add(f"tensor {name} holds values beyond {MAX_SCALE:g}", "out_of_range")
        return nonzero

    def good_rank(self, module: Module, rank: int, why: str = "") -> bool:
        """Whether this server takes the rank; a problem when not."""
        if rank > self.base.max_rank:
            self.problems.add(
                f"{self.name(module)} has rank {rank}{why}; this server takes up to"
                f" {self.base.max_rank}",
                "rank_too_large",
            )
        return rank <= self.base.max_rank

    def add_pair(
        self, at: Module, scale: float, a: Matrix, b: Matrix, middle: Matrix | None = None
    ) -> None:
        """``y += scale * B (A x)``, or ``scale * B (R (A x))`` with a ``middle``; a scale no
        training gives is a problem."""
        if abs(scale) > MAX_SCALE or np.float32(scale) == 0:
            text = f"{self.name(at)}: its scale would be {scale:g}"
            self.problems.add(text, "out_of_range")
            return
        self.pairs[at] = LoraPair(*at, a.shape[0], float(np.float32(scale)), a, b, middle)

    def add_vector(self, at: Module, kind: VectorKind, values: Float32) -> None:
        """To be added to what the module has of that kind. All zeros change nothing."""
        if not np.isfinite(values).all() or (np.abs(values) > MAX_SCALE).any():
            text = f"{self.name(at)}: the {kind.replace('_', ' ')} it would have is out of range"
            self.problems.add(text, "out_of_range")
        elif values.any():
            before = self.vectors.get((at, kind), np.float32(0))
            self.vectors[at, kind] = np.ascontiguousarray(before + values, np.float32)

    def check_targets(self, targets: Targets) -> None:
        """target_modules and layers_to_transform must name exactly what the file holds."""
        for layer in sorted(targets.layers or ()):
            if not 0 <= layer < self.base.num_layers:
                text = f"layers_to_transform: {layer}; the base has {self.base.num_layers} layers"
                self.problems.add(text)
        if targets.modules is None:
            return
        present = {
            (layer, module): self.name((layer, module))
            for layer in range(self.base.num_layers)
            for module in MODULES
            if module in self.base.widths
        }
        for at in ((0, "embed_tokens"), (self.base.num_layers - 1, "lm_head")):
            present[at] = self.name(at)
        known = {suffix for name in present.values() for suffix in suffixes(name)}
        for entry in sorted(targets.modules - known):
            text = f"target_modules: {shown(entry)} is no linear module of the base's layers"
            self.problems.add(text)
        for (layer, module), name in present.items():
            held = (layer, module) in self.modules
            # To PEFT embeddings and lm_head are in no layer.
            selected = targets.selects(name, layer if module in MODULES else -1)
            if held and not selected:
                self.problems.add(f"{name} has weights, but the config does not target it")
            if selected and not held and targets.exact:
                text = f"{name} is targeted by the config and has no weights in the file"
                self.problems.add(text)

    def warn_of_empty(self, empty: Iterable[Module]) -> None:
        """Say that the pairs of these modules change nothing."""
        if count := len(list(empty)):
            self.warnings.append(
                f"B is all zero in {count} of {len(self.pairs)} modules: these change nothing"
            )

    def canonical(self) -> CanonicalAdapter:
        """What was found, once there are no problems."""
        order = sorted(self.pairs, key=lambda at: (at[0], TABLE_MODULES.index(at[1])))
        pairs = [self.pairs[at] for at in order]
        matrices = (part for pair in pairs for part in (pair.a, pair.b, pair.middle))
        dtypes = {matrix.dtype for matrix in matrices if matrix is not None}
        more = self.vectors or self.tokens
        dtype = dtypes.pop() if len(dtypes) == 1 and not more else "float32"
        vectors = [ModuleVector(*at, kind, values) for (at, kind), values in self.vectors.items()]
        return CanonicalAdapter(
            dtype, tuple(pairs), tuple(vectors), tuple(self.tokens.values()), tuple(self.warnings)
        )


def values_of(matrix: Matrix) -> Float32:
    """A matrix or any other tensor as float32."""
    return widen(matrix.read(), matrix.dtype)
