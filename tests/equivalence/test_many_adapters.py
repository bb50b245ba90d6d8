"""Adapters that shout their own token: any mix-up is a wrong id. Faults seen in peers live here."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.harness import Harness
from tests.model.allocations import Allocations

import loramux.model.decoder
from loramux.memory.frames import Owner
from loramux_kernels.testing import counting

Shouters = tuple[Path, dict[int, Path]]


@pytest.fixture
def harness(shouters: Shouters) -> Iterator[Harness]:
    harness = Harness(shouters[0], num_frames=2000, max_num_seqs=48)
    yield harness
    harness.close()


def test_thirty_two_adapters_and_the_base_in_one_batch(
    harness: Harness, shouters: Shouters
) -> None:
    """vLLM's CPU build gives base rows the last slot's adapter when every slot is taken."""
    prompt = [50, 51, 52, 53, 54]
    base = harness.generate(prompt, max_tokens=6)
    assert len(set(base)) > 1
    names: dict[str, int | None] = {}
    for index, (token, adapter) in enumerate(shouters[1].items()):
        names[harness.submit(prompt, adapter, max_tokens=6)] = token
        if index % 4 == 0:
            names[harness.submit(prompt, max_tokens=6)] = None
    outputs = harness.run()
    for request_id, token in names.items():
        assert outputs[request_id] == (base if token is None else [token] * 6)


def test_the_last_adapter_of_a_batch_is_not_special(harness: Harness, shouters: Shouters) -> None:
    tokens = list(shouters[1])
    for last in tokens[-3:]:
        order = [t for t in tokens if t != last] + [last]
        names = {
            harness.submit([60, 61], shouters[1][t], max_tokens=2, tenant=str(last)): t
            for t in order
        }
        outputs = harness.run()
        assert all(outputs[name] == [token] * 2 for name, token in names.items())


def test_two_adapters_of_one_prompt_do_not_get_the_first_ones_answer(
    harness: Harness, shouters: Shouters
) -> None:
    """OpenVINO GenAI answers both rows of one call with the first row's adapter."""
    first, second = list(shouters[1])[:2]
    a = harness.submit([70, 71, 72], shouters[1][first])
    b = harness.submit([70, 71, 72], shouters[1][second])
    outputs = harness.run()
    assert (set(outputs[a]), set(outputs[b])) == ({first}, {second})


def test_no_adapter_means_none_whatever_is_loaded(harness: Harness, shouters: Shouters) -> None:
    """llama.cpp applies the sum of all loaded adapters to a request that names none."""
    prompt = [80, 81, 82]
    before = harness.generate(prompt)
    for adapter in shouters[1].values():
        harness.generate([1, 2], adapter, max_tokens=1)
    assert harness.generate(prompt, tenant="fresh") == before


def test_a_scale_of_zero_is_the_base_and_scales_are_the_requests_own(
    harness: Harness, shouters: Shouters
) -> None:
    token, adapter = next(iter(shouters[1].items()))
    prompt = [90, 91, 92]
    base = harness.generate(prompt)
    off = harness.submit(prompt, [(adapter, 0.0)])
    on = harness.submit(prompt, [(adapter, 1.0)])
    outputs = harness.run()
    assert outputs[off] == base
    assert set(outputs[on]) == {token}


