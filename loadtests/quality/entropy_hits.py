"""What entropy-adaptive decoding leaves of what adapters were trained for.

    python loadtests/quality/entropy_hits.py [--quick] [--prompts 100]

The demo's adapters that have a partner for the small model answer prompts at temperature 1, with
every threshold of ``loramux calibrate-entropy`` and with the coin that spends as much on the large
model. A hit is what ``loramux.demo.training.measure`` calls one: the adapter's manner was kept.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "server"), str(ROOT / "kernels")]
sys.path.append(str(ROOT / "loadtests" / "serving"))

import report  # noqa: E402
from pairs import header  # noqa: E402
from rich.progress import Progress, TaskID  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from loramux.calibration import Frontier, Judge, Point, pair  # noqa: E402
from loramux.config import DEMO_DIR  # noqa: E402
from loramux.demo.training.manners import MANNERS  # noqa: E402
from loramux.demo.training.measure import HITS, MAX_TOKENS, PROMPT_SEED  # noqa: E402

COLUMNS = {
    "adapter": "adapter",
    "tokens": "tokens by the large model, %",
    "cost": "computed, % of the large model alone",
    "hits": "hits, %",
    "coin_hits": "hits by lot, %",
}


def judge_of(adapter: str, prompts: list[str]) -> Judge:
    """Whether an answer is in the manner of ``adapter``."""
    tokenizer = Tokenizer.from_file(str(DEMO_DIR / "base" / "tokenizer.json"))
    return lambda index, ids: HITS[adapter](prompts[index], tokenizer.decode(list(ids)))


def cases(adapter: str, frontier: Frontier) -> list[dict[str, Any]]:
    """A line for each way to choose the model, the small one alone first."""

    def told(point: Point, coin: Point | None) -> dict[str, Any]:
        assert point.hits is not None
        return {
            "adapter": adapter,
            "tokens": 100 * point.tokens,
            "cost": 100 * point.cost,
            "hits": 100 * point.hits,
            "coin_hits": None if coin is None or coin.hits is None else 100 * coin.hits,
        }

    found = [told(frontier.small, None), told(frontier.large, None)]
    found += [told(tried.entropy, tried.coin) for tried in frontier.tried]
    return sorted(found, key=lambda case: case["tokens"])


def plot(found: list[dict[str, Any]], where: Path) -> None:
    """Hits over the large model's share of the tokens."""
    with report.plot(where, "entropy-hits") as (axes,):
        for colour, adapter in zip(
            report.COLOURS, dict.fromkeys(case["adapter"] for case in found), strict=False
        ):
            those = [case for case in found if case["adapter"] == adapter]
            shares = [case["tokens"] for case in those]
            ends = [
                case["hits"] if case["coin_hits"] is None else case["coin_hits"] for case in those
            ]
            axes.plot(shares, [case["hits"] for case in those], "o-", color=colour, label=adapter)
            axes.plot(shares, ends, "s--", color=colour, label=f"{adapter}, by lot")
        axes.set_xlabel("tokens by the large model, %")
        axes.set_ylabel("hits, %")
        axes.legend()


def main() -> None:
    parser = report.arguments(__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    found = header()
    for folder in sorted((DEMO_DIR / "small_adapters").iterdir()):
        adapter, rng = folder.name, Random(PROMPT_SEED)
        number = 4 if args.quick else args.prompts
        prompts = [MANNERS[adapter](rng).opening for _ in range(number)]
        models = pair(
            DEMO_DIR / "base",
            DEMO_DIR / "draft",
            DEMO_DIR / "adapters" / adapter,
            folder,
            prompts,
            MAX_TOKENS,
        )
        with models as engine, Progress() as progress:
            bar = progress.add_task(adapter, total=None)

            def tell(done: int, total: int, bar: TaskID = bar) -> None:
                progress.update(bar, completed=done, total=total)

            frontier = engine.frontier((), tell, judge_of(adapter, prompts))
        found["cases"] += cases(adapter, frontier)
    where = report.folder(args)
    report.save(found, where, "entropy-hits")
    plot(found["cases"], where)
    print(report.markdown(found["cases"], COLUMNS))


if __name__ == "__main__":
    main()
