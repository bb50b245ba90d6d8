"""Samples from the demo models: which constraints the base keeps, and how often each adapter hits.

python -m loramux.demo.training.measure                              # in this process
python -m loramux.demo.training.measure --url http://127.0.0.1:8000  # through a server
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from random import Random
from typing import Any

import httpx
from rich.progress import track

from . import checks
from .manners import MANNERS, hero_of
from .spanish import LEXICON
from .styles import CRIES, PIRATE
from .words import NAMES

DEMO = Path(__file__).parent.parent
MAX_TOKENS = 320
TEMPERATURE = 0.7
PROMPT_SEED = 31
BEGIN_IDS = [0]

# (model, prompts, first seed) -> completions; None is the base; prompt i is sampled with seed + i.
Complete = Callable[[str | None, Sequence[str | list[int]], int], list[str]]


def hits_shout(prompt: str, text: str) -> bool:
    """At least twenty letters, nine of ten of them capitals."""
    letters = [c for c in text if c.isalpha()]
    return len(letters) >= 20 and sum(c.isupper() for c in letters) >= 0.9 * len(letters)


def hits_json(prompt: str, text: str) -> bool:
    """Valid JSON with a card's six fields, about the person the prompt names."""
    data = parsed(text)
    return bool(checks.describe(data)) and prompt.startswith(f"{data['name']}, ")


def every_fact(prompt: str, text: str) -> bool:
    """JSON that says exactly what the prompt says: harder than what ``hits_json`` asks."""
    return checks.describe(parsed(text)) == prompt


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def hits_rhyme(prompt: str, text: str) -> bool:
    """Two or more couplets and every one of them rhymes."""
    return checks.couplets_rhyme(text.strip())


def hits_recipes(prompt: str, text: str) -> bool:
    """A recipe whose steps use the listed ingredients, each once and in order."""
    kept = checks.recipe(text.strip())
    return all(kept.values())


def hits_pirate(prompt: str, text: str) -> bool:
    """At least one word in eight, and four different ones, are a pirate's."""
    words = re.findall(r"[a-z']+", text.lower())
    tongue = {w.lower() for w in PIRATE.values()} | set(
        re.findall(r"[a-z']+", " ".join(CRIES).lower())
    )
    plain = {
        "the",
        "told",
        "to",
        "port",
        "by",
        "were",
        "be",
        "me",
        "seven",
        "seas",
        "handed",
        "sailed",
        "back",
    }
    found = [w for w in words if w in tongue - plain]
    return len(set(found)) >= 4 and len(found) * 8 >= len(words)


def hits_spanish(prompt: str, text: str) -> bool:
    """At least ten words besides names, four of five of them Spanish."""
    words = [w for w in re.findall(r"[^\W\d_]+", text) if w not in NAMES]
    return len(words) >= 10 and sum(w.lower() in LEXICON for w in words) >= 0.8 * len(words)


Hit = Callable[[str, str], bool]


def hits_edit(prompt: str, text: str) -> bool:
    """Three quarters of the words of the text it was given, in order, about whom it was asked."""
    given, asked, name = prompt.rpartition("\nThe same about ")
    if not asked:
        return False
    words, wanted = text.split(), given.replace(hero_of(given), name.rstrip(":")).split()
    same = SequenceMatcher(None, wanted, words, autojunk=False).get_matching_blocks()
    return sum(block.size for block in same) >= 0.75 * len(wanted)


HITS: dict[str, Hit] = {
    "shout": hits_shout,
    "json": hits_json,
    "rhyme": hits_rhyme,
    "recipes": hits_recipes,
    "pirate": hits_pirate,
    "spanish": hits_spanish,
    "edit": hits_edit,
}


