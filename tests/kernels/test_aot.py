"""The Triton kernels compile for real GPUs, within a budget of registers and shared memory, without
one at hand. A budget is what lets at least two blocks live on a multiprocessor, with no spills."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux_kernels.attention import gpu as attention
from loramux_kernels.attention import pages
from loramux_kernels.lora import SITES, middle, one_row, tiles
from loramux_kernels.lora.runs import ROW_BLOCK
from loramux_kernels.lora.table import GAIN, INPUT_GAIN, SHIFT, TABLE_MODULES, VECTORS
from loramux_kernels.lora.work import RANK_TILE
from loramux_kernels.modulate import gpu as modulate
from loramux_kernels.norm import gpu as norm
from loramux_kernels.tuning import Launch, Table, table_named

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""What the blocks of one multiprocessor may use together, by compute capability."""
REGISTERS = 64 * 1024
LEAST_BLOCKS = 2
CUOBJDUMP = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Shape:
    """A served model: what the kernels are specialised on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inter: int
    dtype: str = "bf16"

    @property
    def chunk(self) -> int:
        widths = (self.hidden, self.heads * self.dim, self.kv_heads * self.dim, self.inter)
        return max(c for c in (16, 32, 64, 128) if all(w % c == 0 for w in widths))

    @property
    def slice_bytes(self) -> int:
        return 16 * 2 * self.kv_heads * self.dim * (4 if self.dtype == "fp32" else 2)


SHAPES = {
    "135m": Shape(30, 576, 9, 3, 64, 1536),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 128, 14336),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 128, 18944),
    "135m-fp32": Shape(30, 576, 9, 3, 64, 1536, "fp32"),
}

SPILLING = {("qwen2.5-7b", 80, pages.ROW_BLOCK)}
"""Known to be over budget: seven query heads times eight rows of a prompt fill 64 rows of a tile,
which sm_80 has no registers for (584 bytes spilled). Decodes are not concerned."""

TABLES = {
    **dict.fromkeys(("slices", "list_start", "a_offset", "b_offset", "h_start"), "*i64"),
    **dict.fromkeys(("middle_offset", "vector_offset"), "*i64"),
    **dict.fromkeys(("pages", "page_start", "layer_start", "positions"), "*i64"),
    **dict.fromkeys(("source", "target"), "*i64"),
    **dict.fromkeys(("h", "m", "parts", "cos", "sin", "request_scale"), "*fp32"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
    **dict.fromkeys(
        ("layer", "pages_per_layer", "per_layer", "window", "width", "stride", "late"), "i32"
    ),
    "arena": "*u8",
}
ROWS = ("x", "y", "qkv", "out", "residual", "weight", "late_weight", "gate_up", "pool")


@dataclass(frozen=True)
class Built:
    """What a block of a compiled kernel takes: what its cubin says, and the shared memory its
    launch asks for. ``spilled`` is a thread's stack in bytes: nothing else in here needs one."""

    name: str
    warps: int
    registers: int
    spilled: int
    shared: int

    @property
    def blocks(self) -> int:
        """Blocks that fit one multiprocessor; registers come in pieces of 256 a warp."""
        a_warp = -(-self.registers * 32 // 256) * 256
        return REGISTERS // (a_warp * self.warps)

    def check(self, capability: int) -> None:
        assert self.spilled == 0, f"{self} spills"
        assert self.blocks >= LEAST_BLOCKS, f"{self}: registers for {self.blocks} blocks"
        assert LEAST_BLOCKS * self.shared <= SHARED_MEMORY[capability], f"{self}: shared memory"


def compile_for(
    kernel: Any, capability: int, dtype: str, launch: Launch, **constants: Any
) -> Built:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ROWS:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = TABLES.get(name, "*i32")
    scaled = (one_row.shrink_rows_kernel, tiles.shrink_tiles_kernel, modulate.modulate_kernel)
    if kernel in scaled:
        signature["scale"] = "*fp32"
    # What a launch finds out by itself: tensors start at multiples of 16 bytes.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Built(
        f"{kernel.__name__}.sm_{capability}.{dtype}",
        launch.warps,
        used["REG"],
        used["STACK"] + used["LOCAL"],
        compiled.metadata.shared,
    )


