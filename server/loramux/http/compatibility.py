"""vLLM's two routes for adapters, for tools that know no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import PlainTextResponse, Response

from loramux.config import ADAPTER_NAME
from loramux.errors import InvalidRequest
from loramux.front.adapters import CONFIG_FILE, HEADS_FILE, WEIGHTS_FILE
from loramux.front.front import Front
from loramux.http.adapters import owner_to_change
from loramux.http.limits import read_json

LONGEST_VALIDATION_S = 600.0


class Compatibility:
    """``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``; other fields than ours are vLLM's
    own numbering and flags, and are not looked at."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def load(self, request: Request) -> Response:
        """``{"lora_name", "lora_path"}``: register a folder of this machine, as ``--adapter`` does.

        Only folders inside ``--lora-path-root``; without it no path is ever looked at.
        """
        body = await read_json(request)
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        root = self._front.config.lora_path_root
        if root is None:
            raise InvalidRequest(
                "lora_path: this server loads no paths; upload the adapter (POST /v1/adapters) or"
                " start the server with --lora-path-root",
                param="lora_path",
                code="path_loading_disabled",
            )
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest(f"lora_name: must match {ADAPTER_NAME.pattern}", param="lora_name")
        files = await run_in_threadpool(inside, root, path)
        await self._front.adapters.register_files(name, *files, wait_s=LONGEST_VALIDATION_S)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """``{"lora_name"}``: delete the adapter; requests that run on it finish."""
        name = _text(await read_json(request), "lora_name")
        tenant = owner_to_change(self._front, request, name)
        await self._front.adapters.delete(name, tenant=tenant)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def inside(root: Path, path: str) -> list[Path]:
    """The files of an adapter folder (config, weights, heads if there are any), links followed, if
    all are truly inside ``root``.

    One refusal for everything else, so that it says nothing about files elsewhere.
    """
    try:
        base = root.resolve(strict=True)
        folder = (base / path).resolve(strict=True)
        names = [CONFIG_FILE, WEIGHTS_FILE]
        if (folder / HEADS_FILE).exists():
            names.append(HEADS_FILE)
        files = [(folder / name).resolve(strict=True) for name in names]
        if all(file.is_relative_to(base) and file.is_file() for file in files):
            return files
    except (OSError, ValueError, RuntimeError):  # missing; NUL in it; a loop of links
        pass
    raise InvalidRequest(
        f"lora_path: must be a folder below --lora-path-root that has {CONFIG_FILE} and"
        f" {WEIGHTS_FILE}",
        param="lora_path",
        code="path_not_allowed",
    )


def _text(body: dict[str, Any], field: str) -> str:
    value = body.get(field)
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"{field}: this field is required, a string", param=field)
    return value
