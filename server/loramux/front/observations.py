"""What the front knows of itself: the newest engine statistics, running totals, and events.

Plain data; exporters read ``Snapshot`` and may watch single events as an ``Observer``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from loramux.errors import LoramuxError
from loramux.front.generation import Done, GenerationSpec
from loramux.metrics.stats import StepStats


class Observer(Protocol):
    """Called synchronously on the event loop: methods must be quick and must not raise."""

    def rejected(self, code: str) -> None:
        """Admission said no; ``code`` is the error's code or a reason such as ``draining``."""

    def submitted(self, spec: GenerationSpec) -> None:
        """A choice was accepted."""

    def first_token(self, spec: GenerationSpec, seconds: float) -> None:
        """The first token arrived, ``seconds`` after the request did."""

    def more_tokens(self, spec: GenerationSpec, num_tokens: int, seconds: float) -> None:
        """Later tokens arrived together, ``seconds`` after the ones before."""

    def finished(self, spec: GenerationSpec, done: Done) -> None:
        """The good terminal event ("abort" included)."""

    def failed(self, spec: GenerationSpec, error: LoramuxError) -> None:
        """The bad terminal event."""

    def step(self, stats: StepStats) -> None:
        """The engine finished a step."""

    def uploaded(self, result: str) -> None:
        """An upload ended: ``ready`` or the code of its refusal."""

    def engine_restarted(self, reason: str) -> None:
        """The engine died (``exit``, ``heartbeat``, ``step_timeout``) and is started again."""


@dataclass
class Snapshot:
    """Newest values and totals since the front started; read it, do not write it.

    ``stats`` is the newest StepStats with ``resident``, ``pinned`` and ``waiting_adapters`` carried
    over when a message left them out. Totals survive engine restarts. ``adapter_tokens`` maps a
    digest ("" for the base) to [prompt, generation] tokens of finished requests and is bounded:
    digests beyond the first 1000 are added up under "other".
    """

    stats: StepStats = field(default_factory=StepStats)
    resident: frozenset[str] = frozenset()
    pinned: frozenset[str] = frozenset()
    waiting_adapters: tuple[str, ...] = ()
    engine_epoch: int = 0
    engine_restarts: int = 0
    steps: int = 0
    unfinished: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_load_bytes: int = 0
    adapter_load_s: float = 0.0
    evictions: dict[str, int] = field(default_factory=dict)
    phase_s: dict[str, float] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    uploads: dict[str, int] = field(default_factory=dict)
    adapter_tokens: dict[str, list[int]] = field(default_factory=dict)
