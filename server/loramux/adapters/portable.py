"""Low-rank pairs as the files PEFT would write for them: any tool that reads PEFT's reads these.

Float32, scale 1 in every module, the same bytes for the same values.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

from loramux.wire import BaseDescription, module_path

Module = tuple[int, str]


def config_bytes(ranks: Mapping[Module, int], base: BaseDescription) -> bytes:
    """The adapter_config.json of pairs of these ranks."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = _patterns({at: rank for at, rank in ranks.items() if rank != common}, ranks)
    config = {
        "alpha_pattern": others,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": common,
        "rank_pattern": others,
        "target_modules": _targets(ranks, base.num_layers),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(config, separators=(",", ":")).encode()


def _path(at: Module) -> str:
    return module_path(*at) if at[1] == "lm_head" else f"model.{module_path(*at)}"


def _targets(ranks: Mapping[Module, int], num_layers: int) -> list[str]:
    """A module's own name where every layer has it, else full names."""
    layers = Counter(module for _, module in ranks)
    full = {m for m, n in layers.items() if n == num_layers or m in ("embed_tokens", "lm_head")}
    return sorted({at[1] if at[1] in full else _path(at) for at in ranks})


def _patterns(others: Mapping[Module, int], ranks: Mapping[Module, int]) -> dict[str, int]:
    """A module's own name where all its layers have one rank, else full names."""
    of_module: dict[str, set[int]] = {}
    for at, rank in ranks.items():
        of_module.setdefault(at[1], set()).add(rank)
    return {at[1] if len(of_module[at[1]]) == 1 else _path(at): rank for at, rank in others.items()}


def weights_header(ranks: Mapping[Module, int], base: BaseDescription) -> bytes:
    """The beginning of the adapter_model.safetensors. A [rank, in] and then B [out, rank] of each
    module follow, in the order of ``ranks``: float32, little-endian."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for at, rank in ranks.items():
        width_in, width_out = base.table_widths[at[1]]
        part = "lora_embedding_{}" if at[1] == "embed_tokens" else "lora_{}.weight"
        for side, shape in (("A", [rank, width_in]), ("B", [width_out, rank])):
            start, end = end, end + 4 * shape[0] * shape[1]
            name = f"base_model.model.{_path(at)}.{part.format(side)}"
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned, as the format asks of writers
    return len(text).to_bytes(8, "little") + text
