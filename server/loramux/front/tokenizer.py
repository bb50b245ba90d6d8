"""Text to token ids and back, and chat templates, beside the event loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


class TokenizerService:
    """The base model's tokenizer.json, tokenizer_config.json and chat template.

    Encoding, decoding and rendering run on a small thread pool. Raises ConfigError when the
    directory has no usable tokenizer.
    """

    vocab_size: int
    """Ids below this are valid prompt tokens."""
    eos_ids: tuple[int, ...]
    """Ids that end a text unless the client asks to ignore them."""
    has_chat_template: bool

    def __init__(self, model: Path) -> None:
        raise NotImplementedError

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text; special tokens written out in the text count as such."""
        raise NotImplementedError

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids, all at once."""
        raise NotImplementedError

    def token_text(self, token_id: int) -> str:
        """One token as text; ``bytes:\\xe2\\x82`` (OpenAI's spelling) when it is no whole text."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for in the middle of a text; empty for unknown ids."""
        raise NotImplementedError

    async def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat. Encode it with ``add_special_tokens=False``.

        ``variables`` are further template variables (``chat_template_kwargs``). Raises
        InvalidRequest (param ``messages``) when there is no template or it refuses the messages.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop the thread pool."""
        raise NotImplementedError
