"""Who asks, and whether they may: every request passes here before its body is read.

Deny by default. Every route declares the scopes of which one is needed (none: open to everybody);
a route that declares nothing keeps the application from being built, and whatever matches no route
needs a live key. Routes are found by Starlette's own matching, on the scope it will route by, so
there is no second opinion about what a path means.

Without a live key in the keys file everybody is tenant "" and may do all; then the server listens
on loopback only, and answers nobody who came by a web page (``Strangers``).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
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


class Strangers:
    """Web pages that use a browser on this machine to reach a server that asks for no key.

    A page of another site may post here, with any body that a form can have: its browser then says
    in ``Origin`` where the page is from. One whose name was made to lead to 127.0.0.1 (DNS
    rebinding) counts as the same site, but its browser says that name in ``Host``. So ``Host`` must
    be a name of this machine or one of ``allowed``, and ``Origin``, if there is one, must be that
    ``Host``. Programs send no ``Origin``, and who sends no ``Host`` is no browser.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(name.lower() for name in allowed)

    def check(self, scope: Scope) -> None:
        """Raises PermissionDenied."""
        hosts = [value.lower() for name, value in scope["headers"] if name == b"host"]
        if not all(self._is_ours(host.decode("latin-1")) for host in hosts):
            raise PermissionDenied(
                "Host: not a name of this machine; without API keys others are answered only if"
                " they are given by --allowed-host",
                param="Host",
                code="host_not_allowed",
            )
        for name, value in scope["headers"]:
            if name == b"origin" and value.lower().partition(b"://")[2] not in hosts:
                raise PermissionDenied(
                    "Origin: without API keys the pages of other sites are not answered",
                    param="Origin",
                    code="origin_not_allowed",
                )

    def _is_ours(self, host: str) -> bool:
        """``host`` as the header has it, perhaps with a port."""
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match[1] or match[2]
        return is_loopback(name) or name in self._allowed


_HOST = re.compile(r"(?:\[([0-9a-f:]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")


class Guard:
    """Nothing without a live key, and nothing without the scope.

    ``access`` declares every route of ``app``; one that it lacks is a bug, raised here.
    """

    def __init__(self, app: FastAPI, access: Access, keys: Keys, strangers: Strangers) -> None:
        self._routes = [route for route in app.routes if isinstance(route, Route)]
        there = {(method, r.path) for r in self._routes for method in r.methods or ()}
        if there != set(access) or len(self._routes) != len(app.routes):
            raise RuntimeError(f"every route declares its scopes: {there ^ set(access)}")
        self._access = access
        self._keys = keys
        self._strangers = strangers

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
        state = scope.setdefault("state", {})
        needs = self._needs(scope)
        if not self._keys.guarded:
            self._strangers.check(scope)
            state["caller"] = EVERYBODY
            return
        if not needs:
            return
        key = self._keys.find(_bearer(scope))
        if key is None:
            raise Unauthenticated("a valid API key is needed: authorization: Bearer lmx_...")
        state["caller"] = asking = Caller(key.tenant, frozenset(key.scopes))
        if not needs & asking.scopes:
            wanted = " or ".join(name for name in SCOPES if name in needs)
            raise PermissionDenied(f"this needs a key with the scope {wanted}")

    def _needs(self, scope: Scope) -> Needs:
        """As the router picks: the first whole match, else the first whose method is another.

        Leaves the route's path, as the route spells it, in the scope's state for logs."""
        partial: Route | None = None
        for route in self._routes:
            match, _ = route.matches(scope)
            if match is Match.FULL:
                scope["state"]["route"] = route.path
                return self._access[scope["method"], route.path]
            if match is Match.PARTIAL and partial is None:
                partial = route
                scope["state"]["route"] = route.path
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
