"""Log-probabilities as OpenAI writes them: parallel lists for completions, objects for chats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loramux.front.tokenizer import TokenizerService
from loramux.http.answers import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from loramux.wire import TokenLogprob

FLOOR = -9999.0
"""JSON has no -Infinity; vLLM writes this number for it, and so do we."""


class OffsetLogprobs:
    """The ``logprobs`` of one completions choice, piece by piece.

    ``text_offset`` is where a token's text begins in the choice's text, so special tokens that are
    left out of the text, and bytes that do not complete a character yet, do not move it.
    """

    def __init__(self, tokenizer: TokenizerService, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stream = tokenizer.stream(skip_special_tokens=skip_special_tokens)
        self._offset = 0

    def restart_at(self, offset: int) -> None:
        """The next token begins a text of its own, ``offset`` characters into the choice's."""
        self._stream = self._tokenizer.stream(skip_special_tokens=self._skip)
        self._offset = offset

    def piece(
        self, token_ids: Iterable[int], entries: Sequence[TokenLogprob | None]
    ) -> CompletionLogprobs:
        """The lists for these tokens; an entry is None where there is no probability."""
        lists = CompletionLogprobs()
        for token_id, entry in zip(token_ids, entries, strict=True):
            lists.text_offset.append(self._offset)
            self._offset += len(self._stream.feed((token_id,))[0])
            lists.tokens.append(self._tokenizer.token_text(token_id))
            lists.token_logprobs.append(None if entry is None else max(entry.logprob, FLOOR))
            lists.top_logprobs.append(None if entry is None else self._top(entry))
        return lists

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the chosen one when it is not among them.

        Two ids may have one text; the likelier one comes first and keeps it.
        """
        top: dict[str, float] = {}
        for token_id, logprob in [*entry.top, (entry.token_id, entry.logprob)]:
            top.setdefault(self._tokenizer.token_text(token_id), max(logprob, FLOOR))
        return top


def chat_logprobs(tokenizer: TokenizerService, entries: Sequence[TokenLogprob]) -> ChatLogprobs:
    """The ``logprobs`` of a chat choice, or of a piece of one."""
    return ChatLogprobs(
        [
            ChatLogprob(
                token=tokenizer.token_text(entry.token_id),
                logprob=max(entry.logprob, FLOOR),
                bytes=list(tokenizer.token_bytes(entry.token_id)),
                top_logprobs=[
                    TopLogprob(
                        token=tokenizer.token_text(token_id),
                        logprob=max(logprob, FLOOR),
                        bytes=list(tokenizer.token_bytes(token_id)),
                    )
                    for token_id, logprob in entry.top
                ],
            )
            for entry in entries
        ]
    )
