"""A text that cannot fit the context takes no tokenizer thread."""

from __future__ import annotations

from typing import Any

import pytest
from tests.http.conftest import Running
from tests.http.fake_front import INFO
from tests.http.test_bad_inputs import refusal


@pytest.fixture
def encoded(shared: Running, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenized."""
    tokenizer, seen = shared.front.tokenizer, []
    encode = tokenizer._encode

    def counted(text: str, add_special_tokens: bool) -> Any:
        seen.append(text)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "_encode", counted)
    return seen


def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    shared: Running, encoded: list[str]
) -> None:
    longest = shared.front.tokenizer.longest
    assert longest is not None and longest > 1
    most = longest * INFO.max_model_len
    for text, num in (("a" * most, 1), ("a" * (most + 1), 0), ("\u00e9" * (most // 2 + 1), 0)):
        encoded.clear()
        error = refusal(shared.complete(text, max_tokens=1), 400)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert len(encoded) == num
    encoded.clear()
    error = refusal(shared.chat("a" * (most + 1)), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert not encoded
