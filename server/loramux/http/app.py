"""The ASGI applications: every route of loramux, in one table each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from loramux import __version__
from loramux.config import ServerConfig
from loramux.errors import LoramuxError
from loramux.front.front import Front
from loramux.http import access_log, auth
from loramux.http.adapters import Adapters, Models
from loramux.http.admin import Admin
from loramux.http.aliases import Aliases
from loramux.http.blobs import Blobs
from loramux.http.bodies import Bodies
from loramux.http.chat import Chat
from loramux.http.compatibility import Compatibility
from loramux.http.completions import Completions
from loramux.http.exchanges import Exchange, Exchanges
from loramux.http.failures import RequestIds, install
from loramux.http.limits import Limits
from loramux.http.openapi import describe
from loramux.http.resumable import Resumable
from loramux.http.site import Site
from loramux.http.traces import Traces, otlp_exporter
from loramux.metrics.prometheus import Exporter

Handler = Callable[..., Coroutine[Any, Any, Response]]
Table = Sequence[tuple[str, str, Handler, auth.Needs]]
"""Method, path, handler, and the scopes of which a caller needs one."""

NAMES_CACHE_S = 1.0
"""With thousands of adapters, listing them all is too much for every scrape."""


_GENERATING = ("/v1/completions", "/v1/chat/completions")
"""When no place is left, these are refused by their first line: reading what they ask for takes
longer than anything else about a refusal, and a server that is flooded has no time for that."""


def build_app(front: Front, config: ServerConfig) -> ASGIApp:
    """The server: its lifespan starts and stops ``front``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await front.start()
        try:
            yield
        finally:
            await front.stop()
            if traces is not None:
                await asyncio.to_thread(traces.close)

    traces = Traces(otlp_exporter(), front.snapshot.recent_loads) if config.otel else None
    app = _application()
    app.router.lifespan_context = lifespan
    exporter = exporter_of(front)
    adapters, models = Adapters(front, exporter), Models(front)
    aliases = Aliases(front)
    blobs, resumable, compatibility = Blobs(front), Resumable(front), Compatibility(front)
    table: Table = (
        ("POST", "/v1/completions", Completions(front, exporter).create, auth.INFER),
        ("POST", "/v1/chat/completions", Chat(front, exporter).create, auth.INFER),
        ("GET", "/v1/models", models.list, auth.INFER),
        ("GET", "/v1/models/{model:path}", models.show, auth.INFER),
        ("POST", "/v1/adapters", adapters.create, auth.UPLOAD),
        ("GET", "/v1/adapters", adapters.list, auth.INFER_OR_UPLOAD),
        ("GET", "/v1/adapters/{name}", adapters.show, auth.INFER_OR_UPLOAD),
        ("GET", "/v1/adapters/{name}/versions", adapters.versions, auth.INFER_OR_UPLOAD),
        ("DELETE", "/v1/adapters/{name}", adapters.delete, auth.UPLOAD),
        ("PUT", "/v1/adapters/{name}/ttl", adapters.set_ttl, auth.UPLOAD),
        ("PUT", "/v1/adapters/{name}/pin", adapters.pin, auth.UPLOAD),
        ("DELETE", "/v1/adapters/{name}/pin", adapters.unpin, auth.UPLOAD),
        ("GET", "/v1/aliases", aliases.list, auth.INFER_OR_UPLOAD),
        ("GET", "/v1/aliases/{alias}", aliases.show, auth.INFER_OR_UPLOAD),
        ("PUT", "/v1/aliases/{alias}", aliases.put, auth.UPLOAD),
        ("DELETE", "/v1/aliases/{alias}", aliases.delete, auth.UPLOAD),
        ("GET", "/v1/capacity", adapters.capacity, auth.INFER_OR_UPLOAD),
        ("HEAD", "/v1/blobs/{digest:path}", blobs.head, auth.UPLOAD),
        ("PUT", "/v1/blobs/{digest:path}", blobs.put, auth.UPLOAD),
        ("POST", "/v1/uploads", resumable.create, auth.UPLOAD),
        ("HEAD", "/v1/uploads/{id}", resumable.head, auth.UPLOAD),
        ("PATCH", "/v1/uploads/{id}", resumable.append, auth.UPLOAD),
        ("POST", "/v1/uploads/{id}/complete", resumable.complete, auth.UPLOAD),
        ("DELETE", "/v1/uploads/{id}", resumable.cancel, auth.UPLOAD),
        ("POST", "/v1/load_lora_adapter", compatibility.load, auth.ADMIN),
        ("POST", "/v1/unload_lora_adapter", compatibility.unload, auth.UPLOAD),
    )
    if config.admin_port is None:
        table = (*table, *_operators(front, exporter))
    return _guarded(app, table, front, config, traces)


