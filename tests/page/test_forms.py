"""Asking several at once, uploading, and the theme."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.http.conftest import Running
from tests.http.fake_front import eventually, fails_after, row, speak
from tests.page.conftest import Open

from loramux.errors import EngineFailed
from loramux.front.generation import GenerationSpec


def choose(page: Page, *names: str) -> None:
    for box in page.locator("#models input[type=checkbox]").all():
        box.set_checked(box.get_attribute("value") in names)


def card(page: Page, name: str) -> object:
    return page.locator(".answer", has=page.get_by_role("heading", name=name, exact=True))


def test_several_answer_side_by_side(server: Running, visit: Open) -> None:
    server.front.script = speak("  <b>hello</b> 😀\nwörld")
    page = visit(server.url)
    page.get_by_label("Prompt").fill("the dog")
    choose(page, "base", "shout", "whisper")
    page.get_by_label("Tokens").fill("30")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Ask", exact=True).click()
    for name in ("base", "shout", "whisper"):
        expect(card(page, name)).to_contain_text("<b>hello</b> 😀\nwörld")
        expect(card(page, name)).to_contain_text("30 tokens · first after")
        expect(card(page, name)).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    specs = server.front.specs
    assert len(specs) == 3 and {spec.sampling.seed for spec in specs} == {7}
    assert {spec.sampling.max_tokens for spec in specs} == {30}
    assert sorted(len(spec.adapters) for spec in specs) == [0, 1, 1]
    assert page.locator(".answer b").count() == 0


def test_stop_stops_all(server: Running, visit: Open) -> None:
    server.front.script = speak("a long story " * 9, delay_s=0.02)
    page = visit(server.url)
    choose(page, "base", "shout")
    page.get_by_label("Tokens").fill("90")
    page.get_by_label("Prompt").fill("the dog")
    page.keyboard.press("Control+Enter")
    expect(card(page, "shout")).to_contain_text("a long")
    expect(card(page, "base")).to_contain_text("a long")
    page.get_by_role("button", name="Stop").click()
    for name in ("base", "shout"):
        expect(card(page, name)).to_contain_text("stopped")
    assert eventually(lambda: len(server.front.aborted) == 2), "the engine is told"


def test_one_that_fails_fails_alone(server: Running, visit: Open) -> None:
    async def either(spec: GenerationSpec) -> AsyncIterator[list[int] | Exception]:
        story = speak("fine") if spec.adapters else fails_after("so f", EngineFailed("it ended"))
        async for piece in story(spec):
            yield piece

    server.front.script = either
    page = visit(server.url)
    choose(page, "base", "shout")
    page.get_by_label("Tokens").fill("8")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(card(page, "base")).to_contain_text("so f")
    expect(card(page, "base")).to_contain_text("it ended")
    expect(card(page, "shout")).to_contain_text("8 tokens")


def test_what_cannot_be_asked_is_said(server: Running, visit: Open) -> None:
    page = visit(server.url)
    ask, problem = page.get_by_role("button", name="Ask", exact=True), page.locator("#ask-problem")
    choose(page)
    ask.click()
    expect(problem).to_have_text("Choose who answers.")
    choose(page, "base")
    page.get_by_label("Prompt").fill("  ")
    ask.click()
    expect(problem).to_have_text("Write a prompt first.")
    page.get_by_label("Prompt").fill("the dog")
    page.get_by_label("Tokens").fill("4000")
    ask.click()
    expect(card(page, "base")).to_contain_text("4000 output tokens exceed the context")
    assert server.front.specs == []


def test_more_than_five_are_too_many(server: Running, visit: Open) -> None:
    for serial in range(40):
        server.front.adapters.put(row(f"a{serial:02}"))
    page = visit(server.url)
    expect(page.locator("#models input[type=checkbox]")).to_have_count(24)
    another = page.get_by_label("Another adapter by name")
    expect(another).to_have_attribute("placeholder", "one of 20 more")
    another.fill("a39")
    another.press("Enter")
    expect(page.get_by_role("checkbox", name="a39")).to_be_checked()
    assert page.locator("#models input:checked").count() == 5
    page.get_by_role("checkbox", name="a05").check()
    expect(page.locator("#ask-problem")).to_contain_text("5 at most")
    page.get_by_role("button", name="Ask", exact=True).click()
    assert page.locator(".answer").count() == 0 and server.front.specs == []


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"w" * 1000)
    (tmp_path / "good").write_bytes(b"{}")
    (tmp_path / "bad").write_bytes(b"bad")
    return tmp_path


def upload(page: Page, files: Path, name: str, config: str) -> None:
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_label("adapter_config.json").set_input_files(files / config)
    page.get_by_label("adapter_model.safetensors").set_input_files(files / "weights")
    page.get_by_role("button", name="Upload").click()


def test_every_offender_of_an_upload(server: Running, visit: Open, files: Path) -> None:
    page = visit(server.url)
    upload(page, files, "cow", "bad")
    verdict = page.locator("#verdict")
    expect(verdict.get_by_role("heading")).to_have_text("Refused, for 2 reasons")
    assert verdict.locator("li").all_inner_texts() == ["one", "two"]
    expect(page.get_by_role("button", name="Upload")).to_be_enabled()
    assert server.front.adapters.own("cow", tenant="") is None


def test_an_upload_that_is_good(server: Running, visit: Open, files: Path) -> None:
    page = visit(server.url)
    page.get_by_label("only check, register nothing").check()
    upload(page, files, "cow", "good")
    expect(page.locator("#verdict h3")).to_have_text("It would work as trained")
    assert server.front.adapters.own("cow", tenant="") is None
    page.get_by_label("only check, register nothing").uncheck()
    upload(page, files, "cow", "good")
    expect(page.locator("#verdict h3")).to_have_text("cow@1 is ready")
    expect(page.locator(".facts")).to_contain_text(re.compile("Rank\\s*8"))
    expect(page.get_by_role("checkbox", name="cow")).to_be_visible()


def test_a_proxy_that_refuses_an_upload(server: Running, visit: Open, files: Path) -> None:
    """nginx answers in HTML, and takes no body over a megabyte unless told to."""
    page = visit(server.url)
    page.route("**/v1/adapters?*", lambda route: route.fulfill(status=413, body="<html>large"))
    upload(page, files, "cow", "good")
    expect(page.locator("#verdict")).to_contain_text("The answer was 413")
    expect(page.get_by_role("button", name="Upload")).to_be_enabled()
    page.route("**/v1/completions", lambda route: route.fulfill(status=502, body="<html>bad"))
    choose(page, "base")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(card(page, "base")).to_contain_text("The answer was 502")


def test_a_server_that_goes_while_it_checks(server: Running, visit: Open, files: Path) -> None:
    page = visit(server.url)
    checking = {"name": "cow", "status": "validating"}
    page.route("**/v1/adapters?*", lambda route: route.fulfill(status=202, json=checking))
    page.route("**/v1/adapters/cow", lambda route: route.abort())
    upload(page, files, "cow", "good")
    expect(page.locator("#verdict")).to_contain_text("The connection broke")
    expect(page.get_by_role("button", name="Upload")).to_be_enabled()


def test_an_answer_without_text(server: Running, visit: Open) -> None:
    server.front.script = speak("</s>")
    page = visit(server.url)
    choose(page, "base")
    page.get_by_label("Tokens").fill("1")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(card(page, "base").locator(".foot")).to_have_text(re.compile("^1 token$"))


def test_the_next_generation_of_a_name(server: Running, visit: Open, files: Path) -> None:
    page = visit(server.url)
    page.get_by_label("if the name is taken, make the next generation").check()
    upload(page, files, "shout", "good")
    expect(page.locator("#verdict h3")).to_have_text("shout@4 is ready")
    upload(page, files, "brandnew", "good")
    expect(page.locator("#verdict h3")).to_have_text("brandnew@1 is ready")


def test_the_reader_s_theme_stays(server: Running, visit: Open) -> None:
    page = visit(server.url, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light, button = page.evaluate(ground), page.get_by_role("button", name="Dark")
    expect(button).to_have_attribute("aria-pressed", "false")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark
    assert visit(server.url, color_scheme="dark").evaluate(ground) == dark, "the system's"
