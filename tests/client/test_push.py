"""How an adapter's files reach the server: skipped, whole, or in parts over bad connections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.client.conftest import Connect
from tests.client.doubles import write_adapter_files

from loramux_client import (
    AdapterFilesError,
    AdapterInvalidError,
    ConnectionFailedError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    OverloadedError,
    RequestTimeoutError,
    _sending,
)

Fault = httpx.Response | Exception | None
WEIGHTS = bytes(range(256)) * 3000


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def adapter(status: str = "ready", **more: Any) -> dict[str, Any]:
    return {"id": "a", "name": "a", "digest": "d" * 64, "status": status, "generation": 1, **more}


def refusal(status: int, code: str, **headers: str) -> httpx.Response:
    hyphened = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.Response(status, json={"error": {"message": "no", "code": code}}, headers=hyphened)


class Blobs:
    """A server with blobs and one upload. ``fault(request)`` may answer first, or raise; with
    ``keep`` bytes of a part having arrived all the same. ``verdicts`` answer the adapter."""

    def __init__(self, fault: Callable[[httpx.Request], Fault] = lambda _: None) -> None:
        self.fault = fault
        self.blobs: dict[str, bytes] = {}
        self.arrived = bytearray()
        self.announced: dict[str, Any] = {}
        self.keep = 0
        self.log: list[str] = []
        self.registered: list[dict[str, Any]] = []
        self.verdicts = [httpx.Response(201, json=adapter())]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = request.content
        path = request.url.path
        self.log.append(f"{request.method} {path}")
        if path.startswith("/v1/adapters"):
            if body:
                self.registered.append(json.loads(body))
            return self.verdicts.pop(0)
        fault = self.fault(request)
        if fault is not None:
            if request.method == "PATCH":
                self.arrived += body[: self.keep]
            if isinstance(fault, Exception):
                raise fault
            return fault
        if "/blobs/" in path:
            return self.blob(request.method, path.removeprefix("/v1/blobs/sha256:"), request)
        return self.upload(request.method, path, request)

    def blob(self, method: str, digest: str, request: httpx.Request) -> httpx.Response:
        if method == "HEAD":
            return httpx.Response(200 if digest in self.blobs else 404)
        assert "transfer-encoding" not in request.headers
        assert request.headers["content-length"] == str(len(request.content))
        assert sha(request.content) == digest
        self.blobs[digest] = request.content
        return httpx.Response(201, json={})

    def upload(self, method: str, path: str, request: httpx.Request) -> httpx.Response:
        at = {"upload-offset": str(len(self.arrived))}
        if path == "/v1/uploads":
            self.announced = json.loads(request.content)
            return httpx.Response(201, json={"id": "u1", "offset": 0})
        if not self.announced:
            return refusal(404, "upload_not_found")
        if method == "HEAD":
            return httpx.Response(200, headers=at)
        if method == "PATCH":
            if int(request.headers["upload-offset"]) != len(self.arrived):
                return refusal(409, "upload_offset_mismatch", x_should_retry="false", **at)
            self.arrived += request.content
            return httpx.Response(204, headers={"upload-offset": str(len(self.arrived))})
        assert path.endswith("/complete")
        assert sha(self.arrived) == self.announced["sha256"]
        assert len(self.arrived) == self.announced["bytes"]
        self.blobs[sha(self.arrived)] = bytes(self.arrived)
        self.announced = {}
        return httpx.Response(201, json={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter_files(tmp_path / "mine", WEIGHTS)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Everything above a kilobyte is large; bytes of one part."""
    monkeypatch.setattr(_sending, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(_sending, "PART_BYTES", 300_000)
    return 300_000


def config(folder: Path) -> bytes:
    return (folder / "adapter_config.json").read_bytes()


def test_small_files_go_whole_and_only_once(connect: Connect, folder: Path) -> None:
    server = Blobs()
    counts: list[tuple[int, int]] = []
    client = connect(server)
    got = client.call("adapters.push", folder, progress=lambda *c: counts.append(c))
    assert got.status == "ready"
    blobs = [f"/v1/blobs/sha256:{sha(data)}" for data in (config(folder), WEIGHTS)]
    assert server.log == [
        *(f"{method} {path}" for path in blobs for method in ("HEAD", "PUT")),
        "POST /v1/adapters",
    ]
    digests = [f"sha256:{sha(data)}" for data in (config(folder), WEIGHTS)]
    registered = {"name": "mine", "config": digests[0], "weights": digests[1]}
    assert server.registered == [registered]
    total = len(WEIGHTS) + len(config(folder))
    assert counts[-1] == (total, total) and len(counts) > 3
    assert [sent for sent, _ in counts] == sorted(sent for sent, _ in counts)
    # The second push of the same bytes sends nothing.
    server.log.clear()
    server.verdicts = [httpx.Response(200, json=adapter())]
    client.call("adapters.push", folder, "other", expected_generation=3)
    assert server.log == [*(f"HEAD {path}" for path in blobs), "POST /v1/adapters"]
    assert server.registered[1:] == [{**registered, "name": "other", "expected_generation": 3}]


def test_push_waits_for_the_verdict(connect: Connect, pauses: list[float], folder: Path) -> None:
    server = Blobs()
    server.verdicts = [
        httpx.Response(202, json=adapter("validating")),
        httpx.Response(200, json=adapter("validating")),
        httpx.Response(200, json=adapter("ready", rank=4)),
    ]
    assert connect(server).call("adapters.push", folder).rank == 4
    assert server.log[-2:] == ["GET /v1/adapters/a@1"] * 2
    assert pauses == [0.05, 0.1]


def test_push_that_does_not_wait(connect: Connect, pauses: list[float], folder: Path) -> None:
    server = Blobs()
    server.verdicts = [httpx.Response(202, json=adapter("validating"))]
    assert connect(server).call("adapters.push", folder, wait=False).status == "validating"
    assert pauses == []


def test_push_stops_waiting(connect: Connect, folder: Path) -> None:
    server = Blobs()
    server.verdicts = [httpx.Response(202, json=adapter("validating")) for _ in range(9)]
    with pytest.raises(RequestTimeoutError, match="'a' is still validating"):
        connect(server).call("adapters.push", folder, wait=1e-9)


def test_push_of_what_cannot_be_served_says_why_at_once_or_later(
    connect: Connect, folder: Path
) -> None:
    problems = ["lm_head: not a linear layer", "r=0"]
    error = {"code": "adapter_invalid", "message": "no", "problems": problems}
    server = Blobs()
    server.verdicts = [
        httpx.Response(422, json={"error": error}, headers={"x-should-retry": "false"}),
        httpx.Response(202, json=adapter("validating")),
        httpx.Response(200, json=adapter("failed", error=error)),
    ]
    client = connect(server)
    for status in (422, None):
        with pytest.raises(AdapterInvalidError) as caught:
            client.call("adapters.push", folder)
        assert caught.value.problems == problems and caught.value.status == status


def test_a_small_file_is_sent_whole_again_after_a_failure(
    connect: Connect, pauses: list[float], folder: Path
) -> None:
    faults = [refusal(503, "overloaded", retry_after="2"), httpx.ReadError("dropped")]
    bodies = []

    def fault(request: httpx.Request) -> Fault:
        if request.method == "PUT" and len(request.content) == len(WEIGHTS):
            bodies.append(request.content)
            return faults.pop(0) if faults else None
        return None

    assert connect(Blobs(fault)).call("adapters.push", folder).status == "ready"
    assert bodies == [WEIGHTS] * 3 and pauses[0] == 2 and len(pauses) == 2


def test_what_head_cannot_say_the_next_request_does(connect: Connect, folder: Path) -> None:
    def fault(request: httpx.Request) -> Fault:
        return httpx.Response(401) if request.method == "HEAD" else refusal(401, "invalid_api_key")

    with pytest.raises(Exception, match="invalid_api_key"):
        connect(Blobs(fault)).call("adapters.push", folder)


def test_a_large_file_goes_in_parts(connect: Connect, folder: Path, in_parts: int) -> None:
    server = Blobs()
    counts: list[int] = []
    client = connect(server)
    client.call("adapters.push", folder, progress=lambda sent, _: counts.append(sent))
    uploads = [line for line in server.log if "/uploads" in line]
    assert uploads == [
        "POST /v1/uploads",
        *["PATCH /v1/uploads/u1"] * -(-len(WEIGHTS) // in_parts),
        "POST /v1/uploads/u1/complete",
    ]
    assert server.blobs[sha(WEIGHTS)] == WEIGHTS
    assert counts == sorted(counts)
    server.log.clear()
    server.verdicts = [httpx.Response(200, json=adapter())]
    client.call("adapters.push", folder)
    assert not [line for line in server.log if "/uploads" in line]


FAULTS: list[Callable[[], Fault]] = [
    lambda: httpx.ConnectError("refused"),
    lambda: httpx.ReadError("dropped"),
    lambda: httpx.WriteTimeout("slow"),
    lambda: httpx.RemoteProtocolError("gone"),
    lambda: refusal(503, "overloaded"),
    lambda: refusal(408, "request_timeout", x_should_retry="true"),
    lambda: refusal(409, "upload_busy", x_should_retry="true", retry_after="1"),
    lambda: httpx.Response(502, text="<html>"),
]


@pytest.mark.parametrize("keep", [0, 1, 12_345])
@pytest.mark.parametrize("make", FAULTS)
def test_a_broken_part_is_resumed_where_the_server_stands(
    connect: Connect, folder: Path, in_parts: int, make: Callable[[], Fault], keep: int
) -> None:
    number = 0

    def fault(request: httpx.Request) -> Fault:
        nonlocal number
        number += request.method == "PATCH"
        return make() if request.method == "PATCH" and number % 2 else None

    server = Blobs(fault)
    server.keep = keep
    counts: list[int] = []
    client = connect(server)
    client.call("adapters.push", folder, progress=lambda sent, _: counts.append(sent))
    assert server.blobs[sha(WEIGHTS)] == WEIGHTS
    assert "HEAD /v1/uploads/u1" in server.log
    assert counts[-1] == len(WEIGHTS) + len(config(folder))


def test_a_wrong_offset_is_put_right(connect: Connect, folder: Path, in_parts: int) -> None:
    server = Blobs()
    server.arrived += WEIGHTS[:777]  # an earlier part whose answer never came
    connect(server).call("adapters.push", folder)
    assert server.blobs[sha(WEIGHTS)] == WEIGHTS


def test_a_server_that_stays_away_is_given_up(
    connect: Connect, pauses: list[float], folder: Path, in_parts: int
) -> None:
    tries = 0

    def fault(request: httpx.Request) -> Fault:
        nonlocal tries
        if "/uploads/" in request.url.path:
            tries += 1
            return httpx.ConnectError("refused")
        return None

    with pytest.raises(ConnectionFailedError):
        connect(Blobs(fault)).call("adapters.push", folder)
    assert tries == _sending.MAX_STALLS + 1 == len(pauses) + 1
    assert sum(pauses) < 60


def test_what_will_not_get_better_is_not_tried_again(
    connect: Connect, pauses: list[float], folder: Path, in_parts: int
) -> None:
    answers = [
        (refusal(507, "storage_full", x_should_retry="false"), "StorageFull"),
        (refusal(413, "payload_too_large"), "PayloadTooLarge"),
        (refusal(404, "upload_not_found"), "NotFound"),
        (refusal(503, "draining", retry_after="3600"), "Overloaded"),
    ]
    for answer, name in answers:
        server = Blobs(lambda r, a=answer: a if r.method == "PATCH" else None)  # type: ignore[misc]
        with pytest.raises(Exception) as caught:
            connect(server).call("adapters.push", folder)
        assert type(caught.value).__name__ == f"{name}Error"
        assert server.log.count("PATCH /v1/uploads/u1") == 1 and pauses == []


def test_an_upload_that_is_gone_after_a_break_says_so(
    connect: Connect, folder: Path, in_parts: int
) -> None:
    def fault(request: httpx.Request) -> Fault:
        if request.method == "PATCH" and server.announced:
            server.announced = {}
            return httpx.ReadError("restarted without it")
        return None

    server = Blobs(fault)
    with pytest.raises(NotFoundError) as caught:
        connect(server).call("adapters.push", folder)
    assert caught.value.code == "upload_not_found"


def test_the_answer_to_complete_may_be_lost(connect: Connect, folder: Path, in_parts: int) -> None:
    lost = [httpx.ReadError("dropped")]

    def fault(request: httpx.Request) -> Fault:
        if request.url.path.endswith("/complete") and lost:
            server.upload("POST", request.url.path, request)
            return lost.pop()
        return None

    server = Blobs(fault)
    connect(server).call("adapters.push", folder)
    assert server.log.count("POST /v1/uploads/u1/complete") == 2
    server = Blobs(
        lambda r: refusal(404, "upload_not_found") if r.url.path.endswith("complete") else None
    )
    with pytest.raises(NotFoundError):
        connect(server).call("adapters.push", folder)
    mismatch = refusal(400, "digest_mismatch")
    server = Blobs(lambda r: mismatch if r.url.path.endswith("complete") else None)
    with pytest.raises(InvalidRequestError):
        connect(server).call("adapters.push", folder)


@pytest.mark.parametrize("offset", ["", "x", "-1", "²", "0", str(len(WEIGHTS) + 1)])
def test_offsets_that_make_no_sense(
    connect: Connect, folder: Path, in_parts: int, offset: str
) -> None:
    headers = [(b"upload-offset", offset.encode())]
    server = Blobs(lambda r: httpx.Response(204, headers=headers) if r.method == "PATCH" else None)
    with pytest.raises(InvalidResponseError):
        connect(server).call("adapters.push", folder)


def test_an_upload_without_an_id(connect: Connect, folder: Path, in_parts: int) -> None:
    server = Blobs(lambda r: httpx.Response(201, json={}) if r.url.path == "/v1/uploads" else None)
    with pytest.raises(InvalidResponseError):
        connect(server).call("adapters.push", folder)


def test_a_file_that_vanishes_fails_the_push_as_it_is(connect: Connect, folder: Path) -> None:
    def vanish(sent: int, total: int) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"")

    with pytest.raises(AdapterFilesError, match="shrank"):
        connect(Blobs()).call("adapters.push", folder, progress=vanish)
    with pytest.raises(AdapterFilesError, match="neither a folder"):
        connect(Blobs()).call("adapters.push", folder / "nowhere")


def test_an_overloaded_server_is_reported_in_the_end(connect: Connect, folder: Path) -> None:
    server = Blobs(lambda _: refusal(503, "overloaded"))
    with pytest.raises(OverloadedError):
        connect(server).call("adapters.push", folder)
