"""A base is what it computes: the same content is the same fingerprint, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loramux.model import fingerprint as module
from loramux.model.architecture import read_architecture
from loramux.model.fingerprint import fingerprint

Checkpoint = Callable[..., Path]


@pytest.fixture
def model(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


def identify(directory: Path, data_dir: Path) -> str:
    return fingerprint(directory, read_architecture(directory), data_dir)


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_the_place_does_not_matter(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    first = identify(model, tmp_path / "a")
    assert len(first) == 64
    assert first == identify(copy, tmp_path / "b") == identify(copy, tmp_path / "a")


def test_a_weight_matters(model: Path, tmp_path: Path) -> None:
    before = identify(model, tmp_path)
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert identify(model, tmp_path) != before


@pytest.mark.parametrize(
    "fields",
    [
        {"rms_norm_eps": 2e-5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10001.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
)
def test_maths_matters(model: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    before = identify(model, tmp_path)
    edit(model, **fields)
    assert identify(model, tmp_path) != before


def test_what_is_not_maths_does_not(model: Path, tmp_path: Path) -> None:
    before = identify(model, tmp_path)
    edit(model, eos_token_id=7, max_position_embeddings=128, initializer_range=0.5)
    assert identify(model, tmp_path) == before


def test_a_restart_reads_no_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = identify(model, tmp_path)
    monkeypatch.setattr(module, "_digest", lambda path: pytest.fail(f"{path} was read"))
    assert identify(model, tmp_path) == before


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}', "\x00"])
def test_a_damaged_cache_is_made_again(model: Path, tmp_path: Path, content: str) -> None:
    before = identify(model, tmp_path)
    (tmp_path / "fingerprints.json").write_text(content)
    assert identify(model, tmp_path) == before
    key = next(iter(json.loads((tmp_path / "fingerprints.json").read_text())))
    (tmp_path / "fingerprints.json").write_text(json.dumps({key: "xyz"}))
    assert identify(model, tmp_path) == before


def test_shards_are_all_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    directory = shutil.copytree(checkpoint("llama", shards=2), tmp_path / "model")
    before = identify(directory, tmp_path)
    for path in sorted(directory.glob("*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        after = identify(directory, tmp_path)
        assert after != before
        before = after
