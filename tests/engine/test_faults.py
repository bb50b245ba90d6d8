"""What goes wrong in a step ends the requests it must, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny
from tests.harness import Harness

from loramux.adapters.pack import packed_path
from loramux.engine.blackbox import BlackBox, read
from loramux.engine.pace import UNKNOWN_S, StepPace
from loramux.model.runner import Plan, Scored
from loramux.request import EntropyAdaptive, Speculation
from loramux.speculation.costs import Costs, CostTable

ROOT = Path(__file__).parents[2]
GOOD = [[5, 6, 7, 8] * 5, [9] * 20, [11, 12, 13]]
BAD = [20, 21, 22] * 7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("faults") / "model")


class Breaking:
    """A runner's forward pass, of whose request with the prompt BAD every number is a NaN from
    output position ``at`` on: the logits, and what is written to its frames."""

    def __init__(self, harness: Harness, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.frames = at, set[int]()
        self.runner = harness.engine._loop._runner
        self.forward: Callable[[Plan], Scored] = self.runner.forward
        monkeypatch.setattr(self.runner, "forward", self)

    def __call__(self, plan: Plan) -> Scored:
        scored = self.forward(plan)
        line = 0
        for row in plan.batch.rows:
            lines = scored.sampling[line : line + row.num_samples]
            line += row.num_samples
            request = row.request
            if request.ids[: len(BAD)].tolist() != BAD or request.num_outputs < self.at:
                continue
            scored.logits[lines] = torch.nan
            scored.logits[[first for index, first in scored.prompt if index == 0]] = torch.nan
            frames = request.kv.page_table[: request.kv.num_pages].tolist()
            for frame in frames:
                self.data(frame)[:] = 0xFF
                self.frames.add(frame)
        return scored

    def data(self, frame: int) -> torch.Tensor:
        size = self.runner._kv.frame.frame_bytes
        return self.runner._decoder.arena[frame * size : (frame + 1) * size]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("drafters", [(), ("lookup",)])
@pytest.mark.parametrize("at", [0, 3])
def test_a_row_that_is_not_finite_ends_its_request_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch, at: int, drafters: tuple[str, ...], overlap: bool
) -> None:
    knobs: dict[str, Any] = {"max_tokens": 12, "logprobs": 2, "temperature": 0.5, "seed": 3}
    if drafters:
        knobs["speculation"] = Speculation(drafters=drafters)
    harness = Harness(model, overlap=overlap)
    alone = [harness.submit(prompt, tenant="alone", **knobs) for prompt in GOOD]
    harness.run()
    breaking = Breaking(harness, at, monkeypatch)
    prefix = harness.engine.pool.prefix
    insert = prefix.insert

    def offered(key: bytes, frame: int) -> None:
        assert not (breaking.data(frame) == 0xFF).all(), "offered to others, though it is broken"
        insert(key, frame)

    monkeypatch.setattr(prefix, "insert", offered)
    good = [harness.submit(prompt, tenant="together", **knobs) for prompt in GOOD]
    bad = harness.submit(BAD, **knobs)
    harness.run()
    assert harness.failed[bad].code == "numerical_error" and list(harness.failed) == [bad]
    assert len(harness.outputs[bad]) == at
    for name, expected in zip(good, alone, strict=True):
        assert harness.outputs[name] == harness.outputs[expected]
        bits = [[o.logprobs for o in harness.details[each]] for each in (name, expected)]
        assert bits[0] == bits[1]
    assert sum(done.stats.get("nan_aborts", 0) for done in harness.steps) == 1
    # Other requests have had none of its frames since: what was in them is gone.
    assert breaking.frames
    for frame in breaking.frames:
        assert not breaking.data(frame).any(), "a NaN is left in a frame that is free"
    monkeypatch.undo()
    again = harness.submit(BAD, **knobs)
    harness.run()
    assert harness.finished[again].cached_tokens == 0
    harness.close()


def test_a_prompt_that_is_not_finite_fails_though_nothing_is_drawn(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(model)
    Breaking(harness, 0, monkeypatch)
    name = harness.submit(BAD, max_tokens=0, prompt_logprobs=0)
    harness.run()
    assert harness.failed[name].code == "numerical_error"
    harness.close()


@pytest.mark.parametrize(
    ("error", "code"), [(ZeroDivisionError, "engine_failed"), (MemoryError, "overloaded")]
)
def test_a_request_that_cannot_even_be_queued_fails_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: str
) -> None:
    harness = Harness(model)
    good = harness.submit(GOOD[0])

    def broken(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(harness.engine.scheduler, "check_fits", broken)
        bad = harness.submit(GOOD[1])
    harness.run()
    assert harness.failed[bad].code == code and len(harness.outputs[good]) == 8
    harness.close()


BROKEN = """
import sys, threading, types, torch
from loramux.engine import main
from loramux.errors import LoramuxError
from loramux.wire import Ready, StepDone

def step():
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

