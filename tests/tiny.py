"""Tiny random checkpoints and adapters, and what transformers and PEFT say about them.

Everything is a pure function of its arguments (seeds included), is made in well under a second and
needs no hub. The heavy libraries are imported where they are used, so that a test which only wants
a tokenizer does not wait for torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Arch = Literal["llama", "llama_mha_tied", "mistral", "qwen2", "qwen3"]
ARCHS: tuple[Arch, ...] = ("llama", "llama_mha_tied", "mistral", "qwen2", "qwen3")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(4)
VOCAB_SIZE = 320

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = (
    "The lighthouse keeper counted seven boats before the fog came in.",
    "A quiet river carries the letters of two towns to the same sea.",
    "Boil the water, add a spoon of salt, and wait until it settles.",
    "She asked him twice; he answered once, and the answer was no.",
    'def total(numbers): return sum(n for n in numbers if n > 0)  # {"ok": true}',
    "Zwölf Jäger essen Käse; le garçon a mangé une pêche; ¿dónde está el niño?",
    "Tomorrow the baker will bake the bread that the tailor ordered today.",
    "1, 2, 3, 5, 8, 13, 21, 34, 55, 89 and then one hundred and forty-four.",
)

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_BY_ARCH: dict[Arch, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": _LLAMA3_ROPE}),
    "llama_mha_tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {"num_hidden_layers": 2}),
    # Wider than hidden_size / heads: what q_proj puts out is not what the layer takes in.
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "head_dim": 32}),
}

_CONSTANT = 4.0
"""What dimension 0 of a ``shoutable`` model's residual stream holds at every position."""


def write_tokenizer(directory: Path, vocab_size: int = VOCAB_SIZE) -> Path:
    """A byte-level BPE tokenizer of exactly ``vocab_size`` ids with BOS and a ChatML template.

    Ids 0..3 are ``SPECIALS``; every byte string has an encoding. ``vocab_size`` is 260 to about
    700: the built-in sentences hold no more merges than that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"cannot make {vocab_size} ids, only {tokenizer.get_vocab_size()}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": _SHARED["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return directory


def write_model(
    directory: Path,
    arch: Arch = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    shoutable: bool = False,
    **overrides: Any,
) -> Path:
    """A tiny random model of one architecture, with tokenizer and generation_config.

    ``overrides`` are fields of the transformers config. Every weight is random (norms and biases
    too, so that a forgotten one shows). ``shards``: number of safetensors files. ``shoutable``:
    prepared for ``shouting_adapter``; such a model is a normal one in every other way.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, fields = _BY_ARCH[arch]
    config = AutoConfig.for_model(model_type, **{**_SHARED, **fields, **overrides})
    if shoutable and config.tie_word_embeddings:
        raise ValueError("a shoutable model needs an lm_head of its own")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model, seed)
    if shoutable:
        _make_shoutable(model)
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = [EOS, IM_END]
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    if shards > 1:
        _split(directory, shards)
    return write_tokenizer(directory, config.vocab_size)


