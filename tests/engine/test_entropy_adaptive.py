"""One request on two models in turn: every token is what its model would say after the same text,
whoever shares the pool, and however often it is interrupted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests import tiny
from tests.harness import Harness

from loramux.memory.frames import Owner
from loramux.request import (
    BASE_MODEL_ID,
    SMALL_MODEL_ID,
    EntropyAdaptive,
    Kv,
    Request,
    Speculation,
)
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.entropy import Router

MODELS = {BASE_MODEL_ID: "large", SMALL_MODEL_ID: "small"}
PROMPT = list(range(60, 73))
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 24},
    "sampled": {"max_tokens": 24, "temperature": 1.0, "seed": 5},
    "processed": {
        "max_tokens": 24,
        "temperature": 0.9,
        "seed": 6,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "logit_bias": {9: 3.0},
        "choice": 1,
    },
}
NEVER_SMALL = EntropyAdaptive(threshold=-1.0, start="large")
NEVER_LARGE = EntropyAdaptive(threshold=math.inf, start="small")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target, and a small model of other widths whose page holds another number of tokens."""
    folder = tmp_path_factory.mktemp("pair")
    large = tiny.write_model(folder / "large", num_hidden_layers=6)
    small = tiny.write_model(
        folder / "small",
        "qwen3",
        seed=1,
        num_hidden_layers=4,
        hidden_size=32,
        head_dim=8,
        num_key_value_heads=1,
    )
    return large, small


