"""For everybody: axe finds nothing serious, the keyboard reaches everything, it fits a phone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from tests.http.conftest import Running, Start
from tests.http.fake_front import speak
from tests.http.granting import grant
from tests.page.conftest import Open, script

from loramux.metrics.picture import Picture

THEMES = pytest.mark.parametrize("theme", ["light", "dark"])


def serious(page: Page) -> list[Any]:
    """Serious and critical violations."""
    found = Axe().run(page).response["violations"]
    return [
        (violation["id"], [node["html"] for node in violation["nodes"]])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


@THEMES
def test_axe_busy(busy_server: Running, visit: Open, theme: str, tmp_path: Path) -> None:
    """Every panel full, answers there, an upload refused."""
    busy_server.front.script = speak("hello")
    page = visit(busy_server.url, color_scheme=theme, bypass_csp=True)
    expect(page.locator("#batch-table tbody tr")).to_have_count(2)
    for summary in page.locator("summary").all():
        summary.click()
    (tmp_path / "bad").write_bytes(b"bad")
    page.get_by_label("Name", exact=True).fill("cow")
    for label in ("adapter_config.json", "adapter_model.safetensors"):
        page.get_by_label(label).set_input_files(tmp_path / "bad")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#verdict h3")).to_be_visible()
    page.get_by_label("Tokens").fill("6")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(4)
    assert serious(page) == []


@THEMES
def test_axe_idle_and_away(server: Running, visit: Open, theme: str) -> None:
    script(server, Picture())
    page = visit(server.url, color_scheme=theme, bypass_csp=True)
    expect(page.locator("#status")).to_have_text("ready")
    assert serious(page) == []
    page.route("**/admin/state", lambda route: route.abort())
    expect(page.locator("#away")).to_be_visible()
    assert serious(page) == []


@THEMES
def test_axe_without_a_key(start: Start, visit: Open, theme: str, tmp_path: Path) -> None:
    grant(tmp_path / "keys.json", "ops")
    page = visit(start(api_keys=tmp_path / "keys.json").url, color_scheme=theme, bypass_csp=True)
    expect(page.get_by_label("API key")).to_be_visible()
    assert serious(page) == []


def test_the_keyboard_reaches_everything(busy_server: Running, visit: Open) -> None:
    page = visit(busy_server.url)
    expect(page.get_by_role("checkbox", name="shout")).to_be_visible()
    wanted: set[str] = set(
        page.evaluate(
            """() => [...document.querySelectorAll("a, button, input, select, textarea, summary")]
                .filter((e) => e.checkVisibility() && !e.disabled)
                .map((e, at) => (e.dataset.n = String(at)))"""
        )
    )
    reached = set()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip", "first the way past the bar"
    for _ in range(3 * len(wanted)):
        seen = page.evaluate(
            """() => {
                const at = document.activeElement, style = getComputedStyle(at);
                const ring = style.outlineStyle !== "none" ? style :
                    at.parentElement && getComputedStyle(at.parentElement);
                return [at.dataset.n ?? "", ring?.outlineStyle ?? "none"];
            }"""
        )
        if seen[0]:
            reached.add(seen[0])
            assert seen[1] != "none", "where the keyboard is can be seen"
        if reached == wanted:
            return
        page.keyboard.press("Tab")
    assert reached == wanted


@pytest.mark.parametrize("width", [400, 900])
def test_it_fits(busy_server: Running, visit: Open, width: int) -> None:
    page = visit(busy_server.url, viewport={"width": width, "height": 800})
    expect(page.locator("#batch-table tbody tr")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    out = page.evaluate(
        """(width) => [...document.querySelectorAll("main *")]
            .filter((e) => e.checkVisibility() && !e.closest(".scroll, svg, .strip"))
            .filter((e) => e.getBoundingClientRect().right > width + 1)
            .map((e) => e.outerHTML.slice(0, 80))""",
        width,
    )
    assert out == []
