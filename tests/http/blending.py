"""Blends over HTTP: the real front and ingest process, an engine that is scripted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.adapters.peft_files import make_config, make_tensors, safetensors_bytes
from tests.front.house import ENGINE, SERVER, configure
from tests.http.conftest import Running, serve
from tests.http.fake_front import eventually

from loramux.front.front import INGEST as REAL_INGEST
from loramux.front.front import Front
from loramux.wire import MODULES, BaseDescription

BASE = BaseDescription(
    fingerprint="fake-base",
    num_layers=1,
    widths={module: (16, 16) for module in MODULES},
    slice_bytes=4096,
    max_rank=64,
)
"""What the scripted engine says its base is."""


@contextmanager
def server_with(folder: Path, ingest: Any = REAL_INGEST, **fields: Any) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SERVER))
        config = configure(folder, port=0, **fields)
        server, stop = serve(Front(config, engine=ENGINE, ingest=ingest), config)
        try:
            assert eventually(lambda: server.http.get("/health").status_code == 200, within_s=30)
            yield server
        finally:
            stop()


def upload(server: Running, name: str, query: str = "", **make: Any) -> httpx.Response:
    weights = safetensors_bytes(make_tensors(BASE, **make))
    files = {"config": json.dumps(make_config()).encode(), "weights": weights}
    url = f"/v1/adapters?wait=30{query}"
    return server.http.post(url, data={"name": name}, files=files)


def blend(
    server: Running, name: str, *sources: Any, query: str = "?wait=30", **fields: Any
) -> httpx.Response:
    """``fields`` are the recipe's, ``method`` soup if not given."""
    body: dict[str, Any] = {"name": name}
    if "expected_generation" in fields:
        body["expected_generation"] = fields.pop("expected_generation")
    listed = [{"id": s} if isinstance(s, str) else {"id": s[0], "weight": s[1]} for s in sources]
    body["blend"] = {"method": "soup", "sources": listed, **fields}
    return server.http.post("/v1/adapters" + query, json=body)


def rows(server: Running, name: str) -> list[Any]:
    return [row for row in server.front.adapters._catalog.rows() if row.name == name]  # type: ignore[attr-defined]
