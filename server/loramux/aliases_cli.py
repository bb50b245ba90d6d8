"""``loramux aliases``: names of a running server that stand for adapters."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from loramux.adapters_cli import add_server
from loramux.config import client_key
from loramux.errors import ConfigError


def add_aliases(commands: Any) -> None:
    """Adds the command to ``loramux``'s own."""
    aliases = commands.add_parser(
        "aliases",
        help="name what adapters of a running server stand for, and share requests among them",
        description="Manage the aliases of a running server.",
    )
    verbs = add_server(aliases)
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
    aliases.set_defaults(run=_run)


def _share(text: str) -> tuple[str, int]:
    model, equals, weight = text.partition("=")
    if not model or (equals and not weight.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not TARGET or TARGET=WEIGHT")
    return model, int(weight) if equals else 1


def _run(args: dict[str, Any]) -> int:
    try:
        from loramux_client import Client, LoramuxClientError
    except ImportError as error:
        raise ConfigError("this command needs the client: pip install loramux-client") from error
    try:
        with Client(args["url"], api_key=args["api_key"] or client_key()) as client:
            _aliases(client, args)
    except LoramuxClientError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return 1
    return 0


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
