"""Files sent by their digest, and adapters registered from them: over the real front."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.front.house import ENGINE, INGEST, SERVER, configure
from tests.front.uploading import blobs as stored
from tests.http import wire
from tests.http.conftest import Running, serve
from tests.http.fake_front import eventually
from tests.http.test_bad_inputs import refusal

from loramux.front.front import Front

LIMIT = 3 << 20
CONFIG = b'{"r":8}'


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def address(data: bytes) -> str:
    return f"/v1/blobs/sha256:{sha(data)}"


@contextmanager
def real_server(
    folder: Path, *, ingest: Sequence[str] = INGEST, **fields: Any
) -> Iterator[Running]:
    """A server over a real front with scripted processes, or with another ``ingest``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(folder, port=0, **fields)
        server, stop = serve(Front(config, engine=ENGINE, ingest=ingest), config)
        try:
            assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=60)
            yield server
        finally:
            stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Running]:
    with real_server(folder, max_adapter_file_bytes=LIMIT, max_config_bytes=1000) as server:
        yield server


def expire(server: Running, table: str, key: str, *values: str) -> None:
    """What ``blob_ttl_s`` and ``upload_ttl_s`` do in a day."""
    database = server.front.adapters._registry.database  # type: ignore[attr-defined]
    with database.transaction() as db:
        for value in values:
            found = db.execute(f"SELECT expires FROM {table} WHERE {key} = ?", (value,)).fetchone()
            assert 86000 < found[0] - time.time() <= 86400
            db.execute(f"UPDATE {table} SET expires = 1 WHERE {key} = ?", (value,))


def put(server: Running, data: bytes, **options: Any) -> httpx.Response:
    return server.http.put(address(data), content=data, **options)


def register(server: Running, query: str = "?wait=30", **body: Any) -> httpx.Response:
    return server.http.post("/v1/adapters" + query, json=body)


def leftovers(folder: Path) -> list[Path]:
    return list((folder / "data" / "blobs" / "tmp").iterdir())


def test_put_then_head(real: Running, folder: Path) -> None:
    data = b"once" * 1000
    assert refusal_of_head(real, data)
    answer = put(real, data)
    assert answer.status_code == 201
    assert answer.json() == {"object": "blob", "digest": f"sha256:{sha(data)}", "bytes": len(data)}
    head = real.http.head(address(data))
    assert head.status_code == 200 and head.headers["content-length"] == str(len(data))
    assert put(real, data).status_code == 200, "it was there"
    assert real.http.request("PUT", address(data), content=iter([data])).status_code == 200
    assert sha(data) in stored(folder) and not leftovers(folder)
    assert put(real, b"").status_code == 201
    assert real.http.head(address(b"")).headers["content-length"] == "0"


def refusal_of_head(server: Running, data: bytes) -> bool:
    answer = server.http.head(address(data))
    return answer.status_code == 404 and answer.content == b""


# Row 28.
MALFORMED = [
    "sha256:" + "a" * 63,
    "sha256:" + "a" * 65,
    "sha256:" + "A" * 64,
    "sha256:" + "g" * 64,
    "sha512:" + "a" * 64,
    "a" * 64,
    "sha256:..%2f..%2fx",
    "sha256:%2e%2e/%2e%2e/etc/passwd",
    "sha256:" + "a" * 64 + "%00",
]


@pytest.mark.parametrize("digest", MALFORMED)
def test_a_malformed_digest_touches_no_file(real: Running, folder: Path, digest: str) -> None:
    before = stored(folder)
    answer = real.http.put(f"/v1/blobs/{digest}", content=b"x")
    assert refusal(answer)["code"] == "digest_malformed"
    assert real.http.head(f"/v1/blobs/{digest}").status_code == 400
    assert stored(folder) == before and not leftovers(folder)


# Row 29.
def test_other_bytes_than_announced(real: Running, folder: Path) -> None:
    before = stored(folder)
    for body in (b"other", b"announce", b"announced+", b""):
        answer = real.http.put(address(b"announced"), content=body)
        assert refusal(answer)["code"] == "digest_mismatch"
    assert refusal_of_head(real, b"announced")
    assert stored(folder) == before and not leftovers(folder)


def test_a_body_that_breaks_off_leaves_nothing(real: Running, folder: Path) -> None:
    data = b"x" * 200_000
    raw = wire.connect(real)
    raw.sendall(wire.request(address(data), data, method="PUT")[:-1000])
    assert eventually(lambda: len(leftovers(folder)) == 1)
    raw.close()
    assert eventually(lambda: not leftovers(folder))
    assert refusal_of_head(real, data)


