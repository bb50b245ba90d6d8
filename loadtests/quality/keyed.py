"""The price of keyed acceptance: how often draft and target draw the same token.

    python loadtests/quality/keyed.py

The draft proposes what its own distribution q draws with the noise that the target's p will draw
with; the guess is right when both draw the same token. No rule accepts more of a draft's tokens
than 1 - TV(p, q), which is what the residual rule of speculative sampling accepts. With keyed noise
it is never less than (1 - TV) / (1 + TV) ("floor"); what exactly, `loramux.sampling.agreement`
says ("exact"), and "measured" counts it, with the sampling kernel, two standard deviations beside
it. "Price" is the share of right guesses that keyed noise gives up. Beside them stand drafters that
do not know the noise, under the same verifier: one that draws from q by noise of its own ("blind"),
and one that guesses q's most likely token ("likeliest").

Made-up pairs: p from a Dirichlet distribution (0.1 for each id, 1 for the 8 ids), q from one around
p, the closer the greater its weight. The demo's: base and draft on held-out documents, at every
position, both under the same temperature and top-p. Each row is a mean over pairs or positions,
in percent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]
sys.path.append(str(ROOT / "loadtests" / "serving"))

import numpy as np  # noqa: E402
import pairs  # noqa: E402
import report  # noqa: E402
import torch  # noqa: E402
from rich.progress import track  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from loramux.config import DEMO_DIR  # noqa: E402
from loramux.demo.training.corpus import HELD_OUT_SEED, MIXTURE  # noqa: E402
from loramux.demo.training.perplexity import documents  # noqa: E402
from loramux.sampling.agreement import agreement  # noqa: E402
from loramux_kernels.sampling import DrawParams, draw, reference, stream_key  # noqa: E402

COLUMNS = {
    "pair": "p and q",
    "positions": "positions",
    "overlap": "1 - TV",
    "floor": "floor",
    "exact": "exact",
    "measured": "measured",
    "two_sd": "±",
    "price": "price",
    "blind": "blind",
    "likeliest": "likeliest",
}
SETTINGS = ((1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9))
AGAIN = 8
"""Draws at a position of a document."""
WEIGHTS = (1, 3, 10, 30, 100, 1000)


@dataclass
class Tally:
    """What rows of pairs showed, each a list of arrays [R]."""

    seen: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, p: Tensor, q: Tensor, measured: Tensor) -> None:
        """p and q float64 [R, V]; ``measured`` [R], shares of draws."""
        overlap = torch.minimum(p, q).sum(-1)
        for name, values in {
            "overlap": overlap,
            "floor": overlap / (2 - overlap),
            "exact": agreement(p, q),
            "measured": measured,
            "blind": (p * q).sum(-1),
            "likeliest": p.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1),
        }.items():
            self.seen.setdefault(name, []).append(values)

    def rows(self, name: str) -> Tensor:
        return torch.cat(self.seen[name])

    def case(self, pair: str, draws: int) -> dict[str, Any]:
        means = {name: self.rows(name).mean().item() for name in self.seen}
        chance = self.rows("exact")
        spread = (chance * (1 - chance) / draws).sum().sqrt().item() / len(chance)
        return {
            "pair": pair,
            "positions": len(chance),
            "draws": draws,
            **{name: round(value, 4) for name, value in means.items()},
            "two_sd": round(2 * spread, 4),
            "price": round(1 - means["exact"] / means["overlap"], 4),
        }


def how(rows: int, temperature: float, top_p: float, seed: int) -> DrawParams:
    return DrawParams(
        temperature=np.full(rows, temperature),
        log_min_p=np.full(rows, -math.inf),
        top_k=np.zeros(rows, np.int64),
        top_p=np.full(rows, top_p),
        key=np.full(rows, stream_key(seed, 0), np.uint64),
    )


def law(logits: Tensor, params: DrawParams) -> Tensor:
    """The probabilities float64 [R, V] that the kernel draws by."""
    cut_logit, cut_id = reference.cut(logits, params)
    before = torch.arange(logits.shape[1]) <= cut_id[:, None]
    keep = (logits > cut_logit[:, None]) | ((logits == cut_logit[:, None]) & before)
    x = reference.exponents(logits, torch.from_numpy(params.temperature))
    weight = torch.where(keep, x.exp(), 0.0)
    return weight / weight.sum(-1, keepdim=True)


def compare(
    tally: Tally, of_p: Tensor, of_q: Tensor, setting: tuple[float, float], seed: int, draws: int
) -> None:
    """Rows of logits, each at an output position of its own."""
    rows = len(of_p)
    at = np.arange(rows, dtype=np.int64)
    same = np.zeros(rows)
    for each in range(draws):
        params = how(rows, *setting, seed + each)
        same += draw(of_p, params, at)[0] == draw(of_q, params, at)[0]
    params = how(rows, *setting, seed)
    tally.add(law(of_p, params), law(of_q, params), torch.from_numpy(same / draws))


def made_up(rng: np.random.Generator, size: int, weight: float, rows: int) -> tuple[Tensor, Tensor]:
    """Logits of p and q."""
    p = rng.dirichlet(np.full(size, 1.0 if size == 8 else 0.1), rows) + 1e-12
    # A Dirichlet's parts are gammas; the tiny ones all round to 0, which no row may do.
    q = rng.standard_gamma(weight * p) + 1e-12
    return torch.from_numpy(np.log(p)).float(), torch.from_numpy(np.log(q)).float()


@torch.inference_mode()
def read(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of base and draft at every position of so many held-out documents."""
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "base/tokenizer.json"))
    base, draft = (
        LlamaForCausalLM.from_pretrained(DEMO_DIR / name, dtype=torch.float32)
        for name in ("base", "draft")
    )
    texts = documents(tokenizer, HELD_OUT_SEED, MIXTURE, limit=count)
    for ids in track(texts, description="documents"):
        given = torch.tensor([ids])
        yield base(given).logits[0, :-1].contiguous(), draft(given).logits[0, :-1].contiguous()


