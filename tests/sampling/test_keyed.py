"""Keyed draws have the target's law, and those of one place know nothing of those of another.

Everything is at fixed seeds, so a p-value is a fact, not luck; and each test is shown a fault of
the kind it looks for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests import interpreter
from tests.kernels.test_sampling_contract import kept
from tests.sampling.test_sampler import processed

from loramux.request import SamplingParams
from loramux.sampling.sampler import Sampler
from loramux_kernels.sampling import DrawParams, cpu, reference, stream_key

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DRAWS = 200_000
CHUNK = 1 << 21
"""Logits at a time."""
HARMLESS, BROKEN = 1e-4, 1e-6

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
Places = tuple[Int64, Int64, Int64]
"""Seed, choice and position of so many draws."""


@dataclass(frozen=True)
class Case:
    """What is drawn from: logits [V] and filters."""

    logits: torch.Tensor
    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def law(self) -> Float64:
        """The probabilities [V], in plain words."""
        x = self.logits.double().numpy() / self.temperature
        weights = np.exp(x - x.max())
        if (self.min_p, self.top_k, self.top_p) != (0, 0, 1):
            ids = kept(self.logits.tolist(), self.temperature, self.min_p, self.top_k, self.top_p)
            weights[np.isin(np.arange(len(x)), ids, invert=True)] = 0.0
        return weights / weights.sum()

    def biased(self, by: float) -> Case:
        """Plain logits whose law is off in total variation ``by`` so much: every other id has a
        little more, the rest less."""
        law = self.law()
        more = np.isin(np.arange(len(law)), np.argsort(-law)[::2])
        share = law[more].sum()
        law = np.where(more, law * (1 + by / share), law * (1 - by / (1 - share)))
        assert abs(np.abs(law - self.law()).sum() / 2 - by) < 1e-12
        with np.errstate(divide="ignore"):
            return Case(torch.from_numpy(np.log(law)).float())

    def draw(self, implementation: Any, places: Places) -> Int64:
        seed, choice, position = places
        key = np.array(list(map(stream_key, seed.tolist(), choice.tolist())), np.uint64)
        most = min(len(key), CHUNK // len(self.logits))
        logits = self.logits.repeat(most, 1)
        tokens = []
        for start in range(0, len(key), most):
            some = slice(start, start + most)
            rows = len(key[some])
            how = DrawParams(
                temperature=np.full(rows, self.temperature),
                log_min_p=np.full(rows, math.log(self.min_p) if self.min_p else -math.inf),
                top_k=np.full(rows, self.top_k),
                top_p=np.full(rows, self.top_p),
                key=key[some],
            )
            tokens.append(implementation(logits[:rows], how, position[some])[0])
        return np.concatenate(tokens)


def logits(size: int) -> torch.Tensor:
    return 1.5 * torch.randn(size, generator=torch.Generator().manual_seed(size))


LARGE = Case(logits(32_768), temperature=0.7)
CASES = {
    "8 ids": Case(logits(8)),
    "64 ids": Case(logits(64)),
    "filtered": Case(logits(64), temperature=0.8, min_p=0.02, top_k=40, top_p=0.9),
}


def everywhere(draws: int = DRAWS) -> Places:
    """Fifty seeds, four choices each, and their first positions. Seeds stand apart: choice c of
    seed s is choice 0 of seed s + c."""
    index = np.arange(draws)
    return 1000 * (index % 50), index // 50 % 4, index // 200


def tail(statistic: float, freedom: int) -> float:
    """How often chi-square with so many degrees of freedom is above ``statistic``."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


def surprise(tokens: Int64, law: Float64) -> float:
    """Pearson's p-value of ``tokens`` under ``law``. Ids expected fewer than five times count
    together, with as many of the next as it takes."""
    seen, expected = np.bincount(tokens, minlength=len(law)), len(tokens) * law
    assert seen[law == 0].sum() == 0, "drawn though it is not there"
    order = np.argsort(expected)
    rare = int(np.searchsorted(np.cumsum(expected[order]), 5.0)) + 1
    rare = max(rare, int((expected < 5).sum()))
    starts = np.array([0, *range(rare, len(law))])
    seen, expected = (np.add.reduceat(counts[order], starts) for counts in (seen, expected))
    return tail(float(((seen - expected) ** 2 / expected).sum()), len(starts) - 1)


