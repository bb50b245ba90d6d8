"""ComPEFT in the client: the values it keeps, the figures it gives, what it refuses."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from tests.adapters.peft_files import (
    Tensors,
    base_description,
    import_files,
    make_config,
    make_tensors,
    tensor_name,
    write_adapter,
)

from loramux.adapters import compeft
from loramux.adapters.canonical import widen
from loramux_client import AdapterFilesError, Compressed, compress
from loramux_client._compress import _rounded

BASE = base_description()


def expanded(compressed: Compressed, tmp_path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """What the server makes of it, as float32."""
    config, weights = (f.open() for f in (compressed.files.config, compressed.files.weights))
    (tmp_path / "w").write_bytes(b"".join(weights.__enter__().readlines()))
    fields = json.loads(b"".join(config.__enter__().readlines()))
    with open(tmp_path / "w", "rb") as file:
        found = compeft.expand(fields, file, BASE)
        import_files(found.config, found.tensors, BASE)
        return {name: widen(t.read(), t.dtype) for name, t in found.tensors.items()}


def compeft_by_definition(
    tensors: Tensors, density: float, alpha: float
) -> dict[str, np.ndarray[Any, Any]]:
    """Once more and slowly: sort, count, compare."""
    names = sorted(tensors)
    tau = np.concatenate([tensors[n].astype(np.float64).reshape(-1) for n in names])
    keep = math.ceil(density * len(tau))
    smallest = sorted(np.abs(tau), reverse=True)[keep - 1]
    value = alpha * tau.std(ddof=1)
    new = np.where(np.abs(tau) >= smallest, value * np.sign(tau), 0)
    found, at = {}, 0
    for name in names:
        found[name] = new[at : at + tensors[name].size].reshape(tensors[name].shape)
        at += tensors[name].size
    return found


@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize("density", [1e-9, 0.0777, 0.3, 1.0])
def test_the_server_reads_what_the_definition_says(
    density: float, alpha: float, tmp_path: Path
) -> None:
    tensors = make_tensors(BASE, rank=5, modules=("q_proj", "down_proj"))
    config = make_config(r=5, target_modules=["q_proj", "down_proj"])
    write_adapter(tmp_path / "a", config, tensors)
    done = compress(tmp_path / "a", density, alpha)
    want, got = compeft_by_definition(tensors, density, alpha), expanded(done, tmp_path)
    assert list(got) == sorted(want)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=1e-6, atol=0)
    assert done.kept == np.mean([v != 0 for part in want.values() for v in part.flat])


def test_values_as_large_as_the_last_all_stay_and_zeros_never(tmp_path: Path) -> None:
    tensors = {name: np.zeros_like(v) for name, v in make_tensors(BASE).items()}
    first, last = sorted(tensors)[0], sorted(tensors)[-1]
    tensors[first][0, :3] = [2, -2, 2]
    tensors[last].flat[-1] = -1
    write_adapter(tmp_path / "a", make_config(), tensors)
    got = expanded(compress(tmp_path / "a", 1e-9), tmp_path)
    assert [int(np.count_nonzero(v)) for v in (got[first], got[last])] == [3, 0]
    everything = expanded(compress(tmp_path / "a", 1.0), tmp_path)
    assert sum(np.count_nonzero(v) for v in everything.values()) == 4
    assert everything[last].flat[-1] < 0


@pytest.mark.parametrize("storage", ["<f4", "<f2", "<u2"])
def test_the_dtype_stays_and_holds_the_scale(storage: str, tmp_path: Path) -> None:
    tensors = make_tensors(BASE)
    if storage == "<u2":
        stored = {n: (v.view("<u4") >> 16).astype("<u2") for n, v in tensors.items()}
    else:
        stored = {n: v.astype(storage) for n, v in tensors.items()}
    write_adapter(tmp_path / "a", make_config(), stored)
    done = compress(tmp_path / "a", 0.2)
    sizes = {abs(v) for part in expanded(done, tmp_path).values() for v in part.flat} - {0.0}
    assert len(sizes) == 1
    (size,) = sizes
    tau = np.concatenate([v.reshape(-1) for v in tensors.values()])
    assert size == pytest.approx(float(tau.std(ddof=1)), rel=2**-7)
    with open(tmp_path / "w", "rb") as file:
        found = compeft.expand(_config_of(done), file, BASE)
        assert {t.dtype for t in found.tensors.values()} == {
            {"<f4": "float32", "<f2": "float16", "<u2": "bfloat16"}[storage]
        }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_scale_is_rounded_to_the_nearest(dtype: str) -> None:
    import torch

    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    for value in [*np.geomspace(1e-4, 1e4, 400).tolist(), 1 + 2**-8, 1 + 3 * 2**-8]:
        wanted = torch.tensor(value, dtype=torch.float32).to(getattr(torch, dtype))
        assert _rounded(value, short) == wanted.item()


def _config_of(done: Compressed) -> dict[str, Any]:
    with done.files.config.open() as file:
        return json.loads(file.read())  # type: ignore[no-any-return]


def test_several_dtypes_become_the_widest(tmp_path: Path) -> None:
    tensors = make_tensors(BASE)
    first = next(iter(tensors))
    write_adapter(tmp_path / "a", make_config(), {**tensors, first: tensors[first].astype("<f2")})
    done = compress(tmp_path / "a", 0.2)
    expanded(done, tmp_path)
    with open(tmp_path / "w", "rb") as file:
        found = compeft.expand(_config_of(done), file, BASE)
    assert {t.dtype for t in found.tensors.values()} == {"float32"}


def test_the_figures_are_those_of_dense_products(tmp_path: Path) -> None:
    tensors = make_tensors(BASE, rank=6)
    write_adapter(tmp_path / "a", make_config(r=6), tensors)
    done = compress(tmp_path / "a", 0.3, 1.5)
    new, changes = expanded(done, tmp_path), []
    for layer in range(BASE.num_layers):
        for module in ("q_proj", "v_proj"):
            a, b = (tensors[tensor_name(layer, module, side)] for side in "AB")
            new_a, new_b = (new[tensor_name(layer, module, side)] for side in "AB")
            changes.append(np.linalg.norm(new_b @ new_a - b @ a) / np.linalg.norm(b @ a))
    assert done.relative_change == pytest.approx(np.mean(changes), rel=1e-5)
    size = (tmp_path / "a/adapter_model.safetensors").stat().st_size
    assert (done.bytes_before, done.bytes_after) == (size, done.files.weights.size)
    assert done.ratio == size / done.files.weights.size
    assert done.ratio_16bit < done.ratio < 2 * done.ratio_16bit + 2
    claims = _config_of(done)[compeft.KEY]
    assert claims["relative_change"] == done.relative_change and claims["density"] == 0.3


def test_the_compressed_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", make_config(), make_tensors(BASE))
    expanded(compress(tmp_path / "a", 0.1), tmp_path)
    with safe_open(tmp_path / "w", "numpy") as file:
        assert set(file.keys()) == {"compeft.header", "compeft.codes"}


def test_an_adapter_that_adds_nothing_has_no_relative_change(tmp_path: Path) -> None:
    tensors = make_tensors(BASE)
    zero = {n: np.zeros_like(v) if "lora_B" in n else v for n, v in tensors.items()}
    write_adapter(tmp_path / "a", make_config(), zero)
    assert compress(tmp_path / "a", 0.1).relative_change is None


def refused(tmp_path: Path, config: Any, tensors: Tensors) -> None:
    write_adapter(tmp_path / "a", config, tensors)
    compress(tmp_path / "a", 0.1)


def test_what_is_no_plain_lora_is_refused_with_the_reason(tmp_path: Path) -> None:
    good = make_tensors(BASE)
    magnitude = tensor_name(0, "q_proj", "A").replace(
        "lora_A.weight", "lora_magnitude_vector.weight"
    )
    with pytest.raises(AdapterFilesError, match="only A and B .* magnitude"):
        refused(tmp_path, make_config(use_dora=True), {**good, magnitude: np.ones(32, "<f4")})
    with pytest.raises(AdapterFilesError, match="peft_type 'IA3' cannot be compressed"):
        refused(tmp_path, make_config(peft_type="IA3"), good)
    with pytest.raises(AdapterFilesError, match="compressed already"):
        refused(tmp_path, make_config(loramux_compeft={}), good)
    with pytest.raises(AdapterFilesError, match="not an object"):
        refused(tmp_path, b"[]", good)
    with pytest.raises(AdapterFilesError, match="not JSON"):
        refused(tmp_path, b"{", good)
    with pytest.raises(AdapterFilesError, match="equal or zero"):
        refused(tmp_path, make_config(), {n: np.zeros_like(v) for n, v in good.items()})
    nan = {n: v.copy() for n, v in good.items()}
    next(iter(nan.values()))[0, 0] = np.nan
    with pytest.raises(AdapterFilesError, match="not finite"):
        refused(tmp_path, make_config(), nan)
    write_adapter(tmp_path / "a", make_config(), good)
    for bad in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="density"):
            compress(tmp_path / "a", bad)
    for bad in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            compress(tmp_path / "a", 0.1, bad)


@pytest.mark.parametrize("data", [b"", b"\xff" * 20, b"\x02" + bytes(7) + b"[]"])
def test_weights_that_are_none_are_refused(data: bytes, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", make_config(), make_tensors(BASE))
    (tmp_path / "a/adapter_model.safetensors").write_bytes(data)
    with pytest.raises(AdapterFilesError):
        compress(tmp_path / "a", 0.1)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", make_config(), make_tensors(BASE))
    save_file({"x": np.ones(3, np.int32)}, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(AdapterFilesError, match="not safetensors of F32, F16, BF16"):
        compress(tmp_path / "a", 0.1)


def test_without_numpy_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "a", make_config(), make_tensors(BASE))
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "numpy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install loramux-client\[compress\]"):
        compress(tmp_path / "a", 0.1)
