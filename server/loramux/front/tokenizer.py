"""Text to token ids and back, and chat templates, beside the event loop."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from loramux.adapters.chat_template import ChatTemplate, find_template, special_tokens
from loramux.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from loramux.front.detokenizer import Detokenizer, TextStream, TokenBytes

log = logging.getLogger(__name__)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_THREADS = 2


class TokenizerService:
    """The base model's tokenizer.json, tokenizer_config.json and chat template.

    Encoding, decoding and rendering run on a small thread pool. Raises ConfigError when the
    directory has no usable tokenizer. A chat template that does not compile leaves completions
    working; ``render_chat`` tells why.
    """

    vocab_size: int
    """Ids below this are valid prompt tokens (config.json's, which may exceed the tokenizer's)."""
    eos_ids: tuple[int, ...]
    """Ids that end a text unless the client asks to ignore them."""
    longest: int | None
    """See ``longest_token``."""
    special_tokens: dict[str, str]
    """What chat templates know as ``bos_token`` and so on."""

    def __init__(self, model: Path) -> None:
        config = _read_json(model / "config.json")
        tokenizer_config = _read_json(model / "tokenizer_config.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception for every failure
            raise ConfigError(f"{model / 'tokenizer.json'}: {error}") from None
        # Some tokenizer files were saved with training limits on; a prompt is never cut or padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._table = TokenBytes(self._tokenizer)
        self.longest = longest_token(self._tokenizer, self._table)
        self.vocab_size = config.get("vocab_size") or self._tokenizer.get_vocab_size()
        self.special_tokens = special = special_tokens(tokenizer_config)
        generation = _read_json(model / "generation_config.json")
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        eos_ids = set(eos) if isinstance(eos, list) else set() if eos is None else {eos}
        named = self._tokenizer.token_to_id(special.get("eos_token", ""))
        self.eos_ids = tuple(sorted(eos_ids | ({named} if named is not None else set())))
        self._template: ChatTemplate | None = None
        self._no_template = "this model has no chat template; use /v1/completions"
        if source := find_template(model, tokenizer_config):
            try:
                self._template = ChatTemplate(source, special)
            except ConfigError as error:
                log.warning("%s", error.message)
                self._no_template = error.message
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenizer")

    @property
    def has_chat_template(self) -> bool:
        """Whether ``render_chat`` can work."""
        return self._template is not None

    async def encode(
        self,
        text: str,
        add_special_tokens: bool = True,
        *,
        most: int | None = None,
        param: str | None = None,
    ) -> list[int]:
        """The ids of a text; special tokens written out in the text count as such.

        Raises ContextLengthExceeded when they are certainly more than ``most``, before a thread
        works on them; not always when they are.
        """
        if most is not None and self.longest is not None:
            num_bytes = len(text.encode())
            if num_bytes > most * self.longest:
                raise ContextLengthExceeded(
                    f"{num_bytes} bytes of prompt exceed the context of {most} tokens", param=param
                )
        return await self._run(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids, all at once: exactly what streaming them would give."""
        return await self._run(self._decode, ids, skip_special_tokens)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        detokenizer = Detokenizer(self._table, skip_special_tokens)
        return detokenizer.feed(ids) + detokenizer.finish()

    def stream(
        self,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> TextStream:
        """A fresh incremental detokenizer."""
        return TextStream(
            self._table,
            stop=stop,
            include_stop=include_stop,
            skip_special_tokens=skip_special_tokens,
            min_tokens=min_tokens,
        )

    def token_text(self, token_id: int) -> str:
        """One token as text; ``bytes:\\xe2\\x82`` (OpenAI's spelling) when it is no whole text."""
        piece = self._table[token_id]
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for in the middle of a text; empty for unknown ids."""
        return self._table[token_id]

    async def render_chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat. Encode it with ``add_special_tokens=False``.

        ``variables`` are further template variables (``chat_template_kwargs``). Raises
        InvalidRequest (param ``messages``) when there is no template or it refuses the messages.
        """
        if self._template is None:
            raise InvalidRequest(self._no_template, param="messages")
        context = {**(variables or {}), "add_generation_prompt": add_generation_prompt}
        return await self._run(self._template.render, messages, context)

    async def _run(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    def close(self) -> None:
        """Stop the thread pool."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def longest_token(tokenizer: Tokenizer, table: TokenBytes) -> int | None:
    """No token takes more bytes of a text. None where that is not sure: a tokenizer that drops or
    shortens texts, or has one token for all that it does not know."""
    written = json.loads(tokenizer.to_str())
    before = written["pre_tokenizer"] or {}
    stages = before.get("pretokenizers", [before])
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sure = (
        written["model"]["type"] == "BPE"
        and written["normalizer"] is None
        and all(s.get("type") == "ByteLevel" or s.get("behavior") == "Isolated" for s in stages)
        and any(stage.get("type") == "ByteLevel" for stage in stages)
        and vocabulary.keys() >= set(ByteLevel.alphabet())
        and not any(token["lstrip"] or token["rstrip"] for token in written["added_tokens"])
    )
    return max(len(table[token_id]) for token_id in vocabulary.values()) if sure else None


def check_partner(model: Path, partner: Path, param: str) -> None:
    """Whether another model reads and writes the same token ids as the base: equal numbers of them,
    and equal tokenizers. A folder without tokenizer.json is taken to share the base's. Raises
    ConfigError, which names the flag of ``param``.
    """
    flag = "--" + param.replace("_", "-")
    if not (partner / "config.json").exists():
        raise ConfigError(f"{flag}: {partner} has no config.json", param=param)
    sizes = [_read_json(folder / "config.json").get("vocab_size") for folder in (model, partner)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"{flag}: {partner} has a vocab_size of {sizes[1]}, --model has {sizes[0]}", param=param
        )
    files = [folder / "tokenizer.json" for folder in (model, partner)]
    if files[1].exists() and _identity(files[0]) != _identity(files[1]):
        raise ConfigError(f"{flag}: {files[1]} is another tokenizer than --model's", param=param)


def _identity(path: Path) -> bytes:
    """What a tokenizer.json does, however it is written; limits on lengths are not obeyed."""
    fields = {**_read_json(path), "truncation": None, "padding": None}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).digest()


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value
