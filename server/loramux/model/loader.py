"""Checkpoint files to weights in place: one destination, allocated once, read into directly.

The peak is one copy of the weights plus one block: rows go from the file through a block of a few
MiB into the fused matrices. A CPU that computes in float32 keeps matrices in the dtype of their
file, since half-precision weights are widened exactly in registers and half the bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from loramux.errors import ConfigError
from loramux.model.architecture import Architecture
from loramux.model.checkpoint import TensorBytes, read_checkpoint
from loramux_kernels.linear import Matrix

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""

Place = tuple[Matrix | torch.Tensor, int]
"""Where a tensor of a file goes: a matrix or a vector, and its first row there."""

_BLOCK_BYTES = 8 << 20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer; a bias the layer lacks is None.

    ``qkv``: rows of q, k, v in that order, ``[(H + 2 KH) * D, hidden]``; ``gate_up``: gate, then
    up, ``[2 I, hidden]``. Their biases are fused alike.
    """

    input_norm: torch.Tensor
    qkv: Matrix
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Matrix
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Matrix
    gate_up_bias: torch.Tensor | None
    down: Matrix
    down_bias: torch.Tensor | None


@dataclass(frozen=True)
class Weights:
    """All of a model. ``lm_head`` is ``embedding`` itself when they are tied."""

    embedding: Matrix
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: Matrix

    @property
    def num_bytes(self) -> int:
        """Bytes held, tied tensors counted once."""
        return sum(t.nbytes for t in {id(t): t for t in self._tensors()}.values())

    def _tensors(self) -> Iterator[Matrix | torch.Tensor]:
        yield from (self.embedding, self.norm, self.lm_head)
        for layer in self.layers:
            values = (getattr(layer, field.name) for field in fields(layer))
            yield from (value for value in values if value is not None)


def load_weights(
    directory: Path,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantize: bool = False,
    progress: Progress | None = None,
) -> Weights:
    """The weights of a model directory, to compute in ``dtype`` on ``device``.

    ``quantize`` rounds the matrices to 8 bits with a scale for each output column (CPU only).

    Raises ``ConfigError`` listing every tensor that is missing, unknown or of the wrong shape
    before anything is read; and one that names a tensor whose values ``dtype`` cannot hold.
    """
    tensors = read_checkpoint(directory)
    # rotary frequencies saved by old releases are derived from the config, here as there
    tensors = {n: t for n, t in tensors.items() if not n.endswith(".rotary_emb.inv_freq")}
    head = tensors.pop("lm_head.weight", None) if architecture.tie_embeddings else None
    _check(directory, tensors, _shapes(architecture))
    if head is not None:
        _check_tied(directory, head, tensors["model.embed_tokens.weight"])
    keep = dtype == torch.float32 and device.type == "cpu"
    stored = {name: _DTYPES[t.dtype] if keep else dtype for name, t in tensors.items()}
    if quantize:
        stored = dict.fromkeys(stored, torch.int8)
    weights = _allocate(architecture, stored, dtype, device)
    places = _places(architecture, weights)
    total = sum(tensor.nbytes for tensor in tensors.values())
    done = 0
    # in file order, so that a disk reads forwards
    for name in sorted(tensors, key=lambda n: (tensors[n].path, tensors[n].offset)):
        for count in _read_into(places[name], tensors[name], name):
            done += count
            if progress is not None:
                progress(done, total)
    return weights


def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this architecture must hold, and its shape."""
    hidden, vocab = arch.hidden_size, arch.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    if not arch.tie_embeddings:
        shapes["lm_head.weight"] = (vocab, hidden)
    biased = {
        "self_attn.q_proj": arch.qkv_bias,
        "self_attn.k_proj": arch.qkv_bias,
        "self_attn.v_proj": arch.qkv_bias,
        "self_attn.o_proj": arch.o_bias,
        "mlp.gate_proj": arch.mlp_bias,
        "mlp.up_proj": arch.mlp_bias,
        "mlp.down_proj": arch.mlp_bias,
    }
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        for module, has_bias in biased.items():
            width_in, width_out = arch.widths[module.partition(".")[2]]
            shapes[f"{prefix}{module}.weight"] = (width_out, width_in)
            if has_bias:
                shapes[f"{prefix}{module}.bias"] = (width_out,)
        if arch.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (arch.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (arch.head_dim,)
    return shapes


def _check(
    directory: Path, tensors: dict[str, TensorBytes], shapes: dict[str, tuple[int, ...]]
) -> None:
    problems = [f"{name}: missing" for name in shapes if name not in tensors]
    problems += [f"{name}: not part of this architecture" for name in tensors if name not in shapes]
    problems += [
        f"{name}: shape {list(tensors[name].shape)}, config.json says {list(shape)}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        listing = "".join(f"\n  {problem}" for problem in problems)
        raise ConfigError(f"the weights in {directory} do not fit:{listing}", param="model")


def _check_tied(directory: Path, head: TensorBytes, embedding: TensorBytes) -> None:
    """A tied model may still store its output matrix: then it must be the embedding's bytes."""
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    with head.path.open("rb") as one, embedding.path.open("rb") as other:
        one.seek(head.offset)
        other.seek(embedding.offset)
        left = head.nbytes
        while same and left:
            count = min(left, _BLOCK_BYTES)
            same = one.read(count) == other.read(count)
            left -= count
    if not same:
        raise ConfigError(
            f"{directory}: tie_word_embeddings is set, but lm_head.weight is not "
            "model.embed_tokens.weight",
            param="model",
        )


