"""``loramux adapters``: upload, list, show, remove and pin adapters of a running server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from loramux.config import client_key
from loramux.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:8000"


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
    verbs.add_parser("list", help="all adapters")
    for verb, text in {
        "show": "one adapter in full",
        "remove": "delete an adapter; requests that run on it finish",
        "pin": "keep an adapter in memory",
        "unpin": "let a pinned adapter be evicted again",
    }.items():
        verbs.add_parser(verb, help=text).add_argument("name")
    adapters.set_defaults(run=_adapters)


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
            elif verb == "remove":
                client.adapters.delete(args["name"])
                print(f"removed {args['name']}")
            else:
                adapter_table([getattr(client.adapters, verb)(args["name"])], full=verb == "show")
    except LoramuxClientError as error:
        print(f"loramux: {error}", file=sys.stderr)
        return 1
    return 0