def lora_kernels(shape: Shape, tuned: Table, capability: int, site: str) -> Iterator[Built]:
    modules = SITES[site]
    q, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
    in_width = {"o": q, "down": shape.inter}.get(site, shape.hidden)
    outs = {"qkv": (q, kv, kv), "gate_up": (shape.inter, shape.inter, 0)}
    outs_of_site = outs.get(site, (shape.hidden, 0, 0))
    common = {
        "LAYERS": shape.layers,
        "FIRST_MODULE": modules[0],
        "MODULES": len(modules),
        "TABLE": len(TABLE_MODULES),
        "SLICE_BYTES": shape.slice_bytes,
        "CHUNK": shape.chunk,
    }
    columns = {f"OUT{i}": width for i, width in enumerate(outs_of_site)}
    columns |= {"ROW_WIDTH": sum(outs_of_site), "RANKS": RANK_TILE}
    launch = tuned.launch("shrink_rows", in_width)
    yield compile_for(
        one_row.shrink_rows_kernel, capability, shape.dtype, launch,
        WIDTH=in_width, CHUNKS=launch.block, RANKS=tuned.lone_ranks, **common,
    )  # fmt: skip
    launch = tuned.launch("expand_rows", sum(outs_of_site))
    yield compile_for(
        one_row.expand_rows_kernel, capability, shape.dtype, launch, **columns, **common
    )
    launch = tuned.launch("shrink_tiles", in_width)
    precision = "tf32x3" if shape.dtype == "fp32" else "tf32"
    yield compile_for(
        tiles.shrink_tiles_kernel, capability, shape.dtype, launch,
        WIDTH=in_width, BLOCK=min(launch.block, shape.chunk), ROWS=ROW_BLOCK, RANKS=RANK_TILE,
        PRECISION=precision, **common,
    )  # fmt: skip
    launch = tuned.launch("expand_tiles", sum(outs_of_site))
    yield compile_for(
        tiles.expand_tiles_kernel, capability, shape.dtype, launch,
        ROWS=ROW_BLOCK, **columns, **common,
    )  # fmt: skip
    for index, ranks in enumerate((tuned.lone_ranks, RANK_TILE)):
        yield compile_for(
            middle.middle_kernel, capability, shape.dtype, middle.LAUNCH,
            LIST=index, RANKS=ranks, **common,
        )  # fmt: skip


