"""openapi.json: what FastAPI cannot see, since handlers read bodies and write answers themselves.

Every operation says which answers it gives, with their media types and shapes, and which scopes its
key needs. Errors all have one shape, so they are ``default``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from loramux.config import ADAPTER_NAME
from loramux.front.aliases import MAX_WEIGHT, AliasView
from loramux.front.catalog import AdapterView
from loramux.http.answers import ChatCompletion, Completion, ModelCard, Usage
from loramux.http.auth import Access
from loramux.http.registration import MAX_TTL_S
from loramux.http.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from loramux.request import MODEL_IDS

Json = dict[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
BYTES = "application/octet-stream"
PLAIN = "text/plain"
REFERENCE = "#/components/schemas/{name}"

_MODELS: tuple[type[BaseModel], ...] = (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)


def _with_whole_usage(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """``kind`` as a whole answer: only the chunks of a stream have no usage, or half of one."""
    fields: list[Any] = []
    for each in msgspec.structs.fields(kind):
        if each.name == "usage":
            fields.append(("usage", Usage))
        elif each.required:
            fields.append((each.name, each.type))
        else:
            fields.append((each.name, each.type, each.default))
    return msgspec.defstruct(kind.__name__, fields, kw_only=True)


_STRUCTS = (AdapterView, AliasView, ChatCompletion, _with_whole_usage(Completion), ModelCard)


def _object(required: str = "", **properties: Json) -> Json:
    return {"type": "object", "required": required.split(), "properties": properties}


def _ref(kind: type) -> Json:
    return {"$ref": REFERENCE.format(name=kind.__name__)}


def _list_of(kind: type) -> Json:
    data = {"type": "array", "items": _ref(kind)}
    return _object("object data", object={"const": "list"}, data=data)


TEXT: Json = {"type": "string"}
FILE: Json = {"type": "string", "format": "binary"}
COUNT: Json = {"type": "integer", "minimum": 0}
DIGEST: Json = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
NAME: Json = {"type": "string", "pattern": f"^{ADAPTER_NAME.pattern}$"}
TTL: Json = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_TTL_S}
REVISION: Json = {"type": ["integer", "null"], "minimum": 0, "maximum": 2**31}
BASE: Json = {"type": "string", "enum": list(MODEL_IDS), "default": "target"}
ANYTHING: Json = {"type": "object"}
PROFILE: Json = {"anyOf": [DIGEST, ANYTHING, {"type": "null"}]}

ERROR = _object(
    "error",
    error={
        **_object(
            "message type param code",
            message=TEXT,
            type=TEXT,
            param={"type": ["string", "null"]},
            code=TEXT,
            problems={"type": "array", "items": TEXT},
        ),
        "additionalProperties": False,
    },
)
BLOB = _object("object digest bytes", object={"const": "blob"}, digest=DIGEST, bytes=COUNT)
UPLOAD = _object(
    "id object offset bytes sha256 expires_at",
    id=TEXT,
    object={"const": "upload"},
    offset=COUNT,
    bytes=COUNT,
    sha256=TEXT,
    expires_at=COUNT,
)
_FORM = _object(
    "name config weights",
    name=NAME,
    config=FILE,
    weights=FILE,
    profile=FILE,
    heads=FILE,
    base=BASE,
)
_REGISTRATION = {
    **_object(
        "name",
        name=NAME,
        config={"anyOf": [DIGEST, ANYTHING]},
        weights=DIGEST,
        profile=PROFILE,
        heads={"anyOf": [DIGEST, {"type": "null"}]},
        blend=_object("method sources", method=TEXT, sources={"type": "array"}),
        base=BASE,
        expected_generation=REVISION,
        ttl_s=TTL,
    ),
    "anyOf": [{"required": ["config", "weights"]}, {"required": ["blend"]}],
    "additionalProperties": False,
}
_SHARE = {
    **_object(
        "model weight",
        model=TEXT,
        weight={"type": "integer", "minimum": 1, "maximum": MAX_WEIGHT},
    ),
    "additionalProperties": False,
}
_ALIAS = {
    **_object(
        target=TEXT,
        targets={"type": "array", "items": _SHARE},
        expected_revision=REVISION,
    ),
    "oneOf": [{"required": ["target"]}, {"required": ["targets"]}],
    "additionalProperties": False,
}

BODIES: Mapping[tuple[str, str], Mapping[str, Json]] = {
    ("POST", "/v1/completions"): {JSON: _ref(CompletionRequest)},
    ("POST", "/v1/chat/completions"): {JSON: _ref(ChatRequest)},
    ("POST", "/tokenize"): {JSON: _ref(TokenizeRequest)},
    ("POST", "/detokenize"): {JSON: _ref(DetokenizeRequest)},
    ("POST", "/v1/adapters"): {"multipart/form-data": _FORM, JSON: _REGISTRATION},
    ("PUT", "/v1/adapters/{name}/ttl"): {
        JSON: {**_object("ttl_s", ttl_s=TTL), "additionalProperties": False}
    },
    ("PUT", "/v1/aliases/{alias}"): {JSON: _ALIAS},
    ("PUT", "/v1/blobs/{digest}"): {BYTES: FILE},
    ("POST", "/v1/uploads"): {
        JSON: {
            **_object("bytes sha256", bytes=COUNT, sha256={**TEXT, "pattern": "^[0-9a-f]{64}$"}),
            "additionalProperties": False,
        }
    },
    ("PATCH", "/v1/uploads/{id}"): {BYTES: FILE},
    ("POST", "/v1/load_lora_adapter"): {
        JSON: _object("lora_name lora_path", lora_name=NAME, lora_path=TEXT)
    },
    ("POST", "/v1/unload_lora_adapter"): {JSON: _object("lora_name", lora_name=TEXT)},
}
"""What an operation reads, by media type. Ones that are not here read nothing."""

NOTHING: Mapping[str, Json] = {}
_ADAPTER = {JSON: _ref(AdapterView)}
_ALIAS_VIEW = {JSON: _ref(AliasView)}
_STATUS = {JSON: _object("status", status=TEXT)}

ANSWERS: Mapping[tuple[str, str], Mapping[int, Mapping[str, Json]]] = {
    ("POST", "/v1/completions"): {200: {JSON: _ref(Completion), EVENTS: TEXT}},
    ("POST", "/v1/chat/completions"): {200: {JSON: _ref(ChatCompletion), EVENTS: TEXT}},
    ("GET", "/v1/models"): {200: {JSON: _list_of(ModelCard)}},
    ("GET", "/v1/models/{model}"): {200: {JSON: _ref(ModelCard)}},
    ("POST", "/v1/adapters"): {200: _ADAPTER, 201: _ADAPTER, 202: _ADAPTER},
    ("GET", "/v1/adapters"): {200: {JSON: _list_of(AdapterView)}},
    ("GET", "/v1/adapters/{name}"): {200: _ADAPTER},
    ("GET", "/v1/adapters/{name}/versions"): {200: {JSON: _list_of(AdapterView)}},
    ("DELETE", "/v1/adapters/{name}"): {202: _ADAPTER},
    ("PUT", "/v1/adapters/{name}/ttl"): {200: _ADAPTER},
    ("PUT", "/v1/adapters/{name}/pin"): {200: _ADAPTER},
    ("DELETE", "/v1/adapters/{name}/pin"): {200: _ADAPTER},
    ("GET", "/v1/aliases"): {200: {JSON: _list_of(AliasView)}},
    ("GET", "/v1/aliases/{alias}"): {200: _ALIAS_VIEW},
    ("PUT", "/v1/aliases/{alias}"): {200: _ALIAS_VIEW, 201: _ALIAS_VIEW},
    ("DELETE", "/v1/aliases/{alias}"): {200: _ALIAS_VIEW},
    ("GET", "/v1/capacity"): {200: {JSON: ANYTHING}},
    ("HEAD", "/v1/blobs/{digest}"): {200: NOTHING},
    ("PUT", "/v1/blobs/{digest}"): {200: {JSON: BLOB}, 201: {JSON: BLOB}},
    ("POST", "/v1/uploads"): {201: {JSON: UPLOAD}},
    ("HEAD", "/v1/uploads/{id}"): {200: NOTHING},
    ("PATCH", "/v1/uploads/{id}"): {204: NOTHING},
    ("DELETE", "/v1/uploads/{id}"): {204: NOTHING},
    ("POST", "/v1/uploads/{id}/complete"): {201: {JSON: BLOB}},
    ("POST", "/v1/load_lora_adapter"): {200: {PLAIN: TEXT}},
    ("POST", "/v1/unload_lora_adapter"): {200: {PLAIN: TEXT}},
    ("GET", "/"): {200: {"text/html": TEXT}, 304: NOTHING},
    ("GET", "/page/{name}"): {
        200: {"text/css": TEXT, "text/javascript": TEXT, "image/svg+xml": TEXT},
        304: NOTHING,
    },
    ("GET", "/health"): {200: NOTHING, 503: NOTHING},
    ("GET", "/health/live"): {200: _STATUS},
    ("GET", "/health/ready"): {200: _STATUS, 503: _STATUS},
    ("GET", "/health/deep"): {200: _STATUS, 503: _STATUS},
    ("GET", "/version"): {200: {JSON: _object("version", version=TEXT)}},
    ("POST", "/tokenize"): {
        200: {
            JSON: _object(
                "count max_model_len tokens token_strs",
                count=COUNT,
                max_model_len=COUNT,
                tokens={"type": "array", "items": COUNT},
                token_strs={"type": ["array", "null"], "items": TEXT},
            )
        }
    },
    ("POST", "/detokenize"): {200: {JSON: _object("prompt", prompt=TEXT)}},
    ("GET", "/admin/state"): {200: {JSON: _object("version not_ready", version=TEXT)}},
    ("GET", "/metrics"): {200: {PLAIN: TEXT}},
}
"""What an operation answers when all is well, by status and media type."""

_MEANINGS = {
    200: "as asked",
    201: "made",
    202: "accepted: it goes on",
    204: "done",
    304: "as it was",
    503: "not ready",
}
_PATHS = {"digest": DIGEST}
_OFFSET = {
    "name": "Upload-Offset",
    "in": "header",
    "required": True,
    "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
}


def describe(app: FastAPI, access: Access) -> None:
    """Adds to openapi.json of ``app`` all of the above, and of ``access`` what a key needs."""
    plain = app.openapi
    scopes = {(method, _bare(path)): needs for (method, path), needs in access.items()}

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            schema["components"] = _components()
            for path, operations in schema["paths"].items():
                for verb, operation in operations.items():
                    at = (verb.upper(), path)
                    _answer(operation, ANSWERS.get(at, {}), needs_key=bool(scopes[at]))
                    operation["security"] = [{"bearer": [name]} for name in sorted(scopes[at])]
                    if at in BODIES:
                        operation["requestBody"] = {"required": True, **_content(BODIES[at])}
                    for parameter in operation.get("parameters", ()):
                        if parameter["in"] == "path":
                            parameter["schema"] = _PATHS.get(parameter["name"], TEXT)
                    if at == ("PATCH", "/v1/uploads/{id}"):
                        operation["parameters"].append(_OFFSET)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _bare(path: str) -> str:
    """As openapi.json spells it: ``{model:path}`` is ``{model}``."""
    return path.replace(":path}", "}")


def _components() -> Json:
    requests = [(model, "validation") for model in _MODELS]
    _, models = models_json_schema(
        requests,  # type: ignore[arg-type]
        ref_template=REFERENCE.replace("name", "model"),
    )
    _, structs = msgspec.json.schema_components(_STRUCTS, ref_template=REFERENCE)
    # UNSET is left out of the JSON, which msgspec knows only of fields that default to it.
    structs["Usage"]["required"].remove("completion_tokens_details")
    return {
        "schemas": {**models["$defs"], **structs, "Error": ERROR},
        "securitySchemes": {
            "bearer": {
                "type": "http",
                "scheme": "bearer",
                "description": "lmx_..., as loramux keys create shows it; one of the scopes named"
                " is enough. A server without keys asks for none.",
            }
        },
    }


def _answer(operation: Json, answers: Mapping[int, Mapping[str, Json]], *, needs_key: bool) -> None:
    operation["responses"] = {
        str(status): {"description": _MEANINGS[status], **_content(content)}
        for status, content in answers.items()
    }
    error = _content({JSON: {"$ref": REFERENCE.format(name="Error")}})
    operation["responses"]["default"] = {"description": "an error", **error}
    if needs_key:
        operation["responses"]["401"] = {"description": "no key, or none that works", **error}


def _content(schemas: Mapping[str, Json]) -> Json:
    content = {media: {"schema": schema} for media, schema in schemas.items()}
    return {"content": content} if content else {}
