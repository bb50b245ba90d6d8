"""The exactness contract: a row's bits are its own, whoever is in the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numba
import pytest
import torch

from loramux.model.architecture import parse_architecture
from loramux.model.loader import LayerWeights, Weights
from loramux_kernels.jit import set_num_threads
from loramux_kernels.linear import Matrix
from tests import tiny
from tests.model.paged import Paged, Request

BATCHES = 200
MAX_ROWS = 40


def run_in_random_batches(
    model: Paged,
    probe: list[int],
    worn: tuple[tuple[int, float], ...],
    slots: list[int],
    batches: int,
    source: random.Random,
) -> None:
    """Feed ``probe`` again and again, in chunks of any size among neighbours of any kind, and
    compare every row with the one it gave alone."""
    vocab = model.architecture.vocab_size
    alone = model.run(probe, adapters=worn)
    assert not alone.isnan().any()
    own = Request(list(probe), worn)
    others: list[Request] = []
    for _ in range(batches):
        own_rows = source.randint(1, min(MAX_ROWS, len(probe) - own.done))
        room = source.randint(0, MAX_ROWS - own_rows)
        parts = [(own, own_rows)]
        while room:
            if len(others) < 8 and source.random() < 0.5:
                ids = source.choices(range(vocab), k=source.randint(1, 30))
                wears = source.choice([(), *(((slot, 0.5),) for slot in slots)])
                others.append(Request(ids, wears))
            waiting = [r for r in others if all(r is not part for part, _ in parts)]
            if not waiting:
                break
            other = source.choice(waiting)
            # a decode, or a chunk of the prompt
            rows = source.choice([1, source.randint(1, room)])
            rows = min(rows, len(other.ids) - other.done)
            parts.append((other, rows))
            room -= rows
        source.shuffle(parts)
        at = [part is own for part, _ in parts].index(True)
        first = own.done
        logits = model.step(parts)[at]
        assert torch.equal(logits, alone[first : first + own_rows]), [n for _, n in parts]
        for request in [own, *others]:
            if request.done == len(request.ids):
                model.finish(request)
                if request is not own:
                    others = [r for r in others if r is not request]
        if own.done == len(probe):
            own = Request(list(probe), worn)


@pytest.mark.parametrize("arch", tiny.ARCHS)
def test_one_row_in_two_hundred_batches(
    checkpoint: Callable[..., Path], arch: tiny.Arch, tmp_path: Path
) -> None:
    directory = checkpoint(arch)
    model = Paged.load(directory, page_tokens=4, num_slices=6000)
    slots = [
        model.add_adapter(tiny.write_adapter(tmp_path / str(r), directory, r=r, seed=r))
        for r in (1, 3, 8)
    ]
    source = random.Random(arch)
    probe = source.choices(range(tiny.VOCAB_SIZE), k=33)
    run_in_random_batches(model, probe, ((slots[1], 1.0),), slots, BATCHES, source)


def test_one_row_at_the_widths_of_a_real_model() -> None:
    """The shapes of a 135M model on two threads, where a BLAS has choices that tiny shapes hide."""
    # about 10 s: real widths are the point, and a batch reads 130 MB of weights
    set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
    config = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 2,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    architecture = parse_architecture(config, {})
    generator = torch.Generator().manual_seed(0)

    def random_matrix(out: int, inner: int) -> Matrix:
        return Matrix.of(torch.randn(out, inner, generator=generator).mul_(inner**-0.5))

    def layer() -> LayerWeights:
        matrices = {
            "qkv": random_matrix(960, 576),
            "o": random_matrix(576, 576),
            "gate_up": random_matrix(3072, 576),
            "down": random_matrix(576, 1536),
            "input_norm": torch.ones(576),
            "post_norm": torch.ones(576),
        }
        return LayerWeights(
            **{f.name: matrices.get(f.name) for f in fields(LayerWeights)}  # type: ignore[arg-type]
        )

    embedding = random_matrix(49152, 576)
    weights = Weights(embedding, (layer(), layer()), torch.ones(576), embedding)
    model = Paged(architecture, weights, page_tokens=16)
    source = random.Random(0)
    probe = source.choices(range(49152), k=37)
    run_in_random_batches(model, probe, (), [], 30, source)
