"""An alias is swapped whole or not at all, and what it stands for does not vanish under it."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.adapters.test_registry import BASE, CONFIG, WEIGHTS, ready

from loramux.adapters import aliases as aliases_module
from loramux.adapters.aliases import Aliases, AliasRow, Target
from loramux.adapters.registry import AdapterRow, Registry
from loramux.errors import Conflict, GenerationGone, NotFound, QuotaExceeded

ROOT = Path(__file__).parents[2]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path)
    registry.base_fingerprint = BASE
    yield registry
    registry.close()


@pytest.fixture
def aliases(registry: Registry) -> Aliases:
    return Aliases(registry.database)


def pin_to(row: AdapterRow, weight: int = 1) -> Target:
    return Target(
        owner=row.tenant,
        name=row.name,
        generation=row.generation,
        digest=row.digest,
        weight=weight,
    )


def refused(code: str, call: Any, *args: Any, **kwargs: Any) -> Conflict:
    with pytest.raises(Conflict) as caught:
        call(*args, **kwargs)
    assert caught.value.code == code
    return caught.value


def two(registry: Registry) -> tuple[AdapterRow, AdapterRow]:
    return ready(registry, "cat", 0), ready(registry, "cat", 1, expected=1)


def test_a_target_is_for_the_target_model(registry: Registry, aliases: Aliases) -> None:
    row, _ = registry.create("d", config_digest="c" * 64, weights_digest="d" * 64, base="draft")
    registry.partner_fingerprints = {"draft": "tiny"}
    row = registry.mark_ready(row.id, fingerprint="tiny", report={})
    assert row.status == "ready"
    for target in (pin_to(row), Target(name="d")):
        refused("adapter_not_ready", aliases.set, "a", [target])


def test_revisions_count_changes(registry: Registry, aliases: Aliases) -> None:
    one, other = two(registry)
    row, before = aliases.set("prod", [pin_to(one)], expected_revision=0)
    assert (row.revision, before, row.targets) == (1, 0, (pin_to(one),))
    assert aliases.set("prod", [pin_to(one)], expected_revision=9) == (row, 1), "no change"
    shares = [pin_to(one, 90), pin_to(other, 10)]
    changed, before = aliases.set("prod", shares, expected_revision=1)
    assert (changed.revision, before, changed.targets) == (2, 1, tuple(shares))
    for stale in (0, 1, 3):
        error = refused(
            "revision_conflict", aliases.set, "prod", [pin_to(one)], expected_revision=stale
        )
        assert error.param == "expected_revision" and "is 2" in error.message
    assert aliases.get("prod") == changed and aliases.every() == [changed]
    assert aliases.set("prod", list(reversed(shares)))[0].revision == 3


def test_a_revision_is_never_used_twice(registry: Registry, aliases: Aliases) -> None:
    one, other = two(registry)
    aliases.set("prod", [pin_to(one)])
    assert aliases.remove("prod").targets == ()
    assert aliases.get("prod") is None and aliases.every() == []
    with pytest.raises(NotFound):
        aliases.remove("prod")
    refused("revision_conflict", aliases.set, "prod", [pin_to(other)], expected_revision=1)
    row, before = aliases.set("prod", [pin_to(other)], expected_revision=0)
    assert before == 0 and row.revision == 3, "who read revision 1 cannot take it for this"


def test_names_are_either_an_adapters_or_an_aliases(registry: Registry, aliases: Aliases) -> None:
    one, _ = two(registry)
    refused("name_reserved", aliases.set, "cat", [pin_to(one)])
    aliases.set("cat", [pin_to(one)], tenant="alice")
    aliases.set("prod", [pin_to(one)])
    for tenant, name in (("", "prod"), ("alice", "cat")):
        refused(
            "name_reserved",
            registry.create,
            name,
            config_digest=CONFIG,
            weights_digest=WEIGHTS[2],
            tenant=tenant,
        )
    registry.create("prod", config_digest=CONFIG, weights_digest=WEIGHTS[2], tenant="alice")
    aliases.remove("prod")
    ready(registry, "prod", 2)


def test_a_target_is_there_and_ready(registry: Registry, aliases: Aliases) -> None:
    one, other = two(registry)
    for target in (
        Target(name="dog"),
        Target(name="cat", generation=3, digest=one.digest),
        Target(name="cat", generation=1, digest=other.digest),
        Target(name="cat", owner="alice"),
    ):
        refused("adapter_not_ready", aliases.set, "prod", [Target(), pin_to(one), target])
    assert aliases.get("prod") is None, "all of a change or nothing of it"
    aliases.set("prod", [Target(), Target(name="cat"), pin_to(one)])


def test_a_tenant_has_so_many(
    registry: Registry, aliases: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aliases_module, "MAX_ALIASES", 2)
    aliases.set("a", [Target()])
    aliases.set("b", [Target()])
    with pytest.raises(QuotaExceeded):
        aliases.set("c", [Target()])
    aliases.set("c", [Target()], tenant="alice")
    aliases.set("b", [Target(weight=2)])
    aliases.remove("a")
    aliases.set("c", [Target()])


def test_a_pinned_target_is_held(registry: Registry, aliases: Aliases) -> None:
    one, other = two(registry)
    aliases.set("prod", [pin_to(one)])
    aliases.set("old", [pin_to(one), Target()])
    error = refused("adapter_aliased", registry.delete, "cat", generation=1)
    assert "(old, prod)" in error.message
    refused("adapter_aliased", registry.delete, "cat")
    assert [row.status for row in registry.list("cat")] == ["ready", "ready"]
    (gone,) = registry.delete("cat", generation=2)
    assert (gone.id, gone.status) == (other.id, "deleting")
    assert registry.get("cat").generation == 1
    aliases.remove("prod")
    aliases.remove("old")
    (gone,) = registry.delete("cat", generation=1)
    assert gone.id == one.id
    with pytest.raises(NotFound):
        registry.get("cat")


def test_a_followed_name_holds_its_newest_that_can_serve(
    registry: Registry, aliases: Aliases
) -> None:
    two(registry)
    aliases.set("prod", [Target(name="cat")])
    refused("adapter_aliased", registry.delete, "cat", generation=2)
    refused("adapter_aliased", registry.delete, "cat")
    registry.delete("cat", generation=1)
    row, _ = registry.create(
        "cat", config_digest=CONFIG, weights_digest=WEIGHTS[2], expected_generation=2
    )
    refused("adapter_aliased", registry.delete, "cat", generation=2)
    registry.mark_ready(row.id, fingerprint=BASE, report={})
    registry.delete("cat", generation=2)
    refused("adapter_aliased", registry.delete, "cat", generation=3)


def test_another_tenants_alias_holds_nothing(registry: Registry, aliases: Aliases) -> None:
    """Else each tenant could keep operators from removing what is shared."""
    one, _ = two(registry)
    aliases.set("prod", [pin_to(one), Target(name="cat")], tenant="alice")
    assert len(registry.delete("cat")) == 2


def test_one_generation_by_its_number(registry: Registry) -> None:
    two(registry)
    registry.set_pinned("cat", True)
    refused("adapter_pinned", registry.delete, "cat")
    refused("adapter_pinned", registry.delete, "cat", generation=2)
    for number in (0, 3):
        with pytest.raises(NotFound) as caught:
            registry.delete("cat", generation=number)
        assert caught.value.code == "model_not_found"
    (gone,) = registry.delete("cat", generation=1)
    registry.forget(gone.id)
    with pytest.raises(GenerationGone):
        registry.delete("cat", generation=1)
    registry.set_pinned("cat", False)
    assert len(registry.delete("cat")) == 1


def test_many_threads_swap_one_alias(registry: Registry, aliases: Aliases) -> None:
    rows = two(registry)
    aliases.set("prod", [Target()])
    won: list[AliasRow] = []

    def swap(number: int) -> None:
        for _ in range(20):
            now = aliases.get("prod")
            assert now is not None and len(now.targets) in (1, 3)
            shares = [pin_to(rows[number % 2], number + 1), Target(), Target(name="cat")]
            try:
                row, _ = aliases.set("prod", shares, expected_revision=now.revision)
            except Conflict as error:
                assert error.code == "revision_conflict"
            else:
                won.append(row)

    threads = [threading.Thread(target=swap, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = aliases.get("prod")
    assert last is not None and {row.revision for row in won} == set(range(2, last.revision + 1))


CHILD = """
import os, signal, sys
from pathlib import Path
from loramux.adapters.aliases import Aliases, Target
from loramux.adapters.registry import Registry