def test_the_limit_byte(real: Running, folder: Path) -> None:
    exact, over = b"e" * LIMIT, b"o" * (LIMIT + 1)
    assert put(real, exact).status_code == 201
    assert refusal(put(real, over), 413)["code"] == "payload_too_large"
    chunked = real.http.put(address(over), content=iter([over[:1000], over[1000:]]))
    assert refusal(chunked, 413)
    assert sha(over) not in stored(folder) and not leftovers(folder)


def test_encoded_bodies_are_refused(real: Running) -> None:
    assert refusal(put(real, b"z", headers={"content-encoding": "gzip"}), 415)


# Row 30.
def test_the_same_blob_from_many_at_once(real: Running, folder: Path) -> None:
    data = b"everybody's" * 50_000
    answers: list[int] = []

    def send() -> None:
        with httpx.Client(base_url=real.url, timeout=30) as http:
            pieces = iter([data[:100_000], data[100_000:]])
            answers.append(http.put(address(data), content=pieces).status_code)

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] * 5 + [201]
    assert sha(data) in stored(folder) and not leftovers(folder)


def test_an_adapter_of_blobs(real: Running, folder: Path) -> None:
    weights = b"weights of blobs"
    put(real, CONFIG), put(real, weights)
    names = {"config": f"sha256:{sha(CONFIG)}", "weights": f"sha256:{sha(weights)}"}
    answer = register(real, name="cat", **names)
    assert answer.status_code == 201, answer.text
    files = {"config": CONFIG, "weights": weights}
    same = real.http.post("/v1/adapters?wait=30", data={"name": "cat"}, files=files)
    assert same.status_code == 200 and same.json() == answer.json(), "one pipeline behind all"
    # The object itself is stored with sorted keys and without spaces.
    assert register(real, name="cat", config={"r": 8}, weights=names["weights"]).status_code == 200
    dog = register(real, name="dog", config={"z": 1, "a": "ü"}, weights=names["weights"])
    assert dog.status_code == 201
    assert sha(json.dumps({"a": "ü", "z": 1}, separators=(",", ":")).encode()) in stored(folder)
    assert register(real, "?validate_only=1", name="dry", config={}, weights=names["weights"])
    assert refusal(real.http.get("/v1/adapters/dry"), 404)


# Row 45.
def test_generations(real: Running) -> None:
    for data in (b"gen one", b"gen two"):
        put(real, data)
    one, two = (f"sha256:{sha(data)}" for data in (b"gen one", b"gen two"))
    assert register(real, name="gen", config={}, weights=one).status_code == 201
    again = {"name": "gen", "config": {}, "weights": two}
    assert refusal(register(real, **again), 409)["code"] == "generation_conflict"
    for stale in (0, 2):
        assert refusal(register(real, expected_generation=stale, **again), 409)
    assert refusal(register(real, "?expected_generation=1", expected_generation=2, **again))
    answer = register(real, "", expected_generation=1, **again)
    assert answer.status_code in (201, 202) and answer.json()["generation"] == 2


def test_unknown_blobs_name_their_parameter(real: Running) -> None:
    put(real, b"known")
    known, unknown = f"sha256:{sha(b'known')}", f"sha256:{sha(b'unknown')}"
    for config, weights, param in ((unknown, known, "config"), ({}, unknown, "weights")):
        error = refusal(register(real, name="x", config=config, weights=weights), 404)
        assert error["code"] == "blob_not_found" and error["param"] == param
    for config, weights, param in (
        ("sha256:../../x", known, "config"),
        ({}, "A" * 64, "weights"),
        ({}, 7, "weights"),
        ([], known, "config"),
    ):
        error = refusal(register(real, name="x", config=config, weights=weights))
        assert error["code"] == "digest_malformed" and error["param"] == param


def test_a_config_over_its_limit(real: Running) -> None:
    put(real, b"w"), put(real, b"{" + b" " * 1000 + b"}")
    weights, large = f"sha256:{sha(b'w')}", sha(b"{" + b" " * 1000 + b"}")
    for config in (f"sha256:{large}", {"x": "y" * 1000}):
        error = refusal(register(real, name="big", config=config, weights=weights), 413)
        assert error["param"] == "config"


