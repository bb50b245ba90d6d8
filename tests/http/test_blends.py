"""Blends over HTTP: what they become, what they report, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.adapters.blending import FILES, deltas, differ
from tests.adapters.peft_files import Tensors, make_config, make_tensors, safetensors_bytes
from tests.front.uploading import blobs as stored
from tests.http.blending import BASE, blend, rows, server_with, upload
from tests.http.conftest import Running
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal

from loramux.adapters.blobs import BlobStore
from loramux.cli import main
from loramux_client import AdapterInvalidError, Client, NotFoundError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blends")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Running]:
    with server_with(folder) as server:
        for seed, name in enumerate(("one", "two", "three")):
            assert upload(server, name, seed=seed).status_code == 201
        yield server


def files_of(server: Running, name: str, data: Path, into: Path) -> Path:
    """The newest files of a name as a folder."""
    into.mkdir(exist_ok=True)
    row = rows(server, name)[0]
    for file, digest in zip(FILES, (row.config_digest, row.weights_digest), strict=True):
        (into / file).write_bytes(BlobStore(data / "data").path(digest).read_bytes())
    return into


def changes(tensors: Tensors, factor: float = 2.0) -> dict[tuple[int, str], Any]:
    """What ``make_tensors`` and ``make_config`` change: alpha / r is 2."""
    names = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    return {
        (0, m): factor
        * (tensors[names.format(m, "B")].astype(np.float64) @ tensors[names.format(m, "A")])
        for m in ("q_proj", "v_proj")
    }


def test_the_life_of_a_blend(real: Running, folder: Path, tmp_path: Path) -> None:
    answer = blend(real, "mix", ("one", 0.5), ("two@1", -2))
    assert answer.status_code == 201, answer.text
    view = answer.json()
    assert (view["status"], view["rank"], view["generation"]) == ("ready", 8, 1)
    digests = {name: rows(real, name)[0].digest for name in ("one", "two")}
    assert view["report"]["blend"] == {
        "method": "soup",
        "sources": [
            {"id": "one@1", "digest": digests["one"], "weight": 0.5},
            {"id": "two@1", "digest": digests["two"], "weight": -2.0},
        ],
    }
    assert real.http.get("/v1/adapters/mix").json()["report"] == view["report"]
    one, two = (changes(make_tensors(BASE, seed=seed)) for seed in (0, 1))
    got = deltas(files_of(real, "mix", folder, tmp_path / "mix"), BASE)
    assert differ(got, {at: 0.5 * one[at] - 2 * two[at] for at in one}) < 1e-6
    assert real.complete(model="mix").headers["x-loramux-adapter"] == view["digest"]
    # The same again is the same adapter, other weights are others.
    again = blend(real, "mix", (f"one@sha256:{digests['one'][:12]}", 0.5), ("two", -2.0))
    assert again.status_code == 200 and again.json()["digest"] == view["digest"]
    other = blend(real, "mix", ("one", 0.5), ("two", 2))
    assert refusal(other, 409)["code"] == "generation_conflict"
    other = blend(real, "mix", ("one", 0.5), ("two", 2), expected_generation=1)
    assert other.status_code == 201 and other.json()["generation"] == 2


def test_an_alias_as_a_source_and_a_time_to_live(real: Running) -> None:
    shares = [{"model": name, "weight": 1} for name in ("one", "two")]
    real.http.put("/v1/aliases/single", json={"target": "one"})
    real.http.put("/v1/aliases/several", json={"targets": shares})
    view = blend(real, "dated", "single", "two", query="?wait=30&ttl_s=1000").json()
    assert [s["id"] for s in view["report"]["blend"]["sources"]] == ["one@1", "two@1"]
    assert view["expires_at"] - view["created"] in (1000, 1001)
    error = refusal(blend(real, "drawn", "one", "several"))
    assert error["param"] == "blend.sources[1].id", "not one by chance"
    for name in ("single", "several"):
        assert real.http.delete(f"/v1/aliases/{name}").status_code == 200


def test_uniform_weights_are_the_default(real: Running, folder: Path, tmp_path: Path) -> None:
    view = blend(real, "even", "one", "two", "three").json()
    assert [s["weight"] for s in view["report"]["blend"]["sources"]] == [1 / 3] * 3
    parts = [changes(make_tensors(BASE, seed=seed)) for seed in range(3)]
    got = deltas(files_of(real, "even", folder, tmp_path / "even"), BASE)
    assert differ(got, {at: sum(part[at] for part in parts) / 3 for at in got}) < 1e-6


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "ties", "rank": 3, "density": 0.5, "majority_sign_method": "frequency"},
        {"method": "dare_ties", "rank": 3, "density": 0.5, "seed": 4},
        {"method": "dare_linear", "rank": 3, "density": 0.5},
    ],
)
def test_methods_and_what_they_report(real: Running, recipe: dict[str, Any]) -> None:
    name = recipe["method"]
    view = blend(real, name, "one", ("two", 0.5), **recipe).json()
    said = view["report"]["blend"]
    assert view["rank"] == 3 and recipe.items() <= said.items()
    assert 0 < said["worst"]["kept"] <= said["kept"] < 1
    assert said["worst"]["module"] in ("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj")
    assert [source["weight"] for source in said["sources"]] == [1, 0.5]
    assert blend(real, name, "one", ("two", 0.5), **recipe).status_code == 200


def test_one_source_scaled_or_compressed(real: Running) -> None:
    scaled = blend(real, "lines", "one", method="scale_layers", alpha=0.5, beta=1).json()
    assert scaled["report"]["blend"]["alpha"] == 0.5 and "kept" not in scaled["report"]["blend"]
    small = blend(real, "small", "mix", method="compress", rank=2).json()
    assert small["rank"] == 2 and small["report"]["blend"]["kept"] < 1
    whole = blend(real, "whole", "one", method="compress", rank=4).json()
    assert whole["report"]["blend"]["kept"] == 1


def test_looking_only_leaves_nothing(real: Running, folder: Path) -> None:
    before = stored(folder)
    view = blend(real, "dry", "one", ("three", 1), "two", query="?validate_only=1")
    assert refusal(view, 400)["param"] == "blend.sources", "weights for some"
    answer = blend(real, "dry", "one", "three", query="?validate_only=1")
    assert answer.status_code == 200 and answer.json()["generation"] == 0
    assert answer.json()["report"]["blend"]["method"] == "soup"
    assert real.http.get("/v1/adapters/dry").status_code == 404
    assert eventually(lambda: stored(folder) == before)


def test_sources_that_cannot_be_used(real: Running) -> None:
    files = {"config": b"{}", "weights": b"x"}
    failed = real.http.post("/v1/adapters?wait=30", data={"name": "bad"}, files=files)
    assert failed.status_code == 422
    for source, status, code in [
        ("nobody", 404, "model_not_found"),
        ("one@7", 404, "model_not_found"),
        ("one@sha256:" + "0" * 64, 404, "model_not_found"),
        ("bad", 409, "adapter_failed"),
        ("base", 400, "invalid_request"),
        ("../one", 404, "model_not_found"),
        ("", 404, "model_not_found"),
    ]:
        error = refusal(blend(real, "no", "two", source), status)
        assert (error["code"], error["param"]) == (code, "blend.sources[1].id"), source
    assert real.http.get("/v1/adapters/no").status_code == 404


def test_more_than_pairs(real: Running, folder: Path) -> None:
    tensors = make_tensors(BASE)
    for name in [name for name in tensors if ".lora_B." in name]:
        tensors[name.replace("weight", "bias")] = tensors[name][:, 0].copy()
    files = {
        "config": json.dumps(make_config(lora_bias=True)).encode(),
        "weights": safetensors_bytes(tensors),
    }
    answer = real.http.post("/v1/adapters?wait=30", data={"name": "biased"}, files=files)
    assert answer.status_code == 201
    before = stored(folder)
    error = refusal(blend(real, "no", "one", "biased"), 422)
    assert error["code"] == "adapter_invalid" and error["problems"][0].startswith("biased@1 ")
    many = refusal(blend(real, "no", *["one"] * 17), 422)
    assert many["code"] == "rank_too_large" and "rank 68" in many["message"]
    assert "up to 64" in many["message"] and "rank" in many["message"]
    assert blend(real, "yes", *["one"] * 17, rank=4).json()["rank"] == 4
    assert refusal(blend(real, "base", "one"), 409)["code"] == "name_reserved"
    real.http.delete("/v1/adapters/yes")
    assert eventually(lambda: stored(folder) == before)


def request(**changes: Any) -> dict[str, Any]:
    """Of a TIES blend that is right but for ``changes``; None leaves a field out."""
    good = {"method": "ties", "sources": [{"id": "one"}], "rank": 2, "density": 0.5}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


MALFORMED: list[tuple[Any, str]] = [
    ("soup", "blend"),
    (request(method=None), "blend.method"),
    (request(method="average"), "blend.method"),
    (request(method=["soup"]), "blend.method"),
    (request(extra=1), "blend"),
    (request(seed=1), "blend"),
    (request(alpha=1), "blend"),
    (request(method="soup"), "blend"),
    (request(rank=None), "blend.rank"),
    (request(density=None), "blend.density"),
    (request(rank=0), "blend.rank"),
    (request(rank=True), "blend.rank"),
    (request(rank=2.0), "blend.rank"),
    (request(rank=10**9), "blend.rank"),
    (request(density=0), "blend.density"),
    (request(density=1.5), "blend.density"),
    (request(density="0.5"), "blend.density"),
    (request(majority_sign_method="most"), "blend.majority_sign_method"),
    (request(method="dare_ties", seed=-1), "blend.seed"),
    (request(method="dare_ties", seed=2**63), "blend.seed"),
    (request(sources=[]), "blend.sources"),
    (request(sources=None), "blend.sources"),
    (request(sources={"id": "one"}), "blend.sources"),
    (request(sources=[{"id": "one"}] * 33), "blend.sources"),
    (request(sources=["one"]), "blend.sources[0]"),
    (request(sources=[{"id": "one"}, {"weight": 1}]), "blend.sources[1]"),
    (request(sources=[{"id": "one", "scale": 1}]), "blend.sources[0]"),
    (request(sources=[{"id": 1}]), "blend.sources[0].id"),
    (request(sources=[{"id": "one", "weight": True}]), "blend.sources[0].weight"),
    (request(sources=[{"id": "one", "weight": 1e39}]), "blend.sources[0].weight"),
    (request(sources=[{"id": "one", "weight": 10**400}]), "blend.sources[0].weight"),
    ({"method": "compress", "rank": 1, "sources": [{"id": "one"}] * 2}, "blend.sources"),
    (
        {"method": "compress", "rank": 1, "sources": [{"id": "one", "weight": 1}]},
        "blend.sources[0]",
    ),
    ({"method": "compress", "sources": [{"id": "one"}]}, "blend.rank"),
    ({"method": "scale_layers", "alpha": 1, "sources": [{"id": "one"}]}, "blend.beta"),
]


@pytest.mark.parametrize(("body", "param"), MALFORMED)
def test_a_malformed_recipe_names_its_field(real: Running, body: Any, param: str) -> None:
    answer = real.http.post("/v1/adapters", json={"name": "no", "blend": body})
    assert refusal(answer)["param"] == param, answer.text


def test_files_and_a_blend_are_not_mixed(real: Running) -> None:
    body = {"name": "no", "blend": request(), "weights": "sha256:" + "0" * 64}
    assert "blend" in refusal(real.http.post("/v1/adapters", json=body))["message"]
    assert refusal(real.http.post("/v1/adapters", json={"blend": request()}))["param"] == "name"
    raw = b'{"name":"no","blend":{"method":"soup","sources":[{"id":"one","weight":%s}]}}'
    for number in (b"NaN", b"1e999", b"-1e999"):
        answer = real.http.post(
            "/v1/adapters", content=raw % number, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400, number


def test_the_client_and_the_command(real: Running, capsys: pytest.CaptureFixture[str]) -> None:
    with Client(real.url) as asking:
        made = asking.adapters.blend(
            "by-client", method="dare_ties", sources=["one", ("two", 0.5)], rank=3, density=0.5
        )
        assert made.status == "ready" and made.report["blend"]["seed"] == 0
        with pytest.raises(NotFoundError) as missing:
            asking.adapters.blend("by-client", method="soup", sources=["one", "nobody"])
        assert missing.value.param == "blend.sources[1].id"
        with pytest.raises(AdapterInvalidError, match="rank 68"):
            asking.adapters.blend("by-client", method="soup", sources=["one"] * 17)
    words = "blend by-command one two=-0.5 --method ties --rank 3 --density 0.5"
    assert main(["adapters", "--url", real.url, *words.split()]) == 0
    out = capsys.readouterr().out
    assert "by-command" in out and '"weight": -0.5' in out and '"majority_sign_method"' in out
    words = "blend by-command one --method soup --expected-generation 1"
    assert main(["adapters", "--url", real.url, *words.split()]) == 0
    assert main(["adapters", "--url", real.url, *words.replace("soup", "stew").split()]) == 1
    assert "blend.method: must be one of soup, ties" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["adapters", "blend", "x", "one=much", "--method", "soup"])
    assert "SOURCE[=WEIGHT]" in capsys.readouterr().err
