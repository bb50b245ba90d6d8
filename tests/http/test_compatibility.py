"""vLLM's routes: no path is opened unless an operator said where, and then only below there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.http.conftest import Running
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import real_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter in the root and some beside it; links lead from the one to the other."""
    folder = tmp_path_factory.mktemp("compatibility")
    for name in ("outside", "root_of_another", "root/inside", "root/config_only"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_text("{}")
    for name in ("outside", "root_of_another", "root/inside"):
        (folder / name / "adapter_model.safetensors").write_bytes(name.encode())
    root = folder / "root"
    (root / "link_out").symlink_to(folder / "outside")
    (root / "link_in").symlink_to(root / "inside")
    (root / "loop").symlink_to(root / "loop")
    (root / "file_out").mkdir()
    (root / "file_out" / "adapter_config.json").write_text("{}")
    (root / "file_out" / "adapter_model.safetensors").symlink_to(
        folder / "outside" / "adapter_model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def allowed(folder: Path) -> Iterator[Running]:
    with real_server(folder / "allowed", lora_path_root=folder / "root") as server:
        yield server


@pytest.fixture(scope="module")
def refused(folder: Path) -> Iterator[Running]:
    with real_server(folder / "refused") as server:
        yield server


# Row 48.
@pytest.mark.parametrize("path", ["/etc", "../", "hf/id", "{root}/inside", "{root}/link_out", "."])
def test_without_a_root_no_path_is_loaded(refused: Running, folder: Path, path: str) -> None:
    path = path.format(root=folder / "root")
    answer = refused.post("/v1/load_lora_adapter", lora_name="x", lora_path=path)
    error = refusal(answer)
    assert error["code"] == "path_loading_disabled" and error["param"] == "lora_path"
    refusal(refused.http.get("/v1/adapters/x"), 404)


OUTSIDE = [
    "/etc",
    "..",
    "../outside",
    "{outside}",
    "hf/id",
    "link_out",
    "file_out",
    "loop",
    "config_only",
    "inside/adapter_config.json",
    "../root_of_another",
    "{root}_of_another",
    "nul\x00",
    "x" * 5000,
    ".",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leads_out_of_the_root(allowed: Running, folder: Path, path: str) -> None:
    path = path.format(root=folder / "root", outside=folder / "outside")
    answer = allowed.post("/v1/load_lora_adapter", lora_name="x", lora_path=path)
    error = refusal(answer)
    assert error["code"] == "path_not_allowed" and error["param"] == "lora_path"
    refusal(allowed.http.get("/v1/adapters/x"), 404)


def test_load_and_unload(allowed: Running, folder: Path) -> None:
    for path in ("inside", "link_in", str(folder / "root" / "inside"), "inside/../inside"):
        answer = allowed.post("/v1/load_lora_adapter", lora_name="cat", lora_path=path)
        assert answer.status_code == 200, answer.text
        assert answer.text == "Success: LoRA adapter 'cat' added successfully."
    assert allowed.http.get("/v1/adapters/cat").json()["generation"] == 1
    assert allowed.complete(model="cat").status_code == 200
    (folder / "root" / "inside" / "adapter_config.json").write_text('{"new": 1}')
    assert allowed.post(
        "/v1/load_lora_adapter", lora_name="cat", lora_path="inside", load_inplace=True
    )
    assert allowed.http.get("/v1/adapters/cat").json()["generation"] == 2
    answer = allowed.post("/v1/unload_lora_adapter", lora_name="cat", lora_int_id=7)
    assert answer.status_code == 200
    assert answer.text == "Success: LoRA adapter 'cat' removed successfully."
    refusal(allowed.complete(model="cat"), 404)
    assert refusal(allowed.post("/v1/unload_lora_adapter", lora_name="cat"), 404)


def test_a_refused_adapter_is_told_so(allowed: Running, folder: Path) -> None:
    bad = folder / "root" / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text('{"bad": ["one", "two"]}')
    (bad / "adapter_model.safetensors").write_bytes(b"w")
    answer = allowed.post("/v1/load_lora_adapter", lora_name="bad", lora_path="bad")
    assert refusal(answer, 422)["problems"] == ["one", "two"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "lora_name"),
        ({"lora_name": 1, "lora_path": "inside"}, "lora_name"),
        ({"lora_name": "", "lora_path": "inside"}, "lora_name"),
        ({"lora_name": "a/b", "lora_path": "inside"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "a", "lora_path": ["inside"]}, "lora_path"),
    ],
)
def test_fields(allowed: Running, body: dict[str, object], param: str) -> None:
    assert refusal(allowed.post("/v1/load_lora_adapter", **body))["param"] == param
    if param == "lora_name" and body.get("lora_name") != "a/b":
        assert refusal(allowed.post("/v1/unload_lora_adapter", **body))["param"] == param
