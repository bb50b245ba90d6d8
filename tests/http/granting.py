"""Keys for a server under test, and the server as their tenants see it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.front.house import PROMPT
from tests.http import wire
from tests.http.conftest import Running
from tests.http.fake_front import eventually

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


@dataclass
class Tenant:
    """A server as one key sees it."""

    server: Running
    key: str

    def ask(self, method: str, path: str, **fields: Any) -> Any:
        return self.server.http.request(method, path, headers=bearer(self.key), **fields)

    def complete(self, model: str, **fields: Any) -> Any:
        body = {"model": model, "prompt": PROMPT, "max_tokens": 2, **fields}
        return self.ask("POST", "/v1/completions", json=body)

    def upload(self, name: str, weights: bytes = b"w", query: str = "", **config: Any) -> Any:
        files = {"config": json.dumps(config).encode(), "weights": weights}
        return self.ask("POST", "/v1/adapters?wait=30" + query, data={"name": name}, files=files)

    def names(self) -> list[str]:
        return [view["name"] for view in self.ask("GET", "/v1/adapters").json()["data"]]

    def models(self) -> list[str]:
        return [card["id"] for card in self.ask("GET", "/v1/models").json()["data"]]

    def delete(self, name: str) -> None:
        digest = self.ask("GET", f"/v1/adapters/{name}").json()["digest"]
        assert self.ask("DELETE", f"/v1/adapters/{name}").status_code == 202

        def gone() -> bool:
            views = self.ask("GET", "/v1/adapters").json()["data"]
            return (name, digest) not in [(view["name"], view["digest"]) for view in views]

        assert eventually(gone)
