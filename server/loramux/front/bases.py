"""The models of this server that an adapter can be for."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from loramux.errors import InvalidRequest, Overloaded
from loramux.request import BASE_MODEL_ID, MODEL_IDS, Role
from loramux.wire import BaseDescription


class Bases:
    """What the newest engine said of each."""

    def __init__(self) -> None:
        self._known: dict[Role, BaseDescription] = {}

    def know(self, base: BaseDescription, partners: Mapping[int, BaseDescription]) -> None:
        """An engine is ready: its target, and the other models it has, by model id."""
        there = {BASE_MODEL_ID: base}
        for model_id, partner in partners.items():  # in a pool that is cut for the target
            there[model_id] = replace(partner, frame_slices=base.num_layers)
        self._known = {role: there[i] for role, i in MODEL_IDS.items() if i in there}

    def of(self, role: Role) -> BaseDescription:
        """The model that adapters for ``role`` are validated against. Raises Overloaded before an
        engine was ready once, and InvalidRequest (base) when this server has no such model."""
        if not self._known:
            raise Overloaded("no engine has been ready yet", code="engine_starting")
        if role not in self._known:
            raise InvalidRequest(
                f"base: this server has no {role} model (--{role}-model)", param="base"
            )
        return self._known[role]

    def find(self, role: Role) -> BaseDescription | None:
        """The same; None where there is none."""
        return self._known.get(role)

    @property
    def partner_fingerprints(self) -> dict[Role, str]:
        """Of all but the target."""
        return {role: b.fingerprint for role, b in self._known.items() if role != "target"}
