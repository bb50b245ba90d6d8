"""``loramux adapters``: upload, list, show, remove and pin adapters of a running server."""

from __future__ import annotations

import argparse
import sys
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
        help="upload, list, show, remove and pin adapters of a running server",
        description="Manage the adapters of a running server.",
    )
    adapters.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    adapters.add_argument("--api-key", help="your key, if it needs one (default: $LORAMUX_API_KEY)")
    verbs = adapters.add_subparsers(dest="verb", required=True, metavar="VERB")
    push = verbs.add_parser("push", help="upload a PEFT adapter folder, tar or zip")
    push.add_argument("source", type=Path, help="folder with adapter_config.json and weights")
    push.add_argument("--name", help="name to serve it under (default: the folder's)")
    push.add_argument(
        "--no-profile",
        dest="profile",
        action="store_false",
        help="leave out the folder's chat template, generation_config.json and loramux.json",
    )
    _add_blend(verbs)
    verbs.add_parser("list", help="all adapters")
    for verb, text in {
        "show": "one adapter in full",
        "remove": "delete an adapter; requests that run on it finish",
        "pin": "keep an adapter in memory",
        "unpin": "let a pinned adapter be evicted again",
    }.items():
        verbs.add_parser(verb, help=text).add_argument("name")
    adapters.set_defaults(run=_adapters)


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
    try:
        from loramux_client import Client, LoramuxClientError
    except ImportError as error:
        raise ConfigError("this command needs the client: pip install loramux-client") from error
    from loramux.console import adapter_table, upload_progress

    verb = args["verb"]
    try:
        with Client(args["url"], api_key=args["api_key"] or client_key()) as client:
            if verb == "list":
                adapter_table(client.adapters.list())
            elif verb == "push":
                with upload_progress() as progress:
                    view = client.adapters.push(
                        args["source"],
                        name=args["name"],
                        profile=args["profile"],
                        progress=progress,
                    )
                adapter_table([view])
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
