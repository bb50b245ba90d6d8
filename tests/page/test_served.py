"""The page over a server as its users run it, on the demo model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.e2e.server import Server
from tests.page.conftest import Open, cells_of

from loramux.config import DEMO_DIR

ADAPTERS = DEMO_DIR / "adapters"
PIRATE = ADAPTERS / "pirate"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # A process that loads torch takes seconds to start: one for all of this module.
    data = tmp_path_factory.mktemp("served") / "data"
    server = Server(
        DEMO_DIR / "base", data, "--adapters", str(ADAPTERS), "--served-model-name", "demo"
    )
    yield server
    assert server.close() == 0


def state(page: Page) -> dict[str, object]:
    found: dict[str, object] = page.evaluate("fetch('admin/state').then((r) => r.json())")
    return found


def test_ask_look_upload_and_survive(demo: Server, visit: Open, tmp_path: Path) -> None:
    """One visit, from the first prompt to an engine that dies: starting a server costs more than
    all of it."""
    page = visit(demo.url)
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#device")).to_have_text("float32, cpu")
    expect(page.locator("#batch-table")).to_contain_text("Nobody is asking")

    page.get_by_label("Tokens").fill("500")
    chosen = ("demo", "shout", "pirate")
    for box in page.locator("#models input[type=checkbox]").all():
        box.set_checked(box.get_attribute("value") in chosen)
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator("#strip")).to_contain_text("shout@1")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(3)
    texts = [card.inner_text() for card in page.locator(".answer .text").all()]
    assert len(set(texts)) == 3 and all(texts)
    expect(page.locator(".answer .foot").first).to_contain_text("tokens · first after")
    expect(page.locator("#batch-table")).to_contain_text("Nobody is asking")
    rows = {cells[0]: cells for cells in cells_of(page, "adapters-table")}
    assert rows["shout@1"][1] == rows["pirate@1"][1] == "warm"
    warm = page.locator("#legend button", has_text="adapters kept warm")
    frames = sum(int(cells[4]) for cells in rows.values() if cells[1] == "warm")
    expect(warm).to_have_text(f"adapters kept warm {frames}")
    assert page.locator("#events li").count() == 2

    for cell, name in enumerate(("config", "weights")):
        file = sorted(PIRATE.iterdir())[cell]
        page.locator(f"#upload-{name}").set_input_files(file)
    page.get_by_label("Name", exact=True).fill("corsair")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#verdict h3")).to_have_text("corsair@1 is ready")
    expect(page.locator(".facts")).to_contain_text("q_proj")
    expect(page.get_by_role("checkbox", name="corsair")).to_be_visible()

    config = json.loads((PIRATE / "adapter_config.json").read_text())
    config |= {"r": 999, "use_qalora": True, "layer_replication": [[0, 1]]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    page.locator("#upload-config").set_input_files(tmp_path / "adapter_config.json")
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#verdict")).to_contain_text("this name holds another version")
    page.get_by_label("if the name is taken, make the next generation").check()
    page.get_by_role("button", name="Upload").click()
    expect(page.locator("#verdict h3")).to_contain_text("Refused, for")
    offenders = page.locator("#verdict .offenders li").all_inner_texts()
    assert len(offenders) > 1, page.locator("#verdict").inner_text()
    assert any("use_qalora" in text for text in offenders)

    os.kill(int(state(page)["engine"]["pid"]), signal.SIGKILL)  # type: ignore[index]
    expect(page.locator("#status")).to_have_text("the engine is starting")
    expect(page.locator("#status")).to_have_text("ready")
    expect(page.locator("#adapters-line")).to_contain_text("0 in the pool")
    assert {cells[1] for cells in cells_of(page, "adapters-table")} == {"disk"}
