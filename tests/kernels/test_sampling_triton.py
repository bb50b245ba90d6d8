"""The Triton draw: equal tokens under the interpreter, and compiled code for GPUs without one.

The interpreter must be chosen before Triton is imported, so it runs in a process of its own: this
very file, started as a program with the file to draw from and the file to write to.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from loramux_kernels.sampling import DrawParams, reference, stream_key

GOLDEN = json.loads((Path(__file__).parent / "test_sampling_golden.json").read_text())


def golden_batches() -> list[tuple[torch.Tensor, DrawParams, NDArray[np.int64], list[int]]]:
    """Every third golden token (the interpreter is slow), one batch per vocabulary."""
    batches = []
    for size in sorted({len(case["logits"]) for case in GOLDEN["tokens"]}):
        cases = [case for case in GOLDEN["tokens"] if len(case["logits"]) == size][::3]
        how = DrawParams(
            temperature=np.array([case["temperature"] for case in cases], np.float64),
            log_min_p=np.array(
                [math.log(case["min_p"]) if case["min_p"] else -math.inf for case in cases]
            ),
            top_k=np.array([case["top_k"] for case in cases], np.int64),
            top_p=np.array([case["top_p"] for case in cases], np.float64),
            key=np.array([stream_key(case["seed"], case["choice"]) for case in cases], np.uint64),
        )
        position = np.array([case["position"] for case in cases], np.int64)
        logits = torch.tensor([case["logits"] for case in cases])
        batches.append((logits, how, position, [case["token"] for case in cases]))
    return batches


def random_batch() -> tuple[torch.Tensor, DrawParams, NDArray[np.int64]]:
    """More ids than a block holds, bad rows, ties, every filter."""
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.normal(0, 4, (12, 2051)).astype(np.float32))
    logits[3] = -math.inf
    logits[4, 7] = math.nan
    logits[5, 2050] = math.inf
    logits[6] = logits[6].round()
    logits[7, 11:] = -math.inf
    how = DrawParams(
        temperature=np.array([0.0, 0.7] + [1.0] * 7 + [30.0, 0.0, 2.0]),
        log_min_p=np.array([-math.inf] * 8 + [math.log(0.1)] * 2 + [-math.inf] * 2),
        top_k=np.array([0] * 6 + [3, 5] + [0] * 4, np.int64),
        top_p=np.array([1.0] * 9 + [0.9, 0.5, 0.8]),
        key=rng.integers(0, 2**64, 12, dtype=np.uint64),
    )
    return logits, how, rng.integers(0, 2**34, 12)


def tied_row() -> tuple[torch.Tensor, DrawParams, NDArray[np.int64]]:
    """Equal logits, two of them with the same least hash, in blocks far apart."""
    how = DrawParams(
        temperature=np.ones(1),
        log_min_p=np.full(1, -math.inf),
        top_k=np.zeros(1, np.int64),
        top_p=np.ones(1),
        key=np.array([stream_key(GOLDEN["tie"]["seed"], 0)], np.uint64),
    )
    return torch.zeros(1, 1 << 17), how, np.array([GOLDEN["tie"]["position"]])


def interpreted(*, target: Path) -> None:
    from loramux_kernels.sampling import triton_draw

    # numpy warns where the kernel computes -inf - -inf for rows that are bad anyway.
    warnings.simplefilter("ignore", RuntimeWarning)
    drawn = [triton_draw.draw(*batch[:3])[0].tolist() for batch in golden_batches()]
    token, bad = triton_draw.draw(*random_batch())
    tie, _ = triton_draw.draw(*tied_row())
    target.write_text(json.dumps([drawn, token.tolist(), bad.tolist(), tie.tolist()]))


def test_interpreted_kernel_draws_the_same_tokens(tmp_path: Path) -> None:
    # Over 10 s on a busy machine: the interpreter runs its few hundred programs one by one.
    target = tmp_path / "drawn.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(target)], env=environment, check=True)
    golden, token, bad, tie = json.loads(target.read_text())
    assert golden == [expected for _, _, _, expected in golden_batches()]
    expected_token, expected_bad = reference.draw(*random_batch())
    assert token == expected_token.tolist()
    assert bad == expected_bad.tolist()
    assert sum(bad) == 3
    assert tie == [min(GOLDEN["tie"]["tokens"])]


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_gpus(capability: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from loramux_kernels.sampling import triton_draw

    race = {
        "logits": "*fp32",
        "peak": "*fp32",
        "temperature": "*fp64",
        "cut_logit": "*fp32",
        "cut_id": "*i64",
        "key": "*i64",
        "position": "*i64",
        "best_score": "*fp64",
        "best_id": "*i32",
        "stride": "i32",
        "vocab_size": "i32",
        "FILTERED": "constexpr",
        "BLOCK": "constexpr",
    }
    finish = {
        "best_score": "*fp64",
        "best_id": "*i32",
        "peak": "*fp32",
        "token": "*i64",
        "blocks": "i32",
        "vocab_size": "i32",
        "WIDTH": "constexpr",
    }
    for kernel, signature, constants in [
        (triton_draw.race_kernel, race, {"FILTERED": True, "BLOCK": triton_draw.BLOCK}),
        (triton_draw.finish_kernel, finish, {"WIDTH": 256}),
    ]:
        compiled = triton.compile(
            ASTSource(kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"enable_fp_fusion": False},
        )
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 48 * 1024


@pytest.mark.gpu
def test_gpu_draws_the_same_tokens() -> None:
    from loramux_kernels.sampling import triton_draw

    for logits, how, position, expected in golden_batches():
        assert triton_draw.draw(logits.cuda(), how, position)[0].tolist() == expected
    logits, how, position = random_batch()
    token, bad = triton_draw.draw(logits.cuda(), how, position)
    expected_token, expected_bad = reference.draw(logits, how, position)
    assert token.tolist() == expected_token.tolist()
    assert bad.tolist() == expected_bad.tolist()


if __name__ == "__main__":
    interpreted(target=Path(sys.argv[1]))
