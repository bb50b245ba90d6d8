"""What the page draws is what the state says."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect
from tests.http.conftest import Running
from tests.page.conftest import Open, busy, cells_of, script, settle

from loramux.metrics.picture import BatchRow, Frames, Picture

USES = ["free", "kv", "prefix", "leased", "warm", "loading"]


def painted(page: Page) -> list[str]:
    """The use of every cell, told from the colour in its middle."""
    found: list[str] = page.evaluate(
        """(uses) => {
            const canvas = document.getElementById("map");
            const context = canvas.getContext("2d");
            const probe = document.createElement("canvas").getContext("2d");
            const dot = document.body.appendChild(document.createElement("i"));
            uses.forEach((use, at) => {
                dot.style.color = `var(--${use})`;
                probe.fillStyle = getComputedStyle(dot).color;
                probe.fillRect(at, 0, 1, 1);
            });
            const pixel = (image, x, y) =>
                image.data.slice(4 * (y * image.width + x), 4 * (y * image.width + x) + 4).join();
            const known = probe.getImageData(0, 0, uses.length, 1);
            const colours = uses.map((use, at) => pixel(known, at, 0));
            const whole = context.getImageData(0, 0, canvas.width, canvas.height);
            const size = 24;  // 40 cells are drawn at the largest size
            const columns = Math.floor(canvas.clientWidth / size);
            return Array.from({length: 40}, (_, at) => {
                const x = (at % columns) * size + 10, y = Math.floor(at / columns) * size + 10;
                return uses[colours.indexOf(pixel(whole, x, y))];
            });
        }""",
        USES,
    )
    return found


def test_the_map_has_the_colour_of_every_frame(busy_server: Running, visit: Open) -> None:
    page = visit(busy_server.url)
    expect(page.locator("#status")).to_have_text("ready")
    numbers = page.locator("#legend b").all_inner_texts()
    assert numbers == ["25", "4", "5", "3", "2", "1"]
    expected = ["leased"] * 3 + ["warm"] * 2 + ["kv"] * 4 + ["prefix"] * 5 + ["loading"]
    assert painted(page) == expected + ["free"] * 25
    label = page.locator("#map").get_attribute("aria-label")
    assert label == (
        "Map of 40 frames: free 63 %, KV in use 10 %, KV kept for later 13 %, adapters in use 8 %, "
        "adapters kept warm 5 %, adapters on their way in 3 %"
    )
    page.hover("#map", position={"x": 30, "y": 10})
    expect(page.locator("#map-told")).to_have_text("frame 1: adapters in use, shout@3")
    page.hover("#map", position={"x": 24 * 6 + 3, "y": 10})
    expect(page.locator("#map-told")).to_contain_text("frame 6: KV in use, requests of tenant ")


def test_the_map_is_there_as_a_table(busy_server: Running, visit: Open) -> None:
    page = visit(busy_server.url)
    page.click("summary:has-text('The map as a table')")
    expect(page.locator("#map-table tbody tr")).to_have_count(9)
    lines = cells_of(page, "map-table")
    assert lines[0] == ["free", "all", "25", "63 %"] and lines[3][2] == "3"
    assert ["adapters in use", "shout@3", "3", "8 %"] in lines
    assert ["adapters kept warm", "whisper@1", "2", "5 %"] in lines


def test_one_use_is_shown_alone(busy_server: Running, visit: Open) -> None:
    page = visit(busy_server.url)
    button = page.get_by_role("button", name="adapters in use 3")
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-pressed", "true")
    assert [use for use in painted(page) if use is not None] == ["leased"] * 3, "others are dim"
    page.keyboard.press("Space")
    expect(button).to_have_attribute("aria-pressed", "false")
    assert len(painted(page)) == 40 and None not in painted(page)


def test_many_frames_are_squares_of_several(server: Running, visit: Open) -> None:
    cells = bytes([1, 4] * 2048)
    script(server, Picture(frames=Frames(20_001, 5, cells, bytes(4096), [])))
    page = visit(server.url)
    expect(page.locator("#pool-line")).to_contain_text("20,001 frames of 8 KiB. A square is 5")
    page.hover("#map", position={"x": 6, "y": 1})
    expect(page.locator("#map-told")).to_have_text("frames 5–9, mostly adapters kept warm")


def test_rows_queue_and_adapters(busy_server: Running, visit: Open) -> None:
    page = visit(busy_server.url)
    expect(page.locator("#batch-table tbody tr")).to_have_count(2)
    base, shout = cells_of(page, "batch-table")
    assert base == ["base", "1", "33", "–", "250 ms"]
    assert shout[0].startswith("shout@3") and shout[1:] == ["1 + 4", "120", "75 %", "1.3 s"]
    assert page.locator("#strip span").all_inner_texts() == ["base", "shout@3"]
    wide = [page.locator("#strip span").nth(n).evaluate("e => e.style.flexGrow") for n in (0, 1)]
    assert wide == ["1", "5"]
    queue = cells_of(page, "queue-table")
    assert queue[0] == ["whisper@1", "3", "4.5 s", "free frames"]
    assert queue[1][0] == "shout@3 + whisper@1"
    assert "a seat in the batch (1)" in queue[1][3] and "on its way (1)" in queue[1][3]
    adapters = cells_of(page, "adapters-table")
    assert adapters[0][0].replace("\n", " ").split() == ["shout@3", "pinned"]
    assert adapters[0][1:] == ["in use", "8", "293 KiB", "3", "2", "500 ms", "–"]
    assert adapters[1][:2] == ["whisper@1", "warm"] and adapters[1][6] == "75 s"
    expect(page.locator("#adapters-line")).to_have_text("2 in the pool · 7 on disk")
    events = page.locator("#events li").all_inner_texts()
    assert events[0].startswith("sha256:eeeeeeeeeeee") and "4 frames free again" in events[0]
    assert events[1].startswith("shout@3") and "in 21 ms" in events[1]
    expect(page.locator("#timeline line")).to_have_count(3)
    expect(page.locator("#drafters")).to_contain_text("3 of 4 right, 75 %; 3.0 tokens saved a try")


def test_it_is_live(server: Running, visit: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux.http.state.CACHE_S", 0)
    script(server, Picture())
    page = visit(server.url, clock=True)
    settle(server, page)
    script(server, busy())
    server.front.snapshot.steps += 10
    server.front.snapshot.generation_tokens += 50
    server.front.snapshot.phase_s = {"forward": 0.2, "schedule": 0.05}
    page.clock.run_for(1000)
    expect(page.locator("#f-running")).to_have_text("2")
    expect(page.locator("#f-waiting")).to_have_text("5")
    expect(page.locator("#f-free")).to_have_text("32")
    expect(page.locator("#phases-list")).to_contain_text("forward20 ms")
    expect(page.locator("#f-step")).to_have_text("25 ms")
    expect(page.locator("#f-rate")).to_have_text("50")


def test_nothing_to_show_is_said(server: Running, visit: Open) -> None:
    script(server, Picture())
    page = visit(server.url)
    expect(page.locator("#batch-table")).to_contain_text("Nobody is asking. Try a prompt below.")
    expect(page.locator("#queue-table")).to_contain_text("Nobody waits.")
    expect(page.locator("#adapters-table")).to_contain_text("None was asked for yet")
    expect(page.locator("#events")).to_contain_text("No adapter has come or gone yet.")
    expect(page.locator("#drafters")).to_contain_text("This server does not guess ahead.")
    server.front.reasons = ["engine_starting"]
    expect(page.locator("#status")).to_have_text("the engine is starting")


def test_names_are_text(server: Running, visit: Open) -> None:
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    server.front.base_name = evil
    row = BatchRow([], "<b>tenant</b>", 0, 1, 0, "<i>", 9, 1, 0, 0, 0.1)
    script(server, Picture(batch=[row], num_running=1))
    server.front.snapshot.drafts.add("", "<i>lookup</i>", 4, 4, 3)
    page = visit(server.url)
    expect(page.locator("#model")).to_have_text(evil)
    expect(page.locator("#batch-table tbody th")).to_contain_text("<script>")
    expect(page.locator("#drafters b")).to_have_text("<i>lookup</i>")
    assert page.locator("main img, body script").count() == 0 and page.title() == "loramux"


def test_nothing_else_runs(server: Running, visit: Open, complaints: list[str]) -> None:
    """The policy is the second wall: even an element that got in could not do anything."""
    page = visit(server.url)
    expect(page.locator("#status")).to_have_text("ready")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            try { script.text = "document.title = 'ran'"; } catch { document.title += "."; }
            document.body.append(script);
            const image = document.createElement("img");
            image.src = "https://elsewhere.invalid/x.png";
            document.body.append(image);
            try { document.body.innerHTML = "<p>"; } catch { document.title += "!"; }
            return fetch("https://elsewhere.invalid/").catch(() => { document.title += "?"; });
        }"""
    )
    assert page.title() == "loramux.!?"
    for directive in ("TrustedScript", "TrustedHTML", "img-src", "connect-src"):
        assert any(directive in complaint for complaint in complaints), directive
    complaints.clear()
