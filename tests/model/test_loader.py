"""Weights: every value in its place, one copy of them, and a refusal that names every misfit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loramux.errors import ConfigError
from loramux.model import loader
from loramux.model.architecture import Architecture, read_architecture
from loramux.model.checkpoint import read_checkpoint
from loramux.model.loader import Weights, load_weights
from loramux_kernels.linear import Matrix
from tests import tiny
from tests.model.allocations import Allocations

Checkpoint = Callable[..., Path]
CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Architecture, Weights]:
    architecture = read_architecture(directory)
    return architecture, load_weights(directory, architecture, dtype=dtype, device=CPU)


def assert_holds(weights: Weights, arch: Architecture, tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor of the files, found where the decoder looks for it; nothing is left over."""
    left = dict(tensors)
    q, kv = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim

    def check(name: str, got: torch.Tensor | Matrix) -> None:
        got = dense(got)
        assert torch.equal(got, left.pop(name).to(got.dtype)), name

    check("model.embed_tokens.weight", weights.embedding)
    check("model.norm.weight", weights.norm)
    if arch.tie_embeddings:
        assert weights.lm_head is weights.embedding
        left.pop("lm_head.weight", None)
    else:
        check("lm_head.weight", weights.lm_head)
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        check(prefix + "input_layernorm.weight", layer.input_norm)
        check(prefix + "post_attention_layernorm.weight", layer.post_norm)
        for kind, qkv, o, gate_up, down in (
            ("weight", layer.qkv, layer.o, layer.gate_up, layer.down),
            ("bias", layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias),
        ):
            qkv, gate_up = dense(qkv), dense(gate_up)
            if qkv is not None:
                check(f"{prefix}self_attn.q_proj.{kind}", qkv[:q])
                check(f"{prefix}self_attn.k_proj.{kind}", qkv[q : q + kv])
                check(f"{prefix}self_attn.v_proj.{kind}", qkv[q + kv :])
            if o is not None:
                check(f"{prefix}self_attn.o_proj.{kind}", o)
            if gate_up is not None:
                check(f"{prefix}mlp.gate_proj.{kind}", gate_up[: arch.intermediate_size])
                check(f"{prefix}mlp.up_proj.{kind}", gate_up[arch.intermediate_size :])
            if down is not None:
                check(f"{prefix}mlp.down_proj.{kind}", down)
        if layer.q_norm is not None and layer.k_norm is not None:
            check(prefix + "self_attn.q_norm.weight", layer.q_norm)
            check(prefix + "self_attn.k_norm.weight", layer.k_norm)
    assert not left


def dense(held: torch.Tensor | Matrix | None) -> torch.Tensor | None:
    return held.dense() if isinstance(held, Matrix) else held


def files_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.fixture
def spoiled(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of a tied Llama to change."""
    return shutil.copytree(checkpoint("llama_mha_tied"), tmp_path / "model")


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("arch", tiny.ARCHS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_is_in_its_place(checkpoint: Checkpoint, arch: tiny.Arch, shards: int) -> None:
    directory = checkpoint(arch, shards=shards)
    architecture, weights = load(directory)
    assert_holds(weights, architecture, files_of(directory))


def test_all_biases(checkpoint: Checkpoint) -> None:
    directory = checkpoint("llama", attention_bias=True, mlp_bias=True)
    architecture, weights = load(directory)
    assert_holds(weights, architecture, files_of(directory))


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted_in_blocks(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    wanted: torch.dtype,
) -> None:
    # smaller than every matrix, and dividing none of them
    monkeypatch.setattr(loader, "_BLOCK_BYTES", 4 * 1000)
    directory = checkpoint("qwen2", dtype=stored)
    architecture, weights = load(directory, wanted)
    assert weights.norm.dtype == wanted
    # float32 on a CPU reads matrices as their file has them
    kept = getattr(torch, stored) if wanted == torch.float32 else wanted
    assert weights.embedding.data.dtype == weights.layers[0].qkv.data.dtype == kept
    assert_holds(weights, architecture, files_of(directory))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_the_peak_is_one_copy_and_one_block(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, stored: str
) -> None:
    block = 4096
    monkeypatch.setattr(loader, "_BLOCK_BYTES", block)
    directory = checkpoint("llama", dtype=stored)
    architecture = read_architecture(directory)
    with Allocations() as allocations:
        weights = load_weights(directory, architecture, dtype=torch.float32, device=CPU)
    kept = [size for size in allocations.sizes if size > block]
    assert sum(kept) <= weights.num_bytes
    # matrices as in the file, in whole panels of 32 rows; vectors in float32
    files = files_of(directory).values()
    assert weights.num_bytes < 1.1 * sum(t.nbytes if t.ndim == 2 else 4 * len(t) for t in files)


def test_progress_counts_every_byte(checkpoint: Checkpoint) -> None:
    directory = checkpoint("llama", shards=2)
    seen: list[tuple[int, int]] = []
    load_weights(
        directory,
        read_architecture(directory),
        dtype=torch.float32,
        device=CPU,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(t.nbytes for t in files_of(directory).values())
    assert seen == sorted(seen)
    assert {t for _, t in seen} == {total}
    assert seen[-1] == (total, total)


def test_missing_extra_and_wrong_tensors_are_all_named(spoiled: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.down_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        tensors["model.norm.weight"] = torch.zeros(63)

    rewrite(spoiled, change)
    with pytest.raises(ConfigError) as caught:
        load(spoiled)
    assert "model.layers.1.mlp.down_proj.weight: missing" in caught.value.message
    assert "model.layers.0.self_attn.q_proj.bias: not part" in caught.value.message
    assert "model.norm.weight: shape [63]" in caught.value.message


def test_saved_rotary_frequencies_are_neutral(spoiled: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(spoiled, lambda tensors: tensors.update({name: torch.zeros(8)}))
    load(spoiled)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(spoiled: Path) -> None:
    def store(offset: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
            tensors["lm_head.weight"][-1, -1] += offset

        return change

    rewrite(spoiled, store(0.0))
    load(spoiled)
    rewrite(spoiled, store(1.0))
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        load(spoiled)


def test_a_value_float16_cannot_hold_is_refused(spoiled: Path) -> None:
    rewrite(spoiled, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    load(spoiled, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight.*float16"):
        load(spoiled, torch.float16)


def test_other_dtypes_are_refused(spoiled: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].double()

    rewrite(spoiled, change)
    with pytest.raises(ConfigError, match="F64"):
        load(spoiled)


def test_no_weights_is_said_plainly(spoiled: Path) -> None:
    (spoiled / "model.safetensors").rename(spoiled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="only safetensors"):
        load(spoiled)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(spoiled: Path, keep: int) -> None:
    path = spoiled / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load(spoiled)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        [],
    ],
)
def test_a_malformed_header_is_refused(tmp_path: Path, entry: object) -> None:
    header = json.dumps({"w": entry}).encode()
    payload = len(header).to_bytes(8, "little") + header + bytes(8)
    (tmp_path / "model.safetensors").write_bytes(payload)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(weight_map={}),
        lambda index: index.pop("weight_map"),
        lambda index: index["weight_map"].pop("model.norm.weight"),
        lambda index: index["weight_map"].update({"more": index["weight_map"]["lm_head.weight"]}),
        lambda index: index["weight_map"].update({"lm_head.weight": "../model.safetensors"}),
        lambda index: index["weight_map"].update({"lm_head.weight": "gone.safetensors"}),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: Callable[[dict[str, object]], object]
) -> None:
    directory = shutil.copytree(checkpoint("llama", shards=2), tmp_path / "model")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError):
        load(directory)
