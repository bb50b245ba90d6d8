"""``loramux``: serve a model with adapters, and manage the adapters of a running server."""

from __future__ import annotations

import argparse
import sys
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from loramux import __version__
from loramux.config import ServerConfig, client_key
from loramux.errors import ConfigError
from loramux.keys_cli import add_keys

DEFAULT_URL = "http://127.0.0.1:8000"


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code. 2 means it was asked for something impossible."""
    parser = argparse.ArgumentParser(prog="loramux", description=__doc__)
    parser.add_argument("--version", action="version", version=f"loramux {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_adapters(commands)
    add_keys(commands)
    args = vars(parser.parse_args(argv))
    run = args.pop("run")
    del args["command"]
    try:
        return int(run(args))
    except ConfigError as error:
        print(f"loramux: {error.message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="start the server",
        description="Serve one base model with many LoRA adapters over an OpenAI-compatible API. "
        "Without --model it serves the small demo model that comes along. Every flag can also be "
        "set as an environment variable: --max-num-seqs is LORAMUX_MAX_NUM_SEQS.",
    )
    for name, field in ServerConfig.model_fields.items():
        flag = "--" + name.replace("_", "-")
        text = field.description or ""
        if field.annotation is bool:
            serve.add_argument(
                flag, action=argparse.BooleanOptionalAction, help=text, default=argparse.SUPPRESS
            )
            continue
        many = typing.get_origin(field.annotation) is tuple
        serve.add_argument(
            flag,
            action="append" if many else "store",
            help=text + _default(field),
            metavar=_metavar(field),
            default=argparse.SUPPRESS,
        )
    serve.set_defaults(run=_serve)


def _metavar(field: FieldInfo) -> str:
    if typing.get_origin(field.annotation) is typing.Literal:
        return "{" + ",".join(map(str, typing.get_args(field.annotation))) + "}"
    kinds = {int: "N", float: "SECONDS", Path: "PATH"}
    for kind, metavar in kinds.items():
        if field.annotation is kind or kind in typing.get_args(field.annotation):
            return metavar
    return "VALUE"


def _default(field: FieldInfo) -> str:
    if field.default in (None, ()):
        return ""
    return f" (default: {field.default})".replace("%", "%%")


def _serve(args: dict[str, Any]) -> int:
    try:
        config = ServerConfig(**args)
    except ValidationError as error:
        lines = [
            f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']}" if e["loc"] else e["msg"]
            for e in error.errors(include_url=False)
        ]
        raise ConfigError("cannot start:\n  " + "\n  ".join(lines)) from error
    from loramux.http.serve import serve

    return serve(config)


def _add_adapters(commands: Any) -> None:
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
                        args["source"], name=args["name"], progress=progress
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


if __name__ == "__main__":
    sys.exit(main())
