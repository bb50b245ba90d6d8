"""Profiles into voices: read once, forgotten when there are too many, never trusted unread."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.front.model_dir import write_model

from loramux.adapters.profile import spell
from loramux.errors import AdapterLoadFailed, Conflict, InvalidRequest
from loramux.front import voices as module
from loramux.front.catalog import Served
from loramux.front.tokenizer import TokenizerService
from loramux.front.voices import Voice, Voices
from loramux.request import AdapterRef

MARK = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ eos_token }}"


class Shelf:
    """Voices over a folder of profiles, and how often a file was asked for."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = TokenizerService(write_model(folder / "model"))
        self.folder = folder
        self.reads = 0
        self.voices = Voices(self.tokenizer, self.path)

    def path(self, digest: str) -> Path:
        self.reads += 1
        return self.folder / digest

    def put(self, **profile: Any) -> str:
        data = spell(profile)
        digest = hashlib.sha256(data).hexdigest()
        (self.folder / digest).write_bytes(data)
        return digest

    def of(self, *profiles: str) -> Voice:
        refs = tuple(AdapterRef(str(number) * 64) for number in range(len(profiles)))
        return asyncio.run(self.voices.of(Served(refs, "x", profiles=profiles)))

    def prompt(self, voice: Voice, *messages: tuple[str, str], **options: bool) -> str:
        async def text() -> str:
            chat = [{"role": role, "content": content} for role, content in messages]
            ids = await self.voices.prompt(voice, chat, **options)
            return await self.tokenizer.decode(ids)

        return asyncio.run(text())


@pytest.fixture
def shelf(tmp_path: Path) -> Iterator[Shelf]:
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.voices.close()
    shelf.tokenizer.close()


def test_the_base_and_an_adapter_without_a_profile_speak_as_the_base(shelf: Shelf) -> None:
    assert shelf.of() == shelf.of("") == shelf.of("", "") == Voice((1, 7))
    assert shelf.reads == 0
    assert shelf.prompt(shelf.of(""), ("user", "hi")) == "<|user|>hi</s>\n<|assistant|>"


def test_one_adapter_brings_all_it_has(shelf: Shelf) -> None:
    digest = shelf.put(
        chat_template=MARK,
        system="be kind",
        generation={"temperature": 0, "max_tokens": 9},
        stop=["END"],
        stop_token_ids=[5],
        eos_token_id=[9, 4],
    )
    voice = shelf.of(digest)
    assert voice == Voice((4, 9), MARK, "be kind", {"temperature": 0}, 9, ("END",), (5,))
    said = shelf.prompt(voice, ("user", "hi"))
    assert said == "[system]be kind[user]hi</s>"
    for role in ("system", "developer"):  # the chat's own wins
        assert shelf.prompt(voice, (role, "a"), ("user", "b")) == f"[{role}]a[user]b</s>"


def test_a_system_message_under_the_bases_template(shelf: Shelf) -> None:
    voice = shelf.of(shelf.put(system="be kind"))
    said = shelf.prompt(voice, ("user", "hi"), add_generation_prompt=False)
    assert said == "<|system|>be kind</s>\n<|user|>hi</s>\n"


def test_of_several_the_first_that_has_something_gives_it(shelf: Shelf) -> None:
    first = shelf.put(system="one", generation={"top_p": 0.5, "max_tokens": 3}, stop=["A"])
    second = shelf.put(chat_template=MARK, system="two", stop=["B"], eos_token_id=9)
    third = shelf.put(chat_template="third", stop_token_ids=[3], eos_token_id=[5, 1])
    voice = shelf.of("", first, second, third)
    assert voice == Voice((1, 5, 7, 9), MARK, "one", {}, None, ("A", "B"), (3,))
    alone = shelf.of(first)
    assert alone.defaults == {"top_p": 0.5} and alone.max_tokens == 3
    assert shelf.of(first, "").defaults == {}, "two are named, though one says nothing"


def test_a_profile_is_read_once_and_forgotten_when_there_are_too_many(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [shelf.put(system=f"{number:0100}") for number in range(5)]
    size = (shelf.folder / digests[0]).stat().st_size + module._ENTRY_BYTES
    monkeypatch.setattr(module, "_CACHE_BYTES", 3 * size)
    for digest in [*digests[:3]] * 2:
        shelf.of(digest)
    assert shelf.reads == 3
    shelf.of(digests[0])
    shelf.of(digests[3])  # the second, used longest ago, makes room
    assert list(shelf.voices._known) == [digests[2], digests[0], digests[3]]
    assert shelf.voices._known_bytes == 3 * size
    shelf.of(digests[0])
    assert shelf.reads == 4
    assert shelf.of(digests[1]).system == f"{1:0100}" and shelf.reads == 5


def test_requests_that_come_together_count_a_profile_once(shelf: Shelf) -> None:
    digest = shelf.put(system="x" * 100)

    async def together() -> None:
        served = Served((AdapterRef("a" * 64),), "x", profiles=(digest,))
        await asyncio.gather(*(shelf.voices.of(served) for _ in range(6)))

    asyncio.run(together())
    size = (shelf.folder / digest).stat().st_size
    assert shelf.voices._known_bytes == size + module._ENTRY_BYTES


def test_one_that_is_gone_or_damaged(shelf: Shelf) -> None:
    digest = shelf.put(system="x")
    path = shelf.folder / digest
    path.write_bytes(path.read_bytes().replace(b"x", b"y"))
    with pytest.raises(AdapterLoadFailed, match="damaged"):
        shelf.of(digest)
    with pytest.raises(AdapterLoadFailed, match="damaged"):
        asyncio.run(shelf.voices.show(digest))
    path.unlink()
    with pytest.raises(Conflict) as caught:
        shelf.of(digest)
    assert caught.value.code == "adapter_not_ready"
    path.mkdir()
    with pytest.raises(AdapterLoadFailed, match="cannot be read"):
        shelf.of(digest)


def test_show_gives_what_was_uploaded(shelf: Shelf) -> None:
    assert asyncio.run(shelf.voices.show(shelf.put(system="x", eos_token_id=3))) == {
        "system": "x",
        "eos_token_id": 3,
    }


def test_a_template_that_fails_late_is_named_as_the_adapters(shelf: Shelf) -> None:
    template = "{% if 'x' in messages[0].content %}{{ a.b.c }}{% endif %}ok"
    voice = shelf.of(shelf.put(chat_template=template))
    assert shelf.prompt(voice, ("user", "hi")) == "ok"
    with pytest.raises(InvalidRequest, match="the adapter's chat template fails") as caught:
        shelf.prompt(voice, ("user", "x"))
    assert caught.value.param == "messages"


def test_templates_that_take_their_time_hold_up_templates_only(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = threading.Event()

    class Slow:
        def render(self, *_: object) -> str:
            assert patience.wait(60)
            return "x"

        def close(self) -> None:
            pass

    monkeypatch.setattr(module, "Renderer", Slow)
    voice, other = shelf.of(shelf.put(chat_template="slow")), shelf.put(system="x")

    async def main() -> None:
        chat = [{"role": "user", "content": "hi"}]
        # As many as hold up every renderer, and one more.
        tasks = [asyncio.create_task(shelf.voices.prompt(voice, chat)) for _ in range(3)]
        await asyncio.sleep(0.01)
        assert await shelf.voices.show(other) == {"system": "x"}
        assert await shelf.voices.prompt(Voice((1,)), chat)
        assert not any(task.done() for task in tasks)
        patience.set()
        assert len(set(map(tuple, await asyncio.gather(*tasks)))) == 1

    asyncio.run(main())
