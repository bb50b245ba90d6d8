"""What a name means to each tenant, against the rule said in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.http.fake_front import row

from loramux.adapters.aliases import AliasRow, Target
from loramux.adapters.registry import AdapterRow
from loramux.errors import Conflict, LoramuxError, NotFound
from loramux.front.catalog import SHARED, AdapterView, Catalog, Served
from loramux.front.observations import Snapshot

TENANTS = [SHARED, "alice", "bob"]
NAMES = ["cat", "dog"]
STATUSES = ["validating", "ready", "failed", "deleting", "incompatible"]

PUTS = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.sampled_from(NAMES),
        st.lists(st.sampled_from(STATUSES), max_size=3),
    ),
    max_size=12,
)


def outcome(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except LoramuxError as error:
        return (type(error), error.code, error.message)


@given(PUTS)
def test_its_own_else_the_shared_one(puts: list[tuple[str, str, list[str]]]) -> None:
    catalog = Catalog("base", Snapshot())
    world: dict[tuple[str, str], list[AdapterRow]] = {}
    for tenant, name, statuses in puts:
        rows = [
            row(name, generation, status, tenant=tenant, id=hash((tenant, name, generation)))
            for generation, status in reversed(list(enumerate(statuses, 1)))
        ]
        world[tenant, name] = rows
        catalog.put(name, rows, tenant=tenant)

    def best(rows: list[AdapterRow]) -> AdapterView:
        return catalog.view(next((r for r in rows if r.status == "ready"), rows[0]))

    for tenant in TENANTS:
        listed = []
        for name in NAMES:
            own, shared = (world.get((who, name), []) for who in (tenant, SHARED))
            seen = [
                rows
                for rows in ([r for r in each if r.status != "deleting"] for each in (own, shared))
                if rows
            ]
            found = outcome(lambda t=tenant, n=name: catalog.show(n, tenant=t))
            if seen:
                assert found == best(seen[0])
                assert catalog.owner(name, tenant=tenant) == seen[0][0].tenant
                listed.append(found)
            else:
                assert found[0] is NotFound
                assert catalog.owner(name, tenant=tenant) == tenant
                listed += [best(rows) for rows in (own, shared) if rows][:1]
            others = Catalog("base", Snapshot())
            for (who, name_), rows in world.items():
                if who in (tenant, SHARED):
                    others.put(name_, rows, tenant=who)
            for model in (name, f"{name}@1", f"{name}@3", f"{name}@9", "x"):
                here, alone = [
                    outcome(lambda c=each, m=model, t=tenant: c.resolve(m, tenant=t))
                    for each in (catalog, others)
                ]
                assert here == alone, "as if the other tenants did not exist"
            assert catalog.list(tenant=tenant) == others.list(tenant=tenant)
        assert [view.id for view in catalog.list(tenant=tenant)] == [view.id for view in listed]
    every = {row.id for rows in world.values() for row in rows}
    assert {row.id for row in catalog.rows()} == every
    for rows in world.values():
        for each in rows:
            assert catalog.row(each) is each
            assert catalog.serves(each.digest) == any(
                r.status == "ready" and r.digest == each.digest for r in catalog.rows()
            )


ALIASES = st.dictionaries(
    st.tuples(st.sampled_from(TENANTS), st.sampled_from([*NAMES, "prod"])),
    st.tuples(st.sampled_from(["", SHARED, "own"]), st.sampled_from(NAMES), st.integers(0, 3)),
    max_size=5,
)


@given(PUTS, ALIASES)
def test_an_alias_means_what_its_target_does(
    puts: list[tuple[str, str, list[str]]],
    aliases: dict[tuple[str, str], tuple[str, str, int]],
) -> None:
    catalog = Catalog("base", Snapshot())
    world: dict[tuple[str, str], list[AdapterRow]] = {}
    for tenant, name, statuses in puts:
        if (tenant, name) not in aliases:  # no registry has both
            rows = [
                row(name, generation, status, tenant=tenant, id=hash((tenant, name, generation)))
                for generation, status in reversed(list(enumerate(statuses, 1)))
            ]
            world[tenant, name] = rows
            catalog.put(name, rows, tenant=tenant)
    for (tenant, alias), (kind, name, generation) in aliases.items():
        owner = tenant if kind == "own" else SHARED
        target = Target(owner=owner, name=name, generation=generation) if kind else Target()
        made = AliasRow(tenant=tenant, name=alias, revision=1, targets=(target,), changed=0.0)
        catalog.put_alias(alias, made, tenant=tenant)

    def seen(who: str, name: str) -> bool:
        return any(row.status != "deleting" for row in world.get((who, name), []))

    for tenant in TENANTS:
        means = {}
        for name in [*NAMES, "prod"]:
            if (tenant, name) in aliases or (SHARED, name) in aliases and not seen(tenant, name):
                means[name] = tenant if (tenant, name) in aliases else SHARED
        found = {row.name: row.tenant for row in catalog.aliases(tenant=tenant)}
        assert found == means and list(found) == sorted(found)
        for name in [*NAMES, "prod"]:
            got = outcome(lambda t=tenant, n=name: catalog.resolve(n, tenant=t))
            if name not in means:
                shown = outcome(lambda t=tenant, n=name: catalog.show(n, tenant=t))
                assert isinstance(got, Served) == (getattr(shown, "status", "") == "ready")
                continue
            (target,) = catalog.alias(name, tenant=tenant).targets
            rows = world.get((target.owner, target.name), []) if target.name else []
            there = [r for r in rows if r.status != "deleting"]
            if target.generation:
                there = [r for r in there if r.generation == target.generation]
            ready = [r for r in there if r.status == "ready"]
            if not target.name:
                assert got == Served((), name)
            elif not there:
                assert got[1] == "generation_gone" and name in got[2]
            elif not ready:
                assert got[0] is Conflict
            else:
                assert (got.name, got.label) == (name, ready[0].digest)
                assert got.versions == (f"{target.name}@{ready[0].generation}",)
        for name in NAMES:
            model = f"{name}@1"
            shown = outcome(lambda t=tenant, m=model: catalog.show(m, tenant=t))
            got = outcome(lambda t=tenant, m=model: catalog.resolve(m, tenant=t))
            assert isinstance(got, Served) == (getattr(shown, "status", "") == "ready")


def test_an_alias_that_goes() -> None:
    catalog = Catalog("base", Snapshot())
    made = AliasRow(tenant="", name="prod", revision=1, targets=(Target(),), changed=0.0)
    catalog.put_alias("prod", made)
    assert catalog.resolve("prod", tenant="alice") == Served((), "prod")
    catalog.put_alias("prod", None)
    catalog.put_alias("prod", None)
    assert catalog.aliases() == [] and catalog.alias("prod") is None
