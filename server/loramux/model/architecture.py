"""What a checkpoint of the Llama lineage computes, read from its config.json; no torch.

Import is strict: every field of the file is used, known not to touch the maths, or empty (null,
false, "", [], {}). Anything else is refused by name: a field that is ignored is a model that runs
and is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loramux.errors import ConfigError
from loramux.model.fields import Fields
from loramux.model.scaling import Rope, read_rope
from loramux.wire import MODULES

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_COMMON_FIELDS = frozenset(
    "model_type architectures hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps hidden_act "
    "tie_word_embeddings rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "dtype torch_dtype eos_token_id".split()
)
_WINDOW_FIELDS = frozenset(
    {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
)
_FAMILY_FIELDS: dict[str, frozenset[str]] = {
    "llama": frozenset({"attention_bias", "mlp_bias"}),
    "mistral": frozenset({"sliding_window"}),
    "qwen2": _WINDOW_FIELDS,
    "qwen3": _WINDOW_FIELDS | {"attention_bias"},
}

_NEUTRAL_FIELDS = frozenset(
    # training and bookkeeping
    "_name_or_path name_or_path _commit_hash transformers_version initializer_range "
    "attention_dropout use_cache bos_token_id pad_token_id unk_token_id sep_token_id "
    "unsloth_version unsloth_fixed transformers.js_config is_llama_config "
    # pretraining_tp splits the same matrix product; chunking splits the same rows
    "pretraining_tp chunk_size_feed_forward "
    # what transformers returns and which of its kernels it uses
    "return_dict output_attentions output_hidden_states torchscript tie_last_hidden_states "
    "_attn_implementation attn_implementation _attn_implementation_autoset "
    # heads for other tasks
    "id2label label2id num_labels problem_type task_specific_params "
    # sampling defaults that old releases kept in config.json; a request brings its own
    "do_sample temperature top_k top_p typical_p repetition_penalty length_penalty max_length "
    "min_length num_beams num_beam_groups num_return_sequences diversity_penalty early_stopping "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size".split()
)
"""Fields that may hold anything: none of them reaches the logits."""


@dataclass(frozen=True)
class Architecture:
    """The maths of one decoder-only model.

    ``windows[layer]`` is the sliding window in tokens, 0 for full attention: a query sees the keys
    with ``position > own - window``. ``eos_token_ids`` joins those of config.json and of
    generation_config.json. ``checkpoint_dtype`` is a torch dtype's name.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    rope: Rope
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """``(in_features, out_features)`` of every linear module of a layer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        pairs = (
            (hidden, q),
            (hidden, kv),
            (hidden, kv),
            (q, hidden),
            (hidden, inner),
            (hidden, inner),
            (inner, hidden),
        )
        return dict(zip(MODULES, pairs, strict=True))

    @property
    def matrix_elements(self) -> int:
        """Values in all matrices that a step multiplies by."""
        layer = sum(fan_in * fan_out for fan_in, fan_out in self.widths.values())
        return self.num_layers * layer + self.hidden_size * self.vocab_size

    @property
    def context_length(self) -> int:
        """Longest sequence the positions are made for.

        YaRN is configured by adding its factor to an unchanged ``max_position_embeddings``, so
        there the stretched original length counts.
        """
        if self.rope.kind != "yarn":
            return self.max_position_embeddings
        stretched = int(self.rope.factor * self.rope.original_max_positions)
        return max(self.max_position_embeddings, stretched)


def read_architecture(directory: Path) -> Architecture:
    """The architecture of a Hugging Face-format model directory.

    Raises ``ConfigError`` naming the file when it is missing or malformed, and naming *every*
    field that is wrong, missing or not implemented.
    """
    config = _read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return parse_architecture(config, generation, source=str(directory / "config.json"))


def parse_architecture(
    config: Mapping[str, Any], generation: Mapping[str, Any], *, source: str = "config.json"
) -> Architecture:
    """``read_architecture`` on parsed JSON; ``source`` names the file in errors."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{source}: model_type {family!r} is not supported ({', '.join(FAMILIES)} are)",
            param="model",
        )
    fields = Fields(config)
    _refuse_unknown(fields, family)
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    # Llama 1 and 2 leave the field out for plain multi-head attention; the others never do.
    kv_heads = fields.integer("num_key_value_heads", heads if family == "llama" else None)
    layers = fields.integer("num_hidden_layers")
    max_positions = fields.integer("max_position_embeddings")
    attention_bias = fields.flag("attention_bias") if family in ("llama", "qwen3") else False
    architecture = Architecture(
        model_type=family,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(fields, family, hidden, heads),
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_eps=fields.number("rms_norm_eps"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias") if family == "llama" else False,
        qk_norm=family == "qwen3",
        windows=_windows(fields, family, layers),
        rope=read_rope(fields, max_positions),
        max_position_embeddings=max_positions,
        eos_token_ids=_eos_token_ids(fields, generation),
        checkpoint_dtype=_dtype(fields),
    )
    if heads % kv_heads:
        fields.refuse(
            "num_key_value_heads", f"{kv_heads} does not divide num_attention_heads {heads}"
        )
    if fields.problems:
        listing = "".join(f"\n  {problem}" for problem in fields.problems)
        raise ConfigError(f"{source} cannot be served exactly:{listing}", param="model")
    return architecture


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", param="model") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", param="model") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object", param="model")
    return value