def build_admin_app(front: Front, config: ServerConfig) -> ASGIApp:
    """Operators' routes alone, for ``--admin-port``; ``build_app`` starts and stops ``front``."""
    return _guarded(_application(), _operators(front, exporter_of(front)), front, config)


def _guarded(
    app: FastAPI, table: Table, front: Front, config: ServerConfig, traces: Traces | None = None
) -> ASGIApp:
    """``app`` with its routes, behind everything a request has to pass first."""
    access = {(method, "/openapi.json"): auth.ANY for method in ("GET", "HEAD")}
    for method, path, handler, needs in table:
        app.add_api_route(path, handler, methods=[method], response_model=None)
        access[method, path] = needs
    describe(app, access)
    guard = auth.Guard(app, access, front.keys, auth.Strangers(config.allowed_host))
    exporter = exporter_of(front)

    def refusal(scope: Scope) -> LoramuxError | None:
        if (refused := guard.refusal(scope)) is not None:
            return refused
        if front.draining and scope["method"] not in ("GET", "HEAD"):
            return front.room.refuse("the server takes nothing new", 0, code="draining")
        if scope["path"] in _GENERATING and scope["method"] == "POST" and front.room.full:
            return front.room.refuse(f"{front.room.choices} requests are running or waiting")
        return None

    def count(exchange: Exchange) -> None:
        if exchange.told is not None:
            exporter.erred(*exchange.told)

    readers = [count, *([access_log.write] if config.access_log == "json" else ())]
    if traces is not None:
        readers.append(traces.write)
    limited = Limits(Bodies(app, config), config, refusal)
    return RequestIds(Exchanges(limited, readers))


def exporter_of(front: Front) -> Exporter:
    """The front's one Exporter, made when first asked for."""
    if isinstance(front.observer, Exporter):
        return front.observer
    cached: Mapping[str, Sequence[str]] = {}
    cached_at = float("-inf")

    def names() -> Mapping[str, Sequence[str]]:
        nonlocal cached, cached_at
        if time.monotonic() - cached_at >= NAMES_CACHE_S:
            cached, cached_at = front.adapters.labels(), time.monotonic()
        return cached

    front.observer = exporter = Exporter(front, names)
    return exporter


def _application() -> FastAPI:
    app = FastAPI(
        title="loramux",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        # Newer releases record spans and failures, and may export them as the environment says.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    install(app)
    return app


def _operators(front: Front, exporter: Exporter) -> Table:
    admin, site = Admin(front, exporter), Site()
    return (
        ("GET", "/", site.index, auth.OPEN),
        ("GET", "/page/{name}", site.file, auth.OPEN),
        ("GET", "/health", admin.health, auth.OPEN),
        ("GET", "/health/live", admin.live, auth.OPEN),
        ("GET", "/health/ready", admin.ready, auth.OPEN),
        ("GET", "/health/deep", admin.deep, auth.ADMIN),
        ("GET", "/version", admin.version, auth.OPEN),
        ("POST", "/tokenize", admin.tokenize, auth.INFER),
        ("POST", "/detokenize", admin.detokenize, auth.INFER),
        ("GET", "/admin/state", admin.state, auth.ADMIN),
        (
            "GET",
            "/metrics",
            admin.metrics,
            auth.OPEN if front.config.public_metrics else auth.ADMIN,
        ),
    )
