"""Keys for a server under test."""

from __future__ import annotations

from pathlib import Path

import httpx
from tests.http import wire
from tests.http.conftest import Running

from loramux.front.keys import SCOPES, Scope, editing, new_key


def grant(path: Path, tenant: str, *scopes: Scope) -> str:
    """A new key in the file (all scopes unless told otherwise); its text."""
    with editing(path) as content:
        key, text = new_key(tenant, scopes or SCOPES)
        content.keys.append(key)
    return text


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


def client(server: Running, text: str) -> Running:
    """The same server seen with a key, until the end of the test."""
    seen = Running(server.front, server.port)
    seen.http.close()
    seen.http = httpx.Client(base_url=server.url, timeout=20, headers=bearer(text))
    wire.close_later(seen.http)
    return seen


def look_again(server: Running) -> None:
    """The second between two looks at the keys file is over."""
    server.front.keys._checked_at = float("-inf")
