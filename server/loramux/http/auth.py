"""Who asks, and whether they may: every request passes here before its body is read.

Deny by default. Every route declares the scopes of which one is needed (none: open to everybody);
a route that declares nothing keeps the application from being built, and whatever matches no route
needs a live key. Routes are found by Starlette's own matching, on the scope it will route by, so
there is no second opinion about what a path means.

Without a live key in the keys file everybody is tenant "" and may do all; then the server listens
on loopback only.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Scope

from loramux.errors import (
    ConfigError,
    InvalidRequest,
    LoramuxError,
    PermissionDenied,
    RequestError,
    Unauthenticated,
)
from loramux.front.catalog import SHARED
from loramux.front.keys import SCOPES, Keys

Needs = frozenset[str]
"""The scopes of which a caller needs one; empty: open to everybody."""

OPEN: Needs = frozenset()
INFER: Needs = frozenset({"infer"})
UPLOAD: Needs = frozenset({"upload"})
INFER_OR_UPLOAD = INFER | UPLOAD
ADMIN: Needs = frozenset({"admin"})
ANY: Needs = frozenset(SCOPES)

Access = Mapping[tuple[str, str], Needs]
"""(method, path as the route spells it) -> what it needs."""


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    tenant: str
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        """May change what is shared."""
        return "admin" in self.scopes


EVERYBODY = Caller(SHARED, ANY)


def caller(request: Request) -> Caller:
    """Who sent this request. Handlers of open routes must not ask."""
    found = request.scope["state"]["caller"]
    assert isinstance(found, Caller)
    return found


class Guard:
    """Nothing without a live key, and nothing without the scope.

    ``access`` declares every route of ``app``; one that it lacks is a bug, raised here.
    """

    def __init__(self, app: FastAPI, access: Access, keys: Keys) -> None:
        self._routes = [route for route in app.routes if isinstance(route, Route)]
        there = {(method, r.path) for r in self._routes for method in r.methods or ()}
        if there != set(access) or len(self._routes) != len(app.routes):
            raise RuntimeError(f"every route declares its scopes: {there ^ set(access)}")
        self._access = access
        self._keys = keys

    def refusal(self, scope: Scope) -> LoramuxError | None:
        """Why this request gets no further: Unauthenticated, PermissionDenied, InvalidRequest.

        Leaves the caller in the scope's state for the handlers.
        """
        try:
            self._check(scope)
        except RequestError as refusal:
            return refusal
        return None

    def _check(self, scope: Scope) -> None:
        needs = self._needs(scope)
        if not needs:
            return
        state = scope.setdefault("state", {})
        if not self._keys.guarded:
            state["caller"] = EVERYBODY
            return
        key = self._keys.find(_bearer(scope))
        if key is None:
            raise Unauthenticated("a valid API key is needed: authorization: Bearer lmx_...")
        state["caller"] = asking = Caller(key.tenant, frozenset(key.scopes))
        if not needs & asking.scopes:
            wanted = " or ".join(name for name in SCOPES if name in needs)
            raise PermissionDenied(f"this needs a key with the scope {wanted}")

    def _needs(self, scope: Scope) -> Needs:
        """As the router picks: the first whole match, else the first whose method is another."""
        partial: Route | None = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                return self._access[scope["method"], route.path]
            if match is Match.PARTIAL and partial is None:
                partial = route
        if partial is not None and not any(
            self._access[method, partial.path] for method in partial.methods or ()
        ):
            return OPEN  # a 405 tells of nothing that is not open
        return ANY


def _bearer(scope: Scope) -> str:
    """The key of the request's one Authorization header; "" when there is none of that kind."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) > 1:
        raise InvalidRequest("authorization: this header came twice", param="authorization")
    scheme, _, key = given[0].decode("latin-1").partition(" ") if given else ("", "", "")
    return key.strip(" ") if scheme.lower() == "bearer" else ""


def check_host(keys: Keys, host: str) -> None:
    """Raises ConfigError when everybody who reaches ``host`` could use a server without keys."""
    if not keys.guarded and not is_loopback(host):
        raise ConfigError(
            f"--host {host} can be reached from other machines and there is no API key: make one"
            " with loramux keys create, or listen on 127.0.0.1",
            param="host",
        )


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1 or localhost."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    return address.is_loopback and getattr(address, "ipv4_mapped", None) is None
