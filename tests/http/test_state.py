"""``GET /admin/state``: names for digests, hashes for tenants, one size whatever there is."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from tests.http.conftest import Running, Start
from tests.http.fake_front import FakeFront, row

from loramux.config import ServerConfig
from loramux.engine.picture import (
    MOST_ADAPTER_HOLDERS,
    MOST_ADAPTERS,
    MOST_CELLS,
    MOST_EVENTS,
    MOST_QUEUES,
    MOST_ROWS,
    MOST_TENANT_HOLDERS,
)
from loramux.errors import Overloaded
from loramux.http.site import HEADERS
from loramux.http.state import State
from loramux.metrics.picture import (
    BatchRow,
    Cell,
    Event,
    Frames,
    Holder,
    Picture,
    Resident,
    Waiting,
)

KIB = 1024


def resident(digest: str, cell: Cell = Cell.WARM) -> Resident:
    return Resident(digest, 0, cell, 3, 123_456_789, 1, False, 1234.567)


def batch_row(digests: list[str], tenant: str) -> BatchRow:
    return BatchRow(digests, tenant, 0, 9, 4, "copyspec", 100_000, 99_999, 54_321, 12_345, 9.87)


def said(picture: Picture) -> dict[str, Any]:
    """What the engine's reply holds."""
    return {"picture": msgspec.to_builtins(picture)}


class Reader:
    """A State over a front without a server around it."""

    def __init__(self, model_dir: Path, tmp_path: Path) -> None:
        self.front = FakeFront(ServerConfig(model=model_dir, data_dir=tmp_path), model_dir)
        self.now = 0.0
        self.state = State(self.front, prompts=True, clock=lambda: self.now)  # type: ignore[arg-type]

    async def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self.state.read())
        return found


@pytest.fixture
def reader(model_dir: Path, tmp_path: Path) -> Reader:
    return Reader(model_dir, tmp_path)


def test_digests_are_named_and_tenants_hidden(reader: Reader) -> None:
    front = reader.front
    front.adapters.put(row("cow", 2, tenant="alice corp"))
    cow, shout, gone = row("cow", 2).digest, row("shout", 3).digest, "e" * 64
    front.says = said(
        Picture(
            frames=Frames(4, 1, bytes([3, 3, 1, 0]), bytes([1, 1, 2, 0]), [
                Holder(digest=shout),
                Holder(tenant="alice corp"),
            ]),
            residents=[resident(shout, Cell.LEASED), resident(cow)],
            num_resident=2,
            events=[Event("load", cow, 3, 9), Event("evict", gone, 3, 9)],
            batch=[batch_row([shout, cow], "alice corp"), batch_row([], "")],
            queue=[Waiting([cow], 7, 2.5, {"frames": 7})],
            num_waiting=7,
        )
    )  # fmt: skip
    front.snapshot.adapter_tokens |= {shout: [10, 5], row("whisper").digest: [1, 1]}
    front.snapshot.drafts.add(shout, "lookup", 4, 4, 3)
    state = asyncio.run(reader.read())

    assert state["frames"]["holders"][0] == {"adapter": "shout@3"}
    hashed = state["frames"]["holders"][1]["tenant"]
    assert re.fullmatch("[0-9a-f]{8}", hashed) and "alice" not in json.dumps(state)
    assert base64.b64decode(state["frames"]["cells"]) == bytes([3, 3, 1, 0])
    assert [r["adapters"] for r in state["batch"]] == [["shout@3", "cow@2"], ["base"]]
    assert [r["tenant"] for r in state["batch"]] == [hashed, ""]
    assert state["queue"] == [
        {"adapters": ["cow@2"], "num": 7, "oldest_s": 2.5, "reasons": {"frames": 7}}
    ]
    assert [e["name"] for e in state["events"]] == ["cow@2", "sha256:eeeeeeeeeeee"]
    rows = {r["name"]: r for r in state["adapters"]["rows"]}
    assert (rows["shout@3"]["tier"], rows["shout@3"]["state"]) == ("pool", "leased")
    assert (rows["shout@3"]["rank"], rows["shout@3"]["tokens"]) == (8, 15)
    assert (rows["cow@2"]["tenant"], rows["cow@2"]["generation"]) == (hashed, 2)
    assert (rows["whisper@1"]["tier"], rows["whisper@1"]["in_flight"]) == ("disk", 0)
    assert state["adapters"]["registered"] == len(list(front.adapters.catalog.rows()))
    guesses = [(g["adapter"], g["drafter"], g["accepted"]) for g in state["acceptance"]]
    assert guesses == [(None, "lookup", 3), ("shout@3", "lookup", 3)]


def test_the_hash_of_a_tenant_is_this_process_s_own(model_dir: Path, tmp_path: Path) -> None:
    hashes = set()
    for name in ("one", "two"):
        reader = Reader(model_dir, tmp_path / name)
        reader.front.says = said(Picture(batch=[batch_row([], "alice")]))
        hashes.add(asyncio.run(reader.read())["batch"][0]["tenant"])
    assert len(hashes) == 2, "or it could be looked up in a list of likely names"


