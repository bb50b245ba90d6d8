"""Streaming text equals the whole text, and never shows half a character or a stop string."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.front.model_dir import KINDS
from tokenizers import Tokenizer, decoders

from loramux.errors import ConfigError
from loramux.front.detokenizer import Detokenizer, StopStrings, TextStream, TokenBytes

kinds = st.sampled_from(sorted(KINDS))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text("ab 日é😀stop▁")


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return KINDS[kind]()


@functools.cache
def table(kind: str) -> TokenBytes:
    return TokenBytes(tokenizer(kind))


def cut(data: st.DataObject, sequence: list[int]) -> list[list[int]]:
    """The sequence in pieces of any length, empty ones included."""
    marks = data.draw(st.lists(st.integers(0, len(sequence)), max_size=8))
    edges = [0, *sorted(marks), len(sequence)]
    return [sequence[a:b] for a, b in zip(edges, edges[1:], strict=False)]


def streamed(kind: str, pieces: list[list[int]], skip: bool) -> str:
    stream = Detokenizer(table(kind), skip)
    return "".join([stream.feed(piece) for piece in pieces]) + stream.finish()


@given(st.data(), kinds, st.booleans())
def test_equals_the_whole_text_for_any_tokens(data: st.DataObject, kind: str, skip: bool) -> None:
    size = tokenizer(kind).get_vocab_size()
    # The interesting tokens (words with spaces, added ones, unknown ids) have the highest ids.
    one = st.integers(0, size + 3) | st.integers(max(0, size - 12), size + 3)
    ids = data.draw(st.lists(one, max_size=30))
    whole = tokenizer(kind).decode(ids, skip_special_tokens=skip)
    if "fallback" in kind and "\N{REPLACEMENT CHARACTER}" in whole:
        # Runs of byte tokens that are not UTF-8: the documented difference.
        whole = b"".join(
            table(kind)[i] for i in ids if not (skip and i in table(kind).special)
        ).decode(errors="replace")
        whole = whole.removeprefix(" ") if kind == "byte_fallback" else whole
    assert streamed(kind, cut(data, ids), skip) == whole


@given(st.data(), kinds, TEXTS)
def test_equals_the_whole_text_of_a_text(data: st.DataObject, kind: str, text: str) -> None:
    ids = tokenizer(kind).encode(text, add_special_tokens=False).ids
    whole = tokenizer(kind).decode(ids, skip_special_tokens=True)
    assert streamed(kind, cut(data, ids), True) == whole


@given(TEXTS)
def test_half_a_character_is_never_shown(text: str) -> None:
    ids = tokenizer("byte_fallback").encode(text, add_special_tokens=False).ids
    stream, shown = Detokenizer(table("byte_fallback")), ""
    for token in ids:
        shown += stream.feed([token])
        assert tokenizer("byte_fallback").decode(ids).startswith(shown)
    assert stream.finish() == ""


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    ids = tokenizer("byte_level").encode("日").ids
    assert len(ids) > 1
    stream = Detokenizer(table("byte_level"))
    assert stream.feed(ids[:-1]) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_added_tokens_are_text_unless_special() -> None:
    ids = tokenizer("byte_level").encode("a[not special é]</s>").ids
    assert len(ids) == 3
    assert streamed("byte_level", [ids], skip=True) == "a[not special é]"
    assert streamed("byte_level", [ids], skip=False) == "a[not special é]</s>"


def test_the_alphabet_of_byte_level_is_the_library_s() -> None:
    one = tokenizer("byte_level")
    pieces = {table("byte_level")[i] for i in range(one.get_vocab_size())}
    assert {bytes([byte]) for byte in range(256)} <= pieces


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.WordPiece(),
        decoders.CTC(),
        decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
        decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
        decoders.Sequence([decoders.ByteFallback(), decoders.Replace("▁", " ")]),
    ],
)
def test_unknown_decoders_are_refused_by_name(decoder: decoders.Decoder) -> None:
    one = KINDS["words"]()
    one.decoder = decoder
    with pytest.raises(ConfigError, match="decoder stage"):
        TokenBytes(one)


def first_match(text: str, stops: list[str]) -> tuple[str, str] | None:
    """(the text before, the stop string) of the match that ends first, the longest of those."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end - len(stop)], stop
    return None


STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)


@given(st.data(), st.text("abc", max_size=40), STOPS, st.booleans())
def test_stop_strings_cut_the_whole_text(
    data: st.DataObject, text: str, stops: list[str], include: bool
) -> None:
    marks = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    edges = [0, *marks, len(text)]
    stream, shown = StopStrings(stops, include), ""
    for a, b in zip(edges, edges[1:], strict=False):
        shown += stream.feed(text[a:b])
        if stream.matched is not None:
            break
    else:
        held = stream.finish()
        assert not held or any(stop.startswith(held) for stop in stops)  # nothing held in vain
        shown += held
    match first_match(text, stops):
        case None:
            assert (shown, stream.matched) == (text, None)
        case (before, stop):
            assert (shown, stream.matched) == (before + stop * include, stop)


@given(st.data(), kinds, st.lists(st.sampled_from(["st", "stop", " a", "é", "日"]), min_size=1))
def test_stop_strings_across_tokens(data: st.DataObject, kind: str, stops: list[str]) -> None:
    text = data.draw(st.text("stop aé日b", max_size=30))
    ids = tokenizer(kind).encode(text, add_special_tokens=False).ids
    whole = streamed(kind, [ids], True)
    stream, shown, used = TextStream(table(kind), stop=stops), "", 0
    for piece in cut(data, ids):
        new, count = stream.feed(piece)
        shown, used = shown + new, used + count
        if stream.matched is not None:
            break
    else:
        shown += stream.finish()
    match first_match(whole, stops):
        case None:
            assert (shown, stream.matched, used) == (whole, None, len(ids))
        case (before, stop):
            assert (shown, stream.matched) == (before, stop)
            fewest = next(n for n in range(len(ids) + 1) if before + stop in certain(kind, ids[:n]))
            assert used == fewest


def certain(kind: str, ids: list[int]) -> str:
    return Detokenizer(table(kind)).feed(ids)


def test_stop_strings_wait_for_min_tokens() -> None:
    ids = tokenizer("byte_level").encode("a stop, a stop, a stop").ids
    whole = tokenizer("byte_level").decode(ids)
    first = next(n for n in range(len(ids)) if "stop" in tokenizer("byte_level").decode(ids[:n]))
    stream = TextStream(table("byte_level"), stop=["stop"], min_tokens=first)
    text, _ = stream.feed(ids)
    assert text == whole[: whole.index("stop", whole.index("stop") + 1)]


def test_the_cost_of_a_stop_string_does_not_grow_with_it() -> None:
    stream = StopStrings(["a" * 5000 + "b"], include=False)
    text = "".join(stream.feed("a") for _ in range(5500))
    assert text == "a" * 500
    assert stream.finish() == "a" * 5000
