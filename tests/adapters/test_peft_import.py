"""What PEFT saved is what we pack: every bit of every matrix, and every module's scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from tests.adapters.peft_files import (
    base_description,
    import_files,
    make_config,
    make_tensors,
    module_name,
    tensor_name,
    write_adapter,
)
from tests.adapters.peft_models import load_peft_adapter, save_peft_adapter

from loramux.adapters import pack
from loramux.adapters.canonical import ITEMSIZE, STORAGE
from loramux.adapters.formats import parse_config
from loramux.adapters.pack import PackedAdapter
from loramux.adapters.safetensors_file import read_tensors
from loramux.wire import MODULES, BaseDescription

DIGEST = "d" * 64
ALL = list(MODULES)


def pack_folder(folder: Path, base: BaseDescription) -> tuple[PackedAdapter, tuple[str, ...]]:
    """Import and pack an adapter folder; the packed header and the warnings."""
    config = parse_config((folder / "adapter_config.json").read_bytes())
    path = pack.packed_path(folder, DIGEST, base.fingerprint)
    with open(folder / "adapter_model.safetensors", "rb") as file:
        adapter = import_files(config, read_tensors(file), base)
        layout = pack.pack(adapter, base, DIGEST, path)
    packed = pack.read_header(path)
    assert pack.verify_payload(packed)
    assert packed.num_elems == layout.num_elems and packed.dtype == layout.dtype
    return packed, adapter.warnings


def unpack(packed: PackedAdapter, base: BaseDescription) -> dict[tuple[int, str, str], Any]:
    """Every vector of the stream by (layer, module, side), and proof that nothing else is in it."""
    stream = np.fromfile(packed.path, STORAGE[packed.dtype], offset=packed.payload_offset)
    assert stream.size == packed.num_elems
    seen = np.zeros(stream.size, bool)
    result = {}
    for layer in range(base.num_layers):
        for index, module in enumerate(MODULES):
            rank = int(packed.rank[layer, index])
            for side, offset, width in zip(
                "AB", (packed.a_offset, packed.b_offset), base.widths[module], strict=True
            ):
                start = int(offset[layer, index])
                padded = -(-width // packed.chunk) * packed.chunk
                at = slice(start, start + rank * padded)
                assert not seen[at].any(), "two matrices share elements"
                seen[at] = True
                vectors = stream[at].reshape(rank, padded)
                assert not vectors[:, width:].any(), "padding is zero"
                if rank:
                    result[layer, module, side] = vectors[:, :width]
    assert seen.all(), "elements that belong to no matrix"
    return result


def torch_bits(tensor: torch.Tensor) -> Any:
    """A tensor as numpy, bfloat16 as its bits."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def assert_equals_peft(packed: PackedAdapter, base: BaseDescription, model: PeftModel) -> None:
    """Bit for bit the same matrices, and the same scale, in exactly the same modules."""
    vectors = unpack(packed, base)
    adapted = set()
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        layer, kind = int(name.split("layers.")[1].split(".")[0]), name.rpartition(".")[2]
        adapted.add((layer, kind))
        index = MODULES.index(kind)
        assert packed.rank[layer, index] == module.r["default"]
        assert packed.scale[layer, index] == np.float32(module.scaling["default"])
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert ITEMSIZE[packed.dtype] == a.element_size()
        assert vectors[layer, kind, "A"].tobytes() == torch_bits(a).tobytes()
        assert vectors[layer, kind, "B"].tobytes() == torch_bits(b.T).tobytes()
    assert adapted and adapted == {(layer, module) for layer, module, _ in vectors}
    assert (packed.rank > 0).sum() == len(adapted)


