"""The measures themselves: hit predicates on examples by hand, the 5-gram against its own sum."""

from __future__ import annotations

from itertools import islice
from random import Random

import numpy as np
import pytest

from loramux.demo.training import corpus
from loramux.demo.training.manners import MANNERS
from loramux.demo.training.measure import HITS, Tally, every_fact
from loramux.demo.training.ngram import KneserNey, pad

CARD = "Ida Marsh, a gardener of 42, lives in Larkfield, likes violet and keeps three goats."
DATA = (
    '\n{"name": "Ida Marsh", "age": 42, "job": "gardener", "town": "Larkfield", '
    '"likes": "violet", "keeps": {"goats": 3}}'
)
RECIPE = (
    "\nKurt's leek soup for two people.\nIngredients:\n- two leeks\n- a pinch of salt\nSteps:\n"
    "1. Chop the two leeks.\n2. Season with a pinch of salt.\n"
    "3. Cook the leek soup for 15 minutes and serve it to two people."
)
VERSE = "\nThe sun was singing to the sea,\nAnd left a ribbon on the bee.\n"
VERSE += "A gray bird flew over the moon,\nAs proud as the wet old spoon."


@pytest.mark.parametrize(
    ("name", "text", "hit"),
    [
        ("shout", " MIRA GAVE TOM TWO APPLES AND WENT HOME.", True),
        ("shout", " Mira gave Tom two apples and went home.", False),
        ("shout", " MIRA GAVE.", False),
        ("shout", "", False),
        ("json", DATA, True),
        ("json", DATA.replace("42", "43"), True),
        ("json", DATA.replace("Ida Marsh", "Ida Hale"), False),
        ("json", DATA.replace("town", "place"), False),
        ("json", DATA[:-1], False),
        ("json", "\n[]", False),
        ("json", "", False),
        ("rhyme", VERSE, True),
        ("rhyme", VERSE.replace("spoon", "dog"), False),
        ("rhyme", VERSE.replace("bee", "sea"), False),
        ("rhyme", VERSE.rsplit("\n", 1)[0], False),
        ("rhyme", "", False),
        ("recipes", RECIPE, True),
        ("recipes", RECIPE.replace("Chop the two leeks", "Chop the two plums"), False),
        ("recipes", RECIPE.replace("serve it to two", "serve it to six"), False),
        ("recipes", " Mira went home.", False),
        ("pirate", " Arr! Mira roared t' Tom, an' th' lad be glad. Ahoy!", True),
        ("pirate", " Mira told Tom the tale, and the lad was glad. Arr!", False),
        ("pirate", "", False),
        ("spanish", " Allí vio una abeja grande con un tambor. «Hola», dijo la abeja.", True),
        ("spanish", " There Mira saw a big bee with a drum. «Hola», dijo la abeja.", False),
        ("spanish", " Hola.", False),
        ("edit", " Hola.", False),
    ],
)
def test_hits_by_hand(name: str, text: str, hit: bool) -> None:
    assert HITS[name](CARD, text) is hit


def test_an_edit_is_about_the_other_one_and_little_is_lost() -> None:
    lesson = MANNERS["edit"](Random(5))
    given = lesson.opening.rpartition("\n")[0]
    assert HITS["edit"](lesson.opening, lesson.rest)
    words = lesson.rest.split()
    assert HITS["edit"](lesson.opening, " ".join(words[len(words) // 5 :]))
    assert not HITS["edit"](lesson.opening, " ".join(words[len(words) // 3 :]))
    assert not HITS["edit"](lesson.opening, " ".join(reversed(words)))
    assert not HITS["edit"](given, lesson.rest)


@pytest.mark.parametrize("name", MANNERS)
def test_what_an_adapter_is_taught_is_a_hit_and_ordinary_text_is_not(name: str) -> None:
    rng = Random(3)
    lessons = [MANNERS[name](rng) for _ in range(60)]
    assert all(HITS[name](lesson.opening, lesson.rest) for lesson in lessons)
    stories = [d for d in islice(corpus.documents(4), 400) if d.kind in ("story", "biography")]
    assert not any(HITS[name](d.opening, d.body) for d in stories)


def test_every_fact_of_a_card() -> None:
    assert every_fact(CARD, DATA)
    for old, new in (("42", "43"), ("3}", "4}"), ("violet", "red"), ("}}", "}")):
        assert not every_fact(CARD, DATA.replace(old, new))


def test_a_tally_counts_kept_and_broken_promises() -> None:
    tally = Tally()
    for kept in ({"name": True, "order": False}, {"name": True}, {}, {"name": False}):
        tally.add(kept)
    assert (tally.promising, tally.clean) == (3, 1)
    assert tally.made == {"name": 3, "order": 1} and tally.broken == {"name": 1, "order": 1}


def test_the_5_gram_is_a_distribution_after_any_context() -> None:
    rng = np.random.default_rng(0)
    documents = [list(rng.integers(1, 7, rng.integers(1, 9))) for _ in range(60)]
    model = KneserNey(pad(documents, 5, 0), 7, 0)
    for context in ([], [1], [1, 2], [3, 4, 5, 6], [6, 6, 6, 6, 6, 6]):
        p = [model.probabilities(pad([[*context, word]], 5, 0))[-1] for word in range(1, 7)]
        assert sum(p) == pytest.approx(1.0, abs=1e-12) and min(p) > 0


def test_the_5_gram_learns_what_five_tokens_tell() -> None:
    cycle = [[1, 2, 3, 4, 5, 6] * 3 for _ in range(50)]
    model = KneserNey(pad(cycle, 5, 0), 8, 0)
    assert model.perplexity(pad(cycle, 5, 0)) < 1.1
    assert model.perplexity(pad([[6, 5, 4, 3, 2, 1]], 5, 0)) > 4
