"""When the page asks, when it does not, and what it says when there is no answer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Page, expect
from tests.http.conftest import Running, Start
from tests.http.fake_front import eventually
from tests.http.granting import grant
from tests.page.conftest import Open, busy, script, settle

from loramux.http.app import build_admin_app
from loramux.http.connection import uvicorn_config

HIDE = """(hidden) => {
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


def counted(page: Page) -> list[str]:
    """The questions to /admin/state from now on."""
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if r.url.endswith("/admin/state") else None)
    return asked


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question is answered anew: here time is the page's alone."""
    monkeypatch.setattr("loramux.http.state.CACHE_S", 0)


def test_once_a_second_and_only_while_somebody_looks(server: Running, visit: Open) -> None:
    page = visit(server.url, clock=True)
    settle(server, page)
    asked = counted(page)
    for number in range(1, 4):
        server.front.snapshot.stats.num_running = number
        page.clock.run_for(999)
        assert len(asked) == number - 1
        page.clock.run_for(1)
        expect(page.locator("#f-running")).to_have_text(str(number))
        assert len(asked) == number
    page.evaluate(HIDE, True)
    page.clock.run_for(20_000)
    assert len(asked) == 3, "nobody looks"
    server.front.snapshot.stats.num_running = 4
    page.evaluate(HIDE, False)
    expect(page.locator("#f-running")).to_have_text("4")
    assert len(asked) == 4, "at once, when somebody looks again"


def test_a_server_that_is_away(busy_server: Running, visit: Open) -> None:
    page = visit(busy_server.url, clock=True)
    settle(busy_server, page)
    page.route("**/admin/state", lambda route: route.abort())
    asked = counted(page)
    for number, wait in enumerate([1, 1, 2, 4, 8, 16, 30, 30], start=1):
        with page.expect_event("requestfailed"):
            page.clock.run_for(1000 * wait)
        wanted = f"next try in {min(30, 2 ** (number - 1))} s."
        expect(page.locator("#away-text")).to_contain_text(wanted)
        assert len(asked) == number
    expect(page.locator("#status")).to_have_text("no answer")
    expect(page.locator("#f-running")).to_have_text("99")
    expect(page.locator("body")).to_have_class("stale")
    page.unroute("**/admin/state")
    page.click("#away-now")
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#away")).to_be_hidden()
    expect(page.locator("body")).not_to_have_class("stale")


def test_an_answer_that_is_no_state_is_no_answer(server: Running, visit: Open) -> None:
    page = visit(server.url)
    expect(page.locator("#status")).to_have_text("ready")
    page.route("**/admin/state", lambda route: route.fulfill(status=502, body="<html>"))
    expect(page.locator("#status")).to_have_text("no answer")
    page.unroute("**/admin/state")
    expect(page.locator("#status")).to_have_text("ready")


def test_keys(start: Start, visit: Open, tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    operator, reader = grant(keys, "ops"), grant(keys, "acme", "infer")
    server = start(api_keys=keys)
    script(server, busy())
    page = visit(server.url)
    expect(page.locator("#status")).to_have_text("a key is needed")
    expect(page.get_by_label("API key")).to_be_focused()
    assert "scope admin" in page.locator("#key-why").inner_text()
    assert server.front.commands == [] and page.locator("#batch-table tbody tr").count() == 0

    page.get_by_label("API key").fill(reader)
    page.keyboard.press("Enter")
    expect(page.locator("#key-why")).to_have_text("this needs a key with the scope admin.")
    page.get_by_label("API key").fill(operator)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#batch-table tbody tr")).to_have_count(2)
    expect(page.locator("#key")).to_be_hidden()
    expect(page.get_by_role("checkbox", name="shout")).to_be_visible()

    kept = "JSON.stringify([localStorage, document.cookie, location.href, document.body.innerHTML])"
    assert operator not in page.evaluate(kept)
    assert page.evaluate("sessionStorage.length") == 1
    page.reload()
    expect(page.locator("#status")).to_have_text("ready")
    page.get_by_role("button", name="Key", exact=True).click()
    page.get_by_role("button", name="Forget it").click()
    expect(page.locator("#status")).to_have_text("a key is needed")
    assert page.evaluate("sessionStorage.length") == 0


def test_on_the_operators_port(start: Start, visit: Open) -> None:
    """Prompts go elsewhere there, and the page says so."""
    main = start(admin_port=1)
    script(main, busy())
    app = build_admin_app(main.front, main.front.config)
    server = uvicorn.Server(uvicorn_config(app, main.front.config, port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert eventually(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        page = visit(f"http://127.0.0.1:{port}")
        expect(page.locator("#batch-table tbody tr")).to_have_count(2)
        expect(page.locator("#elsewhere")).to_be_visible()
        for hidden in ("#ask", "#upload", "#nav-ask", "#nav-upload"):
            expect(page.locator(hidden)).to_be_hidden()
        page.close()
    finally:
        server.should_exit = True
        thread.join(20)