@pytest.fixture(scope="module")
def worn(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("worn")
    large = tiny.write_adapter(folder / "large", models[0], r=1, seed=3, b_scale=0.3)
    return large, tiny.write_adapter(folder / "small", models[1], r=1, seed=4, b_scale=0.3)


def engine(models: tuple[Path, Path], **config: Any) -> Harness:
    return Harness(models[0], small_model=models[1], page_tokens=4, **config)


@pytest.fixture(scope="module")
def shared(models: tuple[Path, Path]) -> Iterator[Harness]:
    harness = engine(models, max_batch_tokens=32)
    yield harness
    harness.close()


@pytest.fixture(scope="module")
def how(shared: Harness) -> EntropyAdaptive:
    """Moves often: the threshold is the median of what the two models' entropies are."""
    seen: list[float] = []

    class Watching(Router):
        def observe(self, entropy: float) -> int:
            seen.append(entropy)
            return super().observe(entropy)

    shared.engine.new_router = Watching.resumed
    for alone in (NEVER_SMALL, NEVER_LARGE):
        run(shared, entropy=alone, max_tokens=24, temperature=1.0)
    shared.engine.new_router = Router.resumed
    assert len(seen) == 48 and 0 < min(seen) < max(seen) < math.log2(tiny.VOCAB_SIZE)
    return EntropyAdaptive(threshold=float(np.median(seen)), window=1, min_dwell=2)


def run(harness: Harness, prompt: Sequence[int] = PROMPT, adapter: Any = None, **knobs: Any) -> str:
    """The id of one request from beginning to end; unless a ``tenant`` is named, one that finds
    nothing in the cache."""
    knobs = {"tenant": f"of {harness._serial}", **knobs}
    name = harness.submit(prompt, adapter, **knobs)
    harness.run()
    assert name not in harness.failed, harness.failed[name]
    return name


def drawn_by(harness: Harness, name: str) -> list[int]:
    """The model that each token is from, as the ledgers say."""
    told: list[int] = []
    for output in harness.details[name]:
        assert output.ledger is not None
        large, small = output.ledger[:2]
        new_large = large - told.count(BASE_MODEL_ID)
        new_small = small - told.count(SMALL_MODEL_ID)
        assert 0 in (new_large, new_small), "one step's tokens are all from one model"
        told += [BASE_MODEL_ID] * new_large + [SMALL_MODEL_ID] * new_small
        assert len(told) == output.start_index + len(output.token_ids)
    return told


def moves(told: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(told, told[1:], strict=False))


def fresh(
    harness: Harness, model_id: int, outputs: Sequence[int], *adapters: Any, **knobs: Any
) -> int:
    """What the model alone says after ``outputs``, of which it has computed nothing before."""
    never = NEVER_SMALL if model_id == BASE_MODEL_ID else NEVER_LARGE
    router = Router(never)
    for _ in outputs:
        router.observe(0.0)
    name = run(
        harness,
        PROMPT,
        adapters[0] if adapters else None,
        small_adapter=adapters[1] if adapters else None,
        output_ids=outputs,
        entropy=never,
        resume=router.state if outputs else None,
        **{**knobs, "max_tokens": len(outputs) + 1},
    )
    return harness.outputs[name][-1]


# -- one model alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", SAMPLINGS.values(), ids=SAMPLINGS)
def test_a_threshold_below_all_is_the_large_model(shared: Harness, knobs: dict[str, Any]) -> None:
    plain = run(shared, logprobs=1, **knobs)
    routed = run(shared, logprobs=1, entropy=NEVER_SMALL, **knobs)
    assert shared.outputs[routed] == shared.outputs[plain]
    said = [[o.logprobs for o in shared.details[name]] for name in (plain, routed)]
    assert said[0] == said[1]
    assert shared.details[routed][-1].ledger == (24, 0, len(PROMPT) + 23, 0)
    assert shared.details[plain][-1].ledger is None and shared.details[plain][-1].resume is None


def test_an_infinite_threshold_is_the_small_model(
    models: tuple[Path, Path], shared: Harness
) -> None:
    alone = Harness(models[1])
    for knobs in SAMPLINGS.values():
        name = run(shared, entropy=NEVER_LARGE, **knobs)
        assert shared.outputs[name] == alone.generate(PROMPT, **knobs)
    alone.close()


# -- between the two -------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("with_adapters", [False, True])
def test_every_token_is_what_a_fresh_prefill_of_its_model_says(
    shared: Harness, how: EntropyAdaptive, worn: Any, knobs: dict[str, Any], with_adapters: bool
) -> None:
    adapters = worn if with_adapters else (None, None)
    name = run(shared, PROMPT, adapters[0], small_adapter=adapters[1], entropy=how, **knobs)
    outputs, told = shared.outputs[name], drawn_by(shared, name)
    assert moves(told) >= 3, told
    for at, model_id in enumerate(told):
        again = fresh(shared, model_id, outputs[:at], *adapters, **knobs)
        assert again == outputs[at], f"token {at}, of the {MODELS[model_id]} model"


def test_what_an_adapter_says_is_heard_on_both_models(
    shared: Harness, worn: tuple[Path, Path]
) -> None:
    for never, adapters in ((NEVER_SMALL, (worn[0], None)), (NEVER_LARGE, (None, worn[1]))):
        said = [
            shared.outputs[run(shared, PROMPT, a, small_adapter=b, entropy=never, max_tokens=24)]
            for a, b in ((None, None), adapters)
        ]
        assert said[0] != said[1]


def cached(harness: Harness, kv: Kv) -> npt.NDArray[np.float32]:
    """All that ``kv`` has in the pool: [layers, tokens, values]."""
    loop, model = harness.engine._loop, harness.engine.scheduler._models[kv.model_id].kv
    arena = loop._runner._decoder.arena
    offsets = model.offsets(kv.page_table[: kv.num_pages])
    layers = []
    for layer in offsets:
        pages = [
            arena[at : at + model.layer_bytes].view(torch.float32).numpy().copy() for at in layer
        ]
        shaped = np.stack(pages).reshape(
            -1, 2, model.num_kv_heads, model.page_tokens, model.head_dim
        )
        layers.append(
            shaped.transpose(0, 3, 1, 2, 4).reshape(-1, 2 * model.num_kv_heads * model.head_dim)
        )
    return np.stack(layers)[:, : kv.num_computed]


def test_the_kv_of_both_is_that_of_a_fresh_prefill(
    models: tuple[Path, Path], how: EntropyAdaptive
) -> None:
    harness = engine(models, prefix_caching=False)
    name = harness.submit(PROMPT, entropy=how, max_tokens=30, temperature=1.0)
    while len(harness.outputs[name]) < 25:
        harness.step()
    (request,) = harness.engine.scheduler.running
    assert request.lagging is not None and request.lagging.num_computed > len(PROMPT)
    kept = {kv.model_id: cached(harness, kv) for kv in request.kvs}
    ids = request.ids[: request.num_ids].tolist()
    harness.run()
    for model_id, values in kept.items():
        never = NEVER_SMALL if model_id == BASE_MODEL_ID else NEVER_LARGE
        name = harness.submit(ids, entropy=never, max_tokens=2)
        while not harness.outputs[name]:
            harness.step()
        (request,) = harness.engine.scheduler.running
        expected = cached(harness, request.kv)[:, : values.shape[1]]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-5)
        harness.run()
    harness.close()


# -- books -----------------------------------------------------------------------------------------


