"""What entropy-adaptive decoding costs and keeps on a pair of models, for every threshold.

Prompts are continued at temperature 1 by an engine in this process, and what came out is scored by
the large model. Beside each threshold stands a coin that gives the large model the same share of
the tokens, a dwell at a time: what the entropies are worth is the distance between the two.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from loramux.config import ServerConfig
from loramux.errors import ConfigError
from loramux.parity import install
from loramux.request import (
    BASE_MODEL_ID,
    SMALL_MODEL_ID,
    AdapterRef,
    Adapters,
    EntropyAdaptive,
    SamplingParams,
)
from loramux.speculation.entropy import Router
from loramux.wire import Output, StepDone, Submit

if TYPE_CHECKING:
    from loramux.engine.engine import Engine

QUANTILES = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Of the small model's mean entropies: the thresholds that are tried when none are named."""
SMALL_ALONE = EntropyAdaptive(threshold=float("inf"), start="small")
LARGE_ALONE = EntropyAdaptive(threshold=-1.0, start="large")
SEED = 17

Progress = Callable[[int, int], None]
"""Told how many runs over the prompts are done, and of how many."""
Judge = Callable[[int, Sequence[int]], bool]
"""Says of the token ids of the answer to a prompt, by its index, whether it is as it should be."""
Routers = Callable[[EntropyAdaptive, bytes | None, int], Router]


@dataclass(frozen=True)
class Point:
    """All prompts, one way of choosing the model.

    Shares of the large model: of the tokens that were drawn (``tokens``), and what all tokens that
    were computed cost, prompts and catching up included, against the large model alone (``cost``).
    ``quality`` is the mean log-likelihood in nats of a token under the large model, ``agreement``
    how often it is the one that the large model holds most likely, ``hits`` how many of the answers
    passed a judge, if there is one.
    """

    tokens: float
    cost: float
    quality: float
    agreement: float
    hits: float | None = None


@dataclass(frozen=True)
class Tried:
    """A ``threshold``, and a coin with the same share of tokens."""

    threshold: float
    entropy: Point
    coin: Point


@dataclass(frozen=True)
class Frontier:
    """The two models alone, and what lies between."""

    large: Point
    small: Point
    tried: list[Tried]

    def as_dict(self) -> dict[str, Any]:
        """For JSON. ``quality_share``: a token's likelihood against that of the large model's own,
        both as geometric means."""

        def told(point: Point) -> dict[str, float]:
            share = float(np.exp(point.quality - self.large.quality))
            told = {name: value for name, value in asdict(point).items() if value is not None}
            return {**told, "quality_share": share}

        return {
            "large": told(self.large),
            "small": told(self.small),
            "tried": [
                {
                    "threshold": tried.threshold,
                    "entropy": told(tried.entropy),
                    "coin": told(tried.coin),
                }
                for tried in self.tried
            ],
        }


class Coin(Router):
    """Chooses by lot for a dwell at a time; the large model with probability ``share``."""

    def __init__(self, how: EntropyAdaptive, share: float, lots: Random) -> None:
        super().__init__(how)
        self._share, self._lots = share, lots
        self.model_id = self._draw()

    def _draw(self) -> int:
        return BASE_MODEL_ID if self._lots.random() < self._share else SMALL_MODEL_ID

    def _wanted(self) -> int:
        if self._dwell < max(self._how.min_dwell, self._how.window):
            return self.model_id
        self._dwell = 0
        return self._draw()


