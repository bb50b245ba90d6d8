"""The engine drawn for a person: it agrees with the books, says why who waits, and stays small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests import tiny
from tests.engine.fakes import Bench
from tests.harness import Harness

from loramux.engine.picture import MOST_CELLS, _coarser, _frames
from loramux.engine.scheduler import Wait
from loramux.metrics.picture import Cell, Holder, Picture
from loramux.metrics.stats import PoolStats
from loramux.request import Speculation
from loramux.wire import Command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("picture") / "tiny")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [tiny.write_adapter(folder / str(n), model, r=4, seed=n) for n in range(3)]


@pytest.fixture
def harness(model: Path) -> Iterator[Harness]:
    harness = Harness(model, num_frames=120, page_tokens=4, max_num_seqs=3)
    yield harness
    harness.close()


def look(harness: Harness) -> Picture:
    """As it comes over the wire."""
    payload = harness.engine.command(Command(command_id=1, kind="state"))
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(payload))
    return msgspec.convert(sent["picture"], Picture)


def counted(picture: Picture) -> dict[str, int]:
    cells = np.frombuffer(picture.frames.cells, dtype=np.uint8)
    return {cell.name.lower(): int((cells == cell).sum()) for cell in Cell}


def told(harness: Harness) -> dict[str, int]:
    stats = msgspec.convert(harness.steps[-1].stats["pool"], PoolStats)
    return {
        "free": stats.free,
        "kv": stats.kv,
        "prefix": stats.prefix,
        "leased": stats.adapter_leased,
        "warm": stats.adapter_warm,
        "loading": stats.loading,
    }


def test_the_map_is_the_books_after_every_step(harness: Harness, adapters: list[Path]) -> None:
    seen: set[str] = set()
    for serial, adapter in enumerate([*adapters, None, *adapters]):
        harness.submit(range(3, 12 + serial), adapter, max_tokens=6, tenant=f"t{serial % 2}")
    while harness.engine.has_work:
        harness.step()
        picture = look(harness)
        assert counted(picture) == told(harness)
        seen |= {name for name, num in counted(picture).items() if num}
        for row in picture.residents:
            place = 1 + picture.frames.holders.index(Holder(digest=row.digest))
            assert picture.frames.held.count(place) == row.num_frames
        assert sum(waiting.num for waiting in picture.queue) == picture.num_waiting
        assert len(picture.batch) == picture.num_running
    assert seen == {"free", "kv", "prefix", "leased", "warm", "loading"}
    assert [cell for cell, num in counted(look(harness)).items() if num] == [
        "free",
        "prefix",
        "warm",
    ]
    pinned = harness.install(adapters[1])
    assert harness.engine.command(Command(command_id=2, kind="pin", digest=pinned))
    harness.step()
    assert counted(look(harness)) == told(harness) and counted(look(harness))["leased"]


def test_rows_say_what_they_wear_and_whose_pages_are_whose(
    harness: Harness, adapters: list[Path]
) -> None:
    harness.submit(range(3, 12), adapters[0], tenant="alice", max_tokens=5)
    while not harness.engine.scheduler.running:
        harness.step()
    harness.submit(range(3, 23), None, tenant="bob", max_tokens=5)
    harness.step()
    assert len(harness.engine.scheduler.running) == 2
    picture = look(harness)
    rows = {row.tenant: row for row in picture.batch}
    assert rows["alice"].digests == [harness.install(adapters[0])] and rows["bob"].digests == []
    for tenant, row in rows.items():
        request = next(r for r in harness.engine.scheduler.running if r.tenant == tenant)
        assert (row.context, row.outputs) == (request.num_ids, request.num_outputs)
        place = 1 + picture.frames.holders.index(Holder(tenant=tenant))
        assert picture.frames.held.count(place) == request.kv.num_pages
    assert sum(row.tokens for row in picture.batch) == harness.steps[-1].stats["batch_tokens"]
    [resident] = picture.residents
    assert (resident.cell, resident.leases, resident.pinned) == (Cell.LEASED, 1, False)
    assert resident.idle_s is not None and resident.idle_s >= 0
    harness.run()


def test_guesses_are_counted_by_row(model: Path) -> None:
    harness = Harness(model, num_frames=120, speculation="auto")
    ask = Speculation(drafters=("lookup",), max_draft_tokens=4)
    harness.submit([7, 8, 9, 10] * 6, None, max_tokens=40, speculation=ask)
    most = (0, 0)
    while harness.engine.has_work:
        harness.step()
        for row in look(harness).batch:
            most = max(most, (row.drafted, row.accepted))
            assert row.accepted <= row.drafted
    drafted = sum(sum(step.stats.get("drafted", {}).values()) for step in harness.steps)
    accepted = sum(sum(step.stats.get("accepted", {}).values()) for step in harness.steps)
    assert drafted > 0 and most[0] <= drafted and most[1] <= accepted
    harness.close()


def test_the_reason_is_the_scheduler_s_own(harness: Harness, adapters: list[Path]) -> None:
    for serial in range(5):
        harness.submit(range(3, 9), None, max_tokens=9, name=f"b{serial}")
    harness.step()
    harness.submit(range(3, 9), adapters[1], max_tokens=2, name="late")
    assert {(*w.digests, *w.reasons) for w in look(harness).queue} == {
        ("seats",),
        (harness.install(adapters[1]), "seats"),
    }
    assert sum(w.num for w in look(harness).queue) == 3
    harness.run()
    assert look(harness).queue == [] and look(harness).num_waiting == 0


def test_loading_and_frames_are_told_apart() -> None:
    bench = Bench(12, {"a": 4, "huge": 9})
    scheduler = bench.scheduler
    loading, short = bench.add("loading", adapter="a"), bench.add("short", adapter="huge")
    behind = bench.add("behind", adapter="a")
    scheduler.schedule()
    assert scheduler.why_waiting(loading) is Wait.LOADING
    assert scheduler.why_waiting(short) is Wait.FRAMES
    assert scheduler.why_waiting(behind) is Wait.TURN


def test_comings_and_goings_are_remembered(harness: Harness, adapters: list[Path]) -> None:
    digests = [harness.install(adapter) for adapter in adapters]
    for adapter in adapters:
        harness.generate(range(3, 9), adapter, max_tokens=2)
    harness.engine.command(Command(command_id=2, kind="evict", digest=digests[0]))
    events = look(harness).events
    assert [(event.kind, event.digest) for event in events] == [
        ("evict", digests[0]),
        *(("load", digest) for digest in reversed(digests)),
    ]
    ages = [event.age_s for event in events]
    assert ages == sorted(ages) and ages[0] >= 0
    assert [e.num_frames for e in events if e.digest == digests[0]] == [events[0].num_frames] * 2


def test_a_pool_of_many_frames_is_drawn_coarser() -> None:
    bench = Bench(3 * MOST_CELLS - 1)
    frames = _frames(bench.pool, [], [])
    assert frames.per_cell == 3 and len(frames.cells) == MOST_CELLS == len(frames.held)
    cells = np.array([0, 1, 1, 4, 4, 0, 3], dtype=np.uint8)
    whose = np.array([0, 7, 8, 9, 9, 0, 5], dtype=np.uint8)
    most, held = _coarser(cells, whose, 3)
    assert most.tolist() == [1, 4, 3] and held.tolist() == [7, 9, 5]


def test_one_line_for_all_who_wait_for_the_same(harness: Harness) -> None:
    for serial in range(40):
        harness.submit([5, 6, 7], None, max_tokens=2, tenant=f"t{serial}")
    harness.step()
    picture = look(harness)
    assert len(picture.queue) == 1 and picture.queue[0].num == picture.num_waiting == 37
    harness.run()


def test_lists_are_cut_to_the_most_telling(
    harness: Harness, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loramux.engine.picture.MOST_ADAPTERS", 2)
    for adapter in adapters:
        harness.generate(range(3, 9), adapter, max_tokens=2)
    harness.submit(range(3, 9), adapters[0], max_tokens=4)
    harness.step()
    picture = look(harness)
    shown = [row.digest for row in picture.residents]
    assert shown == [harness.install(adapters[0]), harness.install(adapters[2])]
    assert picture.num_resident == 3
    harness.run()
