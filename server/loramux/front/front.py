"""Everything HTTP needs, in one object: requests, adapters, tokenizer, readiness."""

from __future__ import annotations

from typing import Any, Literal

from loramux.config import ServerConfig
from loramux.front.adapters import AdapterService
from loramux.front.generation import Generation, GenerationSpec
from loramux.front.observations import Observer, Snapshot
from loramux.front.tokenizer import TokenizerService
from loramux.wire import Ready

CommandKind = Literal["pin", "unpin", "evict", "drain", "state"]


class Admission:
    """Places reserved for choices not yet submitted. Use as ``with front.admit(n): ...``.

    The places are held until ``release`` (or the end of the ``with``), so a burst is refused at its
    first byte and not after it was tokenized. Submit everything inside the ``with``, without an
    ``await`` after the first ``submit``: a submitted choice holds its own place.
    """

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the places back. Idempotent."""
        raise NotImplementedError


class Front:
    """One per process; every method runs on the event loop that ran ``start``."""

    config: ServerConfig
    base_name: str
    created: int
    adapters: AdapterService
    tokenizer: TokenizerService
    snapshot: Snapshot
    observer: Observer | None
    """Set it before ``start`` to see single events (histograms)."""

    def __init__(self, config: ServerConfig, observer: Observer | None = None) -> None:
        raise NotImplementedError

    @property
    def info(self) -> Ready | None:
        """What the running engine said of itself; None while there is none."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start the engine and ingest processes; returns before they are ready."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Refuse new requests, let running ones go on for ``config.drain_s``, end everything."""
        raise NotImplementedError

    def not_ready(self) -> list[str]:
        """Why requests are refused now; empty when they are not."""
        raise NotImplementedError

    def admit(self, num: int) -> Admission:
        """Reserve ``num`` places; raises Overloaded at once when not ready, draining or full."""
        raise NotImplementedError

    def submit(self, spec: GenerationSpec) -> Generation:
        """Hand one choice to the engine; never blocks.

        Raises InvalidRequest or ContextLengthExceeded for a prompt the engine cannot take, Conflict
        or NotFound when its adapter has gone since it was resolved, Overloaded when the engine has
        gone since ``admit``.
        """
        raise NotImplementedError

    async def command(self, kind: CommandKind, digest: str | None = None) -> dict[str, Any]:
        """An operator's command to the engine; its Reply's payload. Raises Overloaded without one.

        An error in the Reply is raised as NotFound or Conflict with the engine's code and message.
        """
        raise NotImplementedError
