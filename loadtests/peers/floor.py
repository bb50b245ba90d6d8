"""The least time a run can take: bytes over the measured bandwidth, operations over the GEMM rate.

Requests are served as the floor would have it: a prompt is computed whole in the step that admits
it, beside the decodes of all others, and a place is taken again at once. A step's base matmuls, its
adapters and its attention each take the larger of the two quotients; a step is their sum. An
adapter's bytes count once a step however many rows share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cases import SHAPE, Job, Mix, adapter_shape

HIDDEN, INNER, LAYERS = (
    SHAPE[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")
)
KV = SHAPE["num_key_value_heads"] * (HIDDEN // SHAPE["num_attention_heads"])
WIDTHS = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (HIDDEN, INNER),
    "up_proj": (HIDDEN, INNER),
    "down_proj": (INNER, HIDDEN),
}
MATRICES = LAYERS * sum(into * out for into, out in WIDTHS.values())
HEAD = SHAPE["vocab_size"] * HIDDEN


def adapter_elements(mix: Mix, index: int) -> int:
    """Numbers in the matrices of one adapter of a set; none for the base (-1)."""
    if index < 0:
        return 0
    rank, targets = adapter_shape(mix, index)
    return LAYERS * rank * sum(sum(WIDTHS[target]) for target in targets)


def floor_seconds(
    jobs: Sequence[Job], concurrency: int, mix: Mix, machine: dict[str, Any]
) -> float:
    """Seconds for all jobs on a ``machine`` (read_gb_s, gemm_gflops), everything in fp32."""

    def longer(elements: int, operations: int) -> float:
        read = 4 * elements / machine["read_gb_s"]
        return max(read, operations / machine["gemm_gflops"]) / 1e9

    waiting = list(reversed(jobs))
    running: list[tuple[Job, int]] = []  # and how many of its tokens are there
    seconds = 0.0
    while waiting or running:
        rows = [(job, 1, len(job.prompt) + done) for job, done in running]
        while waiting and len(rows) < concurrency:
            job = waiting.pop()
            running.append((job, 0))
            rows.append((job, len(job.prompt), len(job.prompt)))
        tokens = sum(new for _, new, _ in rows)
        seconds += longer(MATRICES + HEAD, 2 * (tokens * MATRICES + len(rows) * HEAD))
        sizes = {job.adapter: adapter_elements(mix, job.adapter) for job, _, _ in rows}
        work = sum(new * sizes[job.adapter] for job, new, _ in rows)
        seconds += longer(sum(sizes.values()), 2 * work)
        # Each of a row's new tokens sees those before it and itself.
        seen = sum(new * context - new * (new - 1) // 2 for _, new, context in rows)
        contexts = sum(context for _, _, context in rows)
        seconds += longer(LAYERS * 2 * KV * contexts, LAYERS * 4 * HIDDEN * seen)
        running = [(job, done + 1) for job, done in running if done + 1 < job.num_new]
    return seconds