@pytest.mark.parametrize(("num", "length", "most_kib"), [(1000, 16, 84), (4000, 95, 128)])
def test_thousands_of_adapters_are_no_larger(
    reader: Reader, num: int, length: int, most_kib: int
) -> None:
    """Every list at its bound, and names of an ordinary length or the longest there can be."""
    front = reader.front
    names = [f"{'n' * (length - 5)}{serial:05}" for serial in range(num)]
    for name in names:
        front.adapters.put(row(name, tenant="t" * 60))
    digests = [row(name).digest for name in names]
    for digest in digests:
        front.snapshot.adapter_tokens[digest] = [10**9, 10**9]
        front.snapshot.wearers[digest] = {"t"}
        for drafter in ("suffix", "lookup", "copyspec", "trigram", "medusa", "draft"):
            front.snapshot.drafts.add(digest, drafter, 4, 4, 3)
    front.snapshot.resident = frozenset(digests)
    front.snapshot.failed |= {f"code_{serial}": 1 for serial in range(num)}
    holders = [Holder(digest=digest) for digest in digests[:MOST_ADAPTER_HOLDERS]]
    holders += [Holder(tenant=f"t{serial}") for serial in range(MOST_TENANT_HOLDERS)]
    cells = bytes(range(256)) * (MOST_CELLS // 256)
    reasons = dict.fromkeys(("loading", "frames", "seats", "turn"), 100)
    gone = [Event("evict", digest, 10**6, 10**12, 0.123, 4.567) for digest in digests]
    front.says = said(
        Picture(
            frames=Frames(10**6, 250, cells, cells, holders),
            residents=[resident(digest) for digest in digests[:MOST_ADAPTERS]],
            num_resident=num,
            num_host=num,
            host_bytes=10**12,
            in_host=digests[-MOST_ADAPTERS:],
            events=gone[:MOST_EVENTS],
            batch=[batch_row([digest], f"t{digest}") for digest in digests[:MOST_ROWS]],
            num_running=num,
            queue=[Waiting([digest], 9, 1.5, reasons) for digest in digests[:MOST_QUEUES]],
            num_waiting=num,
        )
    )
    body = asyncio.run(reader.state.read())
    state = json.loads(body)
    assert len(body) < most_kib * KIB, len(body)
    assert state["adapters"]["in_pool"] == num and len(state["adapters"]["rows"]) < 100
    assert state["adapters"]["registered"] >= num
    assert len(state["totals"]["failed"]) < 30


def test_many_readers_are_one_question(reader: Reader) -> None:
    async def crowd() -> None:
        bodies = await asyncio.gather(*(reader.state.read() for _ in range(50)))
        assert len(set(bodies)) == 1 and reader.front.commands == ["state"]
        reader.now = 0.24
        await reader.state.read()
        assert reader.front.commands == ["state"]
        reader.now = 0.26
        await reader.state.read()
        assert reader.front.commands == ["state", "state"]

    asyncio.run(crowd())


def test_without_an_engine_there_is_still_an_answer(reader: Reader) -> None:
    reader.front.says = Overloaded("the engine ended", code="engine_starting")
    state = asyncio.run(reader.read())
    assert state["engine"] is None and state["frames"]["total"] == 0 and state["batch"] == []
    reader.front.info, reader.front.reasons, reader.now = None, ["engine_starting"], 1.0
    asked = len(reader.front.commands)
    state = asyncio.run(reader.read())
    assert state["not_ready"] == ["engine_starting"] and len(reader.front.commands) == asked


def links(page: str) -> set[str]:
    return set(re.findall(r'(?:src|href)="([^#"]+)"', page))


def test_the_page_and_its_files(shared: Running) -> None:
    index = shared.http.get("/")
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    found = {path for path in links(index.text)}
    linked = {"mark.svg", "page.css", "panels.css", "theme.js", "main.js"}
    assert found == {f"page/{name}" for name in linked}
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", index.text), "inline"
    files, todo = {}, found
    while todo:
        path = todo.pop()
        files[path] = shared.http.get("/" + path)
        assert files[path].status_code == 200, path
        for name in re.findall(r'from "\./(\w+\.js)"', files[path].text):
            if f"page/{name}" not in files:
                todo.add(f"page/{name}")
    folder = Path(__file__).parents[2] / "server/loramux/http/page"
    assert {path.removeprefix("page/") for path in files} | {"index.html"} == {
        path.name for path in folder.iterdir()
    }
    for answer in (index, *files.values()):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert {*HEADERS} <= {*answer.headers}
        tag = {"if-none-match": answer.headers["etag"]}
        again = shared.http.get(answer.url.path, headers=tag)
        assert (again.status_code, again.content) == (304, b"")
    everything = index.text + "".join(answer.text for answer in files.values())
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", everything
    )
    outside = set(re.findall(r"https?://[^\s\"')]+", everything)) - {"http://www.w3.org/2000/svg"}
    assert not outside


def test_no_other_file_is_served(shared: Running) -> None:
    for name in ("index.html", "nothing.js", "..%2fsite.py", "%2e%2e/site.py", "page.css/"):
        assert shared.http.get(f"/page/{name}").status_code == 404, name


def test_the_page_is_where_the_operators_are(start: Start) -> None:
    main = start(admin_port=1)
    assert main.http.get("/").status_code == 404
    assert httpx.get(main.url + "/page/main.js").status_code == 404
    front: Any = SimpleNamespace(front=main.front)
    state = State(front.front, prompts=False)
    assert json.loads(asyncio.run(state.read()))["prompts"] is False
