"""One request on two models in turn: every token is what its model would say after the same text,
whoever shares the pool, and however often it is interrupted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests import tiny
from tests.engine.routed import (
    NEVER_LARGE,
    NEVER_SMALL,
    PROMPT,
    SAMPLINGS,
    drawn_by,
    engine,
    moves,
    run,
)
from tests.harness import Harness

from loramux.memory.frames import Owner
from loramux.request import (
    BASE_MODEL_ID,
    SMALL_MODEL_ID,
    EntropyAdaptive,
    Kv,
)
from loramux.speculation.entropy import Router

MODELS = {BASE_MODEL_ID: "large", SMALL_MODEL_ID: "small"}


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


def many(
    harness: Harness, how: EntropyAdaptive, worn: Any, pool_share: float | None = None
) -> list[str]:
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
                pool_share=pool_share,
            )
        )
    for adapter in (None, worn[0]):
        name = harness.submit(PROMPT[2:], adapter, max_tokens=20, pool_share=pool_share)
        names.append(name)
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

    def counted(givers: Any) -> bool:
        nonlocal dropped
        did = drop(givers)
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


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_nothing_changes_within_a_share_of_a_large_pool(
    models: tuple[Path, Path],
    how: EntropyAdaptive,
    worn: Any,
    at_ease: list[list[int]],
    prefix_caching: bool,
) -> None:
    """What a request has on the model that does not serve it counts, and is given up first."""
    harness = engine(models, num_frames=400, prefix_caching=prefix_caching)
    scheduler = harness.engine.scheduler
    names = many(harness, how, worn, pool_share=16 / 400)
    most = 0
    while harness.engine.has_work:
        harness.step()
        held = {
            int(frame)
            for request in scheduler.running
            for kv in request.kvs
            for frame in kv.page_table[: kv.num_pages]
        }
        assert len(held) == scheduler._pages.held("") <= 16
        most = max(most, len(held))
    assert not harness.failed and most > 12
    assert [harness.outputs[name] for name in names] == at_ease
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
    assert harness.run_preempting(rng, 0.5) > 10
    assert [harness.outputs[name] for name in names] == at_ease
    harness.close()


def test_both_adapters_are_there_before_it_begins(
    models: tuple[Path, Path], how: EntropyAdaptive, worn: tuple[Path, Path]
) -> None:
    harness = engine(models)
    knobs = {"entropy": how, "max_tokens": 24, "temperature": 1.0, "seed": 1}
    name = harness.submit(PROMPT, worn[0], small_adapter=worn[1], **knobs)
    residencies = [harness.engine.residency, harness.engine.partners[SMALL_MODEL_ID].residency]
    while harness.engine.has_work:
        harness.step()
        leased = [residency.num_leased_frames() > 0 for residency in residencies]
        running = bool(harness.engine.scheduler.running)
        assert leased == [running, running]
    assert moves(drawn_by(harness, name)) > 1
    harness.close()


def test_what_one_model_computed_is_never_taken_for_the_others(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """Two models whose pages are alike, over the same text."""
    twin = tiny.write_model(tmp_path / "twin", num_hidden_layers=6, seed=9)
    harness = engine((models[0], twin))
    said = [
        harness.outputs[run(harness, entropy=never, tenant=tenant, max_tokens=12)]
        for tenant in ("one", "two")
        for never in ((NEVER_SMALL, NEVER_LARGE) if tenant == "one" else (NEVER_LARGE, NEVER_SMALL))
    ]
    assert said[0] == said[3] != said[1] == said[2]
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