def _allocate(
    arch: Architecture, stored: dict[str, torch.dtype], dtype: torch.dtype, device: torch.device
) -> Weights:
    """Matrices in the dtype their tensors are ``stored`` in, or ``dtype`` where those differ."""

    def vector(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def maybe(wanted: bool, size: int) -> torch.Tensor | None:
        return vector(size) if wanted else None

    def matrix(width_out: int, width_in: int, *names: str) -> Matrix:
        found = {stored[f"{name}.weight"] for name in names}
        return Matrix.empty(width_out, width_in, found.pop() if len(found) == 1 else dtype, device)

    hidden, inner = arch.hidden_size, arch.intermediate_size
    q = arch.num_heads * arch.head_dim
    qkv = q + 2 * arch.num_kv_heads * arch.head_dim

    def layer(index: int) -> LayerWeights:
        attention, mlp = f"model.layers.{index}.self_attn", f"model.layers.{index}.mlp"
        return LayerWeights(
            input_norm=vector(hidden),
            qkv=matrix(qkv, hidden, *(f"{attention}.{x}_proj" for x in "qkv")),
            qkv_bias=maybe(arch.qkv_bias, qkv),
            q_norm=maybe(arch.qk_norm, arch.head_dim),
            k_norm=maybe(arch.qk_norm, arch.head_dim),
            o=matrix(hidden, q, f"{attention}.o_proj"),
            o_bias=maybe(arch.o_bias, hidden),
            post_norm=vector(hidden),
            gate_up=matrix(2 * inner, hidden, f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            gate_up_bias=maybe(arch.mlp_bias, 2 * inner),
            down=matrix(hidden, inner, f"{mlp}.down_proj"),
            down_bias=maybe(arch.mlp_bias, hidden),
        )

    embedding = matrix(arch.vocab_size, hidden, "model.embed_tokens")
    layers = tuple(layer(index) for index in range(arch.num_layers))
    tied = arch.tie_embeddings
    lm_head = embedding if tied else matrix(arch.vocab_size, hidden, "lm_head")
    return Weights(embedding, layers, vector(hidden), lm_head)


def _places(arch: Architecture, weights: Weights) -> dict[str, Place]:
    """Where each tensor of a checkpoint goes."""
    places: dict[str, Place] = {
        "model.embed_tokens.weight": (weights.embedding, 0),
        "model.norm.weight": (weights.norm, 0),
    }
    if not arch.tie_embeddings:
        places["lm_head.weight"] = (weights.lm_head, 0)
    out = {module: width_out for module, (_, width_out) in arch.widths.items()}
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        places[prefix + "input_layernorm.weight"] = (layer.input_norm, 0)
        places[prefix + "post_attention_layernorm.weight"] = (layer.post_norm, 0)
        for fused, bias, modules in (
            (
                layer.qkv,
                layer.qkv_bias,
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ),
            (layer.o, layer.o_bias, ("self_attn.o_proj",)),
            (layer.gate_up, layer.gate_up_bias, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.down, layer.down_bias, ("mlp.down_proj",)),
        ):
            first = 0
            for module in modules:
                places[f"{prefix}{module}.weight"] = (fused, first)
                if bias is not None:
                    places[f"{prefix}{module}.bias"] = (bias, first)
                first += out[module.partition(".")[2]]
        if layer.q_norm is not None and layer.k_norm is not None:
            places[prefix + "self_attn.q_norm.weight"] = (layer.q_norm, 0)
            places[prefix + "self_attn.k_norm.weight"] = (layer.k_norm, 0)
    return places


def _read_into(place: Place, tensor: TensorBytes, name: str) -> Iterator[int]:
    """Read one tensor into its place, yielding the bytes of each block of rows."""
    target, first = place
    dtype = _DTYPES[tensor.dtype]
    held = target.data.dtype
    count, *width = tensor.shape
    block = max(1, _BLOCK_BYTES * count // max(1, tensor.nbytes))
    scratch = torch.empty(min(block, count), *width, dtype=dtype)
    with tensor.path.open("rb", buffering=0) as file:
        file.seek(tensor.offset)
        for start in range(0, count, block):
            rows = scratch[: min(block, count - start)]
            _fill(file.readinto, rows)
            # float16 ends at 65504: a larger weight would silently turn into infinity
            if held == torch.float16 != dtype and not bool(rows.half().isfinite().all()):
                raise ConfigError(f"{name} does not fit float16", param="dtype")
            if isinstance(target, Matrix):
                target.write(first + start, rows)
            else:
                target[first + start : first + start + len(rows)] = rows
            yield rows.nbytes


def _fill(readinto: Callable[[memoryview], int | None], target: torch.Tensor) -> None:
    view = target.view(-1).view(torch.uint8).numpy().data
    while view:
        count = readinto(view)
        if not count:
            raise ConfigError("a weight file became shorter while it was read", param="model")
        view = view[count:]