nothing = lambda *_: None
engine = types.SimpleNamespace(
    on_loaded=nothing, on_running=nothing, step=step, predicted_s=0.0, submit=nothing
)
ready = types.SimpleNamespace(startup_s={})
main.assemble = lambda *_, **__: types.SimpleNamespace(engine=engine, ready=ready)
main.encode = lambda message: type(message).__name__.encode()
main.STATS_EVERY_S = 0.0
threading.Thread(target=threading.Event().wait).start()  # as one that a broken device holds
sys.exit(main.main(sys.argv[1:]))
"""


def test_a_broken_device_ends_the_process_at_once(model: Path, tmp_path: Path) -> None:
    options = ["--socket", f"ipc://{tmp_path}/s", "--epoch", "1", "--parent", str(os.getpid())]
    ended = subprocess.run(
        [sys.executable, "-c", BROKEN, *options, "--blackbox", str(tmp_path / "box")],
        input=f'{{"model": "{model}"}}\n',
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 70, ended.stderr
    assert "illegal memory access" in ended.stderr


def test_the_black_box_says_what_stood_in_it_when_the_process_was_killed(tmp_path: Path) -> None:
    for number in range(20):
        path = tmp_path / str(number)
        child = os.fork()
        if child == 0:
            box = BlackBox(path, 4)
            while True:
                box.note(["a", "b"])
                box.note(["cc"])
                box.note([])
        while not path.exists() or not path.stat().st_size:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert read(path) in ([], ["a", "b"], ["cc"])


def test_the_black_box_names_all_or_nobody(tmp_path: Path) -> None:
    path = tmp_path / "box"
    assert read(path) == []
    box = BlackBox(path, 2)
    assert read(path) == []
    for ids in (["a"], ["cmpl-" + "f" * 32 + "-10", "b"], []):
        box.note(ids)
        assert read(path) == ids
    box.note(["a"])
    box.note(["x" * 100, "y" * 100])
    assert read(path) == [], "what does not fit is not said by halves"


def test_what_a_wild_write_left_in_the_black_box_is_read_as_it_is(tmp_path: Path) -> None:
    """Whoever reads it starts the next engine, and must get by it."""
    box = tmp_path / "box"
    for rest in (b"\xff" * 100, b"\x03\0\0\0a\xffb", b"\x03"):
        box.write_bytes(b"\1" + rest)
        assert "a" not in read(box)


def test_a_step_tells_the_box_whom_it_is_for(model: Path) -> None:
    harness = Harness(model)
    told: list[list[str]] = []
    harness.engine.on_running(lambda ids: told.append(list(ids)))
    names = [harness.submit(prompt, max_tokens=2) for prompt in GOOD]
    runner = harness.engine._loop._runner
    forward, seen = runner.forward, []

    def watched(plan: Plan) -> Scored:
        seen.append((told[-1], [row.request.id for row in plan.batch.rows]))
        return forward(plan)

    runner.forward = watched  # type: ignore[method-assign]
    harness.run()
    assert seen and all(sorted(box) == sorted(rows) for box, rows in seen)
    assert told[-1] == [] and {name for box, _ in seen for name in box} == set(names)
    harness.close()


def test_a_step_is_predicted_from_what_was_measured_and_seen() -> None:
    assert StepPace(None).predict(1) == UNKNOWN_S
    seen = StepPace(None)
    seen.took(4, 2.0)
    assert (seen.predict(4), seen.predict(7), seen.predict(8), seen.predict(64)) == (2, 2, 4, 32)
    assert seen.predict(1) == 2
    for _ in range(100):
        seen.took(4, 1.0)
    assert seen.predict(4) == pytest.approx(1.0, rel=1e-3)
    table = CostTable({1: 0.1, 100: 10.0}, 200)
    measured = StepPace(Costs.alike(table))
    assert measured.predict(100) == 10.0 and measured.predict(1000) == table.seconds[200]
    measured.took(100, 30.0)
    assert measured.predict(100) == 30.0
    measured.took(3, 0.001)
    assert measured.predict(3) == table.seconds[3]
    assert np.all(np.diff(table.seconds) >= 0)


def test_an_adapter_that_is_lost_while_every_seat_is_taken_fails_its_request_once(
    model: Path, tmp_path: Path
) -> None:
    """Whoever has had far more than it is to make room, and its adapter is fetched ahead too: both
    find that it cannot be read."""
    adapter = tiny.write_adapter(tmp_path / "adapter", model)
    harness = Harness(model, max_num_seqs=1, fairness_debt_tokens=0)
    busy = harness.submit(GOOD[0], tenant="busy", max_tokens=30)
    for _ in range(3):
        harness.step()
    lost = harness.submit(GOOD[1], adapter, tenant="other")
    packed_path(harness.data_dir, harness.install(adapter), harness.ready.base.fingerprint).unlink()
    harness.run()
    assert list(harness.failed) == [lost] and harness.failed[lost].code == "adapter_load_failed"
    assert len(harness.outputs[busy]) == 30
    harness.close()


def test_a_refusal_names_the_parameter(model: Path) -> None:
    harness = Harness(model)
    name = harness.submit(GOOD[0], entropy=EntropyAdaptive(threshold=1.0))
    harness.run()
    assert harness.failed[name].param == "entropy_adaptive"
    harness.close()
