"""Generations end one by one, by hand or when their time is over, and give back what they held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.front.house import PROMPT, configure, running, spec, until
from tests.front.test_adapters import until_said
from tests.front.uploading import engine_said, files
from tests.front.uploading import upload as begin
from tests.http.conftest import Running
from tests.http.fake_front import eventually
from tests.http.test_aliases import put, served, told, upload
from tests.http.test_bad_inputs import refusal
from tests.http.test_blobs import real_server, sha

from loramux.errors import NotFound
from loramux.front import catalog as catalog_module

YEARS = 10 * 366 * 86400


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with real_server(tmp_path_factory.mktemp("lifetimes"), sweep_s=0.05) as server:
        yield server


def set_ttl(server: Running, name: str, ttl_s: Any) -> Any:
    return server.http.put(f"/v1/adapters/{name}/ttl", json={"ttl_s": ttl_s})


def test_one_generation_goes(real: Running) -> None:
    one = upload(real, "cat", b"1")
    upload(real, "cat", b"2", "&expected_generation=1")
    assert real.http.put("/v1/adapters/cat/pin").json()["generation"] == 2
    assert refusal(real.http.delete("/v1/adapters/cat@2"), 409)["code"] == "adapter_pinned"
    answer = real.http.delete(f"/v1/adapters/cat@sha256:{one['digest'][:12]}")
    assert answer.status_code == 202
    assert (answer.json()["id"], answer.json()["status"]) == ("cat@1", "deleting")
    assert eventually(lambda: told(real, "evict", one["digest"]))
    ids = [view["id"] for view in real.http.get("/v1/adapters/cat/versions").json()["data"]]
    assert ids == ["cat@2"]
    error = refusal(real.http.delete("/v1/adapters/cat@1"), 404)
    assert error["code"] == "generation_gone"
    for model in ("cat@3", "cat@0", "cat@x", "base@1"):
        refusal(real.http.delete(f"/v1/adapters/{model}"), 404)
    real.http.delete("/v1/adapters/cat/pin")
    assert real.http.delete("/v1/adapters/cat").status_code == 202


def test_the_last_generation_takes_the_name_along(real: Running) -> None:
    upload(real, "pup", b"1")
    assert real.http.delete("/v1/adapters/pup@1").status_code == 202
    refusal(real.http.get("/v1/adapters/pup"), 404)
    assert upload(real, "pup", b"2")["generation"] == 2
    real.http.delete("/v1/adapters/pup")


def test_a_time_to_live_at_upload(real: Running) -> None:
    view = upload(real, "fly", b"f", "&ttl_s=1")
    assert 0 < view["expires_at"] - time.time() <= 2
    assert served(real, "fly")[1] == "fly@1"
    assert eventually(lambda: real.complete(PROMPT, model="fly").status_code == 404)
    assert time.time() >= view["expires_at"], "not before its time"
    assert eventually(lambda: told(real, "evict", view["digest"]))
    assert "fly" not in [v["name"] for v in real.http.get("/v1/adapters").json()["data"]]
    forever = upload(real, "stone", b"s")
    assert forever["expires_at"] is None
    view = upload(real, "stone", b"s", "&ttl_s=100", status=200)
    assert view["generation"] == 1 and view["expires_at"], "also for what was there"
    body = {"name": "stone", "config": {}, "weights": f"sha256:{sha(b's')}"}
    for path, ttl_s in (("", 0), ("", True), ("?ttl_s=5", 6)):
        answer = real.http.post(f"/v1/adapters{path}", json={**body, "ttl_s": ttl_s})
        assert refusal(answer)["param"] == "ttl_s"
    answer = real.http.post("/v1/adapters?ttl_s=7&wait=9", json={**body, "ttl_s": 7})
    assert answer.status_code == 200 and answer.json()["expires_at"] < view["expires_at"]
    real.http.delete("/v1/adapters/stone")


def test_a_time_to_live_changes(real: Running) -> None:
    upload(real, "cat", b"10")
    answer = set_ttl(real, "cat", 1000)
    assert answer.status_code == 200 and 998 < answer.json()["expires_at"] - time.time() < 1002
    assert set_ttl(real, "cat", None).json()["expires_at"] is None
    assert set_ttl(real, "cat", YEARS).status_code == 200
    for bad in (0, -1, 1.5, True, "1", YEARS + 1, [], {}):
        assert refusal(set_ttl(real, "cat", bad))["param"] == "ttl_s"
    for body in ({}, {"ttl_s": 1, "x": 1}, {"ttl": 1}):
        refusal(real.http.put("/v1/adapters/cat/ttl", json=body))
    for query in ("0", "-1", "x", "1.5", "nan", str(YEARS + 1)):
        answer = real.http.post(f"/v1/adapters?ttl_s={query}", data={"name": "x"}, files=FILES)
        assert refusal(answer)["param"] == "ttl_s"
    refusal(set_ttl(real, "nobody", 1), 404)
    refusal(set_ttl(real, "cat@99", 1), 404)
    refusal(set_ttl(real, "base", 1), 403)
    real.http.delete("/v1/adapters/cat")


FILES = {"config": b"{}", "weights": b"x"}


def test_an_alias_keeps_what_has_expired(real: Running) -> None:
    view = upload(real, "owl", b"o", "&ttl_s=1")
    put(real, "prod", "owl@1")
    assert eventually(lambda: time.time() > view["expires_at"] + 0.2)
    assert served(real, "prod") == (view["digest"], "owl@1") and served(real, "owl")
    real.http.delete("/v1/aliases/prod")
    refusal(real.complete(PROMPT, model="owl"), 404)
    assert eventually(lambda: told(real, "evict", view["digest"]))


def test_the_newest_ends_and_the_one_before_serves(real: Running) -> None:
    upload(real, "elk", b"1")
    view = upload(real, "elk", b"2", "&expected_generation=1&ttl_s=1")
    assert served(real, "elk")[1] == "elk@2"
    assert eventually(lambda: served(real, "elk")[1] == "elk@1")
    assert time.time() >= view["expires_at"]
    real.http.delete("/v1/adapters/elk")


def test_from_the_very_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sweeps here."""

    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await begin(front, "cat")
            view = await front.adapters.set_ttl("cat", 1000)
            assert view.expires_at is not None
            served = front.adapters.resolve("cat")
            with monkeypatch.context() as patch:
                patch.setattr(catalog_module, "time", Clock(view.expires_at - 0.01))
                assert front.adapters.resolve("cat@1") == served
            with monkeypatch.context() as patch:
                patch.setattr(catalog_module, "time", Clock(view.expires_at))
                for model in ("cat", "cat@1", f"cat@sha256:{view.digest}"):
                    with pytest.raises(NotFound):
                        front.adapters.resolve(model)
                    with pytest.raises(NotFound):
                        front.adapters.show(model)
                (listed,) = front.adapters.list()
                assert listed.status == "deleting", "until it is gone"

    asyncio.run(main())


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every clock of days is that much ahead from now on."""
    real_time = time.time
    monkeypatch.setattr(time, "time", lambda: real_time() + seconds)


def test_its_end_unpins_and_waits_for_the_last_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await begin(front, "cat")
            other = await begin(front, "dog", b"dog")
            for name in ("cat", "dog"):
                await front.adapters.set_pinned(name, True)
            await front.adapters.set_ttl("cat", 100)
            adapters = front.adapters.resolve("cat").adapters
            stream = front.submit(spec("r", "delay=0.01", 400, adapters))
            later(monkeypatch, 101)
            with pytest.raises(NotFound):
                front.adapters.resolve("cat")
            await front.adapters.expire()
            await asyncio.sleep(0.1)
            commands = (await engine_said(front))["commands"]
            assert ["evict", view.digest] not in commands, "a request runs on it"
            assert len(files(tmp_path)) == 2
            (deleting, _) = front.adapters.list()
            assert (deleting.status, deleting.pinned) == ("deleting", False)
            stream.cancel()
            await until_said(front, ["evict", view.digest])
            commands = (await engine_said(front))["commands"]
            gone = commands.index(["evict", view.digest])
            assert commands.index(["unpin", view.digest]) < gone, "else it would refuse"
            assert ["unpin", other.digest] not in commands
            await until(lambda: len(files(tmp_path)) == 1)

    asyncio.run(main())


def test_a_pin_of_the_same_bytes_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            view = await begin(front, "cat")
            await begin(front, "twin")
            for name in ("cat", "twin"):
                await front.adapters.set_pinned(name, True)
            await front.adapters.set_ttl("cat", 100)
            later(monkeypatch, 101)
            await front.adapters.expire()
            await until(lambda: [v.name for v in front.adapters.list()] == ["twin"])
            commands = (await engine_said(front))["commands"]
            assert ["unpin", view.digest] not in commands
            assert ["evict", view.digest] not in commands

    asyncio.run(main())


def test_it_survives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        config = configure(tmp_path)
        async with running(config) as front:
            await begin(front, "stays", b"s")
            await begin(front, "goes", b"g")
            await front.adapters.set_pinned("goes", True)
            await front.adapters.set_ttl("stays", 1000)
            expires = (await front.adapters.set_ttl("goes", 100)).expires_at
        later(monkeypatch, 101)
        async with running(config) as front:
            await until(lambda: [view.name for view in front.adapters.list()] == ["stays"])
            assert front.adapters.show("stays").expires_at
            await until(lambda: len(files(tmp_path)) == 1)
            pins = [c for c in (await engine_said(front))["commands"] if c[0] == "pin"]
            assert pins == [] and expires is not None

    asyncio.run(main())


def test_a_tenants_quota_counts_what_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running(configure(tmp_path)) as front:
            sizes: list[int] = []

            def count(tenant: str, num: int, which: str) -> None:
                if "every generation" in which:
                    sizes.append(num)

            monkeypatch.setattr(front.quotas, "check_adapters", count)
            await begin(front, "cat", b"1")
            await front.adapters.set_ttl("cat", 100)
            await begin(front, "dog", b"2")
            later(monkeypatch, 101)
            await begin(front, "owl", b"3")
            assert sizes == [0, 1, 1]
            await front.adapters.expire()
            await until(lambda: [v.name for v in front.adapters.list()] == ["dog", "owl"])

    asyncio.run(main())
