"""Tokenizers of every kind the detokenizer knows, trained here, and a model folder with one."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog does not mind at all",
    "stop stopping and stopped: a stop is a stop",
    "straße, naïve café, 日本語の文章, 😀 family 👨‍👩‍👧",
] * 20

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level() -> Tokenizer:
    """As Llama 3, Qwen and GPT-2: a BPE over bytes. 256 bytes, merges, and two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("[not special é]", special=False)])
    return tokenizer


def byte_fallback(strip: bool = True) -> Tokenizer:
    """As Llama 2 and Gemma: words with ▁, characters it never saw as byte tokens."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "é", "▁a", "▁▁", "ab", "▁stop", "stop", "日"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)},
            [],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(stages + [decoders.Strip(" ", 1, 0)] * strip)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace(prepend_scheme: str = "always") -> Tokenizer:
    """As T5: the decoder turns ▁ into spaces, and drops those of the first token."""
    pieces = ["<unk>", "▁", "▁a", "a▁b", "▁▁", "é", "日本", "stop", "▁stop"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], 0))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def words() -> Tokenizer:
    """No decoder at all: tokens are joined with spaces."""
    return Tokenizer(models.WordLevel({"a": 0, "b": 1, "é": 2, "stop": 3, "": 4}, unk_token="a"))


KINDS = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "byte_fallback_unstripped": lambda: byte_fallback(strip=False),
    "metaspace": metaspace,
    "metaspace_never": lambda: metaspace("never"),
    "words": words,
}


def write_model(folder: Path) -> Path:
    """A directory the front can start on (no weights: it never looks)."""
    folder.mkdir(parents=True)
    tokenizer = byte_level()
    tokenizer.enable_truncation(4)  # as some files in the wild: must not be obeyed
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320, "eos_token_id": 1}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT, "eos_token": {"content": "</s>"}, "bos_token": "<s>"})
    )
    return folder
