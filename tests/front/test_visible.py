"""Any history of uploads, verdicts, pins, aliases, requests, deletions, expiries, engine deaths
and restarts leaves tenants seeing what a simple model says, and nothing on disk or in the pool that
is not needed. The adapters' service is the real one, with its registry, files and threads; the
ingest process and the engine are played."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test
from tests.front.played import BASE
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
    action,
)
from tests.front.visible_model import LATER, SHARED, Refused, facts, is_good, sha
from tests.front.visible_versions import Versions

from loramux.adapters.blobs import BlobStore
from loramux.adapters.pack import packed_path
from loramux.errors import AdapterInvalid, Conflict
from loramux.front.uploads import UploadWriter

CONFIGS = [b"{}", b'{"x":1}', b'{"bad":1}']
WEIGHTS = [b"w" * 10, b"v" * 200, b"u"]
FILES = [(config, weights) for config in [CONFIGS[0], *CONFIGS] for weights in WEIGHTS]
WAYS = ["multipart", "multipart", "blob"]


class Visible(Versions):
    """One server's life, and the model beside it."""

    # Uploads.

    async def create(
        self,
        tenant: str,
        name: str,
        files: tuple[bytes, bytes],
        expected: int | None,
        by: str,
        ttl_s: int | None,
    ) -> int:
        service, (config, weights) = self.service, files
        options = {"expected_generation": expected, "tenant": tenant, "ttl_s": ttl_s}
        if by == "blob":
            async with service.blobs.claim(tenant, sha(weights), "weights"):
                view = await service.create(name, config, sha(weights), **options)  # type: ignore[arg-type]
            return view.generation
        writer = await service.begin()
        try:
            await writer.write(weights)
            view = await service.create(name, config, await writer.commit(), **options)  # type: ignore[arg-type]
        finally:
            await writer.abort()
        return view.generation

    @action(TENANT, NAME, FILES, EXPECTED, WAYS, TTL, often=12)
    def upload(
        self,
        tenant: str,
        name: str,
        files: tuple[bytes, bytes],
        expected: Any,
        by: str,
        ttl_s: int | None,
    ) -> None:
        model = self.model
        if expected == "right":
            holders = [r for r in model.visible(tenant, name) if r.status != "failed"]
            expected = holders[0].generation if holders else 0
        refused, row, fresh = None, None, False
        try:
            if by == "blob" and not model.sees_blob(tenant, sha(files[1])):
                raise Refused("blob_not_found")
            row, fresh = model.create(tenant, name, files, expected, ttl_s and LATER)
        except Refused as error:
            refused = error
        generation = self.told(self.create(tenant, name, files, expected, by, ttl_s), refused)
        if row is not None:
            assert generation == row.generation
            if fresh and not self.ingest.holding:
                model.conclude(row)

    @action(TENANT, NAME, FILES)
    def validate_only(self, tenant: str, name: str, files: tuple[bytes, bytes]) -> None:
        if self.ingest.holding:
            return

        async def preview() -> None:
            writer = await self.service.begin()
            try:
                await writer.write(files[1])
                digest = await writer.commit()
                view = await self.service.create(
                    name, files[0], digest, validate_only=True, tenant=tenant
                )
                assert view.generation == 0
            finally:
                await writer.abort()

        refused = None if is_good(files[0]) else Refused(AdapterInvalid.code)
        self.told(preview(), refused)

    @action(WEIGHTS, often=3)
    def begin_upload(self, weights: bytes) -> None:
        """Its file is here, its adapter not yet registered."""

        async def begin() -> UploadWriter:
            writer = await self.service.begin()
            await writer.write(weights)
            await writer.commit()
            return writer

        self.writers.append((self.do(begin()), weights))
        self.model.held[sha(weights)] += 1

    @action(PICK)
    def abandon_upload(self, pick: int) -> None:
        if self.writers:
            writer, weights = self.writers.pop(pick % len(self.writers))
            self.do(writer.abort())
            self.model.held[sha(weights)] -= 1

    @action(often=2)
    def hold_verdicts(self) -> None:
        self.ingest.holding = True

    @action(often=2)
    def verdicts_come(self) -> None:
        self.ingest.holding = False

        async def release() -> None:
            self.ingest.release()

        examined = [row for row in self.model.rows if row.examined]
        self.do(release())
        for row in examined:
            self.model.conclude(row)

    # Files that wait for an adapter.

    @action(TENANT, WEIGHTS, often=2)
    def put_blob(self, tenant: str, data: bytes) -> None:
        async def body() -> AsyncIterator[bytes]:
            yield data

        known = self.model.sees_blob(tenant, sha(data))
        fresh = self.do(self.service.blobs.put(tenant, sha(data), body(), len(data)))
        assert fresh is not known
        self.model.granted[tenant, sha(data)] = len(data)

    @action(TENANT, WEIGHTS)
    def open_upload(self, tenant: str, data: bytes) -> None:
        made = self.do(self.service.resumable.create(tenant, len(data), sha(data)))
        self.model.uploads[made.id] = tenant, data, 0

    @action(PICK, range(1, 201))
    def continue_upload(self, pick: int, num: int) -> None:
        if not self.model.uploads:
            return
        upload_id = list(self.model.uploads)[pick % len(self.model.uploads)]
        tenant, data, offset = self.model.uploads[upload_id]

        async def body() -> AsyncIterator[bytes]:
            yield data[offset : offset + num]

        at = self.do(self.service.resumable.append(tenant, upload_id, offset, 0, body()))
        self.model.uploads[upload_id] = tenant, data, at
        assert at == min(offset + num, len(data))

    @action(PICK)
    def complete_upload(self, pick: int) -> None:
        if not self.model.uploads:
            return
        upload_id = list(self.model.uploads)[pick % len(self.model.uploads)]
        tenant, data, offset = self.model.uploads[upload_id]
        refused = Refused("upload_incomplete") if offset < len(data) else None
        self.told(self.service.resumable.complete(tenant, upload_id), refused)
        if refused is None:
            del self.model.uploads[upload_id]
            self.model.granted[tenant, sha(data)] = len(data)

    @action(TENANT, EITHER)
    def expire(self, tenant: str, blobs: bool) -> None:
        """A day goes by for what a tenant has sent, and the sweep comes."""
        table = "tenant_blobs" if blobs else "uploads"
        with self.service.shelf.registry.database.transaction() as db:
            db.execute(f"UPDATE {table} SET expires = 1 WHERE tenant = ?", (tenant,))
        self.do(self.service.blobs.sweep())
        self.do(self.service.resumable.sweep())
        model = self.model
        if blobs:
            model.granted = {key: n for key, n in model.granted.items() if key[0] != tenant}
        else:
            model.uploads = {i: each for i, each in model.uploads.items() if each[0] != tenant}

    # Pins.

    @action(TENANT, NAME, [True, True, False], [False, False, False, True], often=4)
    def pin(self, tenant: str, name: str, pinned: bool, full: bool) -> None:
        refused, before = None, set(self.engine.pins)
        try:
            row = self.model.pin(tenant, name, pinned)
            if pinned and full and self.engine.up and row.digest not in before:
                row.pinned = False
                refused = Refused("pool_full")
        except Refused as error:
            refused = error
        self.engine.full = full
        self.told(self.service.set_pinned(name, pinned, tenant=tenant), refused)
        self.engine.full = False

    # Requests.

    @action(TENANT, [*NAME, "pet"], USERS, EITHER, often=5)
    def request(self, tenant: str, name: str, user: str, begin: bool) -> None:
        """Resolved, and begun at once or later."""
        try:
            row = self.model.resolve(tenant, name, user=user)
        except Refused:
            return  # compared in every state
        if row is None:
            return
        assert self.service.resolve(name, tenant=tenant, user=user).label == row.digest
        self.resolved.append(row.digest)
        if begin:
            self.begin_resolved(len(self.resolved) - 1)

    @action(PICK, often=2)
    def begin_resolved(self, pick: int) -> None:
        if not self.resolved or not self.engine.up:
            return
        digest = self.resolved.pop(pick % len(self.resolved))
        if not self.model.serves(digest):
            with pytest.raises(Conflict):
                self.service.require(digest)
            return
        self.service.require(digest)
        self.service.retain(digest)
        self.running.append(digest)
        self.model.references[digest] += 1
        self.engine.leases[digest] += 1
        self.engine.resident.add(digest)

    @action(PICK, often=2)
    def end_request(self, pick: int) -> None:
        if self.running:
            self.end(self.running.pop(pick % len(self.running)))

    def end(self, digest: str) -> None:
        async def release() -> None:
            self.service.release(digest)

        self.engine.leases[digest] -= 1
        self.do(release())
        self.model.references[digest] -= 1
        self.model.forget(row for row in self.model.rows if row.digest == digest)

    # The pool, the engine, the server.

    @action(PICK)
    def evict(self, pick: int) -> None:
        """The pool needs the frames of something idle."""
        idle = [d for d in self.engine.resident - self.engine.pins if not self.engine.leases[d]]
        if idle:
            self.engine.resident.discard(sorted(idle)[pick % len(idle)])

    @action()
    def engine_dies(self) -> None:
        self.engine.up = False
        self.engine.pins.clear()
        self.engine.resident.clear()
        while self.running:
            self.end(self.running.pop())

    @action(range(10), often=2)
    def engine_starts(self, lost: int) -> None:
        """Perhaps one packed file has gone since."""
        if self.engine.up:
            return
        self.engine.up = True
        self.lose_a_packed_file(lost)

        async def ready() -> None:
            self.stock.base_ready(BASE)

        self.do(ready())
        self.make_good()

    def lose_a_packed_file(self, lost: int) -> None:
        packed = sorted(self.model.packed)
        if lost < len(packed):
            packed_path(self.data_dir, packed[lost], BASE.fingerprint).unlink()
            self.model.packed.discard(packed[lost])

    def make_good(self) -> None:
        """What is ready and has no packed file is examined again."""
        model = self.model
        for row in model.rows:
            if row.status == "ready" and not model.is_over(row) and row.digest not in model.packed:
                model.unpacked.add(row.digest)
                row.examined = True
        if not self.ingest.holding:
            for row in model.rows:
                if row.examined:
                    model.conclude(row)

    @action(range(10))
    def restart(self, lost: int) -> None:
        self.close()
        # As a death leaves it between a row's end and its file's.
        packed_path(self.data_dir, sha(b"orphan"), BASE.fingerprint).touch()
        model = self.model
        model.held.clear()
        model.references.clear()
        model.unpacked.clear()
        self.lose_a_packed_file(lost)
        self.open()
        model.expire()
        for row in model.rows:
            row.examined = row.status == "validating"
        self.make_good()
        model.forget(model.rows)

    # What has to be so in every state.

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        self.act(lambda options: data.draw(st.sampled_from(options)))

    @invariant()
    def check(self) -> None:
        """All of what follows."""
        self.names_mean_what_they_should()
        self.aliases_are_as_they_were_set()
        self.the_registry_and_its_mirror_hold_the_same_rows()
        self.no_file_is_kept_that_nobody_needs()
        self.nothing_leaks()

    def the_registry_and_its_mirror_hold_the_same_rows(self) -> None:
        expected = sorted(map(facts, self.model.rows))
        registry = self.service.shelf.registry
        assert sorted(map(facts, registry.every())) == expected
        assert sorted(map(facts, self.service.shelf.catalog.rows())) == expected
        for tenant in TENANTS:
            listed = {view.name for view in self.service.list(tenant=tenant)}
            assert listed == {
                name for name in NAMES if self.model.of(tenant, name) or self.model.of(SHARED, name)
            }

    def no_file_is_kept_that_nobody_needs(self) -> None:
        store = BlobStore(self.data_dir)
        assert set(store.digests()) == self.model.needed_blobs()
        assert not any(store.temporary_dir.iterdir())
        packed = {path.name[:64] for path in (self.data_dir / "packed").glob("*")}
        assert packed == self.model.packed
        uploads = {path.name for path in (self.data_dir / "uploads").iterdir()}
        assert uploads == set(self.model.uploads)

    def nothing_leaks(self) -> None:
        assert not self.errors.seen, [record.exc_info for record in self.errors.seen]
        service, model = self.service, self.model
        assert service._references == +model.references
        assert service.blobs.holds._counts == +model.held
        assert len(service.verdicts._running) == sum(row.examined for row in model.rows)
        assert service.shelf.catalog.unpacked == model.unpacked
        for tenant in TENANTS:
            waiting = service.blobs._granted.waiting_bytes(tenant)
            assert waiting == model.waiting_bytes(tenant)
        if self.engine.up:
            assert model.pins() <= self.engine.pins <= model.pins() | model.pins_that_end()
            assert self.engine.resident <= {row.digest for row in model.rows}


@pytest.mark.parametrize("seed", range(4))
def test_a_history(seed: int) -> None:
    """Drawn evenly: of the few examples that there is time for here, Hypothesis would draw most
    alike."""
    draw, server = random.Random(seed), Visible()
    try:
        for _ in range(250):
            server.act(draw.choice)
            server.check()
    finally:
        server.teardown()


@pytest.mark.slow
def test_ten_thousand_operations() -> None:
    """Takes a minute or two: each operation is a few transactions and files that are synced."""
    run_state_machine_as_test(
        Visible,
        settings=settings(
            max_examples=100,
            stateful_step_count=100,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
