"""A tree of guesses in a batch: what its nodes compute is what their chains compute, to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from loramux.model.inputs import ModelInputs
from loramux_kernels.attention import Paths, compact
from tests import tiny
from tests.model.paged import Paged, Request
from tests.trees import random_parents, way_to

Worn = tuple[tuple[int, float], ...]
Trees = Sequence[list[int] | None]


def loaded(checkpoint: Callable[..., Path], arch: tiny.Arch, tmp_path: Path, page: int) -> Paged:
    directory = checkpoint(arch)
    model = Paged.load(directory, page_tokens=page, num_slices=9000, max_tokens=160)
    for rank in (1, 3, 8):
        folder = tiny.write_adapter(tmp_path / f"{page}-{rank}", directory, r=rank, seed=rank)
        model.add_adapter(folder)
    return model


def planted(model: Paged, parts: Sequence[tuple[Request, int]], trees: Trees) -> ModelInputs:
    """The step in which each request computes its next ids as the tree it has, or in order."""
    held = [request.done for request, _ in parts]
    inputs = model.inputs(parts)
    positions = []
    for start, (_, count), parents in zip(held, parts, trees, strict=True):
        depths = range(count)
        if parents is not None:
            depths = [len(way_to(parents, node)) - 1 for node in range(count)]
        positions += [start + depth for depth in depths]
    paths = Paths.of([count for _, count in parts], trees)
    return dataclasses.replace(
        inputs,
        positions=torch.tensor(positions),
        pages=dataclasses.replace(inputs.pages, paths=paths),
    )


def stored(model: Paged, request: Request, tokens: int) -> torch.Tensor:
    """The keys and values of a request's first tokens, all layers."""
    arch, size = model.architecture, model.slice_bytes
    shape = (2, arch.num_kv_heads, model.page_tokens, arch.head_dim)
    layers = []
    for layer in range(arch.num_layers):
        pages = [
            model.arena[at : at + size].view(torch.float32).view(shape)
            for at in (int(slices[layer]) for slices in request.pages)
        ]
        layers.append(torch.cat(pages, dim=2)[:, :, :tokens])
    return torch.stack(layers).view(torch.int32)


def random_ids(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(4, tiny.VOCAB_SIZE, count).tolist()


@pytest.mark.parametrize(
    ("arch", "page_tokens"),
    [("llama", 1), ("llama", 5), ("llama", 16), ("mistral", 5), ("qwen3", 16)],
)
def test_every_way_through_a_tree_gives_the_logits_of_its_chain(
    checkpoint: Callable[..., Path], arch: tiny.Arch, page_tokens: int, tmp_path: Path
) -> None:
    """Among others with other adapters, one of them a chain; mistral's window is 8."""
    model = loaded(checkpoint, arch, tmp_path, page_tokens)
    rng = np.random.default_rng(page_tokens)
    for _ in range(5):
        trees: list[list[int] | None] = [
            random_parents(rng, int(rng.integers(1, 15))),
            None,
            random_parents(rng, int(rng.integers(1, 15))),
        ]
        worn: list[Worn] = [((int(rng.integers(3)), 1.0),), ((2, 0.5), (0, 1.0)), ()]
        counts = [9 if tree is None else len(tree) + 1 for tree in trees]
        held = rng.integers(0, 48, 3).tolist()
        requests = [
            Request(random_ids(rng, start + count), wears)
            for start, count, wears in zip(held, counts, worn, strict=True)
        ]
        model.step([(r, start) for r, start in zip(requests, held, strict=True) if start])
        parts = list(zip(requests, counts, strict=True))
        logits = model.decoder.forward(planted(model, parts, trees)).clone()
        for request in requests:
            model.finish(request)
        for part, start, (request, count), tree in zip(
            torch.split(logits, counts), held, parts, trees, strict=True
        ):
            chain = list(range(count - 1)) if tree is None else tree
            for node in range(count):
                ids = request.ids[:start] + [request.ids[start + n] for n in way_to(chain, node)]
                alone = model.run(ids, adapters=request.adapters)
                assert torch.equal(part[node], alone[-1]), (start, tree, node)


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
def test_what_is_kept_of_trees_is_what_a_prefill_stores(
    checkpoint: Callable[..., Path], page_tokens: int, tmp_path: Path
) -> None:
    """Round upon round: trees grow on what was kept of trees, whatever was accepted."""
    model = loaded(checkpoint, "llama", tmp_path, page_tokens)
    rng = np.random.default_rng(0)
    requests = [
        Request(random_ids(rng, 1 + 6 * i), wears) for i, wears in enumerate([(), ((1, 1.0),)])
    ]
    model.step([(request, len(request.ids)) for request in requests])
    for _ in range(8):
        trees = [random_parents(rng, int(rng.integers(1, 12))) for _ in requests]
        held = [request.done for request in requests]
        for request, tree in zip(requests, trees, strict=True):
            request.ids += random_ids(rng, len(tree) + 1)
        parts = [(r, len(tree) + 1) for r, tree in zip(requests, trees, strict=True)]
        inputs = planted(model, parts, trees)
        model.decoder.forward(inputs)
        kept = {i: way_to(tree, int(rng.integers(len(tree) + 1))) for i, tree in enumerate(trees)}
        compact(model.arena, pages=inputs.pages, kept=kept)
        for index, (request, start) in enumerate(zip(requests, held, strict=True)):
            request.ids = request.ids[:start] + [request.ids[start + n] for n in kept[index]]
            request.done = len(request.ids)
            fresh = Request(list(request.ids), request.adapters)
            model.step([(fresh, len(fresh.ids))])
            same = torch.equal(
                stored(model, request, request.done), stored(model, fresh, fresh.done)
            )
            assert same, (start, trees[index], kept[index])
            model.finish(fresh)


def test_a_node_at_its_place_in_the_row_is_caught(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A position that counts rows instead of depth, and an ancestor that is none."""
    model = loaded(checkpoint, "llama", tmp_path, 4)
    rng = np.random.default_rng(1)
    ids, tree = random_ids(rng, 14), [0, 0, 1]

    def grown(parents: list[int], positions: list[int] | None = None) -> torch.Tensor:
        request = Request(list(ids))
        model.step([(request, 10)])
        inputs = planted(model, [(request, 4)], [parents])
        if positions is not None:
            inputs = dataclasses.replace(inputs, positions=torch.tensor(positions))
        logits = model.decoder.forward(inputs).clone()
        model.finish(request)
        return logits[3]

    right = model.run(ids[:10] + [ids[10 + node] for node in way_to(tree, 3)])[-1]
    assert torch.equal(grown(tree), right)
    assert not torch.equal(grown([0, 0, 2]), right)
    assert not torch.equal(grown(tree, [10, 11, 12, 13]), right)
