"""Traffic drawn before it is sent: who asks for what and when, as S-LoRA's generator draws it.

``rate * duration_s`` requests arrive with gaps from a Gamma distribution of mean ``1 / rate`` and
coefficient of variation ``cv`` (1: Poisson; larger: bursts). Lengths are uniform integers in
[low, high). The adapter of a request is ``int(numpy.power(alpha) * adapters)``. numpy's power
distribution has the density ``alpha * x**(alpha - 1)`` on [0, 1], so adapter ``k`` of ``n`` gets

    ((k + 1) / n) ** alpha - (k / n) ** alpha

of the requests: alpha = 1 is *uniform*, and the smaller alpha is, the more of them name adapter 0
(alpha = 0.1 and n = 1,000: half of all). Above 1 the last adapters are the popular ones.

Adapter ``k`` has rank ``ranks[k % len(ranks)]``. Of the requests, ``cold_share`` name an adapter
that no request named before or will again: numbers from ``adapters`` on. Tenants are drawn
uniformly. Every property is drawn from a stream of its own, so two plans that differ in the number
of adapters have the same arrivals and lengths. Times count from the start of the run; nobody asks
the wall clock.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

Span = tuple[int, int]


@dataclass(frozen=True)
class Traffic:
    """What is asked for. ``adapters`` = 0 names the base only; spans are [low, high) in tokens.

    Raises ValueError for what cannot be drawn.
    """

    adapters: int = 100
    alpha: float = 1.0
    rate: float = 2.0
    cv: float = 1.0
    duration_s: float = 300.0
    prompt: Span = (8, 512)
    output: Span = (8, 512)
    ranks: tuple[int, ...] = (8,)
    cold_share: float = 0.0
    tenants: int = 1
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("alpha", "rate", "cv", "duration_s"):
            if not getattr(self, name) > 0:
                hint = "; uniform popularity is alpha = 1" if name == "alpha" else ""
                raise ValueError(f"{name}: has to be above 0{hint}")
        for name in ("prompt", "output"):
            low, high = getattr(self, name)
            if not 1 <= low < high:
                raise ValueError(f"{name}: [low, high) needs 1 <= low < high")
        if self.adapters < 0 or self.tenants < 1 or not self.ranks:
            raise ValueError("adapters >= 0, tenants >= 1 and at least one rank")
        if not 0 <= self.cold_share <= 1 or (self.cold_share and not self.adapters):
            raise ValueError("cold_share: between 0 and 1, and with adapters only")

    @classmethod
    def read(cls, table: dict[str, Any]) -> Traffic:
        """From a scenario's table. Raises ValueError for a name that is none of the fields."""
        known = {field.name for field in fields(cls)}
        if unknown := set(table) - known:
            raise ValueError(f"traffic: no {sorted(unknown)}; there are {sorted(known)}")
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in table.items()
        }
        return cls(**lists)

    def rank(self, adapter: int) -> int:
        """The rank of an adapter; cold ones included."""
        return self.ranks[adapter % len(self.ranks)]


@dataclass(frozen=True)
class Arrival:
    """One request: ``at_s`` seconds after the start. ``adapter`` -1 is the base."""

    at_s: float
    adapter: int
    rank: int
    tenant: int
    prompt_tokens: int
    output_tokens: int
    cold: bool


def draw(traffic: Traffic) -> list[Arrival]:
    """The requests in the order of their arrival."""
    num = max(1, int(traffic.rate * traffic.duration_s))
    streams = map(np.random.default_rng, np.random.SeedSequence(traffic.seed).spawn(6))
    times, who, prompts, outputs, colds, tenants = streams
    shape, scale = 1 / traffic.cv**2, traffic.cv**2 / traffic.rate
    at_s = np.cumsum(times.gamma(shape, scale, num))
    adapters = (who.power(traffic.alpha, num) * traffic.adapters).astype(int)
    if not traffic.adapters:
        adapters -= 1
    is_cold = colds.random(num) < traffic.cold_share
    adapters[is_cold] = traffic.adapters + np.arange(is_cold.sum())
    drawn = zip(
        at_s.tolist(),
        adapters.tolist(),
        tenants.integers(0, traffic.tenants, num).tolist(),
        prompts.integers(*traffic.prompt, num).tolist(),
        outputs.integers(*traffic.output, num).tolist(),
        is_cold.tolist(),
        strict=True,
    )
    return [
        Arrival(
            at_s=at,
            adapter=adapter,
            rank=traffic.rank(adapter) if adapter >= 0 else 0,
            tenant=tenant,
            prompt_tokens=prompt,
            output_tokens=output,
            cold=cold,
        )
        for at, adapter, tenant, prompt, output, cold in drawn
    ]


def num_adapters(traffic: Traffic, plan: Sequence[Arrival]) -> int:
    """How many adapters a server has to know for a plan."""
    return max(traffic.adapters, 1 + max(arrival.adapter for arrival in plan))


def prompt_ids(seed: int, index: int, num: int, vocabulary: int) -> list[int]:
    """The prompt of request ``index``: random ids, so that no prefix cache knows it."""
    rng = np.random.default_rng([seed, index])
    ids: list[int] = rng.integers(min(10, vocabulary - 1), vocabulary, num).tolist()
    return ids


def prompt_words(seed: int, index: int, num: int) -> str:
    """A prompt of ``num`` random words, for servers whose vocabulary is not known: their ``usage``
    says how many tokens that was."""
    rng = np.random.default_rng([seed, index])
    letters = rng.integers(ord("a"), ord("z") + 1, (num, 4))
    return " ".join("".join(map(chr, word)) for word in letters.tolist())


def write_plan(traffic: Traffic, plan: Sequence[Arrival], path: Path) -> str:
    """Write the plan as lines of JSON, the settings first; the file's SHA-256."""
    lines = [json.dumps(asdict(traffic))]
    lines += [json.dumps(asdict(arrival)) for arrival in plan]
    data = "\n".join([*lines, ""]).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()
