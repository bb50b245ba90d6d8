"""Adapters that bring heads of their own, in one batch with those that do not."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny
from tests.harness import Harness
from tests.heads import saying

from loramux.adapters.blobs import BlobStore
from loramux.request import Speculation
from loramux.wire import Command

HIDDEN = 64
PROMPT = [60, 61, 62]
LENGTH = 17
SHOUTED = range(40, 44)
BASE_SAYS = 43


@pytest.fixture(scope="module")
def shouters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Path]]:
    """A model, and adapters that say one token each."""
    folder = tmp_path_factory.mktemp("shouters")
    model = tiny.write_model(folder / "model", shoutable=True)
    return model, {t: tiny.shouting_adapter(folder / f"a{t}", model, t) for t in SHOUTED}


def store(harness: Harness, token_id: int, **more: Any) -> str:
    """Heads that say a token, as an upload leaves them; their digest."""
    with BlobStore(harness.data_dir).writer(1 << 20) as writer:
        writer.write(saying(token_id, HIDDEN, tiny.VOCAB_SIZE, **more))
        return writer.commit()


def at_hand(harness: Harness, *digests: str) -> None:
    """Wait until the heads have been read."""
    end = time.monotonic() + 30
    while not all([harness.engine.own_heads.get(digest) for digest in digests]):
        assert time.monotonic() < end
        time.sleep(0.001)


def guessing(heads: str = "", *, tree: bool = False) -> Speculation:
    return Speculation(drafters=("medusa",), heads=heads, tree=tree)


def fate(harness: Harness, name: str) -> tuple[int, int]:
    """Guesses of a request, and how many were right."""
    drafted = [output for output in harness.details[name] if output.drafted is not None]
    guessed = sum(output.drafted[1] for output in drafted if output.drafted)
    return guessed, sum(len(output.token_ids) - 1 for output in drafted)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tree", [False, True])
def test_three_with_heads_one_without_and_the_base(
    shouters: tuple[Path, dict[int, Path]], overlap: bool, tree: bool, tmp_path: Path
) -> None:
    """What each says is foreseen by its own heads and by nobody else's."""
    model, adapters = shouters
    model = with_heads(model, tmp_path / "base", BASE_SAYS)
    harness = Harness(model, page_tokens=4, overlap=overlap)
    assert harness.ready.drafters[-1] == "medusa"
    right = {token: store(harness, token) for token in SHOUTED}
    at_hand(harness, *right.values())
    worn = {"forty": 40, "forty-one": 41, "mistaken": 42, "without": 43, "base": None}
    heads = {"forty": right[40], "forty-one": right[41], "mistaken": right[41]}
    plain = Harness(model, page_tokens=4)
    for name, token in worn.items():
        for at, speculation in ((harness, guessing(heads.get(name, ""), tree=tree)), (plain, None)):
            at.submit(
                PROMPT,
                None if token is None else adapters[token],
                name=name,
                max_tokens=LENGTH,
                speculation=speculation,
            )
    assert harness.run() == plain.run()
    for name in ("forty", "forty-one", "without"):
        guessed, accepted = fate(harness, name)
        assert accepted >= LENGTH // 2 and harness.outputs[name] == [worn[name]] * LENGTH
        assert tree or guessed == accepted, "all of it was foreseen"
    guessed, accepted = fate(harness, "mistaken")
    assert guessed > 10 and (tree or accepted == 0)
    assert fate(harness, "base")[0] > 10 and BASE_SAYS not in harness.outputs["base"]
    for at in (harness, plain):
        at.close()


def with_heads(model: Path, folder: Path, token_id: int) -> Path:
    shutil.copytree(model, folder)
    (folder / "medusa_heads.safetensors").write_bytes(saying(token_id, HIDDEN, tiny.VOCAB_SIZE))
    return folder


def test_a_base_without_heads_has_them_for_adapters(
    shouters: tuple[Path, dict[int, Path]],
) -> None:
    """Sampled, across preemptions and with a first question before they are at hand."""
    model, adapters = shouters
    harness = Harness(model, page_tokens=4)
    assert "medusa" not in harness.ready.drafters
    digest = store(harness, 40, heads=4)
    rng = np.random.default_rng(1)
    for number in range(3):
        harness.submit(
            PROMPT,
            adapters[40],
            name=f"own-{number}",
            max_tokens=LENGTH,
            temperature=1.0,
            seed=number,
            speculation=guessing(digest),
        )
        harness.submit(PROMPT, name=f"base-{number}", max_tokens=5, speculation=guessing())
        harness.run_preempting(rng, 0.1)
        at_hand(harness, digest)
    assert all(harness.outputs[f"own-{number}"] == [40] * LENGTH for number in range(3))
    guessed, accepted = fate(harness, "own-2")
    assert guessed == accepted >= LENGTH // 2
    assert [fate(harness, f"base-{number}") for number in range(3)] == [(0, 0)] * 3
    harness.close()


def test_deleting_drops_them_and_damage_costs_guesses_only(
    shouters: tuple[Path, dict[int, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    model, adapters = shouters
    harness = Harness(model, page_tokens=4)
    digest = store(harness, 41)
    at_hand(harness, digest)
    harness.engine.command(Command(command_id=1, kind="evict", digest=digest))
    assert not harness.engine.own_heads._kept
    path = BlobStore(harness.data_dir).path(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    fields: dict[str, Any] = {"max_tokens": LENGTH, "speculation": guessing(digest)}
    harness.submit(PROMPT, adapters[41], name="damaged", **fields)
    harness.run()
    assert harness.outputs["damaged"] == [41] * LENGTH and fate(harness, "damaged") == (0, 0)
    harness.close()
    assert "no longer has its digest" in caplog.text
