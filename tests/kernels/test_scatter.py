"""A stream spread over slices: the reference against a loop, the Triton kernel under Triton's
interpreter (in a process of its own, some ten seconds) and compiled for real GPUs."""

from __future__ import annotations

import os

import pytest
import torch
import triton
from tests import interpreter
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux_kernels import dispatch
from loramux_kernels.scatter import gpu, scatter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def case(
    num_bytes: int, slice_bytes: int, num_slices: int = 40
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(arena, staged, offsets, the arena as it should be afterwards)."""
    generator = torch.Generator().manual_seed(num_bytes + slice_bytes)
    arena = torch.randint(0, 256, (num_slices * slice_bytes,), generator=generator).to(torch.uint8)
    staged = torch.randint(0, 256, (num_bytes,), generator=generator).to(torch.uint8)
    need = -(-num_bytes // slice_bytes)
    offsets = torch.randperm(num_slices, generator=generator)[:need] * slice_bytes
    expected = arena.clone()
    for at in range(num_bytes):
        expected[offsets[at // slice_bytes] + at % slice_bytes] = staged[at]
    return arena, staged, offsets, expected


SHAPES = [(0, 64), (8, 64), (64, 64), (7 * 64, 64), (7 * 64 - 8, 64), (1000, 24), (4096 + 32, 1088)]


@pytest.mark.parametrize(("num_bytes", "slice_bytes"), SHAPES)
def test_every_byte_goes_to_its_slice_and_no_other_changes(
    num_bytes: int, slice_bytes: int
) -> None:
    arena, staged, offsets, expected = case(num_bytes, slice_bytes, 50)
    scatter(arena, staged, offsets, slice_bytes=slice_bytes)
    assert torch.equal(arena, expected)


def test_shapes_that_do_not_fit_are_refused() -> None:
    arena, staged, offsets, _ = case(256, 64)
    with pytest.raises(ValueError, match="do not cover 5 slices"):
        scatter(arena, staged, torch.cat([offsets, offsets[:1]]), slice_bytes=64)
    with pytest.raises(ValueError, match="do not cover 4 slices"):
        scatter(arena, staged[:128], offsets, slice_bytes=64)
    with pytest.raises(ValueError, match="multiples of 8"):
        scatter(arena, staged[:-1], offsets, slice_bytes=64)
    with pytest.raises(ValueError, match="uint8"):
        scatter(arena, staged.float(), offsets, slice_bytes=64)


@pytest.mark.gpu
@pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("num_bytes", "slice_bytes"), [*SHAPES, (3 * 16384 + 40, 16384 + 24)])
def test_the_kernel_does_the_same(num_bytes: int, slice_bytes: int) -> None:
    arena, staged, offsets, expected = case(num_bytes, slice_bytes, 50)
    on_device = arena.to(DEVICE)
    with dispatch.using("gpu"):
        scatter(on_device, staged.to(DEVICE), offsets.to(DEVICE), slice_bytes=slice_bytes)
    assert torch.equal(on_device.cpu(), expected)


def test_the_kernel_passes_under_the_interpreter() -> None:
    interpreter.passes("tests/kernels/test_scatter.py")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_to_wide_copies(capability: int) -> None:
    types = {"arena": "*i64", "staged": "*i64", "offsets": "*i64", "num_words": "i32"}
    constants = {"SLICE_WORDS": 8192, "BLOCK": gpu.BLOCK, "ALIGN": 2}
    source = ASTSource(
        fn=gpu.scatter_kernel,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        # What a launch finds out by itself: all of these are multiples of 16.
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.asm["cubin"] and compiled.metadata.shared == 0
    ptx = compiled.asm["ptx"]
    assert "st.global.v2" in ptx and "ld.global.v2" in ptx
    assert "st.local" not in ptx, "registers spill"
