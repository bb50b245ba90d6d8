"""What a draft model wears for a request: loaded when it is asked for, missed by nobody."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny
from tests.harness import Harness, install_adapter
from tests.speculation.drafting import DRAFTED, Bench

from loramux.request import DRAFT_MODEL_ID, AdapterRef, Request, SamplingParams
from loramux.wire import Command, Submit


@pytest.fixture(scope="module")
def shouter(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.shouting_adapter(tmp_path_factory.mktemp("s") / "a", models["target"], 17)


def companion(made: Bench, folder: Path) -> dict[int, tuple[AdapterRef, ...]]:
    digest = install_adapter(folder, made.harness.data_dir, made.partner.description)
    return {DRAFT_MODEL_ID: (AdapterRef(digest),)}


def until_here(made: Bench, request: Request) -> None:
    (ref,) = request.companions[DRAFT_MODEL_ID]
    while not made.partner.residency.is_resident(ref.digest):
        made.partner.residency.poll()


def test_a_companion_is_worn_once_it_is_here(bench: Callable[..., Bench], shouter: Path) -> None:
    made = bench("target", "target")
    worn = made.request("worn", range(60, 70), companions=companion(made, shouter))
    bare = made.request("bare", range(60, 70))
    assert [len(guess) for guess in made.propose((worn, 3), (bare, 3))] == [0, 3]
    until_here(made, worn)
    shouted, plain = made.propose((worn, 3), (bare, 3))
    assert shouted == [17] * 3 and plain != shouted
    assert made.partner.residency.num_leased_frames() == 0
    made.partner.residency.check()
    made.goes_on(worn, 17)
    made.partner.residency.evict(worn.companions[DRAFT_MODEL_ID][0].digest)
    assert made.propose((worn, 3)) == [[]]
    until_here(made, worn)
    assert made.propose((worn, 3)) == [[17] * 3]


def test_a_request_says_what_its_guesses_are_made_with(
    models: dict[str, Path], shouter: Path
) -> None:
    """The target shouts and so does its draft model: all that is guessed is right."""
    harness = Harness(models["target"], draft_model=models["target"])
    digest = install_adapter(shouter, harness.data_dir, harness.ready.partners[1])
    harness.outputs["a"], harness.details["a"] = [], []
    harness.engine.submit(
        Submit(
            request_id="a",
            tenant="",
            model_id=0,
            adapters=(AdapterRef(harness.install(shouter)),),
            prompt_ids=[60, 61, 62],
            sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=30),
            speculation=DRAFTED,
            companions={DRAFT_MODEL_ID: (AdapterRef(digest),)},
        )
    )
    harness.run()
    assert harness.outputs["a"] == [17] * 30
    guessed = [o for o in harness.details["a"] if o.drafted]
    assert guessed and all(len(o.token_ids) == o.drafted[1] + 1 for o in guessed if o.drafted)
    # It is listed, its load was told, and it goes when an operator asks, as the target's do.
    assert set(harness.step().stats["resident"]) == {digest, harness.install(shouter)}
    assert digest in {load[0] for step in harness.steps for load in step.stats.get("loads", ())}
    harness.engine.command(Command(command_id=1, kind="evict", digest=digest))
    assert not harness.engine.partners[DRAFT_MODEL_ID].residency.resident()
    harness.close()


def test_without_its_companion_it_guesses_bare(bench: Callable[..., Bench], shouter: Path) -> None:
    """Gone from the disk for one request, damaged for another: guesses, of a model without it."""
    made = bench("target", "target")
    bare = made.request("bare", range(60, 70))
    (plain,) = made.propose((bare, 3))
    lost = made.request("lost", range(60, 70), companions={1: (AdapterRef("0" * 64),)})
    assert made.propose((lost, 3)) == [plain]
    hurt = made.request("hurt", range(60, 70), companions=companion(made, shouter))
    (ref,) = hurt.companions[DRAFT_MODEL_ID]
    (path,) = made.harness.data_dir.glob(f"packed/{ref.digest}*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert made.propose((hurt, 3)) == [[]]
    while made.partner.residency.num_loading:
        made.partner.residency.poll()
    assert made.propose((hurt, 3)) == [plain]
    assert made.propose((hurt, 3)) == [plain], "and is not asked for again"
    assert made.partner.residency.num_loading == 0


def test_what_was_computed_without_a_companion_is_not_used_with_it(
    bench: Callable[..., Bench], shouter: Path
) -> None:
    made = bench("target", "target")
    request = made.request("a", range(60, 70))
    made.propose((request, 3))
    request.companions = companion(made, shouter)
    made.propose((request, 3))
    until_here(made, request)
    made.passes.clear()
    assert made.propose((request, 3)) == [[17] * 3]
    assert made.passes[0] == [("a", 0, 10)]
