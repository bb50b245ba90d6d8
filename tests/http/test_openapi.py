"""What openapi.json says is so: schemathesis asks every operation what it may, and what it may not.

A real front and ingest, with a scripted engine, behind a real socket. Requests are drawn from the
document; names of things that exist are put into some, else all of them would end at a 404.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from tests.adapters.peft_files import base_description, make_config, make_tensors, safetensors_bytes
from tests.front.house import ENGINE, SERVER, configure
from tests.http.conftest import Running, serve
from tests.http.fake_front import eventually
from tests.http.granting import Tenant, bearer, grant, look_again
from tests.http.test_auth import ROUTES

from loramux.front.front import INGEST, Front
from loramux.http.openapi import ANSWERS, BODIES

SETTINGS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
SHORT = {"model": "base", "max_tokens": 2}
WORKS: dict[str, dict[str, Any]] = {
    "/v1/completions": {**SHORT, "prompt": "a"},
    "/v1/chat/completions": {**SHORT, "messages": [{"role": "user", "content": "a"}]},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [5]},
    "/v1/aliases/{alias}": {"target": "base"},
    "/v1/uploads": {"bytes": 3, "sha256": "a" * 64},
}
"""Bodies that work; one of the drawn fields is put into them."""
FILE = b"a file"
PUBLIC = [
    (method, path.replace(":path}", "}")) for method, path in ROUTES if path != "/openapi.json"
]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenant]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(tmp_path_factory.mktemp("openapi"), port=0, access_log="off")
        key = grant(config.keys_file, "acme")
        server, stop = serve(Front(config, engine=ENGINE, ingest=INGEST), config)
        assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
        yield Tenant(server, key)
        stop()


@pytest.fixture(scope="module")
def document(house: Tenant) -> Any:
    raw = house.server.http.get("/openapi.json", headers=bearer(house.key)).json()
    schema = schemathesis.openapi.from_dict(raw)
    schema.config.update(base_url=house.server.url)
    return schema


def test_every_route_is_described(house: Tenant) -> None:
    raw = house.server.http.get("/openapi.json", headers=bearer(house.key)).json()
    found = {(method.upper(), path) for path, ops in raw["paths"].items() for method in ops}
    assert found == set(PUBLIC) == set(ANSWERS) and set(BODIES) < found
    for (method, path), needs in ROUTES.items():
        if path == "/openapi.json":
            continue
        operation = raw["paths"][path.replace(":path}", "}")][method.lower()]
        asked = {scope for each in operation["security"] for scope in each["bearer"]}
        assert asked == needs and ("401" in operation["responses"]) == bool(needs)
        assert operation["summary"] and operation["description"]


def existing(server: Running, headers: dict[str, str]) -> dict[str, str]:
    """Makes sure that there is one of everything; what it is called where it is asked for."""
    base = base_description(hidden=16, inter=16, heads=2, layers=1)  # as the scripted engine's
    weights = safetensors_bytes(make_tensors(base))
    files = {"config": json.dumps(make_config()).encode(), "weights": weights}
    server.http.post("/v1/adapters?wait=30", data={"name": "here"}, files=files, headers=headers)
    server.http.put("/v1/aliases/stands", json={"target": "base"}, headers=headers)
    digest = hashlib.sha256(FILE).hexdigest()
    server.http.put(f"/v1/blobs/sha256:{digest}", content=FILE, headers=headers)
    body = {"bytes": len(FILE), "sha256": digest}
    upload = server.http.post("/v1/uploads", json=body, headers=headers).json()["id"]
    return {
        "model": "base",
        "name": "here",
        "alias": "stands",
        "lora_name": "here",
        "digest": f"sha256:{digest}",
        "id": upload,
        "Upload-Offset": "0",
    }


def steer(case: Any, data: Any, names: dict[str, str]) -> None:
    """Puts what exists in place of drawn names, and a drawn field into a body that works."""
    for place in (case.path_parameters, case.headers, case.body):
        if hasattr(place, "update"):
            place.update({name: names[name] for name in place.keys() & names.keys()})
    if isinstance(case.body, dict) and case.body and (works := WORKS.get(case.path)):
        field = data.draw(st.sampled_from(sorted(case.body)))
        case.body = {**works, field: case.body[field]}
    if isinstance(case.body, bytes):
        case.body = FILE


CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "allow_header_conformance",
)


def ask(document: Any, house: Tenant, method: str, path: str, num: int, **options: Any) -> set[int]:
    """The statuses of ``num`` drawn requests, all of them as the document has it."""
    # A tenant each: one that asks at random soon has as many open uploads as it may.
    tenant = re.sub(r"\W", "-", f"{method}{path}")
    headers = bearer(grant(house.server.front.config.keys_file, tenant))
    look_again(house.server)
    operation = document[path][method]
    checks = CHECKS.get_by_names(list(CHECKED))
    seen: set[int] = set()

    @settings(max_examples=num, **SETTINGS, **options)
    @given(data=st.data())
    def drawn(data: Any) -> None:
        valid = data.draw(st.booleans())
        mode = GenerationMode.POSITIVE if valid else GenerationMode.NEGATIVE
        case = data.draw(operation.as_strategy(generation_mode=mode))
        if data.draw(st.booleans()):
            steer(case, data, names)
        if isinstance(case.body, dict):
            case.body.pop(
                "deadline_s", None
            )  # a very short one is answered with the 504 it asks for
        for name in [name for name in case.headers or () if name.lower() == "authorization"]:
            del case.headers[name]
        case.headers = {**dict(case.headers or {}), **headers}
        answer = case.call_and_validate(checks=checks)
        seen.add(answer.status_code)
        if answer.status_code >= 400 and method != "HEAD":
            error = json.loads(answer.content)["error"]
            assert error["message"] and error["code"] and error["type"]
        assert answer.headers["x-request-id"]

    names = existing(house.server, headers)
    if path.startswith("/page"):
        names["name"] = "page.css"
    drawn()
    return seen


@pytest.mark.parametrize(("method", "path"), PUBLIC, ids=lambda part: str(part))
def test_answers_are_as_described(document: Any, house: Tenant, method: str, path: str) -> None:
    seen = ask(document, house, method, path, 15, derandomize=True)
    assert not {status for status in seen if status >= 500}
    assert house.server.http.get("/health").status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), PUBLIC, ids=lambda part: str(part))
def test_many_answers_are_as_described(
    document: Any, house: Tenant, method: str, path: str
) -> None:
    """Minutes: a hundred requests for every operation, others on every run."""
    ask(document, house, method, path, 100)
    assert house.server.http.get("/health").status_code == 200
