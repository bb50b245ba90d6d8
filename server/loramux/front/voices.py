"""How the adapters of a request are spoken to and speak: their profiles, read when first needed.

Ten thousand profiles of 64 KiB are no thing to hold, so the newest used ones are; the others are
read, and checked against their digests, on a thread of their own: not on those that render, which
a template may hold up.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import msgspec

from loramux.adapters.profile import Profile, parse_profile
from loramux.adapters.renderer import Renderer
from loramux.errors import AdapterLoadFailed, Conflict
from loramux.front.catalog import Served
from loramux.front.tokenizer import TokenizerService

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_CACHE_BYTES = 16 << 20
_ENTRY_BYTES = 4 << 10
"""What a profile in the cache counts besides its text."""
_RENDERERS = 2
"""A template that takes its time holds up one of them."""


@dataclass(frozen=True)
class Voice:
    """What all adapters of a request bring together. ``defaults`` are request fields by name;
    ``max_tokens`` is apart from them, for it gives way where the context ends."""

    eos_ids: tuple[int, ...]
    template: str = ""
    system: str = ""
    defaults: Mapping[str, float] = field(default_factory=dict)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()


class Voices:
    """Finds a request's Voice and makes its prompt. ``path`` is where a blob is."""

    def __init__(self, tokenizer: TokenizerService, path: Callable[[str], Path]) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self._base = Voice(tokenizer.eos_ids)
        self._known: OrderedDict[str, tuple[Profile, int]] = OrderedDict()
        self._known_bytes = 0
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="profiles")
        self._rendering = ThreadPoolExecutor(_RENDERERS, thread_name_prefix="templates")
        self._thread = threading.local()
        self._renderers: list[Renderer] = []

    async def of(self, served: Served) -> Voice:
        """Raises Conflict (adapter_not_ready) when an adapter was deleted since it was resolved,
        and AdapterLoadFailed when its profile is damaged."""
        if not any(served.profiles):
            return self._base
        found = [await self._profile(digest) for digest in served.profiles if digest]
        return self._together(found, alone=len(served.profiles) == 1)

    def _together(self, profiles: Sequence[Profile], *, alone: bool) -> Voice:
        """Several speak as the first that says how; they end where any of them would, and none has
        its sampling forced on the others."""
        ends = {token_id for profile in profiles for token_id in profile.eos_token_id}
        defaults = dict(profiles[0].generation.given) if alone else {}
        most = defaults.pop("max_tokens", None)
        return Voice(
            eos_ids=tuple(sorted(ends if alone and ends else ends.union(self._base.eos_ids))),
            template=next((p.chat_template for p in profiles if p.chat_template), ""),
            system=next((p.system for p in profiles if p.system), ""),
            defaults=defaults,
            max_tokens=None if most is None else int(most),
            stop=tuple(stop for profile in profiles for stop in profile.stop),
            stop_token_ids=tuple(i for profile in profiles for i in profile.stop_token_ids),
        )

    async def prompt(
        self,
        voice: Voice,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
        most: int | None = None,
    ) -> list[int]:
        """The ids of a chat. Raises InvalidRequest when there is no template or it fails, and
        ContextLengthExceeded when they are certainly more than ``most``."""
        if voice.system and not any(m["role"] in ("system", "developer") for m in messages):
            messages = [{"role": "system", "content": voice.system}, *messages]
        if voice.template:
            text = await asyncio.get_running_loop().run_in_executor(
                self._rendering, self._render, voice.template, messages, add_generation_prompt
            )
        else:
            text = await self._tokenizer.render_chat(
                messages, add_generation_prompt=add_generation_prompt
            )
        return await self._tokenizer.encode(text, add_special_tokens, most=most, param="messages")

    async def show(self, digest: str) -> dict[str, Any]:
        """A profile as it was uploaded, its fields unchecked. Raises as ``of`` does."""
        found: dict[str, Any] = msgspec.json.decode(await self._on_thread(self._read, digest))
        return found

    async def _profile(self, digest: str) -> Profile:
        if digest in self._known:
            self._known.move_to_end(digest)
            return self._known[digest][0]
        data = await self._on_thread(self._read, digest)
        profile = await self._on_thread(parse_profile, data)
        if digest not in self._known:  # another request may have been as quick
            self._known[digest] = profile, len(data) + _ENTRY_BYTES
            self._known_bytes += len(data) + _ENTRY_BYTES
        while self._known_bytes > _CACHE_BYTES:
            self._known_bytes -= self._known.popitem(last=False)[1][1]
        return profile

    def _read(self, digest: str) -> bytes:
        try:
            data = self._path(digest).read_bytes()
        except FileNotFoundError:
            raise Conflict(
                "the adapter was deleted meanwhile", param="model", code="adapter_not_ready"
            ) from None
        except OSError as error:
            raise AdapterLoadFailed(f"the adapter's profile cannot be read: {error}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise AdapterLoadFailed("the adapter's profile is damaged: upload the adapter again")
        return data

    def _render(
        self, template: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool
    ) -> str:
        renderer: Renderer | None = getattr(self._thread, "renderer", None)
        if renderer is None:
            renderer = self._thread.renderer = Renderer()
            self._renderers.append(renderer)
        variables = {"add_generation_prompt": add_generation_prompt}
        return renderer.render(template, self._tokenizer.special_tokens, messages, variables)

    async def _on_thread(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reading, function, *arguments)

    def close(self) -> None:
        """Stop the threads and the processes that render."""
        for threads in (self._reading, self._rendering):
            threads.shutdown(wait=True, cancel_futures=True)
        for renderer in self._renderers:
            renderer.close()