PLAIN: dict[str, dict[str, Any]] = {
    "rank 1": dict(r=1, target_modules=ALL),
    "rank 3": dict(r=3, lora_alpha=5, target_modules=ALL),
    "rank 64, the cap": dict(r=64, lora_alpha=16, target_modules=ALL),
    "rslora": dict(r=8, lora_alpha=3, use_rslora=True, target_modules=ALL),
    "fractional alpha": dict(r=3, lora_alpha=0.1, target_modules=["v_proj"]),
    "negative alpha": dict(r=3, lora_alpha=-2, target_modules=["v_proj"]),
    "one module": dict(r=8, target_modules=["down_proj"]),
    "attention only": dict(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    "one layer, int": dict(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=1),
    "the last layer": dict(r=4, target_modules=ALL, layers_to_transform=[2]),
    "layers with pattern": dict(
        r=4, target_modules=ALL, layers_to_transform=[0, 2], layers_pattern="layers"
    ),
    "full and partial names": dict(
        r=4, target_modules=["model.layers.1.self_attn.k_proj", "mlp.gate_proj"]
    ),
    "a full name beside layers": dict(
        r=4,
        target_modules=["model.layers.0.self_attn.q_proj", "v_proj"],
        layers_to_transform=[2],
    ),
    "excluded": dict(
        r=4, target_modules=ALL, exclude_modules=["k_proj", "model.layers.2.mlp.up_proj"]
    ),
    "all-linear": dict(r=4, target_modules="all-linear"),
    "expression": dict(r=4, target_modules=r".*layers\.[01]\..*(q|v)_proj"),
    "excluded by expression": dict(r=4, target_modules=ALL, exclude_modules=r".*\.[kv]_proj"),
    "gaussian": dict(r=4, target_modules=["o_proj"], init_lora_weights="gaussian"),
    "orthogonal": dict(r=4, target_modules=["o_proj"], init_lora_weights="orthogonal"),
    "random B": dict(r=4, target_modules=["o_proj"], init_lora_weights=False),
    "dropout, task": dict(r=4, target_modules=["o_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"),
    "patterns": dict(
        r=4,
        lora_alpha=7,
        use_rslora=True,
        target_modules=ALL,
        rank_pattern={r"layers\.[12]\..*q_proj": 7, "self_attn.q_proj": 2, "down_proj": 1},
        alpha_pattern={"layers.0.mlp.up_proj": 3.5, "up_proj|gate_proj": 11, ".*": 13},
    ),
}


ODD = ["rank 1", "rank 3", "the last layer", "full and partial names", "patterns"]


@pytest.mark.parametrize("case", PLAIN)
def test_every_matrix_and_scale_is_pefts_own(tmp_path: Path, case: str) -> None:
    base = base_description()
    save_peft_adapter(tmp_path, base, **PLAIN[case])
    packed, _ = pack_folder(tmp_path, base)
    assert packed.dtype == "float32"
    assert_equals_peft(packed, base, load_peft_adapter(tmp_path, base))


@pytest.mark.parametrize("case", ODD)
def test_widths_that_need_padding(tmp_path: Path, case: str) -> None:
    base = base_description(hidden=40, inter=50, kv_heads=1)
    save_peft_adapter(tmp_path, base, **PLAIN[case])
    packed, _ = pack_folder(tmp_path, base)
    assert_equals_peft(packed, base, load_peft_adapter(tmp_path, base))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_half_precision_files_keep_their_bits(
    tmp_path: Path, dtype: torch.dtype, rank: int
) -> None:
    base = base_description(hidden=40)
    model = save_peft_adapter(tmp_path, base, dtype=dtype, r=rank, target_modules=ALL)
    packed, _ = pack_folder(tmp_path, base)
    assert packed.dtype == str(dtype).removeprefix("torch.")
    assert_equals_peft(packed, base, model)


def test_an_adapter_of_the_bare_model(tmp_path: Path) -> None:
    base = base_description()
    model = save_peft_adapter(tmp_path, base, bare=True, r=4, target_modules=["q_proj"])
    packed, _ = pack_folder(tmp_path, base)
    assert_equals_peft(packed, base, model)


def test_pefts_own_reading_of_the_saved_config_agrees(tmp_path: Path) -> None:
    """Saving sorts the pattern keys; the order in the file is what decides, to PEFT and to us."""
    base = base_description()
    patterns = {"v_proj": 2, "self_attn.v_proj": 3, r"layers\.1.*": 5}
    save_peft_adapter(tmp_path, base, r=4, target_modules=["v_proj"], alpha_pattern=patterns)
    config_path = tmp_path / "adapter_config.json"
    config = json.loads(config_path.read_text())
    seen = set()
    for order in (list(patterns), list(reversed(patterns))):
        config["alpha_pattern"] = {key: patterns[key] for key in order}
        config_path.write_text(json.dumps(config))
        packed, _ = pack_folder(tmp_path, base)
        assert_equals_peft(packed, base, load_peft_adapter(tmp_path, base))
        seen.add(packed.scale.tobytes())
    assert len(seen) == 2


def test_mixed_dtypes_are_widened_exactly(tmp_path: Path) -> None:
    base = base_description(layers=2)
    tensors = make_tensors(base)
    exact = dict(tensors)
    half, brain = tensor_name(0, "q_proj", "A"), tensor_name(1, "v_proj", "B")
    # Subnormals and the largest values too: widening must be exact for every finite value.
    values = np.array([65504, -65504, 6e-8, -6e-5, 0.0, -0.0, 1 / 3], "<f2")
    tensors[half] = np.resize(values, tensors[half].shape)
    exact[half] = tensors[half].astype("<f4")
    bits = np.array([0x0001, 0x8001, 0x0080, 0x477F, 0x8000, 0x3EAB], "<u2")
    tensors[brain] = np.resize(bits, tensors[brain].shape)
    exact[brain] = torch.from_numpy(tensors[brain]).view(torch.bfloat16).float().numpy()
    write_adapter(tmp_path, make_config(), tensors)
    packed, _ = pack_folder(tmp_path, base)
    assert packed.dtype == "float32"
    for (layer, module, side), vectors in unpack(packed, base).items():
        want = exact[tensor_name(layer, module, side)]
        assert vectors.tobytes() == (want if side == "A" else want.T).tobytes()


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("base_model.model.model.", "base_model.model."),
    ],
    ids=["adapter name kept", "no wrapper", "bare model"],
)
def test_other_spellings_of_the_same_names(tmp_path: Path, rename: Any) -> None:
    base = base_description()
    tensors = make_tensors(base)
    write_adapter(tmp_path / "one", make_config(), tensors)
    write_adapter(tmp_path / "two", make_config(), {rename(n): t for n, t in tensors.items()})
    one, two = (pack_folder(tmp_path / which, base)[0] for which in ("one", "two"))
    assert one.payload_sum == two.payload_sum
    assert (one.a_offset == two.a_offset).all() and (one.b_offset == two.b_offset).all()


