"""Checks of ``loramux.model.graphs`` under Triton's interpreter; ``test_graphs.py`` runs them.

A "graph" here is the recorded call itself, with the inputs it was recorded with: whatever a launch
takes from the host at recording, a replay takes again. Only arrays on the device may differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from loramux.model import graphs
from loramux.model.graphs import DeviceForward, Launch, Recorder
from loramux.model.inputs import StepArrays
from loramux.request import Speculation
from loramux_kernels import dispatch
from loramux_kernels.linear import Matrix, gpu
from loramux_kernels.mirror import scratch
from loramux_kernels.testing import counting
from tests import tiny
from tests.equivalence.test_drafted import ScriptedTrees
from tests.harness import Harness

pytestmark = [
    pytest.mark.gpu,
    # silu of a large negative number, which numpy remarks on
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),
]


def row_by_row(out: torch.Tensor, x: torch.Tensor, weight: Matrix) -> None:
    """The base matmul without a BLAS that looks at the number of rows."""
    dense = weight.dense()
    for i in range(len(x)):
        torch.mv(dense, x[i], out=out[i])


def gathered(out: torch.Tensor, weight: Matrix, ids: torch.Tensor) -> None:
    out.copy_(weight.dense()[ids])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    return tiny.write_model(folder, "llama", num_hidden_layers=1, intermediate_size=32)


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        tiny.write_adapter(folder / "a", model, r=1, targets=["q_proj", "down_proj"], b_scale=0.3),
        tiny.write_adapter(folder / "b", model, r=3, seed=1, targets=["o_proj"], b_scale=0.3),
        tiny.write_adapter(folder / "c", model, r=5, seed=2, targets=["v_proj"], b_scale=0.4),
    ]


class Spied(DeviceForward):
    """Keeps the logits of every step, and counts what the recorder recorded."""

    def __init__(self, harness: Harness, recorder: Recorder | None) -> None:
        runner = harness.engine._loop._runner
        self.logits: list[torch.Tensor] = []
        self.num_recorded = 0

        def counted(launch: Launch) -> Launch:
            assert recorder is not None
            self.num_recorded += 1
            return recorder(launch)

        super().__init__(runner._decoder, 4, None if recorder is None else counted)
        runner.use(self)

    def forward(self, step: StepArrays) -> torch.Tensor:
        logits = super().forward(step)
        self.logits.append(logits.clone())
        return logits


Make = Callable[[Recorder | None], tuple[Harness, Spied]]


@pytest.fixture
def make(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    made: list[Harness] = []
    monkeypatch.setattr(graphs, "BUCKETS", (2, 4))

    def engine(recorder: Recorder | None) -> tuple[Harness, Spied]:
        overlap = recorder is not None  # as on a device
        harness = Harness(model, page_tokens=4, max_batch_tokens=24, overlap=overlap)
        made.append(harness)
        return harness, Spied(harness, recorder)

    monkeypatch.setattr(gpu, "project", row_by_row)
    monkeypatch.setattr(gpu, "gather", gathered)
    with dispatch.using("gpu"):
        yield engine
    for harness in made:
        harness.close()


def same(launch: Launch) -> Launch:
    return launch


def submit(harness: Harness, adapters: list[Path]) -> None:
    """Decodes of 3 rows, then of 2 with other adapters. Few: an interpreted step takes seconds."""
    a, b, c = adapters
    harness.submit([7, 8], [(a, 1.0)], max_tokens=3)
    harness.submit([5], None, max_tokens=3)
    harness.submit([40, 41], [(b, 0.5), (a, -1.0)], max_tokens=3)
    harness.run()
    harness.submit([60, 61], [(c, 1.0)], max_tokens=2)
    harness.submit([62], [(b, 1.0)], max_tokens=2)
    harness.run()


def test_replays_give_the_bits_of_plain_launches(
    make: Make, adapters: list[Path], model: Path
) -> None:
    graphed, with_graphs = make(same)
    eager, without = make(None)
    for harness in (graphed, eager):
        submit(harness, adapters)
    assert with_graphs.num_replays >= 3 and without.num_replays == 0
    assert with_graphs.num_recorded == 4
    assert len(with_graphs.logits) == len(without.logits)
    for ours, theirs in zip(with_graphs.logits, without.logits, strict=True):
        assert ours.isfinite().all() and torch.equal(ours, theirs)
    with dispatch.using("cpu"):
        plain = Harness(model, page_tokens=4, max_batch_tokens=24)
        submit(plain, adapters)
        plain.close()
    assert graphed.outputs == plain.outputs


def test_graphs_are_recorded_again_when_arrays_move(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "USUAL_PAGES", 0)
    graphed, with_graphs = make(same)
    eager, without = make(None)
    prepared = with_graphs.num_recorded
    for harness in (graphed, eager):
        harness.submit([9, 8, 7], max_tokens=3)
        harness.run()
    assert with_graphs.num_recorded == prepared + 1 and with_graphs.num_replays == 2
    for ours, theirs in zip(with_graphs.logits, without.logits, strict=True):
        assert torch.equal(ours, theirs)
    scratch("lora_h", torch.device("cpu"), 1 << 20)
    graphed.submit([9, 8], max_tokens=2)
    graphed.run()
    assert with_graphs.num_recorded == prepared + 2


def test_trees_of_guesses_go_without_graphs(make: Make, model: Path, adapters: list[Path]) -> None:
    """Beside a row that guesses nothing, on what is planned ahead as on a device."""

    def submit(harness: Harness, speculation: Speculation | None) -> None:
        harness.submit(
            [7, 8, 9], [(adapters[0], 1.0)], max_tokens=5, name="a", speculation=speculation
        )
        harness.submit([5, 4], max_tokens=3, name="b")
        harness.run()

    with dispatch.using("cpu"):
        plain = Harness(model, page_tokens=4, max_batch_tokens=24)
        submit(plain, None)
        plain.close()
    graphed, with_graphs = make(same)
    graphed.engine.drafting.drafters["scripted"] = ScriptedTrees(
        plain.outputs, lambda most: [0, 0, 2, 3][:most], lambda node: node != 1
    )
    with counting() as calls:
        submit(graphed, Speculation(drafters=("scripted",), max_draft_tokens=4))
    assert graphed.outputs == plain.outputs
    assert calls["gpu:compact"] and with_graphs.num_replays
    assert sum(step.stats.get("batch_rows", 0) for step in graphed.steps) == 6  # not 8


def test_steps_run_without_graphs_when_recording_fails(make: Make) -> None:
    def fails(launch: Launch) -> Launch:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed, with_graphs = make(fails)
    graphed.submit([7, 8, 9], max_tokens=3)
    graphed.run()
    assert with_graphs.num_recorded == 1 and with_graphs.num_replays == 0