@pytest.mark.parametrize("fused", [True, False], ids=["all layers in one call", "one by one"])
def test_kernel_calls_of_a_step_do_not_grow_with_adapters(
    harness: Harness, shouters: Shouters, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:
        monkeypatch.setattr(loramux.model.decoder, "backend", lambda tensor: "one by one")

    def calls_of_a_decode_step(adapters: list[Path]) -> dict[str, int]:
        for index in range(32):
            harness.submit([5, 6], adapters[index % len(adapters)], max_tokens=60)
        while harness.engine.scheduler.running == [] or len(harness.engine.scheduler.waiting):
            harness.step()
        harness.step()
        with counting() as calls:
            done = harness.step()
        assert done.stats["batch_rows"] == done.stats["batch_tokens"] == 32
        assert done.stats["batch_adapters"] == len(adapters)
        harness.run()
        return dict(calls)

    everyone = list(shouters[1].values())[:32]
    one, many = calls_of_a_decode_step(everyone[:1]), calls_of_a_decode_step(everyone)
    assert one == many
    assert ("cpu:run_layers" in one) == fused
    assert fused or one["cpu:add_lora"] > 0


def test_a_decode_step_allocates_next_to_nothing(harness: Harness, shouters: Shouters) -> None:
    """32 rows, 32 adapters: no copy of weights, pages or activations; numpy's arrays included."""
    for adapter in list(shouters[1].values())[:32]:
        harness.submit([5, 6], adapter, max_tokens=60)
    while harness.engine.scheduler.running == [] or len(harness.engine.scheduler.waiting):
        harness.step()
    harness.step()
    with Allocations() as allocations:
        assert harness.step().stats["batch_adapters"] == 32
    assert len(allocations.sizes) <= 20
    assert max(allocations.sizes, default=0) < 1 << 20 < harness.arena_bytes
    tracemalloc.start()
    harness.step()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1 << 20


def test_a_frame_holds_kv_then_an_adapter_then_kv_again(shouters: Shouters) -> None:
    harness = Harness(shouters[0], num_frames=400)
    adapter = next(iter(shouters[1].values()))
    size = harness.engine.residency.num_frames(harness.install(adapter))
    harness.close()
    harness = Harness(shouters[0], num_frames=size + 2, data_dir=harness.data_dir)
    owner = harness.engine.pool.frames.owner
    lives: list[list[Owner]] = [[] for _ in range(size + 2)]

    def serve(prompt: list[int], adapter: Path | None) -> list[int]:
        name = harness.submit(prompt, adapter, max_tokens=16)
        while harness.engine.has_work:
            harness.step()
            for frame, life in enumerate(lives):
                now = Owner.KV if owner(frame) is Owner.PREFIX else owner(frame)
                if now in (Owner.KV, Owner.ADAPTER) and (not life or life[-1] is not now):
                    life.append(now)
        assert name in harness.finished, harness.failed
        return harness.outputs[name]

    wide = [[4 + (i * 7 + j) % 300 for i in range(16 * size)] for j in range(2)]
    (token,) = [t for t, path in shouters[1].items() if path is adapter]
    before = serve(wide[0], None)
    assert set(serve([9, 9], adapter)) == {token}
    assert serve(wide[1], None)
    assert [Owner.KV, Owner.ADAPTER, Owner.KV] in [life[:3] for life in lives]
    assert serve(wide[0], None) == before
    harness.close()


@pytest.mark.parametrize("fault", ["scale", "page table", "last adapter"])
def test_a_planted_fault_is_caught(
    fault: str, shouters: Shouters, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: each of these faults changes a token they look at."""
    model, made = shouters
    prompt = [30 + i for i in range(30)]
    some = list(made.items())[:6]
    harness = Harness(model, num_frames=2000, check=False)
    if fault == "scale":
        add = harness.engine.residency._table.add

        def weaker(**row: Any) -> int:
            return add(**{**row, "scale": row["scale"] * np.float32(0.02)})

        monkeypatch.setattr(harness.engine.residency._table, "add", weaker)
    elif fault == "page table":
        kv = harness.engine._loop._runner._kv
        offsets = type(kv).offsets

        def crossed(self: Any, frames: Any) -> Any:
            table = offsets(self, frames)
            table[1] = table[0]
            return table

        monkeypatch.setattr(type(kv), "offsets", crossed)
    else:
        from loramux.model import runner

        build = runner.build_runs

        def short(rows: Any, slot: Any) -> Any:
            runs = build(rows, slot)
            if len(runs.slot) > 1:
                runs.slot[-1] = runs.slot[-2]
            return runs

        monkeypatch.setattr(runner, "build_runs", short)
    expected = [[token] * 4 for token, _ in some]
    names = [harness.submit(prompt, path, max_tokens=4) for _, path in some]
    base = harness.submit(prompt, max_tokens=4)
    outputs = harness.run()
    got = [outputs[name] for name in names]
    if fault == "page table":
        monkeypatch.undo()
        clean = Harness(model, num_frames=2000)
        assert outputs[base] != clean.generate(prompt, max_tokens=4)
        clean.close()
    else:
        assert got != expected
    harness.close()


def popularity(shouters: Shouters, num_registered: int, fits: int, num_requests: int) -> None:
    """``num_registered`` adapters over a pool that holds ``fits``, power-law popularity."""
    import shutil
    import tempfile

    model, made = shouters
    tokens = list(made)
    probe = Harness(model, num_frames=4000, check=False)
    copies = Path(tempfile.mkdtemp())
    registered = []
    for index in range(num_registered):
        token = tokens[index % len(tokens)]
        copy = copies / str(index)
        shutil.copytree(made[token], copy)
        text = (copy / "adapter_config.json").read_text()
        # Other bytes, another digest: what the files mean stays the same.
        (copy / "adapter_config.json").write_text(text + " " * (1 + index // len(tokens)))
        registered.append((token, copy))
    for _, copy in registered:
        probe.install(copy)
    size = max(probe.engine.residency.num_frames(probe.digests[str(c)]) for _, c in registered)
    probe.close()
    harness = Harness(
        model, num_frames=fits * size + 16, data_dir=probe.data_dir, max_num_seqs=12, check=False
    )
    harness.digests = probe.digests
    rng = np.random.default_rng(0)
    want: dict[str, int] = {}
    for index in range(num_requests):
        token, path = registered[int(rng.power(0.3) * num_registered)]
        prompt = rng.integers(50, 300, rng.integers(1, 24)).tolist()
        want[harness.submit(prompt, path, max_tokens=int(rng.integers(1, 5)))] = token
        if index % 8 == 7:
            harness.step()
        if index % 50 == 49:
            harness.engine.check()
    outputs = harness.run()
    assert not harness.failed
    for request_id, token in want.items():
        assert set(outputs[request_id]) == {token}
    assert sum(step.stats["evictions"]["adapter"] for step in harness.steps if step.stats) > 0
    harness.engine.check()
    frames = harness.engine.pool.frames
    assert frames.count(Owner.KV) == frames.count(Owner.LOADING) == 0
    harness.close()


def test_more_adapters_than_the_pool_holds(shouters: Shouters) -> None:
    popularity(shouters, num_registered=40, fits=5, num_requests=120)


@pytest.mark.slow
def test_five_hundred_adapters_in_a_pool_that_holds_twenty(shouters: Shouters) -> None:
    # 2,000 requests and as many as 500 loads through the real engine take minutes.
    popularity(shouters, num_registered=500, fits=20, num_requests=2000)