def test_the_stream_is_in_the_order_layers_use_it(tmp_path: Path) -> None:
    base = base_description()
    tensors = make_tensors(base, rank=3, modules=MODULES)
    write_adapter(tmp_path, make_config(r=3, target_modules=ALL), tensors)
    packed, _ = pack_folder(tmp_path, base)
    order = "q_A k_A v_A q_B k_B v_B o_A o_B gate_A up_A gate_B up_B down_A down_B".split()
    names = [m.removesuffix("_proj") for m in MODULES]
    offsets = [
        int((packed.a_offset if at.endswith("A") else packed.b_offset)[layer, names.index(at[:-2])])
        for layer in range(base.num_layers)
        for at in order
    ]
    assert offsets[0] == 0 and offsets == sorted(offsets)


def test_warnings_for_what_is_legal_and_odd(tmp_path: Path) -> None:
    base = base_description()
    tensors = make_tensors(base)
    zero = tensor_name(2, "v_proj", "B")
    tensors[zero] = np.zeros_like(tensors[zero])
    config = make_config(rank_pattern={"o_proj": 3, "q_proj": 4, "self_attn.q_proj": 9})
    write_adapter(tmp_path, config, tensors)
    _, warnings = pack_folder(tmp_path, base)
    text = "\n".join(warnings)
    assert "all zero in 1 of 6" in text
    assert "'o_proj'" in text and "'self_attn.q_proj'" in text and "'q_proj' " not in text
    write_adapter(tmp_path, make_config(target_modules=".*"), make_tensors(base))
    _, warnings = pack_folder(tmp_path, base)
    assert len(warnings) == 1 and "target_modules" in warnings[0]
    write_adapter(tmp_path, make_config(), make_tensors(base))
    assert pack_folder(tmp_path, base)[1] == ()


def test_names_used_here_are_the_ones_peft_writes(tmp_path: Path) -> None:
    base = base_description()
    save_peft_adapter(tmp_path, base, r=4, target_modules=ALL)
    with open(tmp_path / "adapter_model.safetensors", "rb") as file:
        saved = set(read_tensors(file))
    assert saved == set(make_tensors(base, modules=MODULES))
    assert module_name(0, "q_proj") == "model.layers.0.self_attn.q_proj"