def _refuse_unknown(fields: Fields, family: str) -> None:
    known = _COMMON_FIELDS | _NEUTRAL_FIELDS | _FAMILY_FIELDS[family]
    for name, value in fields.values.items():
        if name in known or value is None or value is False or value in ("", [], {}):
            continue
        fields.refuse(name, f"is not implemented for {family} (value {_brief(value)})")
    names = fields.values.get("architectures")
    if names and names != [FAMILIES[family]]:
        fields.refuse("architectures", f"must be [{FAMILIES[family]!r}], is {_brief(names)}")
    if (act := fields.values.get("hidden_act", "silu")) not in ("silu", "swish"):
        fields.refuse("hidden_act", f"{act!r} is not implemented (silu is)")


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _head_dim(fields: Fields, family: str, hidden: int, heads: int) -> int:
    # Qwen3's heads are not hidden / heads wide by default, so a missing field would be a guess.
    if fields.values.get("head_dim") is not None or family == "qwen3":
        head_dim = fields.integer("head_dim")
    elif hidden % heads:
        fields.refuse("hidden_size", f"{hidden} is not a multiple of {heads} attention heads")
        return 2
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        fields.refuse("head_dim", f"must be even for rotary positions, is {head_dim}")
    return head_dim


def _windows(fields: Fields, family: str, layers: int) -> tuple[int, ...]:
    if family == "llama":
        return (0,) * layers
    if family == "mistral":
        if "sliding_window" not in fields.values:
            # transformers takes 4096 here, users of Mistral 0.2 and later mean none
            fields.refuse("sliding_window", "is missing (null means full attention)")
        return (_window(fields),) * layers
    window = _window(fields) if fields.flag("use_sliding_window") else 0
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers") if window else layers
        return tuple(window if layer >= first else 0 for layer in range(layers))
    meaning = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= set(meaning):
        fields.refuse("layer_types", f"must name {' or '.join(meaning)} for each of the layers")
        return (0,) * layers
    if "sliding_attention" in kinds and not window:
        fields.refuse("layer_types", "names sliding_attention, but no sliding window is in use")
    return tuple(meaning[kind] for kind in kinds)


def _window(fields: Fields) -> int:
    return 0 if fields.values.get("sliding_window") is None else fields.integer("sliding_window")


def _eos_token_ids(fields: Fields, generation: Mapping[str, Any]) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for source, name in (
        (fields.values, "eos_token_id"),
        (generation, "generation_config.json eos_token_id"),
    ):
        value = source.get("eos_token_id")
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if type(item) is int and item >= 0:
                ids[item] = None
            else:
                fields.refuse(name, f"must be a token id or a list of them, is {value!r}")
    return tuple(ids)


def _dtype(fields: Fields) -> str:
    name = fields.values.get("dtype") or fields.values.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        fields.refuse("dtype", f"{name!r} is not supported (float32, bfloat16, float16 are)")
    return str(name)
