"""Token ids to text as they come: never half a character, never part of a stop string.

Every supported tokenizer turns a token into bytes that do not depend on its neighbours, so the
text of a sequence is the concatenation of its tokens' bytes, read as UTF-8. That makes streaming
exact by construction and costs a table look-up per token.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer

from loramux.errors import ConfigError

_utf8 = codecs.getincrementaldecoder("utf-8")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's character for every byte: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    pairs = [(chr(byte), byte) for byte in printable]
    return dict(pairs + [(chr(256 + i), byte) for i, byte in enumerate(others)])


_BYTE_OF = _byte_level_alphabet()


class TokenBytes:
    """The bytes of every token of a tokenizer, as its decoder would make them.

    Understands the decoders ``ByteLevel``, ``Metaspace``, none at all, and sequences of literal
    ``Replace``, ``Metaspace``, ``ByteFallback``, ``Fuse`` and a final leading ``Strip``; raises
    ConfigError naming any other.

    One difference to ``tokenizers``: a run of byte tokens that is not UTF-8 loses only its bad
    bytes. There the whole run becomes U+FFFD, which a stream that already delivered its first
    characters could not do.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces: dict[int, bytes] = {}
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self._space: str | None = None
        self.drop_first_space = False
        """Metaspace: the first token loses its spaces."""
        self.separator = b""
        self.strip = b""
        """Cut from the beginning of the text, up to ``strip_count`` times."""
        self.strip_count = 0
        specification = json.loads(tokenizer.to_str())
        self.special = frozenset(
            token["id"] for token in specification["added_tokens"] if token["special"]
        )
        decoder = specification["decoder"]
        if decoder is None:
            self.separator = b" "
        else:
            self._read(decoder["decoders"] if decoder["type"] == "Sequence" else [decoder])

    def _read(self, stages: list[dict[str, Any]]) -> None:
        fused = False
        for stage in stages:
            match stage:
                case {"type": "ByteLevel"} if len(stages) == 1:
                    self._byte_level = True
                case {"type": "Replace", "pattern": {"String": old}, "content": new} if (
                    not self._byte_fallback and self._space is None
                ):
                    self._replacements.append((old, new))
                case {"type": "Metaspace", "replacement": mark} if not fused:
                    self._space = mark
                    self.drop_first_space = stage.get("prepend_scheme", "always") != "never"
                case {"type": "ByteFallback"} if not fused:
                    self._byte_fallback = True
                case {"type": "Fuse"}:
                    fused = True
                case {"type": "Strip", "content": char, "start": start, "stop": 0} if (
                    fused and char.isascii() and not self.strip_count
                ):
                    self.strip, self.strip_count = char.encode(), start
                case _:
                    raise ConfigError(f"tokenizer.json: decoder stage {stage} is not supported")

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of one token inside a text; none for an unknown id."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._derive(token_id, first=False) or b""
        return piece

    def first(self, token_id: int) -> bytes | None:
        """The bytes of a token that begins a text, before ``strip``; None for an unknown id."""
        return self._derive(token_id, first=True)

    def _derive(self, token_id: int, first: bool) -> bytes | None:
        token = self._tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return None
        if self._byte_level:
            if all(char in _BYTE_OF for char in token):
                return bytes(_BYTE_OF[char] for char in token)
            return token.encode()
        if self._byte_fallback and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        for old, new in self._replacements:
            token = token.replace(old, new)
        if self._space is not None:
            token = token.replace(self._space, "" if first and self.drop_first_space else " ")
        return token.encode() if first else self.separator + token.encode()


class Detokenizer:
    """The text of one growing token sequence."""

    def __init__(self, table: TokenBytes, skip_special_tokens: bool = True) -> None:
        self._table = table
        self._skip = table.special if skip_special_tokens else frozenset[int]()
        self._utf8 = _utf8("replace")
        self._empty = True
        self._strips_left = table.strip_count

    def feed(self, token_ids: Iterable[int]) -> str:
        """The characters these tokens complete."""
        table, skip = self._table, self._skip
        if not self._empty and not self._strips_left:
            return self._utf8.decode(b"".join([table[i] for i in token_ids if i not in skip]))
        return self._utf8.decode(b"".join([self._begin(i) for i in token_ids if i not in skip]))

    def _begin(self, token_id: int) -> bytes:
        piece = self._table.first(token_id) if self._empty else self._table[token_id]
        if piece is None:
            return b""
        self._empty = False
        while self._strips_left and piece.startswith(self._table.strip):
            piece = piece[len(self._table.strip) :]
            self._strips_left -= 1
        if piece:
            self._strips_left = 0
        return piece

    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Finds the first stop string to be completed in a text that comes in pieces.

    The outcome depends on the text alone, not on how it was cut: the match is the one that ends
    first, the longest of those that end together. Text is held back exactly while it may be the
    beginning of a match (the states of Knuth, Morris and Pratt, 1977), so the cost per character
    does not depend on the length of the stop strings.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._include = include
        self._stops = sorted(stops, key=len, reverse=True)
        self._failures = [_failure_function(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> str:
        """The text that is now certain; ``matched`` is set when a stop string ended it."""
        held, states = self._held + text, self._states
        begin = len(self._held)
        for position in range(begin, len(held)):
            char = held[position]
            for index, stop in enumerate(self._stops):
                state, failure = states[index], self._failures[index]
                while state and stop[state] != char:
                    state = failure[state - 1]
                states[index] = state = state + 1 if stop[state] == char else 0
                if state == len(stop):
                    self.matched, self._held = stop, ""
                    end = position + 1
                    return held[: end if self._include else end - len(stop)]
        keep = len(held) - max(states)
        self._held = held[keep:]
        return held[:keep]

    def finish(self) -> str:
        """The text held back for a match that did not come."""
        held, self._held = self._held, ""
        return held


def _failure_function(pattern: str) -> list[int]:
    """For every prefix of the pattern: the longest proper border of it."""
    table, border = [0] * len(pattern), 0
    for index in range(1, len(pattern)):
        while border and pattern[border] != pattern[index]:
            border = table[border - 1]
        border += pattern[border] == pattern[index]
        table[index] = border
    return table


class TextStream:
    """A request's tokens to its text, stop strings applied.

    As in vLLM, the text of the first ``min_tokens`` tokens is not searched for stop strings.
    """

    def __init__(
        self,
        table: TokenBytes,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._detokenizer = Detokenizer(table, skip_special_tokens)
        self._stops = StopStrings(stop, include_stop) if stop else None
        self._unsearched = min_tokens

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.matched if self._stops else None

    def feed(self, token_ids: Sequence[int]) -> tuple[str, int]:
        """(the certain text, how many tokens were used): fewer than given after a stop string."""
        if self._stops is None:
            return self._detokenizer.feed(token_ids), len(token_ids)
        parts = []
        for used, token_id in enumerate(token_ids, 1):
            text = self._detokenizer.feed((token_id,))
            if self._unsearched > 0:
                self._unsearched -= 1
            else:
                text = self._stops.feed(text)
            parts.append(text)
            if self._stops.matched is not None:
                return "".join(parts), used
        return "".join(parts), len(token_ids)

    def finish(self) -> str:
        """The rest of the text when no stop string ended it (it may still: see ``matched``)."""
        rest = self._detokenizer.finish()
        if self._stops is None or self._stops.matched is not None:
            return rest if self._stops is None else ""
        return self._stops.feed(rest) + ("" if self.matched is not None else self._stops.finish())
