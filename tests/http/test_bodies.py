"""Bodies that are still coming have one bound together, whatever route they are for."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Iterator

import pytest
from tests.http import wire
from tests.http.conftest import Running
from tests.http.fake_front import eventually
from tests.http.test_blobs import real_server

from loramux.http.bodies import WHOLE_BODIES
from loramux.http.openapi import BODIES, JSON

LARGEST = 4000
ROUTES = sorted(at for at, media in BODIES.items() if JSON in media)


def almost(server: Running, method: str, path: str, media: str) -> socket.socket:
    """A client that never sends the last byte of a body of the largest size."""
    body = b"{" + b" " * (LARGEST - 1)
    raw = wire.connect(server)
    raw.sendall(wire.request(path, body, f"content-type: {media}", method=method)[:-1])
    return raw


def answered(clients: list[socket.socket]) -> socket.socket:
    """The first that has an answer."""
    with selectors.DefaultSelector() as ready:
        for raw in clients:
            ready.register(raw, selectors.EVENT_READ)
        found = ready.select(10)
    assert found, "all of them are kept"
    return found[0][0].fileobj  # type: ignore[return-value]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bodies")
    with real_server(folder, max_body_bytes=LARGEST, lora_path_root=folder) as server:
        yield server


def takes_large_bodies(server: Running) -> bool:
    return server.post("/tokenize", prompt="u" * (LARGEST - 100)).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_json_body_counts(method: str, path: str, server: Running) -> None:
    path = path.format(name="a", alias="a")
    clients = [almost(server, method, path, JSON) for _ in range(WHOLE_BODIES + 1)]
    answer = wire.read_until(answered(clients), b"}}")
    assert wire.status(answer) == 503 and wire.error(answer)["code"] == "overloaded"
    for raw in clients:
        raw.close()
    assert eventually(lambda: takes_large_bodies(server))


def test_uploads_do_not_count(server: Running) -> None:
    for _ in range(2 * WHOLE_BODIES):
        almost(server, "POST", "/v1/adapters", "multipart/form-data; boundary=b")
    assert takes_large_bodies(server)
