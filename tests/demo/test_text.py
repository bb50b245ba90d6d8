"""The generator keeps its promises, and the checks notice when a text does not."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from random import Random

import pytest

from loramux.demo.training import checks, corpus, prose, words
from loramux.demo.training.manners import MANNERS, hero_of

DOCUMENTS = list(islice(corpus.documents(5), 3000))


def test_the_stream_is_a_function_of_its_seed() -> None:
    assert list(islice(corpus.texts(5), 40)) == list(islice(corpus.texts(5), 40))
    assert list(islice(corpus.texts(5), 40)) != list(islice(corpus.texts(6), 40))
    assert [d.text for d in islice(corpus.documents(5), 9)] == [d.text for d in DOCUMENTS[:9]]


def test_two_thousand_word_types() -> None:
    text = " ".join(document.text for document in islice(corpus.documents(5), 8000))
    assert len(set(re.findall(r"[^\W\d_]+", text.lower()))) >= 2000


def test_every_kind_is_made_and_recognised() -> None:
    made = Counter(document.kind for document in DOCUMENTS)
    assert set(made) == {
        *("story", "dialogue", "recipe", "verse", "biography", "record", "stock", "diary", "json"),
        *("shout", "pirate", "spanish", "prose"),
    }
    kinds = {checks.check(document.text)[0] for document in DOCUMENTS}
    assert kinds == {checker.__name__ for _, checker in checks.KINDS} | {"other"}


def test_the_generator_keeps_every_constraint() -> None:
    for document in DOCUMENTS:
        _, kept = checks.check(document.text)
        assert all(kept.values()), (kept, document.text)


# Words of one list, swapped where the text repeats them, mostly break a promise.
@pytest.mark.parametrize("group", [words.NAMES, words.THINGS, words.PLACES, words.NUMBERS[1:13]])
def test_a_changed_word_is_noticed(group: list[str]) -> None:
    rng, noticed, changed = Random(1), 0, 0
    for document in DOCUMENTS:
        kind, _ = checks.check(document.text)
        found = [m for m in re.finditer(r"[\w-]+", document.text) if m.group() in group]
        repeated = Counter(m.group() for m in found)
        bound = [m for m in found if repeated[m.group()] > 1]
        if kind == "other" or not bound:
            continue
        at = rng.choice(bound)
        other = rng.choice([word for word in group if word != at.group()])
        text = document.text[: at.start()] + other + document.text[at.end() :]
        now, kept = checks.check(text)
        changed += 1
        noticed += now != kind or not all(kept.values())
    assert changed > 300 and noticed > 0.75 * changed


def test_held_out_prose_is_never_trained_on() -> None:
    held_out = prose.PIECES[-prose.HELD_OUT :]
    trained = {d.text for d in islice(corpus.documents(corpus.TRAIN_SEED), 3000)}
    assert not trained & set(held_out)
    assert trained & set(prose.PIECES)


def test_a_word_has_one_rhyme() -> None:
    everything = [word for group in words.RHYMES.values() for word in group]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("apple", "apples"),
        ("cherry", "cherries"),
        ("box", "boxes"),
        ("monkey", "monkeys"),
        ("potato", "potatoes"),
        ("goose", "geese"),
        ("peach", "peaches"),
    ],
)
def test_plurals(noun: str, many: str) -> None:
    assert words.plural(noun) == many
    assert words.count(1, noun) == f"one {noun}" and words.count(2, noun) == f"two {many}"
    assert words.count(0, noun) == f"no {many}"


@pytest.mark.parametrize("name", MANNERS)
def test_lessons_begin_with_an_ordinary_opening(name: str) -> None:
    rng = Random(2)
    for _ in range(50):
        lesson = MANNERS[name](rng)
        assert hero_of(lesson.opening)
        assert not lesson.opening.isupper() and lesson.rest[0] in " \n"
