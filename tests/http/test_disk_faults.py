"""A disk that refuses at any moment: the upload hears 507, everybody else hears nothing, and when
there is room again it works again."""

from __future__ import annotations

import builtins
import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import PROMPT
from tests.front.uploading import blobs as stored
from tests.http.conftest import Running
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import address, leftovers, put, real_server, sha
from tests.http.test_resumable import append, begin, offset, partial

from loramux.adapters import blobs
from loramux.adapters import partial as partial_module
from loramux.adapters.partial import MAX_OPEN
from loramux.errors import StorageFull

DATA = b"d" * 3_000_000


class Disk:
    """Fails the ``left``-th call that writes, below one folder. Files opened for writing are
    wrapped, since their own methods are out of reach."""

    def __init__(self, number: int, left: int) -> None:
        self.number, self.left, self.failed = number, left, False

    def touch(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.failed = True
            raise OSError(self.number, os.strerror(self.number))

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.touch()
            return call(*args, **kwargs)

        return wrapped

    def open(self, path: Path, mode: str, **options: Any) -> Any:
        if "r" not in mode:
            self.touch()
        file = builtins.open(path, mode, **options)
        return file if "r" in mode else Written(file, self)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for module in (blobs, partial_module):
            patch.setattr(module, "open", self.open, raising=False)
        for name in ("fsync", "replace", "mkdir", "open"):
            patch.setattr(os, name, self.around(getattr(os, name)))


class Written:
    """A file whose writes may fail, the k-th after half of its bytes."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def write(self, data: bytes) -> int:
        try:
            self.disk.touch()
        except OSError:
            self.file.write(bytes(data)[: len(data) // 2])
            raise
        return int(self.file.write(data))

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Running]:
    with real_server(folder) as server:
        yield server


def refused_once(
    request: Callable[[int], Any],
    after: Callable[[int], None],
    number: int,
    prepare: Callable[[int], None] = lambda _: None,
) -> int:
    """``request(k)`` with the k-th call failing, until one lives; how many failed."""
    for left in itertools.count(1):
        prepare(left)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(number, left)
            disk.install(patch)
            answer = request(left)
        if not disk.failed:
            assert answer.status_code < 300
            return left - 1
        error = refusal(answer, 507)
        assert error["code"] == "storage_full" and error["type"] == "storage_error"
        assert answer.headers["x-should-retry"] == "false"
        after(left)
    raise AssertionError


ERRORS = [errno.ENOSPC, errno.EIO]


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_blob(real: Running, folder: Path, number: int) -> None:
    def data(k: int) -> bytes:
        return DATA + b"%d %d" % (k, number)

    def after(k: int) -> None:
        assert real.http.head(address(data(k))).status_code == 404
        assert sha(data(k)) not in stored(folder) and not leftovers(folder)
        assert real.complete(PROMPT).status_code == 200
        assert real.http.get("/health/ready").status_code == 200
        assert put(real, data(k)).status_code == 201, "there is room again"

    assert refused_once(lambda k: put(real, data(k)), after, number) >= 6


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_a_part(real: Running, folder: Path, number: int) -> None:
    path = begin(real, DATA + b"%d" % number)
    append(real, path, 0, DATA[:1000])

    def after(_: int) -> None:
        assert offset(real, path) == 1000, "nothing of a part that met a bad disk is kept"

    assert refused_once(lambda _: append(real, path, 1000, DATA[1000:]), after, number) >= 4
    assert append(real, path, len(DATA), b"%d" % number).status_code == 204
    assert real.http.post(f"{path}/complete").status_code == 201


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_the_beginning_and_the_end_of_an_upload(real: Running, folder: Path, number: int) -> None:
    before = partial(folder)
    body = {"bytes": 1, "sha256": "a" * 64}
    refused_once(
        lambda _: real.post("/v1/uploads", **body),
        lambda _: None if partial(folder) == before else pytest.fail("a file is left"),
        number,
    )
    paths: dict[int, str] = {}

    def data(k: int) -> bytes:
        return b"the end %d %d" % (k, number)

    def prepare(k: int) -> None:
        paths[k] = begin(real, data(k))
        append(real, paths[k], 0, data(k))

    def after(k: int) -> None:
        again = real.http.post(f"{paths[k]}/complete")
        if again.status_code == 404:  # the file had its new name already: start again
            assert real.http.head(address(data(k))).status_code == 404
            assert put(real, data(k)).status_code == 201
        else:
            assert again.status_code == 201

    def complete(k: int) -> Any:
        return real.http.post(f"{paths[k]}/complete")

    assert refused_once(complete, after, number, prepare) >= 3


@pytest.mark.parametrize(
    ("code", "status", "again"),
    [
        ("storage_full", 507, "false"),
        ("internal_error", 500, None),
        ("blob_corrupt", 422, "false"),
    ],
)
def test_an_adapter_that_could_not_be_packed(
    real: Running, code: str, status: int, again: str | None
) -> None:
    """Whose fault that was, the status says; and the name is not taken by what failed."""
    files = {"config": b'{"bad": ["why"], "code": "%s"}' % code.encode(), "weights": b"w"}
    for query in ("?wait=30", "?validate_only=1"):
        answer = real.http.post("/v1/adapters" + query, data={"name": "cat"}, files=files)
        assert refusal(answer, status)["code"] == code
        assert answer.headers.get("x-should-retry") == again
    assert refusal(real.complete(PROMPT, model="cat"), 409)["code"] == "adapter_failed"
    files["config"] = b"{}"
    answer = real.http.post("/v1/adapters?wait=30", data={"name": "cat"}, files=files)
    assert answer.status_code == 201
    assert real.http.delete("/v1/adapters/cat").status_code == 202


def test_a_full_registry(real: Running, folder: Path) -> None:
    database = real.front.adapters._registry.database  # type: ignore[attr-defined]
    put(real, b"before")
    pages = database.connection.execute("PRAGMA page_count").fetchone()[0]
    database.connection.execute(f"PRAGMA max_page_count = {pages}")
    try:
        with pytest.raises(StorageFull):
            for k in range(5000):
                database_fill(real, k)
        fresh = b"into a full registry"
        assert refusal(put(real, fresh), 507)["code"] == "storage_full"
        answers = (real.post("/v1/uploads", bytes=1, sha256="a" * 64) for _ in range(MAX_OPEN))
        refused = next(answer for answer in answers if answer.status_code != 201)
        assert refusal(refused, 507)["code"] == "storage_full", "when its own page is full"
        assert sha(fresh) not in stored(folder) and real.http.head(address(b"before"))
        assert real.complete(PROMPT).status_code == 200
    finally:
        database.connection.execute("PRAGMA max_page_count = 4294967294")
    assert put(real, fresh).status_code == 201


def database_fill(server: Running, k: int) -> None:
    granted = server.front.adapters.blobs._granted  # type: ignore[attr-defined]
    granted.grant("filler", sha(b"%d" % k), 1, 9999)
