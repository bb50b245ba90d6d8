"""Aliases over HTTP: names that stand for adapters, or for shares of several."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from starlette.responses import Response

from loramux.errors import InvalidRequest, PermissionDenied
from loramux.front.aliases import MAX_WEIGHT
from loramux.front.front import Front
from loramux.http.adapters import answer
from loramux.http.auth import caller
from loramux.http.limits import read_json

FIELDS = ("target", "targets", "expected_revision")


class Aliases:
    """``/v1/aliases``."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def put(self, request: Request, alias: str) -> Response:
        """``{"target": MODEL}`` or ``{"targets": [{"model": MODEL, "weight": N}, ...]}``, and
        ``expected_revision`` (0: there must be none yet): what the alias stands for from now on.

        MODEL is what it means now: ``name@…`` is pinned to that generation, a bare ``name`` follows
        the name to its newest generation, the base's name is the base. 201 for a new alias, 200
        for one that was there; equal targets are no new revision.
        """
        body = await read_json(request)
        for key in body:
            if key not in FIELDS:
                raise InvalidRequest(f"the fields are {', '.join(FIELDS)} and no others")
        if ("target" in body) == ("targets" in body):
            raise InvalidRequest("give target or targets", param="target")
        if "target" in body:
            targets, params = [(_text(body["target"], "target"), 1)], ["target"]
        else:
            targets = _targets(body["targets"])
            params = [f"targets[{index}].model" for index in range(len(targets))]
        expected = body.get("expected_revision")
        if expected is not None and (type(expected) is not int or not 0 <= expected <= 2**31):
            raise InvalidRequest("expected_revision: must be an integer", param="expected_revision")
        view, is_new = await self._front.adapters.aliases.set(
            alias,
            targets,
            expected_revision=expected,
            tenant=self._tenant_to_set(request, alias),
            params=params,
        )
        return answer(view, 201 if is_new else 200)

    async def list(self, request: Request) -> Response:
        """Every alias the caller sees."""
        views = self._front.adapters.aliases.list(tenant=caller(request).tenant)
        return answer({"object": "list", "data": views})

    async def show(self, request: Request, alias: str) -> Response:
        """One alias."""
        return answer(self._front.adapters.aliases.show(alias, tenant=caller(request).tenant))

    async def delete(self, request: Request, alias: str) -> Response:
        """The name means nothing from now on; the adapters stay."""
        asking = caller(request)
        owner = self._front.adapters.aliases.owner(alias, tenant=asking.tenant)
        if owner != asking.tenant and not asking.is_admin:
            raise PermissionDenied("a shared alias: changing it needs a key with the scope admin")
        return answer(await self._front.adapters.aliases.delete(alias, tenant=owner))

    def _tenant_to_set(self, request: Request, alias: str) -> str:
        """An operator moves the shared alias that the name means; anybody else's is their own, and
        takes the shared one's place for them."""
        asking = caller(request)
        if not asking.is_admin:
            return asking.tenant
        return self._front.adapters.aliases.owner(alias, tenant=asking.tenant)


def _targets(value: Any) -> list[tuple[str, int]]:
    if not isinstance(value, list):
        raise InvalidRequest("targets: must be a list", param="targets")
    found = []
    for index, item in enumerate(value):
        param = f"targets[{index}]"
        if not isinstance(item, dict) or item.keys() != {"model", "weight"}:
            raise InvalidRequest(f"{param}: must have model and weight, no others", param=param)
        weight = item["weight"]
        if type(weight) is not int or not 1 <= weight <= MAX_WEIGHT:
            raise InvalidRequest(
                f"{param}.weight: must be an integer from 1 to {MAX_WEIGHT}",
                param=f"{param}.weight",
            )
        found.append((_text(item["model"], f"{param}.model"), weight))
    return found


def _text(value: Any, param: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{param}: must be a string", param=param)
    return value