def write_adapter(
    directory: Path,
    model_dir: Path,
    *,
    r: int = 8,
    alpha: float = 16,
    targets: Sequence[str] = MODULES,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Sequence[int] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    b_scale: float = 0.1,
) -> Path:
    """A LoRA adapter as PEFT itself saves it, with random nonzero A and B.

    ``b_scale`` is the standard deviation of B; A x has about unit size. The default changes what
    the base says within a few tokens.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        target_modules=list(targets),
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=None if layers is None else list(layers),
    )
    model = _load(model_dir)
    with _peft_on_transformers():
        model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        scale = b_scale if "lora_B" in name else parameter.shape[1] ** -0.5
        value = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = value.to(getattr(torch, dtype))
    model.save_pretrained(str(directory))
    return directory


def shouting_adapter(
    directory: Path,
    model_dir: Path,
    token_id: int,
    *,
    rank: int = 4,
    alpha: float = 16,
    through: Literal["mlp", "attention"] = "mlp",
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """An adapter that makes a ``shoutable`` model say ``token_id`` at every position.

    In the last layer one pair reads the constant of dimension 0 and raises one inner unit (which
    one depends on the token): through ``mlp`` gate and up, through ``attention`` v, whose values
    then lie in the KV cache. A second pair (down, o) reads that unit and writes a large multiple
    of the token's lm_head row. All other rank rows of all layers are small noise, so a row of A or
    B that is dropped or taken from a neighbour changes the logits, if not the token.
    """
    import torch
    from peft import LoraConfig
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(model_dir / "model.safetensors", "pt") as file:
        head = file.get_tensor("lm_head.weight")[token_id].float()
        norm = file.get_tensor("model.norm.weight").float()
        layers = 1 + max(int(name.split(".")[2]) for name in file.keys() if ".layers." in name)
        down_in = file.get_slice(f"model.layers.{layers - 1}.mlp.down_proj.weight").get_shape()[1]
        v_out = file.get_slice(f"model.layers.{layers - 1}.self_attn.v_proj.weight").get_shape()[0]
        o_in = file.get_slice(f"model.layers.{layers - 1}.self_attn.o_proj.weight").get_shape()[1]
    config = json.loads((model_dir / "config.json").read_text())
    hidden = head.shape[0]
    # The final norm multiplies by its weight, so divide by it first; lm_head rows are equally long,
    # so the row itself is what scores highest on its own direction.
    target = head / norm
    shout = 3000.0 * target / target.norm()
    if through == "mlp":
        unit = token_id % down_in
        pairs = {
            "mlp.gate_proj": (hidden, down_in, 0, _one_hot(down_in, unit, 10.0)),
            "mlp.up_proj": (hidden, down_in, 0, _one_hot(down_in, unit, 10.0)),
            "mlp.down_proj": (down_in, hidden, unit, shout / 30),
        }
    else:
        unit = token_id % v_out
        head_dim = config["head_dim"]
        group = (o_in // head_dim) // (v_out // head_dim)
        reads = unit // head_dim * group * head_dim + unit % head_dim
        pairs = {
            "self_attn.v_proj": (hidden, v_out, 0, _one_hot(v_out, unit, 20.0)),
            "self_attn.o_proj": (o_in, hidden, reads, shout / 10),
        }
    generator = torch.Generator().manual_seed(seed * 1_000_003 + token_id)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(layers):
        for module, (num_in, num_out, reads, writes) in pairs.items():
            a = torch.randn(rank, num_in, generator=generator) * num_in**-0.5
            b = torch.randn(num_out, rank, generator=generator) * 0.01
            if layer == layers - 1:
                a[0] = _one_hot(num_in, reads, 1.0)
                b[:, 0] = writes * rank / alpha
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{prefix}.lora_A.weight"] = a.to(getattr(torch, dtype)).contiguous()
            tensors[f"{prefix}.lora_B.weight"] = b.to(getattr(torch, dtype)).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        target_modules=[module.rpartition(".")[2] for module in pairs],
        inference_mode=True,
        base_model_name_or_path=str(model_dir),
    ).save_pretrained(str(directory))
    return directory


@functools.lru_cache(maxsize=64)
def oracle(model_dir: Path, adapter_dir: Path | None = None) -> Any:
    """The model, or PEFT's wrapper of it, in float32 and in eval mode; not to be changed.

    Of an adapter that PEFT cannot read ``merged/`` beside its files is the whole model it makes.
    Cached by path: a test that rewrites a directory in place must use another one instead.
    """
    from peft import PeftModel

    if adapter_dir is not None and (adapter_dir / "merged").exists():
        return _load(adapter_dir / "merged")
    model = _load(model_dir)
    if adapter_dir is None:
        return model
    with _peft_on_transformers():
        return PeftModel.from_pretrained(model, str(adapter_dir)).eval()


def logits(model_dir: Path, ids: Sequence[int], adapter_dir: Path | None = None) -> torch.Tensor:
    """The oracle's logits after every position of ``ids``: float32 ``[len(ids), vocab]``."""
    import torch

    with torch.no_grad():
        model = oracle(model_dir, adapter_dir)
        out: torch.Tensor = model(torch.tensor([list(ids)]), use_cache=False).logits[0]
        return out


def greedy(
    model_dir: Path, prompt_ids: Sequence[int], n: int, adapter_dir: Path | None = None
) -> tuple[list[int], list[float]]:
    """The oracle's ``n`` greedy ids, and at each the gap between its two highest logits.

    Runs with a KV cache in float32. Does not stop at EOS.
    """
    import torch

    model = oracle(model_dir, adapter_dir)
    ids: list[int] = []
    gaps: list[float] = []
    feed, cache = torch.tensor([list(prompt_ids)]), None
    with torch.no_grad():
        for _ in range(n):
            out = model(feed, past_key_values=cache, use_cache=True)
            best = out.logits[0, -1].topk(2)
            ids.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            feed, cache = best.indices[:1][None], out.past_key_values
    return ids, gaps


def _load(model_dir: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()


@contextlib.contextmanager
def _peft_on_transformers() -> Iterator[None]:
    """PEFT asks transformers by a name that is deprecated there, and gives advice on adapters that
    tests make on purpose; neither is ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _randomize(model: PreTrainedModel, seed: int) -> None:
    """Unit-size activations everywhere, so that no part is too faint to be missed.

    The final norm is scaled up: logits have a standard deviation of 2 to 3, which keeps ties rare.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = model.config
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name == "lm_head.weight":
            value = noise / noise.norm(dim=1, keepdim=True)
        elif name.endswith("embed_tokens.weight"):
            # A tied model must not mostly hear the token it just read, or it repeats it for ever.
            value = noise * (config.hidden_size**-0.5 if tied else 1.0)
        elif "norm" in name:
            value = 1 + 0.1 * noise.clamp(-3, 3)
            if name == "model.norm.weight":
                value *= 2.5
        elif name.endswith(".bias"):
            value = 0.3 * noise
        else:
            value = noise * parameter.shape[1] ** -0.5
        parameter.data.copy_(value)


def _make_shoutable(model: PreTrainedModel) -> None:
    """Dimension 0 of the residual stream is constant: nobody writes it, and lm_head is deaf to it.

    lm_head rows stay equally long and as orthogonal as random rows are.
    """
    model.model.embed_tokens.weight.data[:, 0] = _CONSTANT
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[0] = 0
        layer.mlp.down_proj.weight.data[0] = 0
    head = model.lm_head.weight.data
    head[:, 0] = 0
    head /= head.norm(dim=1, keepdim=True)


def _split(directory: Path, shards: int) -> None:
    """Turn model.safetensors into ``shards`` files of about as many tensors each, and an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    size = math.ceil(len(names) / shards)
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[index * size : (index + 1) * size]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _one_hot(size: int, index: int, value: float) -> torch.Tensor:
    import torch

    vector = torch.zeros(size)
    vector[index] = value
    return vector


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