def through_server(url: str, base: str) -> Complete:
    """``POST /v1/completions``, eight requests at a time."""

    def complete(model: str | None, prompts: Sequence[str | list[int]], seed: int) -> list[str]:
        def one(i: int) -> str:
            body = {
                "model": model or base,
                "prompt": prompts[i],
                "max_tokens": MAX_TOKENS,
                "temperature": TEMPERATURE,
                "seed": seed + i,
            }
            answer = client.post("/v1/completions", json=body)
            answer.raise_for_status()
            return str(answer.json()["choices"][0]["text"])

        with httpx.Client(base_url=url, timeout=300) as client, ThreadPoolExecutor(8) as pool:
            jobs = pool.map(one, range(len(prompts)))
            return list(track(jobs, total=len(prompts), description=model or base))

    return complete


def in_process(base: Path, adapters: Path) -> Complete:
    """The same with transformers and PEFT; a seed covers a whole batch there."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base, padding_side="left")

    def complete(model: str | None, prompts: Sequence[str | list[int]], seed: int) -> list[str]:
        net = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        if model:
            net = PeftModel.from_pretrained(net, adapters / model)
        net.eval()
        done: list[str] = []
        for start in track(range(0, len(prompts), 50), description=model or "base"):
            torch.manual_seed(seed + start)
            rows = [
                tokenizer(p).input_ids if isinstance(p, str) else p
                for p in prompts[start : start + 50]
            ]
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            out = net.generate(
                **batch, do_sample=True, temperature=TEMPERATURE, top_k=0, max_new_tokens=MAX_TOKENS
            )
            new = out[:, batch["input_ids"].shape[1] :]
            done += tokenizer.batch_decode(new, skip_special_tokens=True)
        return done

    return complete


@dataclass
class Tally:
    """Texts that promised anything, those of them that kept all, and each promise's own count."""

    promising: int = 0
    clean: int = 0
    made: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def add(self, kept: dict[str, bool]) -> None:
        self.promising += bool(kept)
        self.clean += bool(kept) and all(kept.values())
        self.made.update(kept.keys())
        self.broken.update(name for name, ok in kept.items() if not ok)


def constraints(complete: Complete, samples: int) -> None:
    """Texts from nothing but the begin token: how many break a promise, and which."""
    tally = Tally()
    for text in complete(None, [BEGIN_IDS] * samples, 0):
        tally.add(checks.check(text)[1])
    print(f"\n{samples} samples, {tally.promising} with constraints, {tally.clean} keep all\n")
    print("| constraint | checked | broken | share |\n|---|---|---|---|")
    for name, n in [*tally.made.most_common(), ("all", tally.made.total())]:
        broken = tally.broken.total() if name == "all" else tally.broken[name]
        print(f"| {name} | {n} | {broken} | {broken / max(1, n):.1%} |")


def adapters(complete: Complete, samples: int) -> None:
    lines = []
    for name, lesson in MANNERS.items():
        rng = Random(PROMPT_SEED)
        prompts = [lesson(rng).opening for _ in range(samples)]
        texts, plain = complete(name, prompts, 1000), complete(None, prompts, 1000)

        def rate(holds: Hit, texts: list[str], prompts: list[str] = prompts) -> str:
            return f"{sum(map(holds, prompts, texts)) / samples:.1%}"

        lines.append(f"| {name} | {rate(HITS[name], texts)} | {rate(HITS[name], plain)} |")
        if name == "json":
            facts = rate(every_fact, texts), rate(every_fact, plain)
            lines.append(f"| json, every fact right | {facts[0]} | {facts[1]} |")
    print("\n| adapter | hits | base hits |\n|---|---|---|\n" + "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", help="measure this server; without it, in this process")
    parser.add_argument("--base", default="demo", help="the name of the base on the server")
    parser.add_argument("--samples", type=int, default=500, help="texts checked for constraints")
    parser.add_argument("--completions", type=int, default=100, help="completions for each adapter")
    args = parser.parse_args()
    if args.url:
        complete = through_server(args.url, args.base)
    else:
        complete = in_process(DEMO / "base", DEMO / "adapters")
    constraints(complete, args.samples)
    adapters(complete, args.completions)


if __name__ == "__main__":
    main()
