"""How a load test tells what it found: a markdown table, a JSON file and a plot."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FULL = ROOT / "docs" / "results"
QUICK = ROOT / "build" / "loadtests"
COLOURS = ("#1f5fa8", "#d1681c", "#3d8b4f", "#8a4fa3", "#7a7a7a", "#b3364a")


def arguments(doc: str) -> argparse.ArgumentParser:
    """The flags every load test has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="does it work? the figures say little")
    parser.add_argument("--out", type=Path, help="folder of the JSON file and of plots/")
    return parser


def folder(args: argparse.Namespace) -> Path:
    """Where the results go. A quick run does not overwrite measured ones unless told to."""
    return Path(args.out or (QUICK if args.quick else FULL))


def markdown(cases: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A table with a line for each case; ``columns`` maps a key of the cases to its heading."""
    lines = [list(columns.values())]
    lines += [[text(case.get(key)) for key in columns] for case in cases]
    right = [
        all(isinstance(c.get(key), int | float | tuple | list | None) for c in cases)
        for key in columns
    ]
    lines.insert(1, ["---:" if is_right else "---" for is_right in right])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def text(value: Any) -> str:
    """A value as a cell: three digits that matter, (median, low, high) as an interval."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        middle, low, high = map(text, value)
        return f"{middle} ({low} to {high})"
    if isinstance(value, float):
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
        return f"{value:.{digits}f}"
    return str(value)


def save(report: Mapping[str, Any], where: Path, name: str) -> None:
    """Write ``where/name.json``."""
    where.mkdir(parents=True, exist_ok=True)
    path = where / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")


@contextmanager
def plot(where: Path, name: str, *, panels: int = 1, title: str = "") -> Iterator[list[Any]]:
    """Draw on ``panels`` axes, at most three abreast; they end up in ``where/plots/name.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    abreast = panels if panels <= 3 else 2
    high = -(-panels // abreast)
    size = (5.2 * abreast, 3.9 * high)
    figure, grid = pyplot.subplots(high, abreast, figsize=size, squeeze=False)
    axes = list(grid.flat)
    for axis in axes:
        axis.grid(True, color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_prop_cycle(color=COLOURS)
    yield axes
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    (where / "plots").mkdir(parents=True, exist_ok=True)
    path = where / "plots" / f"{name}.png"
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(f"drawn: {path}")
