"""``loramux``: serve a model with adapters; manage and measure a running server."""

from __future__ import annotations

import argparse
import sys
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from loramux import __version__
from loramux.adapters_cli import add_adapters
from loramux.aliases_cli import add_aliases
from loramux.bench_cli import add_bench
from loramux.config import ServerConfig
from loramux.entropy_cli import add_entropy
from loramux.errors import ConfigError
from loramux.keys_cli import add_keys


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code. 2 means it was asked for something impossible."""
    parser = argparse.ArgumentParser(prog="loramux", description=__doc__)
    parser.add_argument("--version", action="version", version=f"loramux {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    add_adapters(commands)
    add_aliases(commands)
    add_keys(commands)
    add_bench(commands)
    add_entropy(commands)
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


if __name__ == "__main__":
    sys.exit(main())
