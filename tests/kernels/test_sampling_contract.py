"""The sampling contract, checked against itself written again in pure Python, and against vectors.

``test_sampling_golden.json`` was written once by ``token`` below. It must never change: seeded
requests would get other tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loramux_kernels.sampling import DrawParams, cpu, reference, stream_key

GOLDEN = json.loads((Path(__file__).parent / "test_sampling_golden.json").read_text())

# Random123's known-answer vectors for philox4x32, 10 rounds: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    (a, b, c, d), (x, y) = counter, key
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ x, q % 2**32, (p >> 32) ^ d ^ y, p % 2**32
        x, y = (x + 0x9E3779B9) % 2**32, (y + 0xBB67AE85) % 2**32
    return a, b, c, d


def hashed(seed: int, choice: int, position: int, token: int) -> int:
    key = stream_key(seed, choice)
    counter = (position % 2**32, position >> 32, token // 4, 0)
    return philox(counter, (key % 2**32, key >> 32))[token % 4]


def kept(
    logits: list[float], temperature: float, min_p: float, top_k: int, top_p: float
) -> list[int]:
    """Kept ids in the frozen order, for a positive temperature."""
    x = [(logit - max(logits)) / temperature for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ids = [i for i in order if min_p == 0 or x[i] >= math.log(min_p)]
    ids = [i for i in ids if i in order[: top_k or None]]
    if top_p == 1:
        return ids
    mass = [int(math.exp(x[i]) * 2**40) for i in ids]
    for n in range(1, len(ids)):
        if sum(mass[:n]) >= top_p * sum(mass):
            return ids[:n]
    return ids


def token(
    logits: list[float],
    seed: int,
    choice: int,
    position: int,
    temperature: float,
    min_p: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    if temperature == 0:
        return logits.index(max(logits))
    scores = {}
    for i in kept(logits, temperature, min_p, top_k, top_p):
        weight = math.exp((logits[i] - max(logits)) / temperature)
        v = (hashed(seed, choice, position, i) + 0.5) * 2.0**-32
        scores[i] = -math.log1p(-v) / weight if weight else math.inf
    return min(scores, key=lambda i: (scores[i], i))


def params_of(case: dict[str, object]) -> DrawParams:
    min_p = float(case["min_p"])  # type: ignore[arg-type]
    return DrawParams(
        temperature=np.array([case["temperature"]], np.float64),
        log_min_p=np.array([math.log(min_p) if min_p else -math.inf]),
        top_k=np.array([case["top_k"]], np.int64),
        top_p=np.array([case["top_p"]], np.float64),
        key=np.array([stream_key(case["seed"], case["choice"])], np.uint64),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert philox(counter, key) == expected
    words = [torch.tensor([word]) for word in (*counter, *key)]
    out = reference.philox((words[0], words[1], words[2], words[3]), (words[4], words[5]))
    assert tuple(out[0].tolist()) == expected


def test_splitmix_known_answers() -> None:
    assert stream_key(0, 0) == 0xE220A8397B1DCDAF
    assert stream_key(1234567, 0) == 6457827717110365317
    assert stream_key(1234560, 7) == 6457827717110365317
    assert stream_key(-1, 0) == stream_key(2**64 - 1, 0)


@pytest.mark.parametrize("case", GOLDEN["hashes"])
def test_golden_hashes(case: dict[str, int]) -> None:
    seed, choice, position, at = case["seed"], case["choice"], case["position"], case["token"]
    assert hashed(seed, choice, position, at) == case["hash"]
    key = np.array([stream_key(seed, choice)], np.uint64)
    v = reference.uniforms(key, np.array([position]), at + 1)[0, at]
    assert v.item() * 2**32 - 0.5 == case["hash"]
    out = np.zeros(4, np.uint32)
    cpu._hash(key[0], np.uint64(position), at // 4, out)
    assert out[at % 4] == case["hash"]


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda case: str(case["seed"]))
def test_golden_tokens(case: dict[str, object]) -> None:
    call = {name: value for name, value in case.items() if name != "token"}
    assert token(**call) == case["token"]  # type: ignore[arg-type]
    logits = torch.tensor([case["logits"]])
    position = np.array([case["position"]], np.int64)
    for implementation in (reference, cpu):
        drawn, bad = implementation.draw(logits, params_of(case), position)
        assert (drawn.tolist(), bad.tolist()) == ([case["token"]], [False])


@pytest.mark.parametrize("implementation", [reference, cpu])
def test_equal_scores_go_to_the_lowest_id(implementation: Any) -> None:
    """Found by search: of 2^17 equal logits two hold the same least hash."""
    tie = GOLDEN["tie"]
    assert len({hashed(tie["seed"], 0, tie["position"], at) for at in tie["tokens"]}) == 1
    how = params_of(
        {"seed": tie["seed"], "choice": 0, "temperature": 1.0, "min_p": 0, "top_k": 0, "top_p": 1.0}
    )
    drawn, _ = implementation.draw(torch.zeros(1, 1 << 17), how, np.array([tie["position"]]))
    assert drawn.tolist() == [min(tie["tokens"])]
