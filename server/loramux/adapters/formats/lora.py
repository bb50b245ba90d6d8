"""LoRA as PEFT saves it (arXiv 2106.09685), with rsLoRA, patterns, DoRA and trained biases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from loramux.adapters.base_weights import Float32
from loramux.adapters.canonical import Computed, Matrix
from loramux.adapters.formats import lora_xs, residual
from loramux.adapters.formats.biases import PARTS as BIASES
from loramux.adapters.formats.biases import read_biases
from loramux.adapters.formats.fields import (
    Pattern,
    Rules,
    as_alpha,
    as_rank,
    check_init,
    flag,
    pattern_of,
    targets_of,
    value_of,
)
from loramux.adapters.formats.upload import Module, Upload, values_of
from loramux.adapters.formats.whole import PARTS as WHOLE
from loramux.adapters.formats.whole import read_whole
from loramux.adapters.problems import Problems
from loramux.adapters.safetensors_file import FileTensor
from loramux.adapters.strict_json import shown

RULES = Rules(
    implemented=frozenset(
        "r lora_alpha use_rslora rank_pattern alpha_pattern init_lora_weights use_dora lora_bias"
        " bias modules_to_save trainable_token_indices".split()
    ),
    neutral={
        "lora_dropout": "training only",
        "velora_config": "compresses activations for the backward pass",
        "eva_config": "initialisation only",
        "corda_config": "read by an initialisation that is refused",
        "loftq_config": "read by an initialisation that is refused",
        "lora_ga_config": "read by an initialisation that is refused",
        "megatron_core": "read only with megatron_config, which is refused",
        "qalora_group_size": "read only with use_qalora, which is refused",
    },
    refused={
        "layer_replication": "replicated layers are not served",
        "alora_invocation_tokens": "activated LoRA is not served",
        "use_qalora": "QALoRA is not served",
        "use_bdlora": "block-diagonal LoRA is not served",
        "kasa_config": "KaSA changes the base weights",
        "monteclora_config": "Monte Carlo LoRA is not served",
        "arrow_config": "Arrow routing is not served",
        "megatron_config": "Megatron layers are not served",
    },
)

PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_B.bias": "B bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_embedding_A": "A",
    "lora_embedding_B": "B",
    **BIASES,
    **WHOLE,
    **lora_xs.PARTS,
}


class LoraConfig:
    """The implemented fields. ``rank`` and ``alpha`` are None when they were refused."""

    def __init__(self, config: Mapping[str, Any], problems: Problems, notes: list[str]) -> None:
        RULES.check(config, problems)
        self.residual = residual.init_of(config.get("init_lora_weights"))
        if self.residual is None:
            check_init(config.get("init_lora_weights"), problems)
        self.rank = value_of(config, "r", as_rank, problems)
        self.alpha = value_of(config, "lora_alpha", as_alpha, problems)
        self.use_rslora = flag(config, "use_rslora", problems)
        self.use_dora = flag(config, "use_dora", problems)
        self.lora_bias = flag(config, "lora_bias", problems)
        self.rank_pattern = pattern_of(config, "rank_pattern", as_rank, problems)
        self.alpha_pattern = pattern_of(config, "alpha_pattern", as_alpha, problems)
        self.targets = targets_of(config, problems, notes)

    def rank_of(self, module_name: str) -> int | None:
        """The rank the config gives a module."""
        return None if self.rank is None else self.rank_pattern.lookup(module_name, self.rank)

    def scale_of(self, module_name: str, rank: int) -> float | None:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732), in double precision."""
        if self.alpha is None:
            return None
        alpha = self.alpha_pattern.lookup(module_name, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def takes_out(self, at: Module) -> str | None:
        """How the module's pair was first taken out of the base's weight, if it was: "pissa" or
        "olora". To PEFT these words mean nothing for embeddings."""
        return self.residual if at[1] != "embed_tokens" else None

    def unused_patterns(self) -> list[str]:
        """What to tell the uploader of pattern keys that no module was looked up with."""
        patterns: dict[str, Pattern] = {
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        return [
            f"{field} {shown(key)} decides no module"
            for field, pattern in patterns.items()
            for key in pattern.unused()
        ]


def read(upload: Upload) -> None:
    """See ``formats.FORMATS``."""
    config = LoraConfig(upload.config, upload.problems, upload.warnings)
    upload.match(PARTS)
    upload.refuse_rest()
    read_whole(upload)
    read_biases(upload, "lora_only")
    lora_xs.check(upload, plain=not (config.use_dora or config.lora_bias or config.residual))
    if config.residual and not residual.check(upload, config.residual):
        config.residual = None
    empty = []
    for at in upload.ordered():
        parts = upload.modules[at]
        # Also when something else is wrong: the uploader learns all of it at once.
        nonzero = {part: upload.scan(tensor) for part, tensor in parts.items()}
        if not (config.residual or all(nonzero.get(part, True) for part in "BR")):
            empty.append(at)
        scale = _scale(upload, config, at, parts)
        _check_parts(upload, config, at, parts)
        if scale is not None:
            _add(upload, config, at, parts, scale)
    upload.check_targets(config.targets)
    upload.warn_of_empty(empty)
    upload.warnings += config.unused_patterns()


def _scale(
    upload: Upload, config: LoraConfig, at: Module, parts: dict[str, FileTensor]
) -> float | None:
    """The scale of one module, or None with what is wrong added to the problems."""
    name, problems = upload.name(at), upload.problems
    halves = [side for side in "AB" if side in parts]
    if len(halves) < 2:
        if "R" in parts:
            problems.add(f"tensor {shown(parts['R'].name)} {lora_xs.MISSING}")
            return None
        missing = "B" if halves == ["A"] else "A"
        has = f"lora_{halves[0]}" if halves else shown(next(iter(parts.values())).name)
        problems.add(f"{name} has {has} without lora_{missing}")
        return None
    a, b = parts["A"], parts["B"]
    width_in, width_out = upload.base.table_widths[at[1]]
    fits = [upload.fits(a, None, width_in), upload.fits(b, width_out, None)]
    if not all(fits):
        return None
    rank, configured = a.shape[0], config.rank_of(name)
    if b.shape[1] != rank:
        problems.add(f"{name}: A has rank {rank} and B has rank {b.shape[1]}", "rank_mismatch")
        return None
    if configured is not None and configured != rank:
        text = f"{name} has rank {rank} in the file and {configured} in the config"
        problems.add(text, "rank_mismatch")
        return None
    if "R" in parts and not upload.fits(parts["R"], rank, rank):
        return None
    doubled = config.takes_out(at)
    why = f" ({rank}, twice for init_lora_weights: '{config.residual}')" if doubled else ""
    good = upload.good_rank(at, 2 * rank if doubled else rank, why)
    return config.scale_of(name, rank) if good else None


def _check_parts(
    upload: Upload, config: LoraConfig, at: Module, parts: dict[str, FileTensor]
) -> None:
    """What the config switches on has its tensors, and what it does not has none."""
    for part, field, used in (
        ("magnitude", "use_dora", config.use_dora),
        ("B bias", "lora_bias", config.lora_bias),
    ):
        if used and part not in parts:
            upload.problems.add(f"{upload.name(at)} has no {part}, and the config says {field}")
        if part in parts:
            if not used:
                name = shown(parts[part].name)
                upload.problems.add(f"tensor {name}: the config does not say {field}")
            upload.fits(parts[part], upload.base.table_widths[at[1]][1])
    if config.use_dora and config.lora_bias:
        upload.problems.add("use_dora and lora_bias together are not defined")


def _add(
    upload: Upload, config: LoraConfig, at: Module, parts: dict[str, FileTensor], scale: float
) -> None:
    halves = _halves(upload, config, at, parts, scale)
    if halves is None:
        return
    a, b = halves
    width_out = upload.base.table_widths[at[1]][1]
    given = {part: values_of(t) for part, t in parts.items() if t.shape == (width_out,)}
    if "B bias" in given:
        upload.add_vector(at, "shift", np.float32(scale) * given["B bias"])
    if not (config.use_dora and "magnitude" in given):
        upload.add_pair(at, scale, a, b, parts.get("R"))
        return
    if at[1] == "embed_tokens":
        upload.problems.add(f"{upload.name(at)}: DoRA on embeddings is not served")
        return
    if upload.base.quantized:
        upload.problems.add(
            f"{upload.name(at)}: DoRA's magnitudes are of the original weights, and this server's "
            "base is quantized"
        )
        return
    g = dora_gain(upload, at, given["magnitude"], scale, values_of(a), values_of(b))
    upload.add_vector(at, "gain", g - np.float32(1))
    upload.add_pair(at, scale, a, Computed(b.shape, lambda: g[:, None] * values_of(b)))


def _halves(
    upload: Upload, config: LoraConfig, at: Module, parts: dict[str, FileTensor], scale: float
) -> tuple[Matrix, Matrix] | None:
    """A and B as they act on the base's weight."""
    a, b = parts["A"], parts["B"]
    if (init := config.takes_out(at)) is not None:
        return residual.factors(upload, at, init, scale, a, b)
    return a, b


def dora_gain(
    upload: Upload, at: Module, magnitude: Float32, scale: float, a: Float32, b: Float32
) -> Float32:
    """DoRA's ``m / |W + s B A|``, row by row [out] (arXiv 2402.09353)."""
    norms, row = np.empty(len(b)), 0
    for block in upload.weights.blocks(*at):
        rows = slice(row, row + len(block))
        whole = block + np.float32(scale) * (b[rows] @ a)
        norms[rows] = np.sqrt(np.einsum("ij,ij->i", whole, whole, dtype=np.float64))
        row = rows.stop
    with np.errstate(divide="ignore", invalid="ignore"):
        return (magnitude / norms).astype(np.float32)
