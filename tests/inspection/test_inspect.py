"""``loramux adapters inspect``: the importer's verdict on a folder, in full, without a server."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.adapters.peft_files import Tensors, make_config, tensor_name, write_adapter
from tests.harness import Harness

from loramux import parity
from loramux.cli import main
from loramux.config import DEMO_DIR, ServerConfig
from loramux.ingest.reading import read_adapter
from loramux.inspection import inspect
from loramux.parity import Compared
from loramux_client import compress

SHOUT = DEMO_DIR / "adapters" / "shout"


def run(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, str]:
    code = main(["adapters", "inspect", *map(str, args)])
    return code, capsys.readouterr().out


def inspected(capsys: pytest.CaptureFixture[str], *args: Any) -> tuple[int, dict[str, Any]]:
    code, out = run(capsys, *args, "--json")
    return code, json.loads(out)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("inspect") / "base", "llama")


def tensors_for(model: Path, rank: int = 4) -> Tensors:
    config = json.loads((model / "config.json").read_bytes())
    q = config["num_attention_heads"] * config["head_dim"]
    rng, found = np.random.default_rng(0), {}
    for layer in range(config["num_hidden_layers"]):
        for side, shape in (("A", (rank, config["hidden_size"])), ("B", (q, rank))):
            values = rng.standard_normal(shape).astype("<f4")
            found[tensor_name(layer, "q_proj", side)] = values
    return found


CONFIG = make_config(target_modules=["q_proj"])


def test_the_demos_adapters_are_served_by_the_demos_base(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, found = inspected(capsys, SHOUT)
    assert code == 0 and found["accepted"] and found["problems"] == []
    assert len(found["tensors"]) == found["report"]["tensors"] > 0
    for tensor in found["tensors"]:
        assert tensor["problem"] is None
        assert f"layers.{tensor['layer']}." in tensor["name"] and tensor["module"] in tensor["name"]
        assert f"lora_{tensor['part']}" in tensor["name"]
    code, text = run(capsys, SHOUT)
    assert code == 0
    report, lines = found["report"], re.sub(r"\s+", " ", text)
    assert f"{report['num_bytes']} bytes of {report['dtype']}, {report['num_frames']} frames" in (
        lines
    )
    for tensor in found["tensors"]:
        place = f"layer {tensor['layer']} {tensor['module']}: {tensor['part']}"
        shape = " x ".join(map(str, tensor["shape"]))
        assert f"{tensor['name']} {tensor['dtype']} {shape} {place}" in lines
    assert f"{report['cost']['percent_of_base']['32']} % with 32 rows" in lines


def test_the_report_is_that_of_an_upload(model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", CONFIG, tensors_for(model))
    harness = Harness(model)
    with open(tmp_path / "a/adapter_model.safetensors", "rb") as file:
        config = (tmp_path / "a/adapter_config.json").read_bytes()
        read_adapter(config, file, harness.ready.base).canonical()
    base = harness.ready.base
    harness.close()
    found = inspect(tmp_path / "a", ServerConfig(model=model))
    assert found["report"]["cost"]["base_bytes"] == base.step_bytes
    # Float32, every matrix but the embeddings, which are looked up.
    sizes = [(p.numel(), n) for n, p in tiny.oracle(model).named_parameters() if p.ndim == 2]
    assert base.step_bytes == 4 * sum(size for size, name in sizes if "embed" not in name)


def test_norms_ranks_and_cost_are_those_of_dense_products(model: Path, tmp_path: Path) -> None:
    tensors = tensors_for(model)
    write_adapter(tmp_path / "a", CONFIG, tensors)
    report = inspect(tmp_path / "a", ServerConfig(model=model))["report"]
    norms = sorted(
        np.linalg.norm(
            2.0
            * tensors[tensor_name(layer, "q_proj", "B")]
            @ tensors[tensor_name(layer, "q_proj", "A")]
        )
        for layer in range(3)
    )
    line = report["by_module"]["q_proj"]
    assert report["by_module"].keys() == {"q_proj"}
    np.testing.assert_allclose(line["norm"], norms, rtol=1e-5)
    assert (line["tensors"], line["rank"], line["scale"]) == (6, [4, 4, 4], [2.0, 2.0, 2.0])
    assert line["largest"] == max(float(np.abs(v).max()) for v in tensors.values())
    cost = report["cost"]
    assert cost["row_bytes"] == report["num_bytes"] == sum(v.nbytes for v in tensors.values())
    for rows in (1, 8, 32):
        share = 100 * rows * cost["row_bytes"] / cost["base_bytes"]
        assert cost["percent_of_base"][str(rows)] == round(share, 2)


def test_every_problem_is_listed_and_every_tensor_has_its_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = tensors_for(model)
    strangers = {f"base_model.model.model.stranger{n}.lora_A.weight": np.ones(3) for n in range(70)}
    tensors |= {name: values.astype("<f4") for name, values in strangers.items()}
    bad = tensor_name(1, "q_proj", "A")
    tensors[bad][0, 0] = np.inf
    short = tensor_name(2, "q_proj", "B")
    tensors[short] = tensors[short][:, :3].copy()
    write_adapter(tmp_path / "a", {**CONFIG, "invented": 1}, tensors)
    code, found = inspected(capsys, tmp_path / "a", "--model", model)
    assert code == 1 and not found["accepted"] and found["report"] is None
    assert len(found["problems"]) == 70 + 3
    problems = {tensor["name"]: tensor["problem"] for tensor in found["tensors"]}
    assert problems.keys() == tensors.keys()
    assert "NaN or infinity" in problems[bad]
    assert "A has rank 4 and B has rank 3" in problems[short]
    assert all("no such linear module" in problems[name] for name in strangers)
    good = tensor_name(0, "q_proj", "B")
    assert problems[good] is None
    code, text = run(capsys, tmp_path / "a", "--model", model)
    assert code == 1
    for problem in found["problems"]:
        assert f"refused: {problem}" in text


def test_a_file_that_is_no_safetensors_is_refused_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", CONFIG, {})
    (tmp_path / "a/adapter_model.safetensors").write_bytes(b"PK\x03\x04" + bytes(60))
    code, found = inspected(capsys, tmp_path / "a")
    assert code == 1 and found["code"] == "not_safetensors" and found["tensors"] == []


def test_the_limits_are_those_a_server_would_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORAMUX_MAX_ADAPTER_BYTES", "1000")
    code, found = inspected(capsys, SHOUT)
    assert code == 1 and found["code"] == "adapter_too_large"
    monkeypatch.setenv("LORAMUX_MAX_ADAPTER_BYTES", "100000000")
    monkeypatch.setenv("LORAMUX_MAX_RANK", "1")
    assert inspected(capsys, SHOUT)[1]["code"] == "rank_too_large"


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapters", "inspect", str(tmp_path)]) == 2
    assert "adapter_config.json: No such file" in capsys.readouterr().err
    assert main(["adapters", "inspect", str(SHOUT), "--model", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_compressed_folder_shows_what_it_stands_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = compress(SHOUT, 0.2)
    for name, file in (
        ("config.json", done.files.config),
        ("model.safetensors", done.files.weights),
    ):
        with file.open() as data:
            (tmp_path / f"adapter_{name}").write_bytes(data.read())
    code, found = inspected(capsys, tmp_path)
    plain = inspect(SHOUT, ServerConfig())
    assert code == 0
    shapes = [{t["name"]: t["shape"] for t in f["tensors"]} for f in (found, plain)]
    assert shapes[0] == shapes[1]
    facts = found["report"]["compression"]
    assert facts["kept"] == round(done.kept * facts["values"])
    assert facts["claimed"]["relative_change"] == done.relative_change
    with pytest.raises(Exception, match="PEFT does not read compressed"):
        parity.verify(tmp_path, ServerConfig())


def test_verify_agrees_with_peft_and_sees_a_broken_engine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_adapter(tmp_path / "a", model, r=8, b_scale=0.3)
    monkeypatch.setattr(parity, "PROMPTS", parity.PROMPTS[:2])
    code, found = inspected(capsys, folder, "--model", model, "--verify")
    assert code == 0
    for line in found["parity"]:
        assert line["tokens"] == 24 and line["equal"] >= (line["near_tie"] or 24)
    other = tiny.write_adapter(tmp_path / "b", model, r=8, b_scale=0.3, seed=1)
    real = parity._engine
    monkeypatch.setattr(parity, "_engine", lambda folder, *rest: real(other, *rest))
    code, text = run(capsys, folder, "--model", model, "--verify")
    assert code == 1 and "differs (PEFT's logits are" in re.sub(r"\s+", " ", text)


def test_verify_without_peft_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert main(["adapters", "inspect", str(SHOUT), "--verify"]) == 2
    assert "pip install loramux[verify]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("got", "gaps", "equal", "near", "agrees"),
    [
        ([1, 2, 3], [1, 1, 1], 3, None, True),
        ([1, 9, 3], [1, 1, 1], 1, None, False),
        ([1, 9, 3], [1, 1e-5, 1], 1, 1, True),
        ([1, 9, 3], [1e-5, 1, 1], 1, 0, True),
        ([9, 2, 3], [1, 1e-5, 1], 0, 1, False),
        ([1, 2, 9], [1, 1, 1e-5], 2, 2, True),
    ],
)
def test_a_near_tie_excuses_what_follows_it_only(
    got: list[int], gaps: list[float], equal: int, near: int | None, agrees: bool
) -> None:
    line = parity._compare("p", got, [1, 2, 3], gaps)
    gap = None if equal == 3 else gaps[equal]
    assert line == Compared("p", 3, equal, near, gap) and line.agrees is agrees
