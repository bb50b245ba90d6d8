"""A real browser at the real page; the engine behind it says what a test scripts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from tests.front.model_dir import write_model
from tests.http.conftest import Running, Start, launch
from tests.http.fake_front import row

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
from loramux.metrics.stats import PoolStats

FLAGS = [
    "--no-sandbox",  # CI runs as root, where the sandbox does not start
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SHOUT, WHISPER = row("shout", 3).digest, row("whisper").digest

PATIENCE_MS = 60_000
"""For what has to come; on a machine with other things to do it comes late."""
HOUR_MS = 3_600_000
expect.set_options(timeout=PATIENCE_MS)

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not longer than a module: while it runs, this thread has an event loop."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        assert os.environ.get("TEST_CHROMIUM") != "required", "Chromium was installed, and is gone"
        pytest.skip("no Chromium here: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("page") / "model")


@pytest.fixture
def start(model_dir: Path, tmp_path: Path) -> Iterator[Start]:
    """``start(**config)``: a server over a scripted front."""
    stops = []

    def start(**settings: Any) -> Running:
        running, stop = launch(model_dir, **{"data_dir": tmp_path / "data", **settings})
        stops.append(stop)
        return running

    yield start
    for stop in stops:
        stop()


@pytest.fixture
def server(start: Start) -> Running:
    return start()


@pytest.fixture
def complaints() -> list[str]:
    """What the browser complained of; what is left of it at the end fails the test."""
    return []


@pytest.fixture
def visit(browser: Browser, complaints: list[str]) -> Iterator[Open]:
    """``visit(url, **context)``: the page in a tab of its own. Whatever is asked of another host is
    a complaint too. With ``clock`` the page's time stands still until the test lets some pass."""
    contexts = []

    def visit(url: str, *, clock: bool = False, **context: Any) -> Page:
        made = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        contexts.append(made)
        page = made.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complain(said.type, said.text))
        page.on("request", lambda r: None if r.url.startswith(url) else complaints.append(r.url))
        if clock:
            page.clock.install(time=0)
        page.goto(url + "/")
        if clock:
            page.clock.pause_at(HOUR_MS)
        return page

    def complain(kind: str, text: str) -> None:
        # What a test does itself the browser notes too: answers refused, connections broken, a
        # canvas read back.
        ours = "Failed to load resource" in text or "willReadFrequently" in text
        if kind in ("error", "warning") and not ours:
            complaints.append(text)

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []


def busy() -> Picture:
    """A pool of 40 frames, two rows that run, two lists that wait."""
    cells = [Cell.LEASED] * 3 + [Cell.WARM] * 2 + [Cell.KV] * 4 + [Cell.PREFIX] * 5 + [Cell.LOADING]
    held = [1] * 3 + [2] * 2 + [3] * 4 + [0] * 6
    return Picture(
        frames=Frames(
            total=40,
            cells=bytes(cells).ljust(40, b"\0"),
            held=bytes(held).ljust(40, b"\0"),
            holders=[Holder(digest=SHOUT), Holder(digest=WHISPER), Holder(tenant="alice")],
        ),
        residents=[
            Resident(SHOUT, 0, Cell.LEASED, 3, 300_000, 2, True, 0.5),
            Resident(WHISPER, 0, Cell.WARM, 2, 2_000, 0, False, 75.0),
        ],
        num_resident=2,
        events=[
            Event("evict", "e" * 64, 4, 4_000, age_s=2.0),
            Event("load", SHOUT, 3, 300_000, 0.021, 9.0),
        ],
        batch=[
            BatchRow([SHOUT], "alice", 0, 5, 4, "lookup", 120, 20, 40, 30, 1.25),
            BatchRow([], "", 0, 1, 0, "", 33, 8, 0, 0, 0.25),
        ],
        num_running=2,
        queue=[
            Waiting([WHISPER], 3, 4.5, {"frames": 3}),
            Waiting([SHOUT, WHISPER], 2, 1.5, {"seats": 1, "loading": 1}),
        ],
        num_waiting=5,
    )


def script(server: Running, picture: Picture) -> None:
    """What the engine says from now on."""
    server.front.says = {"picture": msgspec.to_builtins(picture)}
    stats = server.front.snapshot.stats
    counts = [picture.frames.cells.count(cell) for cell in Cell]
    stats.pool = PoolStats(len(picture.frames.cells), *counts)
    stats.num_running, stats.num_waiting = picture.num_running, picture.num_waiting


@pytest.fixture
def busy_server(server: Running) -> Running:
    script(server, busy())
    server.front.snapshot.drafts.add(SHOUT, "lookup", 4, 4, 3)
    return server


def settle(server: Running, page: Page) -> None:
    """With the page's clock stopped: nothing is on its way, the next question is in a second."""
    server.front.snapshot.stats.num_running = 99
    while page.locator("#f-running").inner_text() != "99":
        page.clock.run_for(1000)
        page.wait_for_timeout(20)


def cells_of(page: Page, table: str) -> list[list[str]]:
    """The texts of a table's body."""
    lines = page.locator(f"#{table} tbody tr").all()
    return [line.locator("th, td").all_inner_texts() for line in lines]