def attention_kernels(
    shape: Shape, tuned: Table, capability: int, rows: int, *, trees: bool = False
) -> Iterator[Built]:
    group = shape.heads // shape.kv_heads
    common = {"HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "PAGE_TOKENS": 16}
    block_m = max(16, triton.next_power_of_2(rows * group))
    launch = tuned.launch("attention", block_m)
    yield compile_for(
        attention.attention_kernel,
        capability,
        shape.dtype,
        launch,
        DIM=shape.dim,
        BLOCK_D=shape.dim,
        ROWS=rows,
        GROUP=group,
        BLOCK_M=block_m,
        KEYS=launch.block,
        SPLIT=pages.SPLIT,
        TREES=trees,
        PRECISION="tf32x3" if shape.dtype == "fp32" else "tf32",
        **common,
    )
    half = shape.dim // 2
    launch = tuned.launch("rope_store")
    yield compile_for(
        attention.rope_store_kernel, capability, shape.dtype, launch,
        HALF=half, BLOCK=half, **common,
    )  # fmt: skip
    yield compile_for(
        attention.fold_kernel,
        capability,
        shape.dtype,
        tuned.launch("fold_attention", shape.dim),
        HEADS=shape.heads,
        DIM=shape.dim,
        BLOCK_D=shape.dim,
        ROWS=rows,
        SPLIT=pages.SPLIT,
        TREES=trees,
    )
    if trees:
        yield compile_for(
            attention.compact_kernel, capability, shape.dtype, tuned.launch("rope_store"),
            PLANE=16 * shape.dim, DIM=shape.dim, BLOCK=shape.dim,
        )  # fmt: skip


def norm_kernels(shape: Shape, tuned: Table, capability: int) -> Iterator[Built]:
    for width in (shape.hidden, shape.dim):
        yield compile_for(
            norm.norm_kernel,
            capability,
            shape.dtype,
            tuned.launch("norm", width),
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            ADD=width == shape.hidden,
        )
    launch = tuned.launch("silu_mul")
    yield compile_for(norm.silu_mul_kernel, capability, shape.dtype, launch, BLOCK=launch.block)


def modulate_kernels(shape: Shape, capability: int) -> Iterator[Built]:
    for width, gain, shift in ((shape.inter, GAIN, SHIFT), (shape.hidden, INPUT_GAIN, -1)):
        yield compile_for(
            modulate.modulate_kernel,
            capability,
            shape.dtype,
            modulate.LAUNCH,
            LAYERS=shape.layers,
            MODULES=len(TABLE_MODULES),
            KINDS=len(VECTORS),
            MODULE=0,
            GAIN=gain,
            SHIFT=shift,
            ROW_WIDTH=width,
            FIRST_COLUMN=0,
            WIDTH=width,
            SLICE_BYTES=shape.slice_bytes,
            CHUNK=shape.chunk,
        )


def check(built: Iterator[Built], capability: int) -> None:
    """Every kernel within its budget; the table of what they take is part of a failure."""
    found = list(built)
    for kernel in found:
        sys.stdout.write(
            f"{kernel.name:40} {kernel.warps} warps {kernel.registers:4} registers "
            f"{kernel.spilled:4} bytes spilled {kernel.shared:6} bytes shared "
            f"{kernel.blocks:3} blocks\n"
        )
    for kernel in found:
        kernel.check(capability)


def test_representative_kernels_keep_their_budget() -> None:
    """Tens of seconds without Triton's cache: seven kernels go through LLVM and ptxas."""
    tuned = table_named("sm_90")
    check(lora_kernels(SHAPES["llama-3.1-8b"], tuned, 90, "qkv"), 90)
    check(attention_kernels(SHAPES["llama-3.1-8b"], tuned, 90, rows=1), 90)


def test_a_greedy_setting_breaks_the_budget() -> None:
    """One warp for what four should do: its sums alone are 16 times what a thread can hold."""
    shape, greedy = SHAPES["llama-3.1-8b"], Launch(warps=1, stages=1)
    half = {"HEADS": 32, "KV_HEADS": 8, "PAGE_TOKENS": 16, "HALF": 1 << 12, "BLOCK": 1 << 13}
    built = compile_for(attention.rope_store_kernel, 80, shape.dtype, greedy, **half)
    with pytest.raises(AssertionError, match="spills|registers"):
        built.check(80)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_keeps_its_budget(shape: str, capability: int) -> None:
    """Minutes: some thirty kernels a case. Ranks are not compiled in: tiles of 16 serve all."""
    tuned = table_named(f"sm_{capability}")
    for site in SITES:
        check(lora_kernels(SHAPES[shape], tuned, capability, site), capability)
    for rows, trees in itertools.product((1, pages.ROW_BLOCK), (False, True)):
        built = attention_kernels(SHAPES[shape], tuned, capability, rows, trees=trees)
        if (shape, capability, rows) in SPILLING:
            with pytest.raises(AssertionError, match="attention_kernel.*spills"):
                check(built, capability)
        else:
            check(built, capability)
    check(norm_kernels(SHAPES[shape], tuned, capability), capability)
    check(modulate_kernels(SHAPES[shape], capability), capability)
