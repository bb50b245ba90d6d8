"""Every page in use and a thousand more come; and whoever leaves, wherever it is, leaves nothing.

The harness balances the books after every step, with NaN in every freed frame.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny
from tests.harness import Harness

from loramux.memory.frames import Owner

ARRIVALS = 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("exhaustion") / "base")


def test_a_thousand_arrivals_at_a_full_pool_all_end(model: Path, tmp_path: Path) -> None:
    """Six seconds: a step or more for each of them, on six requests' worth of frames."""
    adapter = tiny.write_adapter(tmp_path / "a", model, r=2)
    harness = Harness(model, num_frames=14, max_num_seqs=8)
    pool = harness.engine.pool
    first = [harness.submit([5 + i] * 20, max_tokens=40, name=f"first {i}") for i in range(8)]
    for _ in range(4):
        harness.step()
    assert len(harness.engine.scheduler.waiting), "there is no page for all of them"
    aborted, late = [], []
    for index in range(ARRIVALS):
        wears = adapter if index % 10 == 0 else None
        deadline_s = 0.0 if index % 50 == 1 else None
        name = harness.submit(
            [10 + index % 200, index % 7 + 5],
            wears,
            max_tokens=1 + index % 3,
            deadline_s=deadline_s,
        )
        if deadline_s is not None:
            late.append(name)
        elif index % 50 == 2:
            aborted.append(name)
    harness.engine.abort(aborted)
    harness.run(most=10_000)
    ended = harness.finished.keys() | harness.failed.keys()
    assert ended == harness.outputs.keys() - set(aborted), "every one, once"
    assert harness.failed.keys() == set(late)
    assert {len(harness.outputs[name]) for name in first} == {40}
    assert sum(done.stats.get("preemptions", 0) for done in harness.steps) > 0
    assert pool.frames.count(Owner.KV) == 0
    harness.close()


@pytest.mark.parametrize("when", ["queued", "prefill", "decode", "last"])
def test_who_leaves_at_any_stage_frees_its_pages_and_disturbs_nobody(
    model: Path, when: str
) -> None:
    """Frames are back at once, and its neighbours' tokens are those of a run without it."""
    prompts = {"left": [7] * 30, "right": [9] * 25}

    def run(leaver: bool) -> Harness:
        harness = Harness(
            model, max_num_seqs=2 + (when != "queued"), max_batch_tokens=16, prefix_caching=False
        )
        for name, prompt in prompts.items():
            harness.submit(prompt, max_tokens=24, temperature=1.0, seed=3, name=name)
        while not all(harness.outputs.values()):
            harness.step()
        if leaver:
            held = harness.engine.pool.frames.num_free
            harness.submit([8] * 40, max_tokens=4, name="leaver")
            steps = {"queued": 1, "prefill": 1, "decode": 3, "last": 5}[when]
            for _ in range(steps):
                harness.step()
            made = len(harness.outputs["leaver"])
            assert made == {"queued": 0, "prefill": 0, "decode": 1, "last": 3}[when]
            frames = harness.engine.pool.frames
            free = frames.num_free
            harness.engine.abort(["leaver"])
            assert (frames.num_free > free) == (when != "queued")
            harness.step()
            assert len(harness.outputs["leaver"]) == made
            assert held - frames.num_free <= 2, "what the other two grew by"
        harness.run()
        assert "leaver" not in harness.finished
        harness.close()
        return harness

    with_it, without = run(True), run(False)
    for name in prompts:
        assert with_it.outputs[name] == without.outputs[name]
