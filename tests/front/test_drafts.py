"""What became of guesses and which model made what: sums that add up, whatever ends a request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.front.house import collect, configure, expected, running, spec
from tests.front.test_ledger import IDS, TOKENIZER, Desk, read
from tests.front.uploading import upload

from loramux.front.drafts import SEATS, Drafted, DraftTotals
from loramux.front.generation import Done
from loramux.request import AdapterRef, EntropyAdaptive, Speculation
from loramux.wire import Finished, Output, decode_to_engine, encode

SPECULATION = Speculation(drafters=("lookup", "suffix"), max_draft_tokens=4, tree=True)
ENTROPY = EntropyAdaptive(threshold=1.5, window=3)
COMPANIONS = {2: (AdapterRef("b" * 64),)}


def drafted(start: int, num: int, guesses: tuple[str, int, int]) -> Output:
    return Output("r", start, IDS[start : start + num], drafted=guesses)


def test_steps_add_up_by_drafter() -> None:
    desk = Desk()
    generation = desk.add("r", speculation=SPECULATION)
    desk.step(Output("r", 0, IDS[:1]))
    desk.step(drafted(1, 1, ("lookup", 3, 3)))
    desk.step(drafted(2, 3, ("lookup", 4, 4)))
    desk.step(drafted(5, 2, ("suffix", 6, 2)), finished=(Finished("r", "length"),))
    _, done = read(generation)
    assert isinstance(done, Done)
    assert done.drafts == {"lookup": Drafted(2, 7, 2), "suffix": Drafted(1, 6, 1)}
    totals = desk.observations.snapshot.drafts
    lookup, suffix = totals.by_drafter["lookup"], totals.by_drafter["suffix"]
    assert (lookup.steps, lookup.drafted, lookup.accepted) == (2, 7, 2)
    assert lookup.depths == {3: 1, 4: 1} and lookup.runs == {0: 1, 2: 1}
    assert suffix.depths == {2: 1} and suffix.runs == {1: 1}
    assert totals.seated == {"a" * 64: done.drafts}


def test_tokens_that_come_twice_are_not_counted_twice() -> None:
    desk = Desk()
    generation = desk.add("r", speculation=SPECULATION)
    desk.step(drafted(0, 3, ("lookup", 4, 4)), drafted(0, 3, ("lookup", 4, 4)))
    desk.step(drafted(1, 1, ("lookup", 4, 4)), finished=(Finished("r", "length"),))
    _, done = read(generation)
    assert isinstance(done, Done) and done.drafts == {"lookup": Drafted(1, 4, 2)}


@pytest.mark.parametrize("active", ["large", "small"])
def test_guesses_behind_a_stop_string_were_not_accepted(active: str) -> None:
    """The step's last token is nobody's guess; what a stop string leaves of it are all guesses."""
    used = next(n for n in range(len(IDS)) if "stop" in TOKENIZER.decode(IDS[:n]))
    for sent in range(used, len(IDS) + 1):
        desk = Desk()
        generation = desk.add("r", stop=("stop",), speculation=SPECULATION)
        desk.step(Output("r", 0, IDS[:1], ledger=(0, 1, 9, 10)))
        last = Output("r", 1, IDS[1:sent], drafted=("lookup", 40, 40))
        last.ledger = (sent - 1, 1, 9 + sent, 10) if active == "large" else (0, sent, 9, 10 + sent)
        desk.step(last)
        _, done = read(generation)
        assert isinstance(done, Done) and done.num_output_tokens == used
        accepted = used - 2 if sent == used else used - 1
        assert done.drafts == {"lookup": Drafted(1, 40, accepted)}, sent
        delivered = (used - 1, 1) if active == "large" else (0, used)
        assert done.by_model == (*delivered, *last.ledger[2:]), "computed, but not delivered"
        assert tuple(desk.observations.snapshot.model_tokens.values()) == delivered


@pytest.mark.parametrize("order", ["large", "small"])
def test_tokens_of_two_models_add_up_to_those_delivered(order: str) -> None:
    desk = Desk()
    counts = {"large": 0, "small": 0}
    for stop in ((), ("stop",)):
        generation = desk.add("r", stop=stop, entropy=ENTROPY)
        made = {"large": 0, "small": 0}
        for start in range(0, len(IDS), 2):
            mine = order if start % 4 else "small"
            ids = IDS[start : start + 2]
            made[mine] += len(ids)
            ledger = (made["large"], made["small"], 5 * made["large"], 7 * made["small"])
            desk.step(Output("r", start, ids, ledger=ledger))
        desk.step(finished=(Finished("r", "length"),))
        delta, done = read(generation)
        assert isinstance(done, Done) and done.by_model is not None
        large, small, *computed = done.by_model
        assert large + small == len(delta.token_ids) == done.num_output_tokens
        assert computed[0] >= 5 * large and computed[1] >= 7 * small
        counts["large"] += large
        counts["small"] += small
        desk.used.clear()
    assert desk.observations.snapshot.model_tokens == counts


def test_who_is_not_asked_is_told_nothing() -> None:
    desk = Desk()
    generation = desk.add("r")
    desk.step(Output("r", 0, IDS[:2]), finished=(Finished("r", "length"),))
    _, done = read(generation)
    assert isinstance(done, Done) and done.drafts == {} and done.by_model is None
    assert desk.observations.snapshot.drafts == DraftTotals()
    assert desk.observations.snapshot.model_tokens == {}


def test_another_engine_is_told_all_that_the_first_one_was_and_said() -> None:
    desk = Desk()
    wishes = {"speculation": SPECULATION, "entropy": ENTROPY, "companions": COMPANIONS}
    desk.add("r", tenant="t", deadline_s=3.0, **wishes)
    entry = desk.ledger._entries["r"]
    arrived = entry.spec.arrived_at
    first = decode_to_engine(encode(entry.submission(arrived)))
    assert (first.output_ids, first.resume, first.deadline_s) == ([], None, 3.0)
    desk.step(Output("r", 0, IDS[:2], resume=b"older", ledger=(0, 2, 1, 7)))
    desk.step(Output("r", 2, IDS[2:3], resume=b"state", ledger=(1, 2, 4, 7)))
    again = decode_to_engine(encode(entry.submission(arrived + 2.0)))
    assert (again.output_ids, again.resume, again.deadline_s) == (IDS[:3], b"state", 1.0)
    for submit in (first, again):
        assert submit.speculation == SPECULATION and submit.entropy == ENTROPY
        assert submit.companions == COMPANIONS and submit.tenant == "t"
        assert submit.sampling == entry.spec.sampling and submit.prompt_ids == [5]
        assert submit.adapters == entry.spec.adapters and submit.request_id == "r"


def test_an_engine_hears_of_it_and_its_guesses_are_counted(tmp_path: Path) -> None:
    async def play() -> None:
        async with running(configure(tmp_path, small_model=tmp_path / "small")) as front:
            companion = AdapterRef((await upload(front, "s", base="small")).digest)
            wishes = {
                "speculation": SPECULATION,
                "entropy": ENTROPY,
                "companions": {2: (companion,)},
            }
            plain = front.submit(spec("plain", "burst=3 draft=4", max_tokens=9))
            asked = front.submit(spec("asked", "burst=3 draft=4", max_tokens=9, **wishes))
            for generation in (plain, asked):
                assert (await collect(generation)).token_ids == expected(9)
            assert plain.done is not None and plain.done.drafts == {}
            assert asked.done is not None and asked.done.drafts == {"lookup": Drafted(3, 12, 6)}
            state = await front.command("state")
            speculation, entropy, companions = state["wishes"][1]
            assert state["wishes"][0] == [None, None, {}]
            assert speculation["drafters"] == ["lookup", "suffix"] and speculation["tree"]
            assert speculation["max_draft_tokens"] == 4 and entropy["threshold"] == 1.5
            assert companions == {2: [[companion.digest, 1.0]]}

    asyncio.run(play())


ADDITIONS = st.lists(
    st.one_of(
        st.none(),
        st.tuples(
            st.integers(0, 2 * SEATS + 5),
            st.sampled_from(["lookup", "suffix"]),
            st.integers(1, 9),
            st.integers(0, 4),
        ),
    ),
    max_size=200,
)


@given(ADDITIONS)
def test_counts_by_adapter_only_grow_and_nothing_is_lost(
    additions: list[tuple[int, str, int, int] | None],
) -> None:
    totals = DraftTotals()
    additions = [*((n, "lookup", 1 + n % 7, n % 2) for n in range(SEATS + 5)), None, *additions]
    before: dict[tuple[str, str], tuple[int, int]] = {}
    busy: dict[str, int] = {}
    for addition in additions:
        if addition is None:
            totals.reseat()
            least = min((busy[digest] for digest in totals.seats), default=0)
            assert all(busy[digest] <= least for digest in busy.keys() - totals.seats)
        else:
            number, drafter, num, accepted = addition
            totals.add(str(number), drafter, num, num, min(num, accepted))
            busy[str(number)] = busy.get(str(number), 0) + num
        assert len(totals.seated) == min(SEATS, len(busy))
        lines = {**totals.by_adapter, "others": totals.others}
        now = {
            (digest, drafter): (counts.drafted, counts.accepted)
            for digest, line in lines.items()
            for drafter, counts in line.items()
        }
        assert all(now[key] >= value for key, value in before.items())
        before = now
    for drafter, every in totals.by_drafter.items():
        mine = [value for key, value in before.items() if key[1] == drafter]
        assert sum(num for num, _ in mine) == every.drafted
        assert sum(accepted for _, accepted in mine) == every.accepted
        assert sum(n * times for n, times in every.depths.items()) == every.drafted, "chains"
        assert sum(n * times for n, times in every.runs.items()) == every.accepted
        assert sum(every.depths.values()) == sum(every.runs.values()) == every.steps


def test_no_more_than_a_thousand_adapters_are_remembered() -> None:
    totals = DraftTotals()
    for number in range(1500):
        totals.add(str(number), "lookup", 1 + (number == 1200), 1, 0)
    totals.reseat()
    assert len(totals.busy) == 1000 and len(totals.by_adapter) == SEATS
    assert totals.others["lookup"].drafted == 1501 - SEATS
