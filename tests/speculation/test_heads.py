"""Medusa heads against plain torch, their trees against a search, and their files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.heads import write_heads
from tests.trees import way_to

from loramux.errors import ConfigError
from loramux.request import Request, SamplingParams, Speculation
from loramux.speculation.drafter import Ask, Guess
from loramux.speculation.heads import ACCURACY, GRADES, Heads, Medusa, base_heads, shape_of
from loramux_kernels.linear import Matrix
from loramux_kernels.sampling import reference, stream_key

HIDDEN, VOCAB = 24, 70
KNOBS: dict[str, Any] = {"temperature": 2.5, "top_k": 9, "top_p": 0.7, "min_p": 0.01}


def lm_head(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9)).to(dtype)


def loaded(folder: Path, **knobs: Any) -> tuple[Heads, dict[str, torch.Tensor]]:
    tensors = write_heads(folder / "medusa_heads.safetensors", HIDDEN, **knobs)
    heads = base_heads(folder, Matrix.of(lm_head()), torch.zeros(1))
    assert heads is not None
    return heads, tensors


def expected(
    tensors: dict[str, torch.Tensor], hidden: torch.Tensor, head: int, blocks: int, prefix: str
) -> torch.Tensor:
    """One head by definition, in float64."""
    x = hidden.double()
    for block in range(blocks):
        name = f"{prefix}{head}.{block}.linear"
        change = x @ tensors[f"{name}.weight"].double().T + tensors[f"{name}.bias"].double()
        x = x + change * torch.sigmoid(change)
    return x @ tensors.get(f"{prefix}{head}.{blocks}.weight", lm_head()).double().T


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("heads", "blocks", "own", "dtype"),
    [
        (3, 1, False, torch.float32),
        (1, 2, False, torch.float16),
        (4, 1, True, torch.float16),
        (2, 3, True, torch.bfloat16),
        (2, 0, True, torch.float32),
    ],
)
def test_heads_are_what_torch_says(
    tmp_path: Path, rows: int, heads: int, blocks: int, own: bool, dtype: torch.dtype
) -> None:
    prefix = "medusa_head." if blocks == 2 else ""
    made, tensors = loaded(
        tmp_path,
        heads=heads,
        blocks=blocks,
        vocab_size=VOCAB if own else 0,
        dtype=dtype,
        prefix=prefix,
    )
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(rows))
    before = hidden.clone()
    for depth in range(1, heads + 1):
        logits = made.logits(hidden, depth)
        assert logits.shape == (depth, rows, VOCAB)
        for head in range(depth):
            want = expected(tensors, hidden, head, blocks, prefix)
            torch.testing.assert_close(logits[head].double(), want, rtol=1e-4, atol=1e-4)
    assert torch.equal(hidden, before)


def request_of(num_ids: int = 5, tree: bool = False, **sampling: Any) -> Request:
    params = SamplingParams(**{"seed": 4, "max_tokens": 64, **sampling})
    speculation = Speculation(drafters=("medusa",), tree=tree)
    return Request(
        "r",
        prompt_ids=[7, 8],
        output_ids=list(range(num_ids - 2)),
        sampling=params,
        speculation=speculation,
    )


def ranked(logits: torch.Tensor, request: Request, head: int) -> list[int]:
    """All tokens in the order of the race, by definition: the whole vocabulary, no filters."""
    params = request.sampling
    if params.temperature == 0:
        return torch.argsort(logits, descending=True, stable=True).tolist()
    key = np.array([stream_key(params.seed, params.choice)], np.uint64)
    at = np.array([request.num_outputs + head])
    noise = -torch.log1p(-reference.uniforms(key, at, VOCAB))[0]
    return torch.argsort(noise / (logits.double() / params.temperature).exp()).tolist()


@pytest.mark.parametrize("knobs", [{"temperature": 0.0}, {"temperature": 1.3, "choice": 2}])
@pytest.mark.parametrize("tree", [False, True])
def test_choices_come_in_the_order_of_the_race(
    tmp_path: Path, knobs: dict[str, Any], tree: bool
) -> None:
    made, _ = loaded(tmp_path, heads=3)
    drafter = Medusa(made)
    hidden = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(3))
    asked, other = request_of(tree=tree, **knobs), request_of(temperature=0.0)
    other.id = "other"
    drafter.saw([other, asked], hidden)
    guess = drafter.propose([Ask(asked, 9), Ask(other, 2)])[0]
    logits = made.logits(hidden[1:], 3)[:, 0]
    orders = [ranked(logits[head], asked, head) for head in range(3)]
    if not tree:
        assert list(guess.token_ids) == [order[0] for order in orders]
        return
    shape = shape_of(made.accuracy, 9)
    assert len(set(shape.parents)) < 9, "it does not branch"
    assert guess.parents == shape.parents
    assert list(guess.token_ids) == [
        orders[head][rank] for head, rank in zip(shape.heads, shape.ranks, strict=True)
    ]
    assert guess.grade == int(logits[0].softmax(-1)[guess.token_ids[0]] * GRADES)


def test_the_first_choice_is_the_samplers_draw_with_all_its_filters(tmp_path: Path) -> None:
    from loramux.sampling.sampler import Sampler

    made, _ = loaded(tmp_path, heads=3)
    drafter, sampler = Medusa(made), Sampler(VOCAB, "cpu")
    for seed in range(20):
        request = request_of(seed=seed, tree=seed % 2 == 1, **KNOBS)
        hidden = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))
        drafter.saw([request], hidden)
        guess = drafter.propose([Ask(request, 3)])[0]
        logits = made.logits(hidden, 3)[:, 0].contiguous()
        sampler.add("r", request.sampling, [], [])
        first = request.num_outputs
        drawn = sampler.sample(logits, [("r", first + head) for head in range(3)]).token_ids
        sampler.remove("r")
        if guess.parents is None or seed % 2 == 0:
            assert list(guess.token_ids) == drawn.tolist()
        else:
            assert guess.token_ids[0] == drawn[0]


def tables() -> st.SearchStrategy[tuple[tuple[float, ...], ...]]:
    chances = st.floats(0, 1, width=16)
    return st.integers(1, 4).flatmap(
        lambda ranks: st.lists(st.tuples(*[chances] * ranks), min_size=1, max_size=3).map(tuple)
    )


@given(accuracy=tables(), most=st.integers(1, 30))
def test_a_tree_holds_the_best_nodes_best_first(
    accuracy: tuple[tuple[float, ...], ...], most: int
) -> None:
    """Against all rank paths, as the published trees are written down."""
    ranks = range(len(accuracy[0]))
    paths = [p for n in range(len(accuracy)) for p in itertools.product(ranks, repeat=n + 1)]

    def chance(path: tuple[int, ...]) -> float:
        product = 1.0
        for head, rank in enumerate(path):
            product *= accuracy[head][rank]
        return product

    shape = shape_of(accuracy, most)
    ways = [way_to(shape.parents, node)[1:] for node in range(1, len(shape.parents) + 1)]
    found = [tuple(shape.ranks[node - 1] for node in way) for way in ways]
    assert len(set(found)) == len(found) == min(most, len(paths))
    assert [len(path) - 1 for path in found] == shape.heads
    chances = [chance(path) for path in found]
    assert chances == sorted(chances, reverse=True)
    assert chances == sorted(map(chance, paths), reverse=True)[: len(found)]
    beginning = shape_of(accuracy, max(1, most // 2))
    assert all(whole[: len(part)] == part for whole, part in zip(shape, beginning, strict=True)), (
        "the beginning of a tree is the tree of fewer nodes"
    )


def test_it_says_nothing_about_what_it_has_not_seen(tmp_path: Path) -> None:
    made, _ = loaded(tmp_path)
    drafter = Medusa(made)
    request = request_of(temperature=0.0)
    assert drafter.propose([Ask(request, 3)]) == [Guess()]
    drafter.saw([request], torch.ones(1, HIDDEN))
    assert drafter.propose([Ask(request, 3)])[0].token_ids
    request.expect()
    request.receive([5])
    assert drafter.propose([Ask(request, 3)]) == [Guess()], "a state of the past is of no use"
    drafter.saw([request], torch.full((1, HIDDEN), torch.nan))
    assert drafter.propose([Ask(request, 3)]) == [Guess()]
    drafter.saw([request], torch.ones(1, HIDDEN))
    drafter.ended(request)
    assert drafter.propose([Ask(request, 3)]) == [Guess()]
    drafter.ended(request)


def test_heads_without_a_table_get_one(tmp_path: Path) -> None:
    made, _ = loaded(tmp_path, heads=2)
    assert made.accuracy == ACCURACY[:2]
    table = torch.tensor([[0.5, 0.25], [0.125, 1.0]])
    made, _ = loaded(tmp_path, heads=2, accuracy=table)
    assert made.accuracy == ((0.5, 0.25), (0.125, 1.0))


def test_no_file_no_heads(tmp_path: Path) -> None:
    assert base_heads(tmp_path, Matrix.of(lm_head()), torch.zeros(1)) is None


Z = torch.zeros
OFFENDERS: dict[str, tuple[dict[str, torch.Tensor | None], list[str]]] = {
    "missing": ({"0.0.linear.bias": None}, ["0.0.linear.bias is missing"]),
    "a gap": (
        {"3.0.linear.bias": Z(HIDDEN)},
        ["2.0.linear.weight is missing", "3.0.linear.weight"],
    ),
    "unknown": ({"lm_head.weight": Z(2, 2), "0.0.linear.gain": Z(3)}, ["lm_head.weight", "gain"]),
    "too many": ({"16.0.linear.bias": Z(HIDDEN)}, ["16.0.linear.bias"]),
    "shapes": (
        {"0.0.linear.weight": Z(HIDDEN, HIDDEN + 1), "1.0.linear.bias": Z(1, HIDDEN)},
        ["0.0.linear.weight: shape [24, 25]", "1.0.linear.bias: shape [1, 24]"],
    ),
    "the place of an output": (
        {"0.0.weight": Z(VOCAB, HIDDEN), "1.1.weight": Z(VOCAB, HIDDEN)},
        ["0.0.weight: a head's own output matrix comes after", "0.1.weight is missing"],
    ),
    "twice": ({"medusa_head.0.0.linear.bias": Z(HIDDEN)}, ["in the file twice"]),
    "not finite": (
        {"1.0.linear.bias": torch.full((HIDDEN,), torch.inf)},
        ["1.0.linear.bias holds a value that is not finite"],
    ),
    "the table's shape": ({"accuracy": Z(3, 4)}, ["accuracy: shape [3, 4] is not [2, up to 64]"]),
    "the table's values": ({"accuracy": torch.ones(2, 3) * 1.5}, ["accuracy holds"]),
}


@pytest.mark.parametrize("name", OFFENDERS)
def test_a_file_that_does_not_fit_is_refused_with_all_offenders(tmp_path: Path, name: str) -> None:
    changes, said = OFFENDERS[name]
    path = tmp_path / "medusa_heads.safetensors"
    tensors: dict[str, torch.Tensor | None] = {**write_heads(path, HIDDEN, heads=2), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, path)
    with pytest.raises(ConfigError) as error:
        base_heads(tmp_path, Matrix.of(lm_head()), torch.zeros(1))
    assert str(path) in str(error.value)
    for text in said:
        assert text in str(error.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "medusa_heads.safetensors"
    for data in (b"", b"PK\x03\x04 and so on"):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="safetensors"):
            base_heads(tmp_path, Matrix.of(lm_head()), torch.zeros(1))
    save_file({"accuracy": torch.ones(1, 1)}, path)
    with pytest.raises(ConfigError, match="holds no Medusa heads"):
        base_heads(tmp_path, Matrix.of(lm_head()), torch.zeros(1))