BAD_BODIES: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"[]", None),
    (b'{"name": "a", "name": "b"}', None),
    (b'{"name": "a", "surprise": 1}', None),
    (b'{"config": {}, "weights": "W"}', "name"),
    (b'{"name": "a", "weights": "W"}', "config"),
    (b'{"name": "a", "config": {}}', "weights"),
    (b'{"name": "a/b", "config": {}, "weights": "W"}', "name"),
    (b'{"name": 3, "config": {}, "weights": "W"}', "name"),
    (b'{"name": "a", "config": {"x": 1e999}, "weights": "W"}', "config"),
    (b'{"name": "a", "config": {"x": NaN}, "weights": "W"}', "config"),
    (b'{"name": "a", "config": {}, "weights": "W", "expected_generation": "1"}', None),
    (b'{"name": "a", "config": {}, "weights": "W", "expected_generation": true}', None),
    (b'{"name": "a", "config": ' + b'{"a":' * 100_000, None),
]


@pytest.mark.parametrize(("body", "param"), BAD_BODIES)
def test_bodies_that_register_nothing(real: Running, body: bytes, param: str | None) -> None:
    put(real, b"w")
    body = body.replace(b'"W"', f'"sha256:{sha(b"w")}"'.encode())
    answer = real.http.post(
        "/v1/adapters", content=body, headers={"content-type": "application/json"}
    )
    error = refusal(answer)
    assert param is None or error["param"] == param
    assert refusal(real.http.get("/v1/adapters/a"), 404)


def test_a_json_body_has_the_limit_of_json(real: Running) -> None:
    """Not that of the files, whatever a second content-type header says."""
    for headers in (
        ["content-type: application/json"],
        ["content-type: application/json", "content-type: multipart/form-data; boundary=B"],
    ):
        raw = wire.connect(real)
        head = [
            "POST /v1/adapters HTTP/1.1",
            "host: localhost",
            f"content-length: {9 << 20}",
            *headers,
        ]
        raw.sendall("\r\n".join([*head, "", ""]).encode())
        assert wire.status(wire.read_until(raw, b"}}")) == 413


def test_tenants_share_the_file_and_not_the_answer(tmp_path: Path) -> None:
    """Whose request it is comes from the ASGI scope; here a front without HTTP is asked."""
    import asyncio

    from tests.front.house import running

    async def body(data: bytes) -> Any:
        yield data

    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            blobs = front.adapters.blobs
            assert await blobs.put("a", sha(b"same"), body(b"same"))
            for tenant in ("", "b"):
                with pytest.raises(Exception, match="no such blob"):
                    await blobs.size(tenant, sha(b"same"))
                with pytest.raises(Exception, match="no such blob"):
                    async with blobs.claim(tenant, sha(b"same"), "weights"):
                        pass
            with pytest.raises(Exception, match="announced digest"):
                await blobs.put("b", sha(b"same"), body(b"guessed"))
            with pytest.raises(Exception, match="no such blob"):
                await blobs.size("b", sha(b"same"))
            assert await blobs.put("b", sha(b"same"), body(b"same")), "new to b"
            assert not await blobs.put("b", sha(b"same"), body(b"same"))
            assert stored(tmp_path) == {sha(b"same")}
            assert await blobs.size("b", sha(b"same")) == 4

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        asyncio.run(main())


def test_a_blob_waits_for_an_adapter_as_long_as_configured(tmp_path: Path) -> None:
    with real_server(tmp_path, sweep_s=0.05) as server:
        used, unused = b"used", b"unused"
        assert put(server, used).status_code == put(server, unused).status_code == 201
        weights = f"sha256:{sha(used)}"
        assert register(server, name="cat", config={}, weights=weights).status_code == 201
        assert stored(tmp_path) >= {sha(used), sha(unused)}
        expire(server, "tenant_blobs", "digest", sha(used), sha(unused))
        assert eventually(lambda: sha(unused) not in stored(tmp_path), within_s=20)
        assert refusal_of_head(server, unused)
        assert server.http.head(address(used)).status_code == 200, (
            "an adapter of the tenant needs it"
        )
        assert server.http.delete("/v1/adapters/cat").status_code == 202
        assert eventually(lambda: not stored(tmp_path), within_s=20)
        assert refusal_of_head(server, used)


def test_blobs_survive_a_restart_and_orphans_do_not(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        put(server, b"kept")
    data = tmp_path / "data" / "blobs"
    orphan = data / "sha256" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"nobody's")
    (data / "tmp" / "half").write_bytes(b"half")
    with real_server(tmp_path) as server:
        assert server.http.head(address(b"kept")).status_code == 200
        assert eventually(lambda: stored(tmp_path) == {sha(b"kept")} and not leftovers(tmp_path))
