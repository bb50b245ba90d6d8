"""The Triton kernels compile for real GPUs, within their shared memory, without one at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loramux_kernels.attention import gpu as attention
from loramux_kernels.lora import gpu as lora
from loramux_kernels.norm import gpu as norm

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""What one block may use, by compute capability."""


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

TABLES = {
    **dict.fromkeys(("slices", "list_start", "a_offset", "b_offset", "out_width"), "*i64"),
    **dict.fromkeys(("offsets", "positions"), "*i64"),
    **dict.fromkeys(("h", "parts", "bounds", "cos", "sin"), "*fp32"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
    **dict.fromkeys(("layer", "pitch", "max_pages", "head_rows", "window", "width"), "i32"),
    **dict.fromkeys(("stride", "late"), "i32"),
    "arena": "*u8",
    "request_scale": "*fp32",
}


def compile_for(
    kernel: Any, capability: int, dtype: str, warps: int, stages: int = 3, **constants: Any
) -> Any:
    rows = ("x", "y", "qkv", "out", "residual", "weight", "late_weight", "gate_up", "pool")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in rows:
            signature[name] = f"*{dtype}"
        else:
            signature[name] = TABLES.get(name, "*i32")
    if kernel is lora.shrink_kernel:
        signature["scale"] = "*fp32"
    # What a launch finds out by itself: tensors start at multiples of 16 bytes.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY[capability]
    return compiled


def check_lora(shape: Shape, capability: int, site: str) -> None:
    modules = lora.SITES[site]
    q, kv = shape.heads * shape.dim, shape.kv_heads * shape.dim
    in_width = {"qkv": shape.hidden, "o": q, "gate_up": shape.hidden, "down": shape.inter}
    row_width = {
        "qkv": q + 2 * kv,
        "o": shape.hidden,
        "gate_up": 2 * shape.inter,
        "down": shape.hidden,
    }
    common = {
        "LAYERS": shape.layers,
        "FIRST_MODULE": modules[0],
        "MODULES": len(modules),
        "SLICE_BYTES": shape.slice_bytes,
        "CHUNK": shape.chunk,
        "ROWS": lora.ROW_BLOCK,
        "RANKS": lora.RANK_TILE,
    }
    precision = "tf32x3" if shape.dtype == "fp32" else "tf32"
    compile_for(
        lora.shrink_kernel,
        capability,
        shape.dtype,
        4,
        WIDTH=in_width[site],
        PRECISION=precision,
        **common,
    )
    compile_for(lora.expand_kernel, capability, shape.dtype, 4, ROW_WIDTH=row_width[site], **common)


def check_attention(shape: Shape, capability: int, rows: int, alone: bool) -> None:
    group = shape.heads // shape.kv_heads
    common = {"HEADS": shape.heads, "KV_HEADS": shape.kv_heads, "PAGE_TOKENS": 16}
    compile_for(
        attention.attention_kernel,
        capability,
        shape.dtype,
        4,
        2,
        DIM=shape.dim,
        BLOCK_D=shape.dim,
        ROWS=rows,
        GROUP=group,
        BLOCK_M=max(16, triton.next_power_of_2(rows * group)),
        KEYS=attention.KEYS,
        SPLIT=attention.SPLIT,
        ALONE=alone,
        PRECISION="tf32x3" if shape.dtype == "fp32" else "tf32",
        **common,
    )
    half = shape.dim // 2
    compile_for(
        attention.rope_store_kernel, capability, shape.dtype, 1, HALF=half, BLOCK=half, **common
    )
    compile_for(
        attention.fold_kernel,
        capability,
        shape.dtype,
        1,
        HEADS=shape.heads,
        DIM=shape.dim,
        BLOCK_D=shape.dim,
        SPLIT=attention.SPLIT,
    )


def check_norms(shape: Shape, capability: int) -> None:
    for width in (shape.hidden, shape.dim):
        compile_for(
            norm.norm_kernel,
            capability,
            shape.dtype,
            4,
            WIDTH=width,
            BLOCK=triton.next_power_of_2(width),
            ADD=width == shape.hidden,
        )
    compile_for(norm.silu_mul_kernel, capability, shape.dtype, 4, BLOCK=norm.SILU_BLOCK)


def test_representative_kernels_compile() -> None:
    """Tens of seconds without Triton's cache: five kernels go through LLVM and ptxas."""
    check_lora(SHAPES["llama-3.1-8b"], 90, "qkv")
    check_attention(SHAPES["135m"], 80, rows=1, alone=True)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kernel_compiles(shape: str, capability: int) -> None:
    """Minutes: some twenty kernels a case. Ranks are not compiled in: tiles of 16 serve all."""
    for site in lora.SITES:
        check_lora(SHAPES[shape], capability, site)
    for rows in (1, attention.ROW_BLOCK):
        check_attention(SHAPES[shape], capability, rows, alone=rows == 1)
    check_norms(SHAPES[shape], capability)
