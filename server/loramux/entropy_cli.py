"""``loramux calibrate-entropy``: which threshold for entropy-adaptive decoding, on your prompts."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loramux import __version__
from loramux.errors import ConfigError, LoramuxError

MAX_TOKENS = 128
PUBLISHED = {"tokens": 0.25, "quality_share": 0.929}
"""arXiv 2502.06833: a pair whose large model has 14B parameters, accuracy on MATH against the large
model's. Another measure of quality than ours: it is drawn for orientation."""


def add_entropy(commands: Any) -> None:
    """Adds the command to ``loramux``'s own."""
    command = commands.add_parser(
        "calibrate-entropy",
        help="find the threshold of entropy-adaptive decoding for a pair of models",
        description="Continue prompts with every threshold and score the outcome by the large "
        "model, beside a coin that spends as much on it. Writes entropy.json and entropy.png.",
    )
    command.add_argument("--model", type=Path, required=True, help="directory of the large model")
    command.add_argument(
        "--small-model", type=Path, required=True, help="directory of the small model"
    )
    command.add_argument("--adapter", type=Path, help="PEFT folder the large model wears")
    command.add_argument("--small-adapter", type=Path, help="PEFT folder the small model wears")
    command.add_argument(
        "--prompts", type=Path, required=True, help='one a line, or .jsonl with "prompt" in each'
    )
    command.add_argument("--out", type=Path, required=True, help="directory for the results")
    command.add_argument(
        "--max-tokens", type=int, default=MAX_TOKENS, help=f"an answer (default: {MAX_TOKENS})"
    )
    command.add_argument(
        "--thresholds",
        help="comma-separated, in bits (default: quantiles of the small model's entropies)",
    )
    command.set_defaults(run=_calibrate)


def _calibrate(args: dict[str, Any]) -> int:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("calibrate-entropy needs matplotlib: pip install loramux[bench]")
    if args["max_tokens"] < 1:
        raise ConfigError("--max-tokens must be at least 1", param="max_tokens")
    prompts = read_prompts(args["prompts"])
    thresholds = read_thresholds(args["thresholds"])
    from loramux.calibration import pair

    asked = {
        name: args[name]
        for name in ("model", "small_model", "adapter", "small_adapter", "max_tokens")
    }
    try:
        with pair(prompts=prompts, **asked) as models, Progress() as progress:
            bar = progress.add_task("runs over the prompts", total=None)
            frontier = models.frontier(
                thresholds, lambda done, total: progress.update(bar, completed=done, total=total)
            )
    except LoramuxError as error:
        raise ConfigError(error.message, param=error.param) from error
    report = {
        "commit": _commit(),
        "version": __version__,
        "command": shlex.join(["loramux", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "prompts": len(prompts),
        "max_tokens": args["max_tokens"],
        "published": PUBLISHED,
        **frontier.as_dict(),
    }
    args["out"].mkdir(parents=True, exist_ok=True)
    (args["out"] / "entropy.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args["out"] / "entropy.png")
    _print(report)
    return 0


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file. Raises ConfigError, naming the line that is none."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {error}", param="prompts") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt: Any = line
        if path.suffix == ".jsonl":
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, TypeError, KeyError) as error:
                raise ConfigError(
                    f'--prompts: line {number} of {path} is not {{"prompt": ...}}', param="prompts"
                ) from error
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(f"--prompts: line {number} of {path} has no text", param="prompts")
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"--prompts: {path} holds no prompt", param="prompts")
    return prompts


def read_thresholds(text: str | None) -> list[float]:
    """Those that were named, in order; none: to be found. Raises ConfigError."""
    if text is None:
        return []
    try:
        thresholds = sorted(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"--thresholds {text}: {error}", param="thresholds") from error
    if not all(map(math.isfinite, thresholds)):
        raise ConfigError(f"--thresholds {text}: must be finite", param="thresholds")
    return thresholds


def draw(report: dict[str, Any], path: Path) -> None:
    """Quality against the large model's share of the tokens, and against the cost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10.4, 3.9), sharey=True)
    for axis, by, label in zip(
        axes,
        ("tokens", "cost"),
        ("share of tokens by the large model", "cost against the large model alone"),
        strict=True,
    ):
        for way, name, style in (
            ("entropy", "by entropy", "o-"),
            ("coin", "by lot, the same share of tokens", "s--"),
        ):
            points = [
                report["small"],
                *sorted((t[way] for t in report["tried"]), key=lambda point: point["tokens"]),
                report["large"],
            ]
            axis.plot(
                [p[by] for p in points], [p["quality_share"] for p in points], style, label=name
            )
        axis.set_xlabel(label)
        axis.grid(True, color="#dddddd", linewidth=0.6)
    axes[0].plot(
        PUBLISHED["tokens"],
        PUBLISHED["quality_share"],
        "*",
        color="black",
        markersize=11,
        label="published, accuracy on MATH",
    )
    axes[0].set_ylabel("likelihood of a token, against\nthe large model's own")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _print(report: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("threshold", "tokens", "cost", "quality", "agreement", "a coin's quality"):
        table.add_column(column, justify="right")

    def line(name: str, point: dict[str, float], coin: str) -> None:
        shares = (f"{point[key]:.1%}" for key in ("tokens", "cost", "quality_share", "agreement"))
        table.add_row(name, *shares, coin)

    line("small alone", report["small"], "")
    for tried in report["tried"]:
        coin = f"{tried['coin']['quality_share']:.1%}"
        line(f"{tried['threshold']:.3f}", tried["entropy"], coin)
    line("large alone", report["large"], "")
    Console().print(table)


def _commit() -> str | None:
    """Of the checkout this runs from, if it is one."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
