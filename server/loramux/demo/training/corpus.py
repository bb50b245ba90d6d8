"""The mixture of texts as an endless seeded stream, and its packing into rows of token ids."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import prose
from .dialogues import dialogue
from .document import Document
from .recipes import recipe
from .records import biography, diary, json_card, json_stock, people, stock
from .stories import story
from .styles import pirate_story, shout_story, spanish_story
from .verse import verse

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (BEGIN, END, USER, ASSISTANT)
CHAT_SHARE = 0.35
TRAIN_SEED, HELD_OUT_SEED = 1, 2

# generator, share of the documents in percent
MIXTURE = (
    (story, 41), (dialogue, 10), (recipe, 9), (verse, 7), (biography, 6), (people, 5),
    (stock, 3), (diary, 4), (json_card, 3), (json_stock, 2),
    (shout_story, 2), (pirate_story, 3), (spanish_story, 4),
)  # fmt: skip
PROSE_SHARE = 1


def piece(rng: Random, held_out: bool) -> Document:
    """A piece of prose; its title and first words are the opening."""
    pieces = prose.PIECES[-prose.HELD_OUT :] if held_out else prose.PIECES[: -prose.HELD_OUT]
    text = rng.choice(pieces)
    title, rest = text.split(". ", 1)
    return Document("prose", f"{title}.", f" {rest}", f"Write about this: {title}.")


def documents(seed: int) -> Iterator[Document]:
    """The endless stream of one seed. Only ``HELD_OUT_SEED`` reads the held-out prose."""
    rng = Random(seed)
    makers = [maker for maker, _ in MIXTURE] + [None]
    shares = [share for _, share in MIXTURE] + [PROSE_SHARE]
    while True:
        maker = rng.choices(makers, shares)[0]
        yield maker(rng) if maker else piece(rng, seed == HELD_OUT_SEED)


def plain(document: Document) -> str:
    return f"{BEGIN}{document.text}{END}"


def chat(document: Document) -> str:
    """One turn of a chat, spelled as the chat template spells it."""
    return f"{BEGIN}{USER}{document.ask}{ASSISTANT}{document.text}{END}"


def texts(seed: int) -> Iterator[str]:
    """What the model reads: most documents plain, some as the answer in a chat."""
    rng = Random(seed + 1000)
    for document in documents(seed):
        yield chat(document) if rng.random() < CHAT_SHARE else plain(document)


def rows(seed: int, tokenizer: Tokenizer, width: int) -> Iterator[NDArray[np.int64]]:
    """Rows of ``width`` ids; each begins with a document, the last document in it is cut off."""
    row: list[int] = []
    for text in texts(seed):
        row += tokenizer.encode(text, add_special_tokens=False).ids
        if len(row) >= width:
            yield np.array(row[:width], dtype=np.int64)
            row = []
