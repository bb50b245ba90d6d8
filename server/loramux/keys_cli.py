"""``loramux keys``: make, list and revoke API keys, and set what a tenant may use.

The commands write the keys file; a running server follows it within a second.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from loramux.config import ADAPTER_NAME, ServerConfig
from loramux.errors import ConfigError
from loramux.front.keys import SCOPES, KeysFile, Limits, Scope, editing, new_key, read

Verb = Callable[[Path, dict[str, Any]], None]


def add_keys(commands: Any) -> None:
    """Adds the command to ``loramux``'s own."""
    keys = commands.add_parser(
        "keys",
        help="make, list and revoke API keys, and set a tenant's limits",
        description="Manage the API keys of a server on this machine. Once there is a key, every "
        "request needs one; without any the server listens on this machine only.",
    )
    verbs = keys.add_subparsers(dest="verb", required=True, metavar="VERB")
    create = _verb(verbs, "create", _create, "make a key and print it, once")
    _add_tenant(create)
    create.add_argument(
        "--scopes",
        type=_scopes,
        required=True,
        help="what it may do, with commas: infer (use models), upload (change the tenant's "
        "adapters), admin (metrics, state, shared adapters)",
    )
    create.add_argument("--note", default="", help="words for the list: who has it, what for")
    _verb(verbs, "list", _list, "all keys, without their secrets")
    revoke = _verb(verbs, "revoke", _revoke, "end a key; requests that run on it finish")
    revoke.add_argument("id", help="its id, as list shows it: lmx_<id>_...")
    limits = _verb(verbs, "limits", _limits, "set, or show, what a tenant may use")
    _add_tenant(limits)
    for name, text in LIMITS.items():
        kind, metavar = (_share, "0..1|none") if name == "max_pool_share" else (_limit, "N|none")
        limits.add_argument("--" + name.replace("_", "-"), type=kind, metavar=metavar, help=text)


LIMITS = {
    "max_adapters": "adapters stored, every generation counted",
    "max_adapter_bytes": "bytes of their weights",
    "max_requests": "completions in flight",
    "tokens_per_minute": "prompt and output tokens",
    "max_pool_share": "part of the memory pool for the KV of running completions; others wait",
}


@dataclass(frozen=True)
class _NoLimit:
    """``none`` on the command line; not given is None."""


def _verb(verbs: Any, name: str, run: Verb, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.add_argument("--data-dir", type=Path, help="the server's data directory")
    parser.add_argument("--api-keys", type=Path, help="the keys file (default: in --data-dir)")
    parser.set_defaults(run=_run, act=run)
    return parser


def _add_tenant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenant", type=_tenant, required=True, help="whose adapters and limits")


def _tenant(text: str) -> str:
    if not ADAPTER_NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"a tenant's name is like {ADAPTER_NAME.pattern}")
    return text


def _scopes(text: str) -> tuple[Scope, ...]:
    asked = text.split(",")
    if unknown := [name for name in asked if name not in SCOPES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: the scopes are {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in asked)


def _limit(text: str) -> int | _NoLimit:
    if text == "none":
        return _NoLimit()
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none")
    return int(text)


def _share(text: str) -> float | _NoLimit:
    if text == "none":
        return _NoLimit()
    if not re.fullmatch(r"0|1|0?\.[0-9]+|[01]\.0*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0 to 1 nor none")
    return float(text)


def _run(args: dict[str, Any]) -> int:
    act: Verb = args.pop("act")
    given = {name: args.pop(name) for name in ("data_dir", "api_keys")}
    config = ServerConfig(**{name: value for name, value in given.items() if value is not None})
    act(config.keys_file, args)
    return 0


def _create(path: Path, args: dict[str, Any]) -> None:
    with editing(path) as content:
        key, text = new_key(args["tenant"], args["scopes"], args["note"])
        if any(other.id == key.id for other in content.keys):
            raise ConfigError("the new key's id is taken, by chance: try again")
        content.keys.append(key)
    print(text)
    print("This key is not shown again; the server keeps only its hash.", file=sys.stderr)


def _list(path: Path, args: dict[str, Any]) -> None:
    content = read(path) or KeysFile()
    table = Table("id", "tenant", "scopes", "created", "note", "revoked", box=None)
    for key in content.keys:
        revoked = "" if key.revoked is None else _minute(key.revoked)
        table.add_row(
            key.id, key.tenant, ",".join(key.scopes), _minute(key.created), key.note, revoked
        )
    Console(markup=False).print(table if content.keys else f"no keys in {path}")


def _minute(when: datetime) -> str:
    return when.strftime("%Y-%m-%d %H:%M")


def _revoke(path: Path, args: dict[str, Any]) -> None:
    with editing(path) as content:
        for index, key in enumerate(content.keys):
            if key.id == args["id"]:
                if key.revoked is None:
                    now = datetime.now(UTC).replace(microsecond=0)
                    content.keys[index] = msgspec.structs.replace(key, revoked=now)
                break
        else:
            raise ConfigError("no key has this id; loramux keys list shows them")
    print(f"revoked {args['id']}")


def _limits(path: Path, args: dict[str, Any]) -> None:
    tenant = args["tenant"]
    given = {name: args[name] for name in LIMITS if args[name] is not None}
    values = {name: None if value == _NoLimit() else value for name, value in given.items()}
    if values:
        with editing(path) as content:
            before = content.tenants.get(tenant, Limits())
            content.tenants[tenant] = msgspec.structs.replace(before, **values)
    found = (read(path) or KeysFile()).tenants.get(tenant, Limits())
    for name in LIMITS:
        value = getattr(found, name)
        print(f"{name:18} {'none' if value is None else value}")
