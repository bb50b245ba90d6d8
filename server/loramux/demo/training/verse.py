"""Verse: couplets whose last words rhyme and differ, about the people named in the title."""

from __future__ import annotations

from random import Random

from .document import Document, cap, others, person
from .words import ADJ, ADVERBS, COLORS, DID, MOODS, RHYMES, SCENERY, a

FIRST = (
    "{name} once saw {a_adj} {w}",
    "the {scene} {did} above the {w}",
    "there never was so {adj} {a_w}",
    "{name} went {adverb} to find the {w}",
    "{a_color} bird flew over the {w}",
    "who painted {color} stripes upon the {w}",
    "the {scene} was singing to the {w}",
)
SECOND = (
    "and {name} was dancing with the {w}",
    "and left {a_color} ribbon on the {w}",
    "as {mood} as the {adj} old {w}",
    "and {adverb} it {did} beside the {w}",
    "and {friend} told a story of the {w}",
    "while {friend} waited {adverb} for the {w}",
    "but {name} only laughed and kept the {w}",
)


def couplets(rng: Random, name: str, friend: str, n: int) -> list[str]:
    """``2 n`` lines; lines 2i and 2i+1 rhyme, no rhyme comes twice."""
    lines = []
    for sound in rng.sample(list(RHYMES), n):
        words = rng.sample(RHYMES[sound], 2)
        for forms, word, mark in zip((FIRST, SECOND), words, ",.", strict=True):
            adj, color = rng.choice(ADJ), rng.choice(COLORS)
            line = rng.choice(forms).format(
                name=name,
                friend=friend,
                w=word,
                a_w=a(word),
                adj=adj,
                a_adj=a(adj),
                color=color,
                a_color=a(color),
                mood=rng.choice(MOODS),
                adverb=rng.choice(ADVERBS),
                scene=rng.choice(SCENERY),
                did=rng.choice(DID),
            )
            lines.append(cap(line) + mark)
    return lines


def verse(rng: Random) -> Document:
    hero = person(rng)
    friend = others(rng, 1, hero.name)[0]
    lines = couplets(rng, hero.name, friend, rng.randint(2, 4))
    return Document(
        "verse",
        f"A verse for {hero.name} and {friend}:",
        "\n" + "\n".join(lines),
        f"Write a verse for {hero.name} and {friend}.",
    )
