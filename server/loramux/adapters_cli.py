"""``loramux adapters``: upload, list, show, remove and pin adapters of a running server, and look
into an adapter's folder without one."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loramux.config import client_key
from loramux.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"
_BLEND_FIELDS = (
    "method rank density majority_sign_method seed alpha beta expected_generation".split()
)


def add_adapters(commands: Any) -> None:
    """Adds the command to ``loramux``'s own."""
    adapters = commands.add_parser(
        "adapters",
        help="upload, list, show, remove and pin adapters of a running server; inspect a folder",
        description="Manage the adapters of a running server, or inspect one on this machine.",
    )
    verbs = add_server(adapters)
    push = verbs.add_parser("push", help="upload a PEFT adapter folder, tar or zip")
    push.add_argument(
        "source", help="folder with adapter_config.json and weights, archive, or hf:ORG/REPO"
    )
    push.add_argument("--name", help="name to serve it under (default: the folder's)")
    push.add_argument(
        "--base",
        choices=("target", "draft", "small"),
        default="target",
        help="the model it is for (default: target); a companion of other adapters is for the"
        " server's --draft-model or --small-model",
    )
    push.add_argument("--ttl", type=int, metavar="SECONDS", help="delete it after that time")
    push.add_argument(
        "--compress",
        metavar="density=D[,alpha=A]",
        help="send only the signs of that share of its values (ComPEFT); says what it costs",
    )
    push.add_argument(
        "--no-profile",
        dest="profile",
        action="store_false",
        help="leave out the folder's chat template, generation_config.json and loramux.json",
    )
    push.add_argument(
        "--no-heads",
        dest="heads",
        action="store_false",
        help="leave out the folder's medusa_heads.safetensors",
    )
    _add_blend(verbs)
    verbs.add_parser("list", help="all adapters")
    for verb, text in {
        "show": "one adapter in full",
        "versions": "every generation of an adapter",
        "remove": "delete an adapter, or NAME@GENERATION; requests that run on it finish",
        "pin": "keep an adapter in memory",
        "unpin": "let a pinned adapter be evicted again",
    }.items():
        verbs.add_parser(verb, help=text).add_argument("name")
    _add_inspect(verbs)
    adapters.set_defaults(run=_adapters)


def add_server(command: argparse.ArgumentParser) -> Any:
    """What a command needs that asks a server; its verbs."""
    command.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    command.add_argument("--api-key", help="your key, if it needs one (default: $LORAMUX_API_KEY)")
    return command.add_subparsers(dest="verb", required=True, metavar="VERB")


def _add_inspect(verbs: Any) -> None:
    inspect = verbs.add_parser(
        "inspect",
        help="what a server would say to an adapter's folder; needs none",
        description="Run the importer on an adapter's folder: every tensor, every problem, and what"
        " the adapter would cost. Exit code 1 when it would be refused, or is not as PEFT has it.",
    )
    inspect.add_argument("folder", type=Path, help="folder with adapter_config.json and weights")
    inspect.add_argument("--model", type=Path, help="directory of the base (default: the demo's)")
    inspect.add_argument("--json", action="store_true", help="print it as JSON")
    inspect.add_argument(
        "--verify", action="store_true", help="compare greedy answers with PEFT's (if installed)"
    )


def _add_blend(verbs: Any) -> None:
    blend = verbs.add_parser("blend", help="make an adapter of others")
    blend.add_argument("name", help="name to serve it under")
    blend.add_argument(
        "sources",
        nargs="+",
        type=_weighed,
        metavar="SOURCE[=WEIGHT]",
        help="adapters to make it of",
    )
    blend.add_argument(
        "--method",
        required=True,
        help="soup, ties, dare_ties, dare_linear, scale_layers or compress",
    )
    for flag, kind, text in (
        ("--rank", int, "rank of the result (soup: the ranks add up)"),
        ("--density", float, "share of values that stays (ties, dare)"),
        ("--majority-sign-method", str, "total or frequency (ties, dare_ties)"),
        ("--seed", int, "which values stay (dare)"),
        ("--alpha", float, "scale of the first block (scale_layers)"),
        ("--beta", float, "how much is added up to the last (scale_layers)"),
        ("--expected-generation", int, "the name's present generation, to replace it"),
    ):
        # What is left out is not sent: the server says what a method needs.
        blend.add_argument(flag, type=kind, help=text, default=argparse.SUPPRESS)


def _weighed(text: str) -> str | tuple[str, float]:
    name, given, weight = text.partition("=")
    return (name, float(weight)) if given else name


def _adapters(args: dict[str, Any]) -> int:
    if args["verb"] == "inspect":
        return _inspect(args["folder"], args["model"], as_json=args["json"], check=args["verify"])
    try:
        from loramux_client import Client, LoramuxClientError
    except ImportError as error:
        raise ConfigError("this command needs the client: pip install loramux-client") from error
    from loramux.console import adapter_table

    verb = args["verb"]
    try:
        with Client(args["url"], api_key=args["api_key"] or client_key()) as client:
            if verb == "list":
                adapter_table(client.adapters.list())
            elif verb == "push":
                adapter_table([_push(client, args)])
            elif verb == "versions":
                adapter_table(client.adapters.versions(args["name"]))
            elif verb == "blend":
                fields = {key: args[key] for key in _BLEND_FIELDS if key in args}
                view = client.adapters.blend(args["name"], sources=args["sources"], **fields)
                adapter_table([view], full=True)
            elif verb == "remove":
                client.adapters.delete(args["name"])
                print(f"removed {args['name']}")
            else:
                adapter_table([getattr(client.adapters, verb)(args["name"])], full=verb == "show")
    except LoramuxClientError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return 1
    return 0


def _push(client: Any, args: dict[str, Any]) -> Any:
    from loramux.console import compression_facts, upload_progress
    from loramux_client import compress

    try:
        source: Any = args["source"]
        if args["compress"] is not None:
            source = compress(source, **_compression(args["compress"]))
            compression_facts(source)
        with upload_progress() as progress:
            return client.adapters.push(
                source,
                name=args["name"],
                base=args["base"],
                ttl_s=args["ttl"],
                profile=args["profile"],
                heads=args["heads"],
                progress=progress,
            )
    except ImportError as error:
        raise ConfigError(str(error)) from error


def _compression(text: str) -> dict[str, float]:
    """``density=0.1,alpha=1``."""
    found: dict[str, float] = {}
    try:
        for item in text.split(","):
            key, _, value = item.partition("=")
            if key not in ("density", "alpha") or key in found:
                raise ValueError
            found[key] = float(value)
        if not 0 < found["density"] <= 1 or not 0 < found.get("alpha", 1) < float("inf"):
            raise ValueError
    except (KeyError, ValueError):
        raise ConfigError(
            f"--compress {text!r} is not density=D[,alpha=A] with 0 < D <= 1 and A > 0"
        ) from None
    return found


def _inspect(folder: Path, model: Path | None, *, as_json: bool, check: bool) -> int:
    from loramux.config import ServerConfig
    from loramux.console import inspection, parity_table
    from loramux.inspection import inspect

    given: dict[str, Any] = {} if model is None else {"model": model}
    config = ServerConfig(**given)
    found = inspect(folder, config)
    compared = []
    if check and found["accepted"]:
        from loramux.parity import verify

        compared = verify(folder, config)
    if as_json:
        more = {"parity": [asdict(line) for line in compared]} if check else {}
        print(json.dumps({**found, **more}, indent=1))
    else:
        inspection(found)
        if compared:
            parity_table(compared)
    return 0 if found["accepted"] and all(line.agrees for line in compared) else 1
