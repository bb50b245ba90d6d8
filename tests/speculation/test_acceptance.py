"""The head that foresees rejections: what it computes, which files it takes, and its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.harness import Harness

from loramux.config import DEMO_DIR
from loramux.errors import ConfigError
from loramux.request import Request, SamplingParams
from loramux.speculation.acceptance import FILE, REJECTED, AcceptanceHead, read_head, stops
from loramux.speculation.drafter import Ask

WIDTH = 8
CPU = torch.device("cpu")


def tensors(blocks: int = 3, width: int = WIDTH) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    return {
        "model.0.linear.weight": some(width, width),
        "model.0.linear.bias": some(width),
        f"model.{blocks}.weight": some(2, width),
        f"model.{blocks}.bias": some(2),
    }


def written_out(held: dict[str, torch.Tensor], blocks: int = 3) -> dict[str, torch.Tensor]:
    """Every block under its own name, as a checkpoint that was not told of the tie holds them."""
    again = {
        f"model.{block}.linear.{part}": held[f"model.0.linear.{part}"].clone()
        for block in range(1, blocks)
        for part in ("weight", "bias")
    }
    return {**held, **again}


def saved(folder: Path, held: dict[str, torch.Tensor]) -> Path:
    save_file(held, folder / FILE, {"format": "pt"})
    return folder


def said(held: dict[str, torch.Tensor], x: torch.Tensor, blocks: int) -> list[float]:
    """By definition."""
    for _ in range(blocks):
        inner = x @ held["model.0.linear.weight"].T + held["model.0.linear.bias"]
        x = x + inner * torch.sigmoid(inner)
    logits = x @ held[f"model.{blocks}.weight"].T + held[f"model.{blocks}.bias"]
    chances: list[float] = torch.softmax(logits, -1)[:, 1].tolist()
    return chances


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("each", [False, True])
def test_one_block_is_used_as_often_as_it_says(tmp_path: Path, blocks: int, each: bool) -> None:
    held = tensors(blocks)
    folder = saved(tmp_path, written_out(held, blocks) if each else held)
    head = read_head(folder, WIDTH, CPU)
    assert head is not None
    for rows in (1, 5):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
        assert head(x) == pytest.approx(said(held, x, blocks), abs=1e-5)
    narrow = x.bfloat16()
    assert head(narrow) == pytest.approx(said(held, narrow.float(), blocks), abs=1e-5)


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    held = {name: tensor.half() for name, tensor in tensors().items()}
    head = read_head(saved(tmp_path, held), WIDTH, CPU)
    assert head is not None
    x = torch.ones(2, WIDTH)
    wide = {name: tensor.float() for name, tensor in held.items()}
    assert head(x) == pytest.approx(said(wide, x, 3), abs=1e-5)


def test_no_file_no_head(tmp_path: Path) -> None:
    assert read_head(tmp_path, WIDTH, CPU) is None


@pytest.mark.parametrize("case", ["untied", "width", "missing", "more", "no blocks", "not a file"])
def test_a_head_that_does_not_fit_names_the_flag(tmp_path: Path, case: str) -> None:
    held = written_out(tensors())
    if case == "untied":
        held["model.1.linear.weight"][0, 0] += 1
    if case == "width":
        held = tensors(width=WIDTH + 1)
    if case == "missing":
        del held["model.0.linear.bias"], held["model.1.linear.bias"], held["model.2.linear.bias"]
    if case == "more":
        held["model.0.linear.scale"] = torch.ones(1)
    if case == "no blocks":
        held = {"model.0.weight": torch.ones(2, WIDTH), "model.0.bias": torch.ones(2)}
    folder = saved(tmp_path, held)
    if case == "not a file":
        (folder / FILE).write_bytes(b"x")
    with pytest.raises(ConfigError, match="--draft-model") as error:
        read_head(folder, WIDTH, CPU)
    assert error.value.param == "draft_model"


@given(st.lists(st.floats(0, 1), max_size=6))
def test_a_round_ends_when_a_rejection_is_likelier_than_the_threshold(chances: list[float]) -> None:
    together = float(np.prod(chances))
    assert stops(together) == (1 - together > REJECTED)
    assert not stops(1.0)


def test_the_newest_guess_has_no_say(tmp_path: Path) -> None:
    """The number of guesses is a stopping time: whatever token the last one is replaced by, and
    only by that one, the round ends there."""
    model = tiny.write_model(tmp_path / "model")
    width = 64
    saved(model, {k: v * (0.3 if "linear" in k else 1) for k, v in tensors(width=width).items()})
    harness = Harness(model, draft_model=model)
    drafter = harness.engine.drafting.drafters["draft"]
    lengths = set()
    for index in range(24):
        prompt = np.random.default_rng(index).integers(60, tiny.VOCAB_SIZE, 6).tolist()

        def guess(name: str, bias: dict[int, float], prompt: list[int] = prompt) -> list[int]:
            sampling = SamplingParams(
                seed=0, temperature=0.0, max_tokens=40, logit_bias=bias, frequency_penalty=0.001
            )
            harness.engine._sampler.add(name, sampling, prompt, ())
            request = Request(name, prompt_ids=prompt, sampling=sampling)
            (found,) = drafter.propose([Ask(request, 9)])
            drafter.ended(request)
            return list(found.token_ids)

        first = guess(f"{index}", {})
        lengths.add(len(first))
        assert 2 <= len(first) <= 9, "nothing is known of the first guess when the second is made"
        if first[-1] in first[:-1]:
            continue
        other = guess(f"{index}, another", {first[-1]: -100.0})
        assert other[:-1] == first[:-1] and other[-1] != first[-1]
    assert len(lengths) > 2, lengths
    harness.close()


# -- the demo's ----------------------------------------------------------------------------------


def test_the_label_is_how_often_both_draw_the_same() -> None:
    """Against draws with the same noise, and between its bounds."""
    from loramux.demo.training.train_acceptance import acceptance

    draw = torch.Generator().manual_seed(2)
    p, q = (torch.rand(7, generator=draw, dtype=torch.float64) for _ in range(2))
    p, q = p / p.sum(), q / q.sum()
    noise = torch.empty(200_000, 7, dtype=torch.float64).exponential_(generator=draw)
    target, draft = (noise / p).argmin(-1), (noise / q).argmin(-1)
    label = acceptance(p.expand(7, 7), q.expand(7, 7), torch.arange(7))
    for token in range(7):
        came = (target[draft == token] == token).double().mean()
        assert float(came) == pytest.approx(float(label[token]), abs=0.015)
    assert bool((label <= torch.minimum(torch.ones(7), p / q) + 1e-12).all())
    never = acceptance(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor(0))
    assert float(never) == pytest.approx(0.0)
    same = acceptance(p, p, torch.tensor(3))
    assert float(same) == pytest.approx(1.0)


def test_the_trained_head_is_what_the_reader_reads(tmp_path: Path) -> None:
    from loramux.demo.training.train_acceptance import Head

    torch.manual_seed(0)
    head = Head(WIDTH)
    head.save(tmp_path / FILE)
    read = read_head(tmp_path, WIDTH, CPU)
    assert read is not None
    x = torch.randn(3, WIDTH)
    with torch.no_grad():
        expected = head(x).softmax(-1)[:, 1].tolist()
    assert read(x) == pytest.approx(expected, abs=2e-3)


def test_the_demo_draft_has_a_small_head() -> None:
    path = DEMO_DIR / "draft" / FILE
    assert path.stat().st_size <= 60_000
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    assert isinstance(read_head(path.parent, 64, CPU), AcceptanceHead)