left = int(sys.argv[2])
registry = Registry(Path(sys.argv[1]))

def point(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

registry.database.connection.set_trace_callback(point)
row, _ = Aliases(registry.database).set("prod", [Target(weight=3), Target(name="cat")])
os.write(1, b"%d" % row.revision)
point()
"""


def test_killed_at_every_statement_of_a_swap(tmp_path: Path) -> None:
    """Old or new, never neither, and new once it was answered."""
    registry = Registry(tmp_path)
    one, _ = two(registry)
    aliases = Aliases(registry.database)
    old = aliases.set("prod", [pin_to(one)])[0]
    registry.close()
    outcomes = []
    for number in itertools.count(1):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, str(tmp_path), str(number)],
            env={"PYTHONPATH": str(ROOT / "server")},
            stdout=subprocess.PIPE,
            check=False,
        )
        registry = Registry(tmp_path)
        aliases = Aliases(registry.database)
        row = aliases.get("prod")
        assert row is not None and len(row.targets) in (1, 2)
        swapped = row.targets == (Target(weight=3), Target(name="cat"))
        assert swapped or row.targets == old.targets
        assert swapped or not child.stdout
        outcomes.append((swapped, bool(child.stdout)))
        aliases.set("prod", old.targets)
        registry.close()
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    assert outcomes[0] == (False, False) and outcomes[-1] == (True, True)
    assert (True, True) in outcomes[:-1], "killed right after the answer"
    assert outcomes == sorted(outcomes) and len(outcomes) > 5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """``clock[0]`` is the time of day."""
    now = [1_000.5]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_a_time_to_live(registry: Registry, clock: list[float]) -> None:
    row, _ = registry.create("cat", config_digest=CONFIG, weights_digest=WEIGHTS[0], ttl_s=60)
    assert row.expires == 1061, "60 seconds at least"
    registry.mark_ready(row.id, fingerprint=BASE, report={})
    registry.set_pinned("cat", True)
    clock[0] = 1060.9
    assert registry.expire() == [] and registry.get("cat").expires == 1061
    clock[0] = 1061.0
    with pytest.raises(NotFound):
        registry.set_ttl("cat", 1, None)
    with pytest.raises(NotFound):
        registry.set_pinned("cat", False)
    (gone,) = registry.expire()
    assert (gone.id, gone.status, gone.pinned) == (row.id, "deleting", True)
    assert registry.expire() == [gone], "until it is forgotten"
    again = ready(registry, "cat", 0)
    assert (again.generation, again.pinned, again.expires) == (2, False, None)


def test_a_time_to_live_changes_and_survives(registry: Registry, clock: list[float]) -> None:
    two(registry)
    assert registry.set_ttl("cat", 1, 10).expires == 1011
    assert registry.set_ttl("cat", 2, 5).expires == 1006
    assert registry.set_ttl("cat", 2, None).expires is None
    with pytest.raises(NotFound):
        registry.set_ttl("cat", 3, 5)
    files = {"config_digest": CONFIG, "weights_digest": WEIGHTS[1]}
    row, fresh = registry.create("cat", ttl_s=7, **files)
    assert not fresh and row.expires == 1008, "pushed again: it lives on from now"
    assert registry.create("cat", **files)[0].expires == 1008, "and says so when nothing is asked"
    again = Registry(registry.database._path.parent)
    assert [r.expires for r in again.list("cat")] == [1008, 1011]
    clock[0] = 1011
    assert len(again.expire()) == 2
    again.close()


def test_what_has_expired_holds_no_name(
    registry: Registry, aliases: Aliases, clock: list[float]
) -> None:
    ready(registry, "cat", 0)
    registry.set_ttl("cat", 1, 1)
    clock[0] = 1002
    row, fresh = registry.create(
        "cat", config_digest=CONFIG, weights_digest=WEIGHTS[1], expected_generation=0
    )
    assert fresh and row.generation == 2
    registry.mark_failed(row.id, code="x", problems=["y"])
    registry.set_ttl("cat", 2, 1)
    clock[0] = 1004
    registry.expire()
    aliases.set("cat", [Target()])


def test_an_alias_outlives_a_time_to_live(
    registry: Registry, aliases: Aliases, clock: list[float]
) -> None:
    one, other = two(registry)
    for number in (1, 2):
        registry.set_ttl("cat", number, 1)
    aliases.set("prod", [pin_to(one), Target(name="cat")])
    clock[0] = 2000
    assert registry.expire() == []
    assert [row.status for row in registry.list("cat")] == ["ready", "ready"]
    aliases.set("prod", [Target(name="cat")])
    assert [row.id for row in registry.expire()] == [one.id]
    registry.set_ttl("cat", 2, 100)
    clock[0] = 2101
    aliases.remove("prod")
    assert {row.id for row in registry.expire()} == {one.id, other.id}