@pytest.mark.parametrize("draw", [cpu.draw, reference.draw], ids=["cpu", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_draws_have_the_law_of_the_target(name: str, draw: Any) -> None:
    case = CASES[name]
    assert surprise(case.draw(draw, everywhere()), case.law()) > HARMLESS


@pytest.mark.parametrize("name", CASES)
def test_a_small_bias_is_caught(name: str) -> None:
    case = CASES[name]
    assert surprise(case.biased(0.02).draw(cpu.draw, everywhere()), case.law()) < BROKEN


@pytest.mark.slow
def test_draws_from_a_large_vocabulary_have_its_law_too() -> None:
    """Half a minute for so many hashes. Thousands of bins blunt the test: it sees larger faults."""
    assert surprise(LARGE.draw(cpu.draw, everywhere()), LARGE.law()) > HARMLESS
    assert surprise(LARGE.biased(0.05).draw(cpu.draw, everywhere()), LARGE.law()) < BROKEN


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_draws_what_the_reference_draws(name: str) -> None:
    """So it has the same law. The interpreter takes tens of milliseconds a draw."""
    from loramux_kernels.sampling import triton_draw

    def draw(logits: torch.Tensor, how: DrawParams, position: Int64) -> Any:
        return triton_draw.draw(logits if INTERPRETED else logits.cuda(), how, position)

    places = everywhere(8 if INTERPRETED else DRAWS)
    tokens = CASES[name].draw(draw, places)
    assert tokens.tolist() == CASES[name].draw(reference.draw, places).tolist()
    assert INTERPRETED or surprise(tokens, CASES[name].law()) > HARMLESS


def test_and_so_does_its_interpreter() -> None:
    interpreter.passes("tests/sampling/test_keyed.py")


def test_the_sampler_draws_from_what_the_processors_leave() -> None:
    source, prompt, output = logits(64), [1, 2, 3, 3], [4, 4, 9]
    params = SamplingParams(
        seed=0,
        temperature=1.2,
        top_p=0.95,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={7: 1.5, 11: -math.inf},
    )
    sampler = Sampler(64, "cpu")
    rows = [(str(index), len(output)) for index in range(10_000)]
    for index, (name, _) in enumerate(rows):
        own = {"seed": 1000 * (index // 4), "choice": index % 4}
        sampler.add(name, msgspec.structs.replace(params, **own), prompt, output)
    tokens = sampler.sample(source.repeat(len(rows), 1), rows).token_ids
    left = processed(source, params, prompt, output)
    assert surprise(tokens, Case(left, temperature=1.2, top_p=0.95).law()) > HARMLESS
    assert surprise(tokens, Case(left, temperature=1.2, top_p=0.99).law()) < BROKEN


def dependence(one: Int64, other: Int64, size: int) -> float:
    """Pearson's p-value of the contingency table of two rows of tokens below ``size``."""
    seen = np.bincount(one * size + other, minlength=size * size).reshape(size, size)
    expected = seen.sum(1, keepdims=True) * seen.sum(0, keepdims=True) / len(one)
    assert expected.min() >= 5
    return tail(float(((seen - expected) ** 2 / expected).sum()), (size - 1) ** 2)


PAIRS = np.arange(60_000)
SEED, AT = 16 * (PAIRS // 20), 2 * (PAIRS % 20)
NONE = np.zeros_like(PAIRS)
NEIGHBOURS: dict[str, tuple[Places, Places]] = {
    "positions": ((SEED, NONE, AT), (SEED, NONE, AT + 1)),
    "positions beyond 32 bits": ((SEED, NONE, AT), (SEED, NONE, AT + (1 << 32))),
    "choices": ((SEED, NONE + 3, AT), (SEED, NONE + 4, AT)),
    "far choices": ((SEED, NONE + 2, AT), (SEED, NONE + 11, AT)),
    "seeds": ((SEED, NONE, AT), (SEED + 1, NONE, AT)),
    "seeds beyond 32 bits": ((SEED, NONE, AT), (SEED + (1 << 32), NONE, AT)),
    "a seed and a position": ((SEED, NONE, AT + 1), (SEED + 1, NONE, AT)),
}
"""What differs, and pairs of places of which no two have one in common."""
BLIND: dict[str, Callable[[Int64, Int64, Int64], Places]] = {
    "positions": lambda seed, choice, position: (seed, choice, 0 * position),
    "positions beyond 32 bits": lambda seed, choice, position: (seed, choice, position % (1 << 32)),
    "choices": lambda seed, choice, position: (seed, 0 * choice, position),
    "far choices": lambda seed, choice, position: (seed, choice % 3, position),
    "seeds": lambda seed, choice, position: (0 * seed, choice, position),
    "seeds beyond 32 bits": lambda seed, choice, position: (seed % (1 << 32), choice, position),
    "a seed and a position": lambda seed, choice, position: (seed + position, choice, 0 * position),
}
"""Noise that does not see the difference: where it looks instead."""


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_draws_at_neighbouring_places_are_independent(name: str) -> None:
    case = CASES["8 ids"]
    one, other = NEIGHBOURS[name]
    tokens = case.draw(cpu.draw, one), case.draw(cpu.draw, other)
    assert dependence(*tokens, 8) > HARMLESS
    blind = [case.draw(cpu.draw, BLIND[name](*places)) for places in (one, other)]
    assert dependence(blind[0], blind[1], 8) < BROKEN


def test_a_little_dependence_is_caught() -> None:
    """One in twenty-five draws sees only the even positions."""
    case = CASES["8 ids"]
    one, (seed, choice, position) = NEIGHBOURS["positions"]
    blind = np.where(PAIRS % 25 == 0, position - 1, position)
    tokens = case.draw(cpu.draw, one), case.draw(cpu.draw, (seed, choice, blind))
    assert dependence(*tokens, 8) < BROKEN


@pytest.mark.parametrize("draw", [cpu.draw, reference.draw], ids=["cpu", "reference"])
@pytest.mark.parametrize("step", [1, 4], ids=["lanes", "counters"])
def test_the_noise_of_neighbouring_ids_is_independent(
    draw: Any, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two draws at one place, each of four ids of its own, ``step`` from each other."""
    ids = np.arange(8)
    first = ids[ids // step % 2 == 0]

    def drawn(draw: Any, some: Int64, pairs: int) -> Int64:
        equal = torch.full((8,), -math.inf)
        equal[some] = 0.0
        tokens = Case(equal).draw(draw, (SEED[:pairs], NONE[:pairs], AT[:pairs]))
        return np.searchsorted(some, tokens)

    tokens = (drawn(draw, some, len(PAIRS)) for some in (first, first + step))
    assert dependence(*tokens, 4) > HARMLESS
    uniforms = reference.uniforms
    seen = ids // (2 * step) * (2 * step) + ids % step
    monkeypatch.setattr(reference, "uniforms", lambda *where: uniforms(*where)[:, seen])
    tokens = (drawn(reference.draw, some, 5000) for some in (first, first + step))
    assert dependence(*tokens, 4) < BROKEN
