"""What the load tests predict and how they account for what they measure."""

from __future__ import annotations

import bench_lora
import numpy as np
import pytest
import registered
import roofline
import scaling
import torch
from workload import Pass

SHAPE = {"hidden_size": 4, "num_hidden_layers": 2, "vocab_size": 10}
WIDTHS = {"q_proj": (4, 4), "k_proj": (4, 2), "up_proj": (4, 8)}
SLOW = {"read_gb_s": 4e-9, "gemm_gflops": 1e-9}
"""One element and one operation a second."""


def test_alpha_one_is_uniform_and_a_smaller_one_prefers_the_first() -> None:
    rng = np.random.default_rng(0)
    uniform = np.bincount(registered.draw(1.0, 20_000, 10, rng), minlength=10) / 20_000
    assert np.abs(uniform - 0.1).max() < 0.01
    skewed = np.array(registered.draw(0.1, 20_000, 1000, rng))
    assert abs((skewed == 0).mean() - 0.001**0.1) < 0.02
    assert abs((skewed < 50).mean() - 0.05**0.1) < 0.02
    assert set(registered.draw(0.1, 100, 1, rng)) == {0}
    assert max(registered.draw(1.0, 20_000, 3, rng)) == 2


def test_a_pool_holds_what_was_used_lately() -> None:
    assert registered.lately([5, 1, 2, 1, 3], 3) == [3, 1, 2]
    assert registered.lately([0, 0, 0], 50) == [0]
    assert registered.lately([], 50) == []


def test_the_parts_of_a_loss_add_up_to_it() -> None:
    small = [Pass(seconds=15.0, load_bytes=100)]
    found = registered.split_loss([10.0], small, [Pass(seconds=12.0)], s_per_byte=0.02)
    assert found["loss"][0] == pytest.approx(0.5)
    assert found["distinct"][0] == pytest.approx(0.2)
    assert found["copies"] == pytest.approx(0.2)
    assert found["rest"][0] == pytest.approx(0.1)


def test_the_parts_of_a_step_cost_the_larger_of_bytes_and_operations() -> None:
    base = 2 * (16 + 8 + 32) + 40
    per_rank = 2 * (8 + 6 + 12)
    one = scaling.predicted_ms(scaling.Point((3,), 1, 5), SHAPE, WIDTHS, SLOW)
    assert one == {
        "base": 1e3 * 2 * base,
        "lora": 1e3 * 2 * 3 * per_rank,
        "attention": 1e3 * 2 * 4 * 4 * 5,
    }
    lazy = SLOW | {"gemm_gflops": 1.0}
    shared = scaling.predicted_ms(scaling.Point((3,) * 7, 2, 5), SHAPE, WIDTHS, lazy)
    assert shared == {
        "base": 1e3 * base,
        "lora": 1e3 * 2 * 3 * per_rank,
        "attention": 1e3 * 2 * 2 * 2 * 7 * 5,
    }


def test_a_sweep_changes_one_thing_only() -> None:
    for name, points in scaling.sweeps(quick=False).items():
        varied = {
            "rows": {p.rows for _, p in points},
            "adapters": {p.adapters for _, p in points},
            "context": {p.context for _, p in points},
            "rank": {p.ranks[0] for _, p in points},
        }
        assert [what for what, values in varied.items() if len(values) > 1] == [name]
        assert all(p.adapters <= p.rows for _, p in points)
    assert [x for x, p in scaling.sweeps(quick=False)["rank"]] == [
        p.sum_rank for _, p in scaling.sweeps(quick=False)["rank"]
    ]


def test_a_line_through_points_of_a_line_is_that_line() -> None:
    slope, intercept = scaling.line([1, 2, 7], [5.0, 8.0, 23.0])
    assert (slope, intercept) == (pytest.approx(3), pytest.approx(2))


def test_a_roofline_is_the_larger_of_its_two_limits() -> None:
    line = roofline.Roofline("cpu", torch.float32, read_bytes_s=10.0, flops_s=100.0)
    assert line.seconds(20, 100) == 2
    assert line.seconds(10, 300) == 3


def test_what_a_lora_call_cannot_avoid() -> None:
    weights, moved, operations = bench_lora.minimum(bench_lora.WIDTHS, "gate_up", 4, 8, 2)
    assert weights == 2 * 8 * 2 * (576 + 1536)
    assert moved == 4 * (576 + 2 * 2 * 1536)
    assert operations == 2 * 4 * 8 * 2 * (576 + 1536)


def test_means_of_a_pass_are_over_the_steps_that_computed() -> None:
    done = Pass(seconds=4.0, steps=2, rows=6, distinct=3, in_flight=8.0)
    done.end()
    assert (done.rows, done.distinct, done.in_flight) == (3, 1.5, 2)
