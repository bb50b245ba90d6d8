"""Recorded steps under Triton's interpreter, in a process of their own: Triton decides how to run
a kernel when it is imported. Over 10 s: whole engines step through interpreted kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from loramux.model.graphs import BUCKETS, DeviceForward
from loramux.model.inputs import StepArrays
from loramux_kernels.lora import Runs
from loramux_kernels.mirror import StandingMirror
from tests import interpreter
from tests.model.paged import CPU, Paged, Request


@pytest.mark.slow  # a minute: the interpreter runs whole models
def test_recorded_steps_pass_under_the_interpreter() -> None:
    interpreter.passes("tests/model/graphs_interpreted.py")


def step_of(paged: Paged, counts: list[int]) -> StepArrays:
    inputs = paged.inputs([(Request([4] * count), count) for count in counts])
    return StepArrays(
        token_ids=inputs.token_ids.numpy(),
        positions=inputs.positions.numpy(),
        pages=inputs.pages,
        runs=inputs.runs,
        scored=inputs.scored.numpy(),
        alone=np.repeat(np.array(counts) == 1, counts),
    )


def test_the_smallest_graph_that_holds_a_decode_runs_it(checkpoint: Callable[..., Path]) -> None:
    paged = Paged.load(checkpoint("llama"), max_tokens=50)
    forward = DeviceForward(paged.decoder, paged.page_tokens, lambda launch: launch)
    for rows in (1, 2, 3, 24, 25, 48):
        bucket = forward.bucket(step_of(paged, [1] * rows))
        assert bucket == min(size for size in BUCKETS if size >= rows)
    # 49 rows would need the bucket of 64, which the workspace of 50 cannot hold
    assert forward.bucket(step_of(paged, [1] * 49)) is None
    assert forward.bucket(step_of(paged, [1, 2])) is None
    unscored = dataclasses.replace(step_of(paged, [1, 1]), scored=np.zeros(1, np.int64))
    assert forward.bucket(unscored) is None
    eager = DeviceForward(paged.decoder, paged.page_tokens, None)
    assert eager.bucket(step_of(paged, [1])) is None


def test_no_graph_holds_what_stands_between_a_and_b(checkpoint: Callable[..., Path]) -> None:
    paged = Paged.load(checkpoint("llama"), max_tokens=50)
    forward = DeviceForward(paged.decoder, paged.page_tokens, lambda launch: launch)
    for middle, plain in ((-1, True), (0, False)):
        shape = paged.table.rank.shape[1:]
        only = np.zeros(shape, np.int32)
        only[0, 0] = 1
        slot = paged.table.add(
            slices=np.arange(20) * paged.slice_bytes,
            a_offset=np.zeros(shape, np.int64),
            b_offset=np.zeros(shape, np.int64),
            middle_offset=np.where(only, middle, -1),
            rank=only,
            scale=only.astype(np.float32),
            dtype=torch.float32,
        )
        runs = Runs.build([1], [[(slot, 1.0)]])
        step = dataclasses.replace(step_of(paged, [1]), runs=runs)
        assert runs.has_middle(paged.table, 0, "qkv") != plain
        assert not runs.has_middle(paged.table, 0, "o")
        assert (forward.bucket(step) is not None) == plain


class TestStandingMirror:
    def test_arrays_stay_where_they_are_until_one_outgrows_its_room(self) -> None:
        mirror = StandingMirror(CPU, {"a": (np.int32, 3), "b": (np.int64, 2)})
        before = mirror.address
        mirror.write({"a": np.array([1, 2], np.int32), "b": np.array([7])})
        mirror.write({"a": np.array([5], np.int32), "b": np.array([8, 9])})
        assert mirror.address == before
        assert mirror.tensors["a"][:1].tolist() == [5]
        assert mirror.tensors["b"].tolist() == [8, 9]
        mirror.write({"a": np.arange(4, dtype=np.int32), "b": np.array([1])})
        assert mirror.address != before and len(mirror.tensors["a"]) == 8
        assert mirror.tensors["a"][:4].tolist() == [0, 1, 2, 3]
        assert mirror.tensors["b"][:1].tolist() == [1]
        assert all(tensor.data_ptr() % 16 == 0 for tensor in mirror.tensors.values())

    def test_an_array_of_another_dtype_is_refused(self) -> None:
        with pytest.raises(TypeError, match="a: int64 is not int32"):
            StandingMirror(CPU, {"a": (np.int32, 3)}).write({"a": np.zeros(1, np.int64)})