def computing(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, str]]:
    """Tokens computed from now on by (model, request), and each model's passes as (model, "")."""
    seen: Counter[tuple[int, str]] = Counter()
    runners = {
        BASE_MODEL_ID: harness.engine._loop._runner,
        SMALL_MODEL_ID: harness.engine.partners[SMALL_MODEL_ID].runner,
    }
    for model_id, runner in runners.items():

        def counted(plan: Any, model_id: int = model_id, forward: Any = runner.forward) -> Any:
            seen[model_id, ""] += 1
            for row in plan.batch.rows:
                assert row.kv.model_id == model_id
                seen[model_id, row.request.id] += row.num_tokens
            return forward(plan)

        monkeypatch.setattr(runner, "forward", counted)
    return seen


def test_the_ledger_is_what_was_computed(
    shared: Harness, how: EntropyAdaptive, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = computing(shared, monkeypatch)
    names = [
        run(shared, tenant="ledger", entropy=how, **knobs) for knobs in SAMPLINGS.values()
    ]  # the later ones find the prompt in the cache
    for name in names:
        large, small, *computed = shared.details[name][-1].ledger or ()
        assert large + small == 24 and min(large, small) > 0
        assert computed == [seen[BASE_MODEL_ID, name], seen[SMALL_MODEL_ID, name]]
    first = shared.details[names[0]][-1].ledger
    assert first is not None and sum(first[2:]) >= 24 + len(PROMPT)


def test_plain_rows_beside_it_are_unchanged_and_cost_the_small_model_nothing(
    shared: Harness, how: EntropyAdaptive, worn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(tenant: str) -> list[str]:
        knobs = {"logprobs": 2, "temperature": 0.8, "max_tokens": 20, "frequency_penalty": 0.5}
        return [
            shared.submit(PROMPT[index:], adapter, tenant=tenant, **knobs)
            for index, adapter in enumerate([None, worn[0], None])
        ]

    def told(names: list[str]) -> list[Any]:
        return [[(o.token_ids, o.logprobs) for o in shared.details[name]] for name in names]

    seen = computing(shared, monkeypatch)
    alone = plain("alone")
    shared.run()
    assert seen[SMALL_MODEL_ID, ""] == 0
    steps = seen[BASE_MODEL_ID, ""]
    beside = plain("beside")
    routed = [
        shared.submit(PROMPT, worn[0], small_adapter=worn[1], entropy=how, seed=s, temperature=1.0)
        for s in range(3)
    ]
    shared.run()
    assert told(beside) == told(alone)
    assert seen[SMALL_MODEL_ID, ""] > 0
    assert seen[BASE_MODEL_ID, ""] - steps <= steps + 2, "a step is one pass of each model"
    assert not any(seen[SMALL_MODEL_ID, name] for name in [*alone, *beside])
    assert all(seen[SMALL_MODEL_ID, name] for name in routed)


def many(harness: Harness, how: EntropyAdaptive, worn: Any) -> list[str]:
    """Five that move and two that do not."""
    names = []
    for index in range(5):
        adapters = worn if index % 2 else (None, None)
        names.append(
            harness.submit(
                PROMPT[: 9 + index],
                adapters[0],
                small_adapter=adapters[1],
                entropy=how,
                temperature=1.0,
                seed=index,
                max_tokens=20,
            )
        )
    names += [harness.submit(PROMPT[2:], adapter, max_tokens=20) for adapter in (None, worn[0])]
    return names


@pytest.fixture(scope="module")
def at_ease(models: tuple[Path, Path], how: EntropyAdaptive, worn: Any) -> list[list[int]]:
    harness = engine(models)
    names = many(harness, how, worn)
    harness.run()
    assert sum(moves(drawn_by(harness, name)) for name in names[:5]) > 10
    harness.close()
    return [harness.outputs[name] for name in names]


@pytest.mark.parametrize("num_frames", [22, 45])
@pytest.mark.parametrize("overlap", [False, True])
def test_nothing_changes_under_pressure(
    models: tuple[Path, Path],
    how: EntropyAdaptive,
    worn: Any,
    at_ease: list[list[int]],
    num_frames: int,
    overlap: bool,
) -> None:
    """Freed frames hold NaN, and the books are balanced after every step."""
    harness = engine(models, num_frames=num_frames, overlap=overlap, prefix_caching=not overlap)
    dropped = 0
    drop = harness.engine.scheduler._drop_lagging

    def counted() -> bool:
        nonlocal dropped
        did = drop()
        dropped += did
        return did

    harness.engine.scheduler._drop_lagging = counted  # type: ignore[method-assign]
    names = many(harness, how, worn)
    harness.run()
    assert not harness.failed
    assert [harness.outputs[name] for name in names] == at_ease
    if num_frames == 22:
        preemptions = sum(step.stats.get("preemptions", 0) for step in harness.steps)
        assert dropped > 0 and preemptions > 0, "no pressure"
    assert harness.engine.pool.frames.count(Owner.KV) == 0
    harness.close()


def test_what_lags_goes_before_anybody_is_preempted(
    models: tuple[Path, Path], how: EntropyAdaptive
) -> None:
    """The large model has no room for one more page until what the small one has is given up."""
    harness = engine(models, num_frames=24, prefix_caching=False)
    mover = EntropyAdaptive(threshold=-1.0, window=1, min_dwell=1, start="small")
    first = harness.submit(PROMPT, name="old", max_tokens=36)
    second = harness.submit(PROMPT, name="moves", entropy=mover, max_tokens=36)
    lags: list[int] = []
    while harness.engine.has_work:
        harness.step()
        lags += [
            request.lagging.num_pages
            for request in harness.engine.scheduler.running
            if request.lagging is not None and request.kv.model_id == BASE_MODEL_ID
        ]
    assert max(lags) > 0 and lags[-1] == 0, "it was not given up"
    assert sum(step.stats.get("preemptions", 0) for step in harness.steps) == 0
    assert len(harness.outputs[first]) == len(harness.outputs[second]) == 36
    harness.close()


def test_preempted_anywhere_is_uninterrupted(
    models: tuple[Path, Path], how: EntropyAdaptive, worn: Any, at_ease: list[list[int]]
) -> None:
    rng = np.random.default_rng(2)
    harness = engine(models, max_batch_tokens=16)
    names = many(harness, how, worn)
    count = 0
    while harness.engine.has_work:
        harness.step()
        running = harness.engine.scheduler.running
        if running and rng.random() < 0.5:
            count += 1
            harness.engine.scheduler._preempt(running[int(rng.integers(len(running)))])
    assert count > 10
    assert [harness.outputs[name] for name in names] == at_ease
    harness.close()


def test_both_adapters_are_there_before_it_begins(
    models: tuple[Path, Path], how: EntropyAdaptive, worn: tuple[Path, Path]
) -> None:
    harness = engine(models)
    name = harness.submit(PROMPT, worn[0], small_adapter=worn[1], entropy=how, max_tokens=24)
    residencies = [harness.engine.residency, harness.engine.partners[SMALL_MODEL_ID].residency]
    while harness.engine.has_work:
        harness.step()
        leased = [residency.num_leased_frames() > 0 for residency in residencies]
        running = bool(harness.engine.scheduler.running)
        assert leased == [running, running]
    assert len(harness.outputs[name]) == 24
    harness.close()


def test_another_engine_goes_on_from_every_position(shared: Harness, how: EntropyAdaptive) -> None:
    knobs = SAMPLINGS["processed"]
    name = run(shared, entropy=how, **knobs)
    details, outputs = list(shared.details[name]), shared.outputs[name]
    assert [len(output.token_ids) for output in details] == [1] * 24
    for at in range(1, 24):
        state = details[at - 1].resume
        assert state is not None
        again = run(
            shared,
            entropy=how,
            output_ids=outputs[:at],
            resume=state,
            **knobs,
        )
        assert shared.outputs[again] == outputs
        assert shared.details[again][-1].ledger is not None
        assert (shared.details[again][-1].ledger or ())[:2] == (details[-1].ledger or ())[:2]


# -- guesses ---------------------------------------------------------------------------------------


class Knowing:
    """Guesses what was said before, as a chain or as a comb with a wrong sibling everywhere."""

    def __init__(self, future: Sequence[int], *, tree: bool) -> None:
        self._future, self._tree = future, tree
        self.asked: list[int] = []

    def propose(self, asks: Sequence[Ask]) -> list[Guess]:
        return [self._guess(ask.request, ask.most) for ask in asks]

    def ended(self, request: Request) -> None: ...

    def _guess(self, request: Request, most: int) -> Guess:
        self.asked.append(request.kv.model_id)
        future = self._future[request.num_outputs :]
        if not self._tree:
            return Guess(future[:most])
        tokens: list[int] = []
        parents: list[int] = []
        parent = 0
        for token in future[: most // 2]:
            tokens += [(token + 1) % tiny.VOCAB_SIZE, token]
            parents += [parent, parent]
            parent = len(tokens)
        return Guess(tokens, parents)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("knobs", SAMPLINGS.values(), ids=SAMPLINGS)
def test_guesses_change_nothing_and_never_reach_over_a_move(
    shared: Harness, how: EntropyAdaptive, knobs: dict[str, Any], tree: bool
) -> None:
    name = run(shared, entropy=how, **knobs)
    knowing = Knowing(shared.outputs[name], tree=tree)
    shared.engine.drafting.drafters["knowing"] = knowing
    speculation = Speculation(drafters=("knowing",), max_draft_tokens=6, tree=tree)
    guessed = run(shared, tenant="guessed", entropy=how, speculation=speculation, **knobs)
    assert shared.outputs[guessed] == shared.outputs[name]
    assert drawn_by(shared, guessed) == drawn_by(shared, name)
    ends = [[(o.ledger or ())[:2] for o in shared.details[each]][-1] for each in (guessed, name)]
    assert ends[0] == ends[1]
    accepted = sum(len(o.token_ids) - 1 for o in shared.details[guessed])
    assert accepted >= 4 and {BASE_MODEL_ID, SMALL_MODEL_ID} == set(knowing.asked)
    again = run(shared, tenant="guessed", entropy=how, speculation=speculation, **knobs)
    assert shared.outputs[again] == shared.outputs[name]


def test_who_knows_only_the_target_is_not_asked_about_the_small_model(
    shared: Harness, how: EntropyAdaptive
) -> None:
    name = run(shared, entropy=how, **SAMPLINGS["sampled"])
    of_target, free = (Knowing(shared.outputs[name], tree=False) for _ in range(2))
    shared.engine.drafting.drafters.update({"draft": of_target, "free": free})
    for chain in (("draft",), ("draft", "free")):
        speculation = Speculation(drafters=chain, max_draft_tokens=2)
        again = run(shared, entropy=how, speculation=speculation, **SAMPLINGS["sampled"])
        assert shared.outputs[again] == shared.outputs[name]
    del shared.engine.drafting.drafters["draft"]
    assert set(of_target.asked) == {BASE_MODEL_ID}
    assert set(free.asked) == {SMALL_MODEL_ID}, "the draft has an answer on the target"


# -- refusals --------------------------------------------------------------------------------------


def refused(harness: Harness, **knobs: Any) -> tuple[str, str]:
    name = harness.submit(PROMPT, **knobs)
    harness.run()
    return harness.failed[name].code, harness.failed[name].message


def test_what_cannot_be_done_is_refused_by_name(
    models: tuple[Path, Path], shared: Harness, how: EntropyAdaptive, tmp_path: Path
) -> None:
    code, message = refused(shared, entropy=how, output_ids=[5], resume=b"?")
    assert code == "invalid_request" and "resume" in message
    without = Harness(models[0])
    code, message = refused(without, entropy=how)
    assert (
        code == "invalid_request" and "entropy_adaptive" in message and "--small-model" in message
    )
    without.close()
    short = tiny.write_model(tmp_path / "short", max_position_embeddings=32)
    harness = engine((models[0], short), num_frames=20)
    code, message = refused(harness, entropy=how, max_tokens=20)
    assert code == "invalid_request" and "entropy_adaptive" in message
    assert len(harness.generate(PROMPT, max_tokens=20)) == 20, "nobody else is bound by it"
    assert len(harness.generate(PROMPT, max_tokens=19, entropy=how)) == 19
    harness.close()


def test_it_must_fit_on_both_models_at_once(
    models: tuple[Path, Path], how: EntropyAdaptive
) -> None:
    probe = engine(models, num_frames=64)
    formats = [model.kv for model in probe.engine.scheduler._models.values()]
    need = sum(kv.num_pages(len(PROMPT) + 40) for kv in formats)
    probe.close()
    for num_frames, fits in ((need, True), (need - 1, False)):
        harness = engine(models, num_frames=num_frames)
        if fits:
            assert len(harness.generate(PROMPT, max_tokens=40, entropy=how)) == 40
        else:
            assert refused(harness, max_tokens=40, entropy=how)[0] == "request_too_large"
        harness.close()


def test_a_broken_row_fails_alone(
    shared: Harness, how: EntropyAdaptive, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = shared.engine.partners[SMALL_MODEL_ID].decoder
    forward: Callable[[Any], torch.Tensor] = decoder.forward

    def poisoned(inputs: Any) -> torch.Tensor:
        logits = forward(inputs)
        logits[:] = torch.nan
        return logits

    monkeypatch.setattr(decoder, "forward", poisoned)
    bad = shared.submit(PROMPT, tenant="bad", entropy=NEVER_LARGE)
    good = shared.submit(PROMPT, tenant="bad", entropy=NEVER_SMALL)
    shared.run()
    assert shared.failed[bad].code == "numerical_error" and len(shared.outputs[good]) == 8
