"""``loramux adapters`` and ``loramux aliases``: what a running server serves, and as what."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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
    verbs = _add_server(adapters)
    push = verbs.add_parser("push", help="upload a PEFT adapter folder, tar or zip")
    push.add_argument("source", type=Path, help="folder with adapter_config.json and weights")
    push.add_argument("--name", help="name to serve it under (default: the folder's)")
    push.add_argument("--ttl", type=int, metavar="SECONDS", help="delete it after that time")
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
    adapters.set_defaults(run=lambda args: _asking(args, _adapters))


def add_aliases(commands: Any) -> None:
    """Adds the command to ``loramux``'s own."""
    aliases = commands.add_parser(
        "aliases",
        help="name what adapters of a running server stand for, and share requests among them",
        description="Manage the aliases of a running server.",
    )
    verbs = _add_server(aliases)
    point = verbs.add_parser("set", help="point an alias at an adapter, or at several with weights")
    point.add_argument("name")
    point.add_argument(
        "target",
        nargs="+",
        type=_share,
        metavar="TARGET[=WEIGHT]",
        help="NAME@GENERATION stays that generation, NAME follows its newest; weight: 1",
    )
    point.add_argument(
        "--expected-revision", type=int, metavar="N", help="only if this is its revision; 0: none"
    )
    verbs.add_parser("list", help="all aliases")
    verbs.add_parser("remove", help="delete an alias; the adapters stay").add_argument("name")
    aliases.set_defaults(run=lambda args: _asking(args, _aliases))


def _add_server(command: argparse.ArgumentParser) -> Any:
    command.add_argument("--url", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    command.add_argument("--api-key", help="your key, if it needs one (default: $LORAMUX_API_KEY)")
    return command.add_subparsers(dest="verb", required=True, metavar="VERB")


def _share(text: str) -> tuple[str, int]:
    model, equals, weight = text.partition("=")
    if not model or (equals and not weight.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not TARGET or TARGET=WEIGHT")
    return model, int(weight) if equals else 1


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


def _asking(args: dict[str, Any], verb: Callable[[Any, dict[str, Any]], None]) -> int:
    """Carry out a verb with a client of the server; the exit code."""
    try:
        from loramux_client import Client, LoramuxClientError
    except ImportError as error:
        raise ConfigError("this command needs the client: pip install loramux-client") from error
    try:
        with Client(args["url"], api_key=args["api_key"] or client_key()) as client:
            verb(client, args)
    except LoramuxClientError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return 1
    return 0


def _adapters(client: Any, args: dict[str, Any]) -> None:
    from loramux.console import adapter_table, upload_progress

    verb, name = args["verb"], args.get("name")
    if verb == "list":
        adapter_table(client.adapters.list())
    elif verb == "versions":
        adapter_table(client.adapters.versions(name))
    elif verb == "push":
        with upload_progress() as progress:
            view = client.adapters.push(
                args["source"], name=name, ttl_s=args["ttl"], progress=progress
            )
        adapter_table([view])
    elif verb == "blend":
        fields = {key: args[key] for key in _BLEND_FIELDS if key in args}
        adapter_table([client.adapters.blend(name, sources=args["sources"], **fields)], full=True)
    elif verb == "remove":
        client.adapters.delete(name)
        print(f"removed {name}")
    else:
        adapter_table([getattr(client.adapters, verb)(name)], full=verb == "show")


def _aliases(client: Any, args: dict[str, Any]) -> None:
    from loramux.console import alias_table

    if args["verb"] == "list":
        alias_table(client.aliases.list())
    elif args["verb"] == "remove":
        client.aliases.delete(args["name"])
        print(f"removed {args['name']}")
    else:
        shares = dict(args["target"])
        if len(shares) < len(args["target"]):
            raise ConfigError("a target was given twice")
        expected = args["expected_revision"]
        alias_table([client.aliases.set(args["name"], shares, expected_revision=expected)])
