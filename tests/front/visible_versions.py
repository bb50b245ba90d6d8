"""The part of a random history that is about versions: deletion of all or one, times to live,
aliases, and what every name then means."""

from __future__ import annotations

from typing import Any

import pytest
from tests.front.visible_machine import (
    EITHER,
    EXPECTED,
    NAME,
    NAMES,
    PICK,
    TENANT,
    TENANTS,
    TTL,
    USERS,
    Machine,
    action,
)
from tests.front.visible_model import BASE_NAME, LATER, SHARED, Model, Refused

from loramux.errors import LoramuxError
from loramux.front.catalog import model_of

# "dog" is an adapter's name as well.
ALIAS = ["pet", "pet", "dog"]

# Names, each with which of the generations that it means; None: whichever it means.
TARGETS: list[list[tuple[str, int | None]]] = [
    [("cat", None)],
    [("cat", 0)],
    [("cat", 0)],
    [("cat", 0)],
    [("cat", 1)],
    [("cat", 1), ("cat", 0)],
    [("cat", 1), ("cat", None)],
    [("dog", None), ("cat", 0)],
    [("cat", None), (BASE_NAME, None)],
    [(BASE_NAME, None)],
    [(BASE_NAME, None)],
    [("pet", None)],
    [("dog", 0), ("dog", 0)],
]
WEIGHTS_OF_TARGETS = [(1, 1), (1, 1), (1, 5), (1000000, 1)]


class Versions(Machine):
    """Actions and what has to be so."""

    def generation(self, tenant: str, name: str, pick: int | None) -> int | None:
        """One of those that the name means to the tenant, else one that there may have been."""
        if pick is None or name == BASE_NAME:
            return None
        rows = self.model.meant(tenant, name)
        return rows[pick % len(rows)].generation if rows else 1

    # Deletion.

    @action(TENANT, NAME)
    def delete(self, tenant: str, name: str) -> None:
        refused = None
        try:
            self.model.delete(tenant, name)
        except Refused as error:
            refused = error
        self.told(self.service.delete(name, tenant=tenant), refused)

    @action(TENANT, NAME, [1, 2, 3, *PICK], often=2)
    def delete_one(self, tenant: str, name: str, pick: int) -> None:
        refused = None
        generation = self.generation(tenant, name, pick)
        if pick % 10 == 9:  # one that has gone, or never came
            generation = pick // 10
        try:
            self.model.delete(tenant, name, generation)
        except Refused as error:
            refused = error
        self.told(self.service.delete(f"{name}@{generation}", tenant=tenant), refused)

    # Times to live.

    @action(TENANT, NAME, [None, 0, 1], TTL[1:], often=3)
    def set_ttl(self, tenant: str, name: str, pick: int | None, ttl_s: int | None) -> None:
        refused = None
        generation = self.generation(tenant, name, pick)
        try:
            self.model.set_ttl(tenant, name, generation, ttl_s and LATER)
        except Refused as error:
            refused = error
        text = spelled(name, generation)
        self.told(self.service.set_ttl(text, ttl_s, tenant=tenant), refused)

    @action(TENANTS, EITHER, often=2)
    def time_goes_by(self, tenant: str, sweep: bool) -> None:
        """Every time of a tenant's is over, and perhaps the sweep comes."""
        with self.service.shelf.registry.database.transaction() as db:
            past = "UPDATE adapters SET expires = 1 WHERE tenant = ? AND expires IS NOT NULL"
            db.execute(past, (tenant,))
        for name in NAMES:
            self.do(self.service.shelf.refresh(tenant, name))
        self.model.time_goes_by(tenant)
        if sweep:
            self.sweep()

    @action()
    def sweep(self) -> None:
        self.do(self.service.expire())
        self.model.expire()
        self.model.forget(self.model.rows)

    # Aliases.

    @action(TENANT, ALIAS, TARGETS, WEIGHTS_OF_TARGETS, EXPECTED, often=10)
    def set_alias(
        self,
        tenant: str,
        name: str,
        targets: list[tuple[str, int | None]],
        weights: tuple[int, int],
        expected: Any,
    ) -> None:
        model, refused, alias = self.model, None, None
        before = model.aliases.get((tenant, name))
        if expected == "right":
            expected = before.revision if before else 0
        meant = [
            (of, self.generation(tenant, of, pick), weight)
            for (of, pick), weight in zip(targets, weights, strict=False)
        ]
        try:
            alias = model.set_alias(tenant, name, meant, expected)
        except Refused as error:
            refused = error
        spelt = [(spelled(of, generation), weight) for of, generation, weight in meant]
        setting = self.service.aliases.set(name, spelt, expected_revision=expected, tenant=tenant)
        answer = self.told(setting, refused)
        if alias is not None:
            assert answer is not None
            assert (answer[0].revision, answer[1]) == (alias.revision, before is None)

    @action(TENANT, ALIAS)
    def remove_alias(self, tenant: str, name: str) -> None:
        refused = None
        try:
            self.model.remove_alias(tenant, name)
        except Refused as error:
            refused = error
        self.told(self.service.aliases.delete(name, tenant=tenant), refused)

    # What has to be so in every state.

    def names_mean_what_they_should(self) -> None:
        for tenant in TENANTS:
            for name in NAMES:
                last = max(self.model.last[tenant, name], self.model.last[SHARED, name])
                for user in USERS:
                    self.compare(tenant, name, None, user)
                for generation in range(last + 2):
                    self.compare(tenant, name, generation, None)

    def compare(self, tenant: str, name: str, generation: int | None, user: str | None) -> None:
        text = spelled(name, generation)
        try:
            served = self.service.resolve(text, tenant=tenant, user=user)
        except LoramuxError as error:
            with pytest.raises(Refused) as refused:
                self.model.resolve(tenant, name, generation, user)
            assert refused.value.code == error.code, (tenant, text)
            return
        row = self.model.resolve(tenant, name, generation, user)
        expected = (row.digest, row.generation) if row else ("base", 0)
        assert (served.label, served.generation) == expected, (tenant, text)
        assert served.name == name

    def aliases_are_as_they_were_set(self) -> None:
        model = self.model
        rows = self.service.shelf.aliases.every()
        assert {(r.tenant, r.name): (r.revision, r.targets) for r in rows} == {
            key: (alias.revision, alias.targets) for key, alias in model.aliases.items()
        }
        for tenant in TENANTS:
            seen = [
                (view.id, view.revision, [(t.model, t.weight, t.digest) for t in view.targets])
                for view in self.service.aliases.list(tenant=tenant)
            ]
            assert seen == seen_by(model, tenant)


def seen_by(model: Model, tenant: str) -> list[Any]:
    """A tenant's list of aliases: names, revisions and targets with what answers now."""
    found = []
    for name in NAMES:
        if alias := model.alias(tenant, name):
            targets = []
            for target in alias.targets:
                row = model.meant_by(target)
                text = model_of(target) if target.name else BASE_NAME
                targets.append((text, target.weight, row.digest if row else None))
            found.append((name, alias.revision, targets))
    return found


def spelled(name: str, generation: int | None) -> str:
    return name if generation is None else f"{name}@{generation}"
