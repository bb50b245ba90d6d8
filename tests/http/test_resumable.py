"""Uploads in parts: over the real front, with connections that break and servers that restart."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.front.uploading import blobs as stored
from tests.http import wire
from tests.http.conftest import Running
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import address, expire, real_server, register

from loramux.adapters.partial import MAX_OPEN

LIMIT = 3 << 20
DATA = bytes(range(256)) * 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resumable")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Running]:
    with real_server(folder, max_adapter_file_bytes=LIMIT) as server:
        yield server


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def begin(server: Running, data: bytes = DATA) -> str:
    answer = server.post("/v1/uploads", bytes=len(data), sha256=sha(data))
    assert answer.status_code == 201, answer.text
    made = answer.json()
    assert made["object"] == "upload" and made["offset"] == 0
    assert made["bytes"] == len(data) and made["sha256"] == sha(data)
    assert time.time() < made["expires_at"] <= time.time() + 86400
    path = f"/v1/uploads/{made['id']}"
    assert answer.headers["location"] == path
    return path


def append(server: Running, path: str, offset: Any, data: Any, **headers: str) -> httpx.Response:
    return server.http.patch(path, content=data, headers={"upload-offset": str(offset), **headers})


def offset(server: Running, path: str) -> int:
    answer = server.http.head(path)
    assert answer.status_code == 200 and answer.content == b""
    return int(answer.headers["upload-offset"])


def partial(folder: Path) -> set[str]:
    return {path.name for path in (folder / "data" / "uploads").iterdir()}


@pytest.mark.parametrize("size", [1, 999, 70_000, len(DATA)])
def test_parts_become_the_blob_of_their_whole(real: Running, folder: Path, size: int) -> None:
    data = DATA[: 20 * size] + bytes([size % 251])
    path = begin(real, data)
    assert real.http.head(path).headers["upload-length"] == str(len(data))
    for start in range(0, len(data), size):
        part = data[start : start + size]
        answer = append(real, path, start, part if start % 2 else iter([part[:1], part[1:]]))
        assert answer.status_code == 204, answer.text
        assert int(answer.headers["upload-offset"]) == start + len(part) == offset(real, path)
    answer = real.http.post(f"{path}/complete")
    assert answer.status_code == 201
    assert answer.json() == {"object": "blob", "digest": f"sha256:{sha(data)}", "bytes": len(data)}
    assert real.http.head(address(data)).headers["content-length"] == str(len(data))
    gone(real, path)
    assert register(
        real, name=f"parts{size}", config={}, weights=f"sha256:{sha(data)}"
    ).status_code in (200, 201)
    assert sha(data) in stored(folder)


def gone(server: Running, path: str) -> None:
    """Nothing can be done with it any more, and no file is left."""
    assert server.http.head(path).status_code == 404
    for answer in (
        append(server, path, 0, b"x"),
        server.http.post(f"{path}/complete"),
        server.http.delete(path),
    ):
        assert refusal(answer, 404)["code"] == "upload_not_found"
    folder = server.front.config.data_dir  # type: ignore[union-attr]
    assert path.rpartition("/")[2] not in {p.name for p in (folder / "uploads").iterdir()}


# Row 31.
def test_a_wrong_offset_is_told_the_right_one(real: Running) -> None:
    path = begin(real)
    append(real, path, 0, DATA[:1000])
    for wrong in (0, 999, 1001, 10**17):
        answer = append(real, path, wrong, b"x" * 10)
        error = refusal(answer, 409)
        assert error["code"] == "upload_offset_mismatch"
        assert answer.headers["upload-offset"] == "1000"
        assert answer.headers["x-should-retry"] == "false"
    for malformed in ("", "-1", "1.0", "0x10", "9" * 19):
        error = refusal(append(real, path, malformed, b"x"))
        assert error["param"] == "Upload-Offset"
    assert refusal(real.http.patch(path, content=b"x"))["param"] == "Upload-Offset"
    assert offset(real, path) == 1000
    assert real.http.delete(path).status_code == 204
    gone(real, path)


def test_past_the_declared_end(real: Running) -> None:
    path = begin(real)
    append(real, path, 0, DATA[:1000])
    rest = DATA[1000:] + b"!"
    for body in (rest, iter([rest[:5000], rest[5000:]])):
        assert refusal(append(real, path, 1000, body), 413)["code"] == "payload_too_large"
        assert offset(real, path) == 1000, "nothing of such a part is kept"
    assert append(real, path, 1000, DATA[1000:]).status_code == 204
    assert append(real, path, len(DATA), b"").status_code == 204
    assert refusal(append(real, path, len(DATA), b"x"), 413)
    assert real.http.post(f"{path}/complete").status_code == 201


def test_completing_too_early_and_with_other_bytes(real: Running, folder: Path) -> None:
    path = begin(real)
    append(real, path, 0, b"x" * 1000)
    answer = real.http.post(f"{path}/complete")
    assert refusal(answer, 409)["code"] == "upload_incomplete"
    assert answer.headers["upload-offset"] == "1000"
    append(real, path, 1000, DATA[1000:])
    before = stored(folder)
    answer = real.http.post(f"{path}/complete")
    assert refusal(answer)["code"] == "digest_mismatch"
    gone(real, path)
    assert stored(folder) == before


def test_nothing_at_all_is_a_file_too(real: Running) -> None:
    path = begin(real, b"")
    assert real.http.post(f"{path}/complete").status_code == 201
    assert real.http.head(address(b"")).status_code == 200


def busy(server: Running) -> bool:
    """Whether a part is on its way. Asking over HTTP would be one more, in the way of the other."""
    return bool(server.front.adapters.resumable._busy)


def test_a_part_that_breaks_off_is_kept_as_far_as_it_came(real: Running, folder: Path) -> None:
    data = DATA * 20
    path = begin(real, data)
    raw = wire.connect(real)
    request = wire.request(path, data, "upload-offset: 0", method="PATCH")
    raw.sendall(request[: -len(data) + 2_000_000])
    file = folder / "data" / "uploads" / path.rpartition("/")[2]
    assert eventually(lambda: file.stat().st_size >= 1 << 20)
    raw.close()
    assert eventually(lambda: offset(real, path) > 0 and not busy(real))
    at = offset(real, path)
    assert 1 << 20 <= at <= 2_000_000 and file.read_bytes() == data[:at]
    assert append(real, path, at, data[at:]).status_code == 204
    assert real.http.post(f"{path}/complete").status_code == 201


def test_one_part_at_a_time(real: Running) -> None:
    path = begin(real)
    raw = wire.connect(real)
    request = wire.request(path, DATA, "upload-offset: 0", method="PATCH")
    raw.sendall(request[: -len(DATA) + 50_000])
    assert eventually(lambda: busy(real))
    assert offset(real, path) == 0, "what is still coming is not durable yet"
    again = append(real, path, 1, b"")
    for answer in (again, real.http.post(f"{path}/complete"), real.http.delete(path)):
        assert refusal(answer, 409)["code"] == "upload_busy"
        assert answer.headers["x-should-retry"] == "true" and answer.headers["retry-after"]
    raw.sendall(request[-len(DATA) + 50_000 :])
    assert wire.status(wire.read_until(raw, b"\r\n\r\n")) == 204
    assert offset(real, path) == len(DATA)
    assert real.http.post(f"{path}/complete").status_code == 201


def test_a_silent_part_is_cut_off_and_kept(tmp_path: Path) -> None:
    """A client whose network went away would keep its upload busy for as long as TCP waits."""
    with real_server(tmp_path, body_timeout_s=0.2) as server:
        path = begin(server)
        raw = wire.connect(server)
        request = wire.request(path, DATA, "upload-offset: 0", method="PATCH")
        raw.sendall(request[: -len(DATA) + 50_000])
        answer = wire.read_until(raw, b"}}")
        assert wire.status(answer) == 408 and wire.error(answer)["code"] == "request_timeout"
        assert eventually(lambda: offset(server, path) == 50_000)


BAD_BODIES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"bytes": 1}, "sha256", "digest_malformed"),
    ({"bytes": 1, "sha256": 7}, "sha256", "digest_malformed"),
    ({"bytes": 1, "sha256": "A" * 64}, "sha256", "digest_malformed"),
    ({"bytes": 1, "sha256": "sha256:" + "a" * 64}, "sha256", "digest_malformed"),
    ({"bytes": 1, "sha256": "../" * 21 + "a"}, "sha256", "digest_malformed"),
    ({"sha256": "a" * 64}, "bytes", "invalid_request"),
    ({"bytes": -1, "sha256": "a" * 64}, "bytes", "invalid_request"),
    ({"bytes": True, "sha256": "a" * 64}, "bytes", "invalid_request"),
    ({"bytes": 1.0, "sha256": "a" * 64}, "bytes", "invalid_request"),
    ({"bytes": "1", "sha256": "a" * 64}, "bytes", "invalid_request"),
    ({"bytes": 1, "sha256": "a" * 64, "x": 1}, None, "invalid_request"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD_BODIES)
def test_uploads_that_never_begin(
    real: Running, folder: Path, body: dict[str, Any], param: str | None, code: str
) -> None:
    before = partial(folder)
    error = refusal(real.post("/v1/uploads", **body))
    assert (error["param"], error["code"]) == (param, code)
    assert partial(folder) == before


def test_a_file_over_the_limit_never_begins(real: Running) -> None:
    error = refusal(real.post("/v1/uploads", bytes=LIMIT + 1, sha256="a" * 64), 413)
    assert error["param"] == "bytes"


@pytest.mark.parametrize("name", ["x", "a" * 32, "A" * 32, "..%2fregistry.sqlite", "%2e%2e"])
def test_ids_that_are_none(real: Running, name: str) -> None:
    path = f"/v1/uploads/{name}"
    for answer in (append(real, path, 0, b"x"), real.http.delete(path)):
        assert refusal(answer, 404)["code"] in ("upload_not_found", "route_not_found")


# Row 46.
def test_a_tenant_has_so_many_open_and_no_more(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        paths = [begin(server) for _ in range(MAX_OPEN)]
        answer = server.post("/v1/uploads", bytes=1, sha256=sha(b"x"))
        assert (
            refusal(answer, 429)["code"] == "rate_limit_exceeded" and answer.headers["retry-after"]
        )
        assert len(partial(tmp_path)) == MAX_OPEN
        assert server.http.delete(paths[0]).status_code == 204
        begin(server)


def test_an_upload_survives_a_restart(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        path, other = begin(server), begin(server)
        append(server, path, 0, DATA[:70_001])
    (tmp_path / "data" / "uploads" / "nobodys").write_bytes(b"a file without a row")
    (tmp_path / "data" / "uploads" / other.rpartition("/")[2]).unlink()  # a row without a file
    with real_server(tmp_path) as server:
        assert partial(tmp_path) == {path.rpartition("/")[2]}
        gone(server, other)
        assert offset(server, path) == 70_001
        assert append(server, path, 70_001, DATA[70_001:]).status_code == 204
        assert server.http.post(f"{path}/complete").status_code == 201


def test_an_upload_expires(tmp_path: Path) -> None:
    with real_server(tmp_path, sweep_s=0.05) as server:
        path, other = begin(server), begin(server)
        assert append(server, path, 0, b"abc").status_code == 204
        expire(server, "uploads", "id", path.rpartition("/")[2])
        assert eventually(lambda: len(partial(tmp_path)) == 1, within_s=20)
        gone(server, path)
        assert offset(server, other) == 0
