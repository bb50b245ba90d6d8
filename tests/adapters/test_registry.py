"""Names, generations and states survive restarts; conflicts are told, never resolved silently."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loramux.adapters.blobs import adapter_digest
from loramux.adapters.database import SCHEMA_VERSION
from loramux.adapters.registry import AdapterRow, Registry
from loramux.errors import (
    ConfigError,
    Conflict,
    GenerationGone,
    InvalidRequest,
    NotFound,
    StorageFull,
)
from loramux.request import Role

CONFIG = "c" * 64
WEIGHTS = [f"{i:x}" * 64 for i in range(4)]
BASE, OTHER_BASE = "base-one", "base-two"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path)
    registry.base_fingerprint = BASE
    yield registry
    registry.close()


def create(registry: Registry, name: str, version: int, expected: int | None = None) -> AdapterRow:
    row, fresh = registry.create(
        name,
        config_digest=CONFIG,
        weights_digest=WEIGHTS[version],
        expected_generation=expected,
    )
    assert fresh and row.status == "validating"
    return row


def ready(
    registry: Registry, name: str, version: int, expected: int | None = None, base: str = BASE
) -> AdapterRow:
    row = create(registry, name, version, expected)
    return registry.mark_ready(row.id, fingerprint=base, report={"rank": 4})


def test_an_adapter_from_upload_to_gone(registry: Registry) -> None:
    row = create(registry, "shout", 0)
    assert row.digest == adapter_digest(CONFIG, WEIGHTS[0])
    assert (row.generation, row.fingerprint, row.error, row.report) == (1, "", None, {})
    done = registry.mark_ready(row.id, fingerprint=BASE, report={"rank": 4, "warnings": ["é"]})
    assert done == registry.get("shout") == registry.list()[0]
    assert (done.status, done.fingerprint, done.report["warnings"]) == ("ready", BASE, ["é"])
    (deleting,) = registry.delete("shout")
    assert deleting.status == "deleting" and registry.list() == [deleting]
    for call in (registry.get, registry.delete):
        with pytest.raises(NotFound):
            call("shout")
    assert registry.uses_blob(CONFIG) and registry.uses_adapter(row.digest)
    registry.forget(row.id)
    assert registry.list() == []
    assert not registry.uses_blob(CONFIG) and not registry.uses_adapter(row.digest)


def test_everything_is_there_after_a_restart(registry: Registry, tmp_path: Path) -> None:
    ready(registry, "b", 0)
    registry.set_pinned("b", True)
    ready(registry, "b", 1, expected=1)
    row = create(registry, "a", 2)
    registry.mark_failed(row.id, code="rank_mismatch", problems=["x", "y"])
    create(registry, "c", 3)
    before = registry.list()
    assert [(r.name, r.generation, r.status, r.pinned) for r in before] == [
        ("a", 1, "failed", False),
        ("b", 2, "ready", True),
        ("b", 1, "ready", False),
        ("c", 1, "validating", False),
    ]
    assert registry.list("b") == before[1:3] and registry.list("none") == []
    registry.close()
    again = Registry(tmp_path)
    again.base_fingerprint = BASE
    assert again.list() == before
    again.close()


def test_the_same_files_are_the_same_row(registry: Registry) -> None:
    for row in (create(registry, "a", 0), ready(registry, "b", 0)):
        for expected in (None, 1, 7):
            again = registry.create(
                row.name,
                config_digest=CONFIG,
                weights_digest=WEIGHTS[0],
                expected_generation=expected,
            )
            assert again == (row, False)


def test_other_files_need_to_know_what_they_replace(registry: Registry) -> None:
    first = ready(registry, "a", 0)
    for expected in (None, 0, 2):
        with pytest.raises(Conflict) as caught:
            create(registry, "a", 1, expected)
        assert caught.value.code == "generation_conflict" and caught.value.status == 409
    with pytest.raises(Conflict):
        create(registry, "new", 1, expected=1)
    second = create(registry, "a", 1, expected=1)
    assert second.generation == 2
    assert registry.get("a") == first, "the old one serves until the new one is ready"
    with pytest.raises(Conflict):
        create(registry, "a", 2, expected=1)
    second = registry.mark_ready(second.id, fingerprint=BASE, report={})
    assert registry.get("a") == second
    assert registry.get("a", generation=1) == first
    assert ready(registry, "a", 0, expected=2).generation == 3, "rolling back is a generation too"
    assert create(registry, "free", 0, expected=0).generation == 1


def test_a_failed_adapter_does_not_hold_its_name(registry: Registry) -> None:
    row = create(registry, "a", 0)
    failed = registry.mark_failed(row.id, code="non_finite", problems=["NaN in x"])
    assert failed.error == {"code": "non_finite", "message": "NaN in x", "problems": ["NaN in x"]}
    assert registry.get("a") == failed
    retried = create(registry, "a", 0)
    assert (retried.id, retried.generation, retried.error) == (row.id, 1, None)
    registry.mark_failed(row.id, code="non_finite", problems=["NaN in x"])
    fixed = create(registry, "a", 1)
    assert fixed.generation == 2 and registry.list() == [fixed]


def test_generations_are_found_gone_or_unknown(registry: Registry) -> None:
    first = ready(registry, "a", 0)
    registry.delete("a")
    registry.forget(first.id)
    second = ready(registry, "a", 0)
    assert second.generation == 2, "a number never means two things"
    with pytest.raises(GenerationGone) as caught:
        registry.get("a", generation=1)
    assert (caught.value.status, caught.value.code) == (404, "generation_gone")
    for generation in (3, 0, -1):
        with pytest.raises(NotFound) as unknown:
            registry.get("a", generation=generation)
        assert unknown.value.code == "model_not_found"
    assert registry.get("a", generation=2) == second


def test_a_version_by_its_digest(registry: Registry) -> None:
    first, second = ready(registry, "a", 0), ready(registry, "a", 1, expected=1)
    for row in (first, second):
        for length in (12, 13, 64):
            assert registry.get("a", digest_prefix=row.digest[:length]) == row
    for prefix in (first.digest[:11], "", "0" * 12, first.digest + "0", "%" * 12):
        with pytest.raises(NotFound):
            registry.get("a", digest_prefix=prefix)


def test_another_base_makes_incompatible_and_changes_nothing(registry: Registry) -> None:
    row = ready(registry, "a", 0)
    registry.base_fingerprint = OTHER_BASE
    assert registry.get("a").status == "incompatible"
    with pytest.raises(Conflict, match="incompatible"):
        registry.set_pinned("a", True)
    for_other = ready(registry, "a", 0, base=OTHER_BASE)
    assert for_other.generation == 2, "an adapter that cannot serve here does not hold its name"
    assert registry.get("a") == for_other
    registry.base_fingerprint = BASE
    assert registry.get("a") == row
    assert [r.status for r in registry.list()] == ["incompatible", "ready"]


def test_a_row_is_for_one_of_several_models(registry: Registry) -> None:
    registry.partner_fingerprints = {"draft": "tiny"}

    def made(name: str, base: Role, fingerprint: str = "") -> AdapterRow:
        files = {"config_digest": CONFIG, "weights_digest": WEIGHTS[0]}
        row, _ = registry.create(name, base=base, **files)
        if fingerprint:
            return registry.mark_ready(row.id, fingerprint=fingerprint, report={})
        return row

    statuses = {
        ("draft", "tiny"): "ready",
        ("draft", BASE): "incompatible",
        ("draft", ""): "validating",
        ("target", BASE): "ready",
        ("target", "tiny"): "incompatible",
        ("small", "tiny"): "incompatible",
        ("small", ""): "incompatible",
    }
    rows = {}
    for number, (base, fingerprint) in enumerate(statuses):
        rows[base, fingerprint] = made(f"a{number}", base, fingerprint)
    assert {key: row.status for key, row in rows.items()} == statuses
    assert [row.base for row in registry.list()] == [base for base, _ in statuses]
    registry.partner_fingerprints = {}
    assert {r.status for r in registry.list() if r.base != "target"} == {"incompatible"}
    registry.base_fingerprint = ""
    assert "incompatible" not in {r.status for r in registry.list()}, "nothing is known yet"
    registry.base_fingerprint = BASE
    for base in ("target", "small"):
        with pytest.raises(Conflict, match="for the draft model") as caught:
            made("a1", base)  # also one that cannot serve here
        assert (caught.value.param, caught.value.code) == ("base", "name_reserved")
    registry.mark_failed(rows["draft", ""].id, code="x", problems=["one"])
    again = made("a2", "small")
    assert (again.id, again.base, again.error) == (rows["draft", ""].id, "small", None)
    registry.delete("a0")
    assert made("a0", "target", BASE).generation == 2
    with pytest.raises(InvalidRequest, match="draft"):
        registry.set_pinned("a1", True)


def test_a_pin_protects_and_follows_the_name(registry: Registry) -> None:
    ready(registry, "a", 0)
    assert registry.set_pinned("a", True).pinned
    with pytest.raises(Conflict) as caught:
        registry.delete("a")
    assert caught.value.code == "adapter_pinned"
    second = create(registry, "a", 1, expected=1)
    assert not second.pinned and registry.get("a").pinned
    registry.mark_ready(second.id, fingerprint=BASE, report={})
    assert [(r.generation, r.pinned) for r in registry.list()] == [(2, True), (1, False)]
    assert not registry.set_pinned("a", False).pinned
    assert len(registry.delete("a")) == 2
    with pytest.raises(NotFound):
        registry.set_pinned("a", True)
    create(registry, "b", 0)
    with pytest.raises(Conflict) as caught:
        registry.set_pinned("b", True)
    assert caught.value.code == "adapter_not_ready"


def test_a_verdict_on_what_was_deleted_meanwhile(registry: Registry) -> None:
    row = create(registry, "a", 0)
    registry.delete("a")
    with pytest.raises(NotFound):
        registry.mark_ready(row.id, fingerprint=BASE, report={})
    with pytest.raises(NotFound):
        registry.mark_failed(row.id, code="x", problems=["y"])
    assert registry.list()[0].status == "deleting"
    assert create(registry, "a", 0).generation == 2, "deleting does not hold the name"


def test_tenants_do_not_see_each_other(registry: Registry) -> None:
    ready(registry, "a", 0)
    row, fresh = registry.create(
        "a", config_digest=CONFIG, weights_digest=WEIGHTS[1], tenant="other"
    )
    assert fresh and row.generation == 1
    assert [r.tenant for r in registry.list(tenant="other")] == ["other"]
    with pytest.raises(NotFound):
        registry.get("a", tenant="third")
    registry.delete("a", tenant="other")
    assert registry.get("a").status == "ready"


def test_many_threads_create_one_row(registry: Registry) -> None:
    results: list[tuple[AdapterRow, bool]] = []

    def run() -> None:
        results.append(registry.create("a", config_digest=CONFIG, weights_digest=WEIGHTS[0]))

    threads = [threading.Thread(target=run) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(fresh for _, fresh in results) == 1
    assert {row.id for row, _ in results} == {registry.get("a").id}


def test_a_newer_schema_is_refused_by_name(tmp_path: Path) -> None:
    Registry(tmp_path).close()
    db = sqlite3.connect(tmp_path / "registry.sqlite")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(ConfigError, match=f"version {SCHEMA_VERSION + 1}.*--data-dir"):
        Registry(tmp_path)


def test_a_foreign_or_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.sqlite"
    path.write_bytes(b"this is no database, and long enough to be looked at" * 100)
    with pytest.raises(ConfigError, match="cannot be used"):
        Registry(tmp_path)
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE something (x)")
    db.close()
    with pytest.raises(ConfigError, match="not an adapter registry"):
        Registry(tmp_path)
    path.unlink()
    Registry(tmp_path).close()
    data = bytearray(path.read_bytes())
    data[4096:8192] = b"\xff" * 4096
    path.write_bytes(data)
    with pytest.raises(ConfigError):
        Registry(tmp_path)


def test_it_is_durable_by_configuration(registry: Registry) -> None:
    assert registry.database.connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert registry.database.connection.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_a_full_disk_is_said_and_reading_goes_on(registry: Registry) -> None:
    row = ready(registry, "a", 0)
    pages = registry.database.connection.execute("PRAGMA page_count").fetchone()[0]
    registry.database.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageFull):
        for i in range(2000):
            create(registry, f"{i:090}", 0)
    assert registry.get("a") == row
    registry.database.connection.execute("PRAGMA max_page_count = 4294967294")
    create(registry, "room again", 0)


def test_a_late_verdict_never_meets_another_adapter(registry: Registry) -> None:
    """The id of a row that is gone is not given to the next one."""
    gone = create(registry, "a", 0)
    registry.mark_failed(gone.id, code="x", problems=["y"])
    following = create(registry, "a", 1)
    assert following.id != gone.id
    with pytest.raises(NotFound):
        registry.mark_ready(gone.id, fingerprint=BASE, report={})
    assert registry.get("a").status == "validating"


class Lifecycle(RuleBasedStateMachine):
    """Random lives: the invariants hold in every state, and a reopened registry is the same."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.registry = Registry(Path(self.folder.name))
        self.registry.base_fingerprint = BASE
        self.highest: dict[str, int] = {}

    names = st.sampled_from(["a", "b"])

    @rule(name=names, version=st.integers(0, 3), expected=st.sampled_from([None, 0, 1, 2, 3]))
    def create(self, name: str, version: int, expected: int | None) -> None:
        before = self.registry.list()
        try:
            row, fresh = self.registry.create(
                name,
                config_digest=CONFIG,
                weights_digest=WEIGHTS[version],
                expected_generation=expected,
            )
        except Conflict:
            assert self.registry.list() == before
            return
        if row.id not in {r.id for r in before}:
            assert fresh and row.generation == self.highest.get(name, 0) + 1
            self.highest[name] = row.generation
            assert not [r for r in self.registry.list(name) if r.status == "failed"]

    @rule(pick=st.integers(0, 9), good=st.booleans())
    def verdict(self, pick: int, good: bool) -> None:
        waiting = [r for r in self.registry.list() if r.status == "validating"]
        if waiting:
            row = waiting[pick % len(waiting)]
            if good:
                self.registry.mark_ready(row.id, fingerprint=BASE, report={})
            else:
                self.registry.mark_failed(row.id, code="x", problems=["y"])

    @rule(name=names, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        try:
            assert self.registry.set_pinned(name, pinned).pinned is pinned
        except (NotFound, Conflict):
            pass

    @rule(name=names)
    def delete(self, name: str) -> None:
        try:
            self.registry.delete(name)
        except (NotFound, Conflict):
            pass

    @rule(pick=st.integers(0, 9))
    def forget(self, pick: int) -> None:
        going = [r for r in self.registry.list() if r.status == "deleting"]
        if going:
            self.registry.forget(going[pick % len(going)].id)

    @rule()
    def reopen(self) -> None:
        before = self.registry.list()
        self.registry.close()
        self.registry = Registry(Path(self.folder.name))
        self.registry.base_fingerprint = BASE
        assert self.registry.list() == before

    @invariant()
    def at_most_one_pin_and_one_meaning_per_name(self) -> None:
        for name in ("a", "b"):
            rows = [r for r in self.registry.list() if r.name == name]
            live = [r for r in rows if r.status != "deleting"]
            assert sum(r.pinned for r in rows) <= 1
            if live:
                best = [r for r in live if r.status == "ready"] or live
                assert self.registry.get(name) == best[0]

    def teardown(self) -> None:
        self.registry.close()
        self.folder.cleanup()


Lifecycle.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestLifecycle = Lifecycle.TestCase