class Pair:
    """An engine with both models, and the prompts it is tried on."""

    def __init__(
        self,
        engine: Engine,
        adapters: Adapters,
        companions: Adapters,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop_token_ids: tuple[int, ...],
        relative_cost: float,
    ) -> None:
        self._engine = engine
        self._adapters = adapters
        self._companions = companions
        self._prompts = prompts
        self._max_tokens = max_tokens
        self._stop_token_ids = stop_token_ids
        self._relative_cost = relative_cost
        self._large_alone = 0.0
        self._num_runs = 0
        self._judge: Judge | None = None

    def frontier(
        self, thresholds: Sequence[float], progress: Progress, judge: Judge | None = None
    ) -> Frontier:
        """The sweep; with no ``thresholds``, over quantiles of what the small model shows."""
        self._judge = judge
        total = 2 + 2 * (len(thresholds) or len(QUANTILES))
        done = iter(range(1, total + 1))

        def run(how: EntropyAdaptive, routers: Routers) -> Point:
            point = self._run(how, routers)
            progress(next(done), total)
            return point

        seen: list[list[float]] = []
        large = run(LARGE_ALONE, Router.resumed)
        small = run(SMALL_ALONE, _watching(seen))
        tried = []
        for threshold in thresholds or _quantiles(seen, SMALL_ALONE.window):
            how = EntropyAdaptive(threshold=threshold)
            entropy = run(how, Router.resumed)
            tried.append(Tried(threshold, entropy, run(how, _coins(entropy.tokens))))
        return Frontier(large, small, tried)

    def _run(self, how: EntropyAdaptive, routers: Routers) -> Point:
        self._engine.new_router = routers
        self._num_runs += 1
        outputs = self._serve(
            [self._ask(index, prompt, how) for index, prompt in enumerate(self._prompts)]
        )
        ledgers = [told[-1].ledger or (0, 0, 0, 0) for told in outputs]
        large, small, computed_large, computed_small = (int(n) for n in np.sum(ledgers, axis=0))
        cost = computed_large + computed_small * self._relative_cost
        if how is LARGE_ALONE:
            self._large_alone = cost
        answers = [[i for output in told for i in output.token_ids] for told in outputs]
        scores = self._scores(answers)
        return Point(
            tokens=large / (large + small),
            cost=cost / self._large_alone,
            quality=float(np.mean([logprob for logprob, _ in scores])),
            agreement=float(np.mean([rank == 1 for _, rank in scores])),
            hits=self._judge and float(np.mean(list(starmap(self._judge, enumerate(answers))))),
        )

    def _ask(self, index: int, prompt: Sequence[int], how: EntropyAdaptive) -> Submit:
        return Submit(
            request_id=str(index),
            tenant="",
            model_id=BASE_MODEL_ID,
            adapters=self._adapters,
            companions={SMALL_MODEL_ID: self._companions},
            prompt_ids=list(prompt),
            cache_salt=f"run {self._num_runs}",  # or a later run would find its prompts computed
            sampling=SamplingParams(
                seed=index, max_tokens=self._max_tokens, stop_token_ids=self._stop_token_ids
            ),
            entropy=how,
        )

    def _scores(self, outputs: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
        """(log-likelihood, rank) of every token of ``outputs`` under the large model."""
        asked = [
            Submit(
                request_id=str(index),
                tenant="",
                model_id=BASE_MODEL_ID,
                adapters=self._adapters,
                prompt_ids=[*prompt, *output],
                sampling=SamplingParams(seed=0, max_tokens=0, prompt_logprobs=0),
            )
            for index, (prompt, output) in enumerate(zip(self._prompts, outputs, strict=True))
        ]
        scores = []
        for prompt, (told,) in zip(self._prompts, self._serve(asked), strict=True):
            for entry in (told.prompt_logprobs or [])[len(prompt) :]:
                assert entry is not None
                scores.append((entry.logprob, entry.rank))
        return scores

    def _serve(self, asked: Sequence[Submit]) -> list[list[Output]]:
        """What each of ``asked`` got, in order. Raises ConfigError if the engine cannot."""
        outputs: dict[str, list[Output]] = {message.request_id: [] for message in asked}
        for message in asked:
            self._engine.submit(message)
        while self._engine.has_work:
            done: StepDone = self._engine.step()
            for failed in done.failed:
                raise ConfigError(f"calibrate-entropy: the engine failed: {failed.message}")
            for output in done.outputs:
                outputs[output.request_id].append(output)
        return list(outputs.values())


@contextmanager
def pair(
    model: Path,
    small_model: Path,
    adapter: Path | None,
    small_adapter: Path | None,
    prompts: Sequence[str],
    max_tokens: int,
) -> Iterator[Pair]:
    """Both models, loaded, with the adapters in these folders. Raises ConfigError for prompts that
    are too long, AdapterInvalid for a folder that is refused."""
    from tokenizers import Tokenizer

    from loramux.engine.assemble import assemble
    from loramux.model.architecture import read_architecture

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    with tempfile.TemporaryDirectory(prefix="loramux-") as temporary:
        data_dir = Path(temporary)
        models: dict[str, Any] = {"model": model, "small_model": small_model, "speculation": "off"}
        assembled = assemble(ServerConfig(**models, data_dir=data_dir))
        ready, engine = assembled.ready, assembled.engine
        small = ready.partners[SMALL_MODEL_ID]
        try:
            longest = min(ready.max_model_len, engine.partners[SMALL_MODEL_ID].max_model_len)
            if max(map(len, ids)) + max_tokens > longest:
                raise ConfigError(
                    f"--max-tokens {max_tokens}: with the longest prompt of {max(map(len, ids))} "
                    f"tokens that is more than the {longest} both models were made for",
                    param="max_tokens",
                )
            yield Pair(
                engine,
                _installed(adapter, data_dir, ready.base),
                _installed(small_adapter, data_dir, small),
                ids,
                max_tokens,
                read_architecture(model).eos_token_ids,
                small.step_bytes / ready.base.step_bytes,
            )
        finally:
            engine.close()


def _installed(folder: Path | None, data_dir: Path, base: Any) -> Adapters:
    return () if folder is None else (AdapterRef(install(folder, data_dir, base)),)


def _coins(share: float) -> Routers:
    lots = Random(SEED)
    return lambda how, state, num_outputs: Coin(how, share, lots)


def _watching(seen: list[list[float]]) -> Routers:
    """Routers that put each request's entropies into a list of ``seen``."""

    class Watching(Router):
        def __init__(self, how: EntropyAdaptive) -> None:
            super().__init__(how)
            self.told: list[float] = []
            seen.append(self.told)

        def observe(self, entropy: float) -> int:
            self.told.append(entropy)
            return super().observe(entropy)

    return Watching.resumed


def _quantiles(seen: Sequence[Sequence[float]], window: int) -> list[float]:
    """QUANTILES of the means that a threshold would have been compared with."""
    means = [
        float(np.mean(told[at - window : at]))
        for told in seen
        for at in range(window, len(told) + 1)
    ]
    if not means:
        raise ConfigError(
            f"--max-tokens: no answer has the {window} tokens that a threshold is compared with"
        )
    return [float(value) for value in np.quantile(means, QUANTILES)]
