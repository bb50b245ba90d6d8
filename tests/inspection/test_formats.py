"""Every tensor of every format is applied to something, and the report has a line for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import formats, tiny

from loramux.config import ServerConfig
from loramux.inspection import inspect


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("formats") / "base", "llama")


@pytest.mark.parametrize("name", formats.FORMATS)
def test_no_tensor_of_a_format_is_left_over(name: str, model: Path, tmp_path: Path) -> None:
    found = inspect(formats.write(tmp_path / name, model, name), ServerConfig(model=model))
    assert found["accepted"], found["problems"]
    report = found["report"]
    assert report["tensors"] == len(found["tensors"])
    assert [t["name"] for t in found["tensors"] if t["part"] is None or t["problem"]] == []
    shared = [t for t in found["tensors"] if t["module"] is None]
    counted = sum(line["tensors"] for line in report["by_module"].values())
    assert counted == len(found["tensors"]) - len(shared)
    for module, line in report["by_module"].items():
        of_module = [t for t in found["tensors"] if t["module"] == module]
        assert line["tensors"] == len(of_module) > 0
