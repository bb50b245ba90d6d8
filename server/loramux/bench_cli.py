"""``loramux bench``: load a running server, and say what it did."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loramux.adapters_cli import DEFAULT_URL
from loramux.config import client_key
from loramux.errors import ConfigError


def add_bench(commands: Any) -> None:
    """Adds the command to ``loramux``'s own."""
    bench = commands.add_parser(
        "bench",
        help="load a running server and measure what it does",
        description="Send requests to a server with OpenAI's /v1/completions at planned times, "
        "whatever becomes of the others (open loop), and print every figure beside its formula. "
        "Tokens are counted by the server's usage, latencies from the planned time. Exit code 1 "
        "when nothing was measured: no request ended well, or this process was too slow.",
    )
    bench.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    bench.add_argument(
        "--models",
        type=_names,
        metavar="A,B",
        help="what requests name (default: every adapter of the server, or its base)",
    )
    for flag, default, text in (
        ("--rate", 8.0, "requests a second, in the mean"),
        ("--duration", 20.0, "seconds over which they are sent; what runs then may still end"),
        ("--alpha", 1.0, "popularity: 1 is even, and the smaller, the more name the first model"),
        ("--cv", 1.0, "burstiness: coefficient of variation of the gaps (1: Poisson)"),
    ):
        bench.add_argument(
            flag,
            type=_positive,
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g})",
        )
    for what, text in (("prompt", "of a prompt, about"), ("output", "of an answer")):
        bench.add_argument(
            f"--{what}-tokens",
            type=_span,
            default=(8, 64),
            metavar="LO:HI",
            help=f"tokens {text}, evenly between the two (default: 8:64)",
        )
    bench.add_argument("--seed", type=_seed, default=42, help="of the plan (default: 42)")
    bench.add_argument("--key", help="your key, if it needs one (default: $LORAMUX_API_KEY)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    bench.set_defaults(run=_bench)


def _names(text: str) -> list[str]:
    names = text.split(",")
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not names with commas between")
    return names


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and 1 <= int(low) <= int(high)):
        raise argparse.ArgumentTypeError(f"{text!r} is not LO:HI with 1 <= LO <= HI")
    return int(low), int(high)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def _bench(args: dict[str, Any]) -> int:
    import uvloop

    from loramux.bench.server import Bench, Refused
    from loramux.bench.traffic import Traffic
    from loramux.console import bench_figures

    url, out = args["url"], args["json"]
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {out.absolute().parent}", param="json")
    key = args["key"] or client_key() or ""
    models = args["models"] or _served(url, key)
    (prompt_low, prompt_high), (low, high) = args["prompt_tokens"], args["output_tokens"]
    traffic = Traffic(
        adapters=len(models),
        alpha=args["alpha"],
        rate=args["rate"],
        cv=args["cv"],
        duration_s=args["duration"],
        prompt=(prompt_low, prompt_high + 1),
        output=(low, high + 1),
        seed=args["seed"],
    )
    try:
        bench = Bench(url, models, traffic, key)
    except ValueError as error:
        raise ConfigError(f"--url: {error}", param="url") from error
    try:
        found = uvloop.run(bench.run())
    except Refused as error:
        raise ConfigError(
            f"{url} does not answer a request for {models[0]!r}: {error}; --url, --models and --key"
            " say whom to ask, for what, and as whom",
            param="url",
        ) from error
    bench_figures(found)
    if out is not None:
        report = {"url": url, "models": models, "traffic": asdict(traffic), **found}
        try:
            out.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--json: {error}", param="json") from error
    if found["failed"]:
        print(f"loramux: nothing was measured: {found['failed']}", file=sys.stderr)
        return 1
    return 0


def _served(url: str, key: str) -> list[str]:
    """Every adapter of the server, or its base."""
    import httpx

    from loramux.bench.server import listed

    try:
        base, adapters = listed(url, key)
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        hint = "--key says as whom to ask" if status in (401, 403) else "--models says what to ask"
        told = f"{error.request.url} answers {status}; {hint}"
        raise ConfigError(told, param="url") from error
    except httpx.HTTPError as error:
        raise ConfigError(
            f"{url} cannot be asked: {error}; make serve or loramux serve starts a server, and"
            " --url names another",
            param="url",
        ) from error
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url: {error}", param="url") from error
    return adapters or [base]
