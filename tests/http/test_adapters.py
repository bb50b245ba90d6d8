"""Uploads taken apart by hand, and what operators do with adapters."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from tests.http import wire
from tests.http.conftest import Running, Start
from tests.http.fake_front import INFO, eventually
from tests.http.test_bad_inputs import refusal

from loramux.metrics.stats import PoolStats

CONFIG, WEIGHTS = b'{"r": 8}', bytes(range(256)) * 300


def part(name: str, data: bytes, *headers: str) -> bytes:
    disposition = f'content-disposition: form-data; name="{name}"'
    return "\r\n".join(["--B", disposition, *headers, "", ""]).encode() + data + b"\r\n"


NAME, CONF, BLOB = part("name", b"new"), part("config", CONFIG), part("weights", WEIGHTS)
END = b"--B--\r\n"


def push(server: Running, body: Any, query: str = "", **headers: str) -> Any:
    return server.http.post(
        "/v1/adapters" + query,
        content=body,
        headers={"content-type": "multipart/form-data; boundary=B"} | headers,
    )


def upload(server: Running, name: str, query: str = "", config: bytes = CONFIG) -> Any:
    files = {"config": ("../../etc/passwd", config), "weights": ("/dev/zero", WEIGHTS)}
    return server.http.post("/v1/adapters" + query, data={"name": name}, files=files)


def test_upload(start: Start) -> None:
    server = start()
    answer = upload(server, "fresh")
    assert answer.status_code == 202 and answer.json()["status"] == "validating"
    [writer] = server.front.adapters.writers
    assert writer.hash.digest() == hashlib.sha256(WEIGHTS).digest()
    assert writer.state == "committed"
    answer = upload(server, "fresh", "?wait=5")
    assert answer.status_code == 201
    view = answer.json()
    assert view["object"] == "adapter" and view["name"] == "fresh" and view["status"] == "ready"
    assert upload(server, "fresh", "?wait=5").status_code == 200, "exactly this was there"
    assert server.complete(model="fresh").headers["x-loramux-adapter"] == view["digest"]
    answer = upload(server, "fresh", "?wait=5&expected_generation=1", config=b"{}")
    assert answer.status_code == 201 and answer.json()["generation"] == 2


def test_validate_only_registers_nothing(shared: Running) -> None:
    answer = upload(shared, "dry", "?validate_only=1")
    assert answer.status_code == 200 and answer.json()["status"] == "ready"
    refusal(shared.http.get("/v1/adapters/dry"), 404)


def test_a_refused_adapter_lists_every_problem(shared: Running) -> None:
    error = refusal(upload(shared, "bad", "?wait=5", config=b"bad"), 422)
    assert error["type"] == "adapter_invalid" and error["problems"] == ["one", "two"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_any_cut_of_the_body(shared: Running, size: int) -> None:
    body = part("weights", b"\r\n--B\r--B-\r\n--C" * 50) + NAME + part("config", CONFIG) + END
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    answer = push(shared, iter(pieces), "?wait=1")
    assert answer.status_code in (200, 201), answer.text
    digest = hashlib.sha256(b"\r\n--B\r--B-\r\n--C" * 50).digest()
    assert shared.front.adapters.writers[-1].hash.digest() == digest


def test_empty_weights_are_the_validators_business(shared: Running) -> None:
    assert push(shared, NAME + CONF + part("weights", b"") + END).status_code == 202
    assert shared.front.adapters.writers[-1].size == 0


BAD = {
    "no closing boundary": NAME + CONF + BLOB,
    "cut inside the weights": (NAME + CONF + BLOB)[:-1000],
    "nothing": b"",
    "only the end": END,
    "no boundary at all": b"hello",
    "another boundary": (NAME + CONF + BLOB + END).replace(b"--B", b"--C"),
    "two weights": NAME + CONF + BLOB + BLOB + END,
    "two names": NAME + NAME + CONF + BLOB + END,
    "two configs": NAME + CONF + CONF + BLOB + END,
    "an extra part": NAME + CONF + BLOB + part("extra", b"x") + END,
    "a part without a name": NAME + b"--B\r\ncontent-disposition: form-data\r\n\r\nx\r\n" + END,
    "a part without headers": NAME + b"--B\r\n\r\nx\r\n" + CONF + BLOB + END,
    "an attachment": NAME + CONF + BLOB.replace(b"form-data", b"attachment") + END,
    "base64": NAME + CONF + part("weights", b"eA==", "content-transfer-encoding: base64") + END,
    "a header twice": NAME + CONF + part("weights", b"x", 'x: "1"', "x: 2") + END,
    "many headers": NAME + part("config", b"x", *["x: y"] * 100) + END,
    "a large header": NAME + part("config", b"x", "x: " + "y" * 100_000) + END,
    "a thousand parts": b"".join(part(f"p{i}", b"") for i in range(1001)) + END,
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bodies_that_are_no_upload(shared: Running, body: bytes) -> None:
    num = len(shared.front.adapters.writers)
    error = refusal(push(shared, body.replace(b"new", b"ghost")))
    assert error["type"] == "invalid_request_error"
    for writer in shared.front.adapters.writers[num:]:
        assert eventually(lambda writer=writer: writer.state == "aborted")
    refusal(shared.http.get("/v1/adapters/ghost"), 404)


@pytest.mark.parametrize("missing", ["name", "config", "weights"])
def test_missing_parts_are_named(shared: Running, missing: str) -> None:
    parts = {"name": part("name", b"lost"), "config": CONF, "weights": BLOB}
    del parts[missing]
    assert refusal(push(shared, b"".join(parts.values()) + END))["param"] == missing


NAMES = ["", "..", "a/b", "a,b", "a b", "x" * 97, "é", "a\u200bb", "nul\x00", "-a", "a@1", "a:b"]


@pytest.mark.parametrize("name", [*(n.encode() for n in NAMES), b"\xff"])
def test_names_that_are_none(shared: Running, name: bytes) -> None:
    assert refusal(push(shared, part("name", name) + CONF + BLOB + END))["param"] == "name"


def test_the_base_models_name(shared: Running) -> None:
    refusal(upload(shared, "base"), 409)


@pytest.mark.parametrize(
    "media",
    ["multipart/form-data", "multipart/mixed; boundary=B", "", "text/plain"],
)
def test_media_types(shared: Running, media: str) -> None:
    body = NAME + CONF + BLOB + END
    assert refusal(push(shared, body, **{"content-type": media}), 415)
    assert refusal(push(shared, body, **{"content-encoding": "gzip"}), 415)


def test_parts_over_their_limits(start: Start) -> None:
    server = start(max_config_bytes=100, max_adapter_file_bytes=1000)
    exact = part("config", b"c" * 100) + part("weights", b"w" * 1000)
    assert push(server, NAME + exact + END).status_code == 202
    for body, param in (
        (NAME + part("config", b"c" * 101) + part("weights", b"w") + END, "config"),
        (NAME + part("config", b"c") + part("weights", b"w" * 1001) + END, "weights"),
        (part("name", b"n" * 300) + CONF + part("weights", b"w") + END, "name"),
    ):
        error = refusal(push(server, body), 413)
        assert error["param"] == param and error["code"] == "payload_too_large"
    assert all(writer.state != "open" for writer in server.front.adapters.writers)


def test_a_long_boundary(shared: Running) -> None:
    media = f"multipart/form-data; boundary={'b' * 5000}"
    assert push(shared, b"x", **{"content-type": media}).status_code in (400, 415)


def test_an_upload_that_breaks_off_leaves_nothing(shared: Running) -> None:
    num = len(shared.front.adapters.writers)
    raw = wire.connect(shared)
    media = "content-type: multipart/form-data; boundary=B"
    raw.sendall(wire.request("/v1/adapters", NAME + CONF + BLOB + END, media)[:-1000])
    assert eventually(lambda: len(shared.front.adapters.writers) == num + 1)
    raw.close()
    assert eventually(lambda: shared.front.adapters.writers[num].state == "aborted")


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("wait=x", "wait"),
        ("wait=-1", "wait"),
        ("wait=nan", "wait"),
        ("wait=1e9", "wait"),
        ("validate_only=hunter2hunter2", "validate_only"),
        ("expected_generation=1.5", "expected_generation"),
        ("expected_generation=-1", "expected_generation"),
    ],
)
def test_query(shared: Running, query: str, param: str) -> None:
    assert refusal(push(shared, NAME + CONF + BLOB + END, f"?{query}"))["param"] == param


def test_list_show_delete(start: Start) -> None:
    http = start().http
    listed = http.get("/v1/adapters").json()
    assert listed["object"] == "list"
    names = [view["name"] for view in listed["data"]]
    assert names == ["alien", "broken", "lonely", "shout", "slow", "whisper"]
    shout = http.get("/v1/adapters/shout").json()
    assert shout["id"] == "shout@3" and shout["rank"] == 8 and shout["status"] == "ready"
    assert http.get("/v1/adapters/shout@2").json()["generation"] == 2
    failed = http.get("/v1/adapters/broken").json()["error"]
    assert failed["problems"] == ["one", "two"]
    answer = http.delete("/v1/adapters/shout")
    assert answer.status_code == 202 and answer.json()["status"] == "deleting"
    refusal(http.get("/v1/adapters/shout"), 404)
    refusal(http.delete("/v1/adapters/shout"), 404)


def test_pins(start: Start) -> None:
    http = start().http
    assert http.put("/v1/adapters/shout/pin").json()["pinned"] is True
    assert http.delete("/v1/adapters/shout/pin").json()["pinned"] is False
    refusal(http.put("/v1/adapters/nobody/pin"), 404)
    refusal(http.put("/v1/adapters/slow/pin"), 409)


def test_capacity(start: Start) -> None:
    server = start()
    table = server.http.get("/v1/capacity").json()
    assert table["frames"]["total"] == table["frames"]["free"] == 100
    assert table["free_bytes"] == 100 * 8192 and table["tokens"] == INFO.max_model_len
    assert [(line["rank"], line["value_bytes"]) for line in table["adapters"]] == [
        (rank, width) for rank in (8, 16, 64) for width in (2, 4)
    ]
    line = table["adapters"][0]
    values = 2 * 8 * (64 + 64 + 64 + 32)
    assert line["adapter_bytes"] == 2 * values
    assert line["adapter_frames"] == 1 and line["fit"] == line["fit_now"] == 100 - 8
    line = table["adapters"][-1]
    assert line["adapter_frames"] == 14  # 28 slices of 4096 bytes, two to a frame
    assert line["fit"] == 92 // 14
    server.front.snapshot.stats.pool = PoolStats(100, 10, 40, 20, 10, 15, 5)
    table = server.http.get("/v1/capacity?tokens=320").json()
    assert table["frames"]["free"] == 10 and table["frames"]["reclaimable"] == 35
    assert table["adapters"][0]["fit"] == 80 and table["adapters"][0]["fit_now"] == 25
    assert server.http.get("/v1/capacity?tokens=0").json()["adapters"][0]["fit"] == 100
    assert server.http.get("/v1/capacity?tokens=99999999").json()["adapters"][0]["fit"] == 0
    refusal(server.http.get("/v1/capacity?tokens=-1"))
    server.front.info = None
    answer = server.http.get("/v1/capacity")
    assert refusal(answer, 503) and answer.headers["retry-after"]


def test_several_adapters_at_once_and_a_scale_for_one(start: Start) -> None:
    server = start()
    shout, whisper = (server.front.adapters.show(name).digest for name in ("shout", "whisper"))
    entries = [{"id": "shout", "scale": 0.1}, {"id": "whisper"}, {"id": "shout@2", "scale": -2}]
    answer = server.complete(model="base", adapters=entries)
    assert answer.status_code == 200 and answer.json()["model"] == "base"
    older = server.front.adapters.show("shout@2").digest
    label = f"{shout};scale=0.1, {whisper}, {older};scale=-2"
    assert answer.headers["x-loramux-adapter"] == label
    refs = server.front.specs[-1].adapters
    assert [ref.digest for ref in refs] == [shout, whisper, older]
    assert [ref.scale for ref in refs] == [float(np.float32(0.1)), 1.0, -2.0]
    answer = server.complete(model="lonely", scale=0.5)
    assert answer.headers["x-loramux-adapter"].endswith(";scale=0.5")
    assert server.complete(model="base", adapters=[{"id": "lonely"}]).status_code == 200
    missing = server.complete(model="base", adapters=[{"id": "shout"}, {"id": "nobody"}])
    assert missing.status_code == 404
