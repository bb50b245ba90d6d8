"""The same stories in another manner: all capitals, a pirate's tongue, Spanish."""

from __future__ import annotations

import re
from random import Random

from .document import Document, person
from .spanish import cuento
from .stories import story

PIRATE = {
    "the": "th'",
    "The": "Th'",
    "you": "ye",
    "You": "Ye",
    "your": "yer",
    "Your": "Yer",
    "my": "me",
    "was": "were",
    "is": "be",
    "and": "an'",
    "said": "roared",
    "friend": "matey",
    "asked": "growled",
    "of": "o'",
    "yes": "aye",
    "Yes": "Aye",
    "told": "told",
    "home": "back to port",
    "to": "t'",
    "found": "plundered",
    "gave": "handed",
    "walked": "sailed",
    "ran": "sailed",
    "went": "sailed",
    "looked": "spied",
}
CRIES = (
    "Arr!",
    "Ahoy!",
    "Shiver me timbers!",
    "Yo ho ho!",
    "Blimey!",
    "By th' seven seas!",
    "Heave ho!",
    "Avast, me hearties!",
    "Aye, me hearties!",
)


def pirate(rng: Random, text: str) -> str:
    """Words exchanged one by one, and a cry after every second sentence or so."""
    text = re.sub(r"[A-Za-z']+", lambda m: PIRATE.get(m.group(), m.group()), text)
    out = []
    for i, sentence in enumerate(re.split(r"(?<=[.!?]) (?=[A-Z])", text)):
        out.append(sentence)
        if i % 2 == 0:
            out.append(rng.choice(CRIES))
    return " ".join(out)


def shout_story(rng: Random) -> Document:
    plain = story(rng)
    return Document("shout", plain.opening.upper(), plain.body.upper(), plain.ask + " Shout!")


def pirate_story(rng: Random) -> Document:
    plain = story(rng)
    told = pirate(rng, plain.text)
    cut = len(re.split(r"(?<=[.!?]) ", told)[0])
    return Document("pirate", told[:cut], told[cut:], plain.ask + " Talk like a pirate.")


def spanish_story(rng: Random) -> Document:
    name = person(rng).name
    told = cuento(rng, name)
    cut = told.index(".") + 1
    return Document("spanish", told[:cut], told[cut:], f"Cuenta una historia de {name}.")
