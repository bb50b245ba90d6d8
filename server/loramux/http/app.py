"""The ASGI applications: every route of loramux, in one table each."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.types import ASGIApp

from loramux import __version__
from loramux.config import ServerConfig
from loramux.front.front import Front
from loramux.http.adapters import Adapters, Models
from loramux.http.admin import Admin
from loramux.http.blobs import Blobs
from loramux.http.chat import Chat
from loramux.http.compatibility import Compatibility
from loramux.http.completions import Completions
from loramux.http.failures import RequestIds, install
from loramux.http.limits import Limits
from loramux.http.resumable import Resumable
from loramux.http.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from loramux.metrics.prometheus import Exporter

NAMES_CACHE_S = 1.0
"""With thousands of adapters, listing them all is too much for every scrape."""

_JSON_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_UPLOAD = {
    "type": "object",
    "required": ["name", "config", "weights"],
    "properties": {
        "name": {"type": "string"},
        "config": {"type": "string", "format": "binary"},
        "weights": {"type": "string", "format": "binary"},
    },
}
_REGISTRATION = {
    "type": "object",
    "required": ["name", "config", "weights"],
    "properties": {
        "name": {"type": "string"},
        "config": {"type": ["string", "object"]},
        "weights": {"type": "string"},
        "expected_generation": {"type": "integer"},
    },
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def build_app(front: Front, config: ServerConfig) -> ASGIApp:
    """The server: its lifespan starts and stops ``front``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await front.start()
        try:
            yield
        finally:
            await front.stop()

    app = _application()
    app.router.lifespan_context = lifespan
    exporter = exporter_of(front)
    adapters, models = Adapters(front, exporter), Models(front)
    blobs, resumable, compatibility = Blobs(front), Resumable(front), Compatibility(front)
    for method, path, handler in (
        ("POST", "/v1/completions", Completions(front, exporter).create),
        ("POST", "/v1/chat/completions", Chat(front, exporter).create),
        ("GET", "/v1/models", models.list),
        ("GET", "/v1/models/{model:path}", models.show),
        ("POST", "/v1/adapters", adapters.create),
        ("GET", "/v1/adapters", adapters.list),
        ("GET", "/v1/adapters/{name}", adapters.show),
        ("DELETE", "/v1/adapters/{name}", adapters.delete),
        ("PUT", "/v1/adapters/{name}/pin", adapters.pin),
        ("DELETE", "/v1/adapters/{name}/pin", adapters.unpin),
        ("GET", "/v1/capacity", adapters.capacity),
        ("HEAD", "/v1/blobs/{digest:path}", blobs.head),
        ("PUT", "/v1/blobs/{digest:path}", blobs.put),
        ("POST", "/v1/uploads", resumable.create),
        ("HEAD", "/v1/uploads/{id}", resumable.head),
        ("PATCH", "/v1/uploads/{id}", resumable.append),
        ("POST", "/v1/uploads/{id}/complete", resumable.complete),
        ("DELETE", "/v1/uploads/{id}", resumable.cancel),
        ("POST", "/v1/load_lora_adapter", compatibility.load),
        ("POST", "/v1/unload_lora_adapter", compatibility.unload),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)
    if config.admin_port is None:
        _add_admin(app, front, exporter)
    return RequestIds(Limits(app, config))


def build_admin_app(front: Front, config: ServerConfig) -> ASGIApp:
    """Operators' routes alone, for ``--admin-port``; ``build_app`` starts and stops ``front``."""
    app = _application()
    _add_admin(app, front, exporter_of(front))
    return RequestIds(Limits(app, config))


def exporter_of(front: Front) -> Exporter:
    """The front's one Exporter, made when first asked for."""
    if isinstance(front.observer, Exporter):
        return front.observer
    cached: dict[str, list[str]] = {}
    cached_at = float("-inf")

    def names() -> Mapping[str, Sequence[str]]:
        nonlocal cached, cached_at
        if time.monotonic() - cached_at >= NAMES_CACHE_S:
            cached, cached_at = {}, time.monotonic()
            for view in front.adapters.list():
                cached.setdefault(view.digest, []).append(view.name)
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
    _describe(app)
    return app


def _add_admin(app: FastAPI, front: Front, exporter: Exporter) -> None:
    admin = Admin(front, exporter)
    for method, path, handler in (
        ("GET", "/health", admin.health),
        ("GET", "/health/live", admin.live),
        ("GET", "/health/ready", admin.ready),
        ("GET", "/version", admin.version),
        ("POST", "/tokenize", admin.tokenize),
        ("POST", "/detokenize", admin.detokenize),
        ("GET", "/admin/state", admin.state),
        ("GET", "/metrics", admin.metrics),
    ):
        app.add_api_route(path, handler, methods=[method], response_model=None)


def _describe(app: FastAPI) -> None:
    """Adds to openapi.json the bodies that FastAPI cannot see, since handlers read them."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            _, models = models_json_schema(
                [(model, "validation") for model in _JSON_BODIES.values()],
                ref_template="#/components/schemas/{model}",
            )
            schema["components"] = {"schemas": {**models["$defs"], "Error": _ERROR}}
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    operation["responses"]["default"] = _content(
                        "application/json", {"$ref": "#/components/schemas/Error"}, "an error"
                    )
                if model := _JSON_BODIES.get(path):
                    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
                    operations["post"]["requestBody"] = _content("application/json", reference)
            if path := schema["paths"].get("/v1/adapters"):
                path["post"]["requestBody"] = body = _content("multipart/form-data", _UPLOAD)
                body["content"].update(_content("application/json", _REGISTRATION)["content"])
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _content(media_type: str, schema: dict[str, Any], description: str = "") -> dict[str, Any]:
    content: dict[str, Any] = {"content": {media_type: {"schema": schema}}}
    return {**content, "description": description} if description else {**content, "required": True}