def in_percent(case: dict[str, Any]) -> dict[str, Any]:
    return {key: 100 * value if isinstance(value, float) else value for key, value in case.items()}


def picture(where: Path, tallies: dict[str, Tally]) -> None:
    """Agreement against 1 - TV: positions in bins, between the floor and the most there can be."""
    x = np.linspace(0, 1, 101)
    with report.plot(where, "keyed", panels=2, title="draft tokens that are right") as axes:
        for axis, kind in zip(axes, ("made up", "demo"), strict=True):
            axis.plot(x, x, color="#222222", linewidth=1, label="residual rule: 1 - TV")
            axis.plot(x, x / (2 - x), color="#222222", linewidth=1, linestyle=":", label="floor")
            for name, tally in tallies.items():
                if name.startswith("demo") == (kind == "demo"):
                    overlap, same = tally.rows("overlap"), tally.rows("measured")
                    place = (overlap * 20).long().clamp(max=19)
                    many = [b for b in range(20) if (place == b).sum() >= 20]
                    axis.plot(
                        [overlap[place == b].mean() for b in many],
                        [same[place == b].mean() for b in many],
                        marker="o",
                        markersize=3,
                        linewidth=0.8,
                        label=name.removeprefix("demo, "),
                    )
            axis.set(xlabel="1 - TV(p, q)", ylabel="share", title=kind, xlim=(0, 1), ylim=(0, 1))
            axis.legend(frameon=False, fontsize=8)


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    rows, draws, count = (20, 5, 2) if args.quick else (300, 40, 40)
    found = pairs.header()
    rng = np.random.default_rng(0)
    tallies: dict[str, Tally] = {}
    for size in (8, 64, 2048):
        whole = tallies.setdefault(f"{size} ids", Tally())
        for weight in track(WEIGHTS, description=f"{size} ids"):
            tally = Tally()
            seed = 1000 * len(found["cases"])
            compare(tally, *made_up(rng, size, weight, rows), (1.0, 1.0), seed, draws)
            found["cases"].append(tally.case(f"{size} ids, weight {weight}", draws))
            for name, values in tally.seen.items():
                whole.seen.setdefault(name, []).extend(values)
    named = {
        f"demo, temperature {t:g}" + (f", top-p {p:g}" if p < 1 else ""): (t, p)
        for t, p in SETTINGS
    }
    for number, (of_p, of_q) in enumerate(read(count)):
        for name, setting in named.items():
            tally = tallies.setdefault(name, Tally())
            compare(tally, of_p, of_q, setting, 100_000 + 1000 * number, AGAIN)
    found["cases"] += [tallies[name].case(name, AGAIN) for name in named]
    where = report.folder(args)
    report.save(found, where, "keyed")
    table = report.markdown([in_percent(case) for case in found["cases"]], COLUMNS)
    print(table)
    title, _, rest = __doc__.partition("\n")
    made = f"Commit {found['commit']}, {found['machine']['cpu']}; figures in `keyed.json`."
    (where / "keyed.md").write_text(
        f"# {title.rstrip('.')}\n{rest}\n{made}\n\n{table}\n\n![agreement](plots/keyed.png)\n"
    )
    picture(where, tallies)


if __name__ == "__main__":
    main()
