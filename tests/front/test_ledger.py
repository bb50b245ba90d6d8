"""Exactly one terminal event, and only tokens that follow the delivered ones."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.front.model_dir import KINDS

from loramux.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFailed,
    InvalidRequest,
    LoramuxError,
    Overloaded,
)
from loramux.front.detokenizer import TextStream, TokenBytes
from loramux.front.generation import Delta, Done, Generation, GenerationSpec
from loramux.front.ledger import Ledger
from loramux.front.observations import Observations
from loramux.request import AdapterRef, SamplingParams
from loramux.wire import Failed, Finished, Output, StepDone, TokenLogprob

TOKENIZER = KINDS["byte_level"]()
TABLE = TokenBytes(TOKENIZER)
IDS = TOKENIZER.encode("the stop sign 日本").ids


@dataclass
class Events:
    """An Observer that counts terminal events."""

    ended: list[str] = field(default_factory=list)
    times: list[tuple[str, int]] = field(default_factory=list)

    def finished(self, spec: GenerationSpec, done: Done) -> None:
        self.ended.append(spec.request_id)

    def failed(self, spec: GenerationSpec, error: LoramuxError) -> None:
        self.ended.append(spec.request_id)

    def submitted(self, spec: GenerationSpec) -> None: ...
    def rejected(self, code: str) -> None: ...
    def step(self, stats: object) -> None: ...
    def uploaded(self, result: str) -> None: ...
    def validated(self, seconds: float, code: str) -> None: ...
    def engine_restarted(self, reason: str) -> None: ...

    def first_token(self, spec: GenerationSpec, seconds: float) -> None:
        self.times.append(("first", 1))

    def more_tokens(self, spec: GenerationSpec, num_tokens: int, seconds: float) -> None:
        self.times.append(("more", num_tokens))


class Desk:
    """A ledger with an observer, reference counts, and what each client was told."""

    def __init__(self) -> None:
        self.events = Events()
        self.references: Counter[str] = Counter()
        self.used: dict[str, int] = {}
        self.observations = Observations(self.events)
        self.ledger = Ledger(
            self.observations,
            self.retain,
            self.release,
            self.ended,
            retry_after_s=lambda num: 7.0 * num,
        )
        self.generations: dict[str, Generation] = {}

    def retain(self, digest: str) -> None:
        self.references[digest] += 1

    def release(self, digest: str) -> None:
        self.references[digest] -= 1
        assert self.references[digest] >= 0

    def ended(self, spec: GenerationSpec, num_outputs: int) -> None:
        assert spec.request_id not in self.used
        self.used[spec.request_id] = num_outputs

    def add(self, request_id: str, max_tokens: int = 16, **fields: object) -> Generation:
        spec = GenerationSpec(
            request_id=request_id,
            adapters=(AdapterRef("a" * 64),),
            prompt_ids=[5],
            sampling=SamplingParams(seed=1, max_tokens=max_tokens),
            **fields,  # type: ignore[arg-type]
        )
        text = TextStream(
            TABLE, stop=spec.stop, include_stop=spec.include_stop, skip_special_tokens=True
        )
        generation = Generation(spec, self.cancel)
        self.generations[request_id] = generation
        self.observations.submitted(spec)
        self.ledger.add(spec, generation, text)
        return generation

    def cancel(self, request_id: str) -> None:
        self.ledger.cancel(request_id)

    def step(self, *outputs: Output, finished: tuple[Finished, ...] = ()) -> list[str]:
        return self.ledger.apply(
            StepDone(engine_epoch=1, step=0, outputs=list(outputs), finished=list(finished))
        )


def read(generation: Generation) -> tuple[Delta, Done | LoramuxError]:
    """Everything a reader gets, merged, and how it ended."""

    async def collect() -> tuple[Delta, Done | LoramuxError]:
        whole = Delta()
        try:
            async for delta in generation:
                whole.extend(delta)
        except LoramuxError as error:
            return whole, error
        assert generation.done is not None
        return whole, generation.done

    return asyncio.run(asyncio.wait_for(collect(), 5))


ACTIONS = st.one_of(
    st.tuples(st.just("output"), st.integers(0, 2), st.integers(-2, 2), st.integers(0, 3)),
    st.tuples(st.just("finish"), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("fail"), st.integers(0, 2)),
    st.tuples(st.just("cancel"), st.integers(0, 2)),
    st.tuples(st.just("death")),
)


@given(st.lists(ACTIONS, max_size=25), st.booleans())
def test_exactly_one_terminal_event(actions: list[tuple[object, ...]], stops: bool) -> None:
    desk = Desk()
    names = ["r0", "r1", "r2"]
    for name in names:
        desk.add(name, stop=("stop",) if stops else ())
    sent = Counter[str]()

    def output(index: int, shift: int, num: int) -> Output:
        start = max(0, sent[names[index]] + shift)
        return Output(names[index], start, [IDS[i % len(IDS)] for i in range(start, start + num)])

    for action in actions:
        match action:
            case ("output", int(index), int(shift), int(num)):
                event = output(index, shift, num)
                ended = names[index] not in desk.ledger
                desk.step(event)
                if not ended and event.start_index == sent[names[index]]:
                    sent[names[index]] += num
            case ("finish", int(index), int(num), int(_)):
                done = Finished(names[index], "length", None)
                desk.step(output(index, 0, num), finished=(done, done))
            case ("fail", int(index)):
                failed = [Failed(names[index], "engine_failed", "x")] * 2
                desk.ledger.apply(StepDone(engine_epoch=1, step=0, failed=failed))
            case ("cancel", int(index)):
                desk.generations[names[index]].cancel()
            case _:
                desk.ledger.fail_all(EngineFailed("gone"))
        for name, generation in desk.generations.items():
            over = (generation.done is not None) + (generation.error is not None)
            assert over == desk.events.ended.count(name) == (name not in desk.ledger)
    assert desk.references["a" * 64] == len(desk.ledger)
    desk.ledger.fail_all(EngineFailed("gone"))
    assert sorted(desk.events.ended) == names
    assert desk.references["a" * 64] == len(desk.ledger) == desk.observations.snapshot.unfinished
    for name in names:
        delta, _ = read(desk.generations[name])
        ids = delta.token_ids
        assert ids == [IDS[i % len(IDS)] for i in range(len(ids))]
        assert desk.used[name] == len(ids), "a tenant pays for what it got"


def test_tokens_already_delivered_are_dropped_and_gaps_fail() -> None:
    desk = Desk()
    generation = desk.add("r")
    assert desk.step(Output("r", 0, IDS[:2])) == []
    assert desk.step(Output("r", 0, IDS[:2]), Output("r", 1, IDS[1:4])) == []
    assert desk.step(Output("r", 2, IDS[2:3])) == []
    assert desk.step(Output("r", 4, IDS[4:5])) == ["r"]
    delta, error = read(generation)
    assert delta.token_ids == IDS[:3]
    assert isinstance(error, EngineFailed) and "token 3 to 4" in error.message


def test_a_stop_string_ends_here_first_and_aborts_there() -> None:
    desk = Desk()
    generation = desk.add("r", stop=("stop",))
    whole = TOKENIZER.decode(IDS)
    used = next(n for n in range(len(IDS)) if "stop" in TOKENIZER.decode(IDS[:n]))
    logprobs = [TokenLogprob(token, -1.0, 1) for token in IDS]
    first = Output("r", 0, IDS, logprobs, None, None, (3, 0.5, 0.25))
    assert desk.step(first) == ["r"]
    assert desk.step(Output("r", len(IDS), IDS[:1])) == []
    delta, done = read(generation)
    assert isinstance(done, Done)
    assert delta.text == whole[: whole.index("stop")]
    assert delta.token_ids == IDS[:used] and len(delta.logprobs or ()) == used
    assert (done.finish_reason, done.stop_reason) == ("stop", "stop")
    assert done.num_output_tokens == used
    assert (done.cached_tokens, done.queue_s, done.prefill_s) == (3, 0.5, 0.25)


def test_a_stop_string_in_the_last_step_needs_no_abort() -> None:
    desk = Desk()
    generation = desk.add("r", stop=("stop",))
    assert desk.step(Output("r", 0, IDS), finished=(Finished("r", "length"),)) == []
    _, done = read(generation)
    assert isinstance(done, Done) and done.stop_reason == "stop"


@pytest.mark.parametrize("include", [True, False])
def test_the_token_that_ends_it_is_text_only_when_asked(include: bool) -> None:
    desk = Desk()
    generation = desk.add("r", include_stop=include)
    ids = TOKENIZER.encode("ab").ids
    assert len(ids) == 2
    desk.step(Output("r", 0, ids), finished=(Finished("r", "stop", ids[1]),))
    delta, done = read(generation)
    assert isinstance(done, Done)
    assert (delta.text, delta.token_ids) == ("ab" if include else "a", ids)
    assert (done.stop_reason, done.num_output_tokens) == (ids[1], 2)


def test_held_text_comes_out_at_the_end() -> None:
    desk = Desk()
    generation = desk.add("r", stop=("stopper",))
    ids = TOKENIZER.encode("a stop").ids
    desk.step(Output("r", 0, ids))
    desk.step(finished=(Finished("r", "length"),))
    delta, done = read(generation)
    assert delta.text == "a stop"
    assert isinstance(done, Done) and done.stop_reason is None


def test_a_slow_reader_finds_one_delta_of_its_own_output() -> None:
    desk = Desk()
    generation = desk.add("r", max_tokens=len(IDS))
    for index, token in enumerate(IDS):
        desk.step(Output("r", index, [token]))

    async def next_delta() -> Delta:
        return await anext(generation)

    delta = asyncio.run(next_delta())
    assert delta.token_ids == IDS and delta.text == TOKENIZER.decode(IDS)
    assert desk.events.times == [("first", 1)] + [("more", 1)] * (len(IDS) - 1)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("deadline_exceeded", DeadlineExceeded),
        ("context_length_exceeded", ContextLengthExceeded),
        ("something_new", EngineFailed),
    ],
)
def test_the_engine_s_codes_become_errors(code: str, kind: type[LoramuxError]) -> None:
    desk = Desk()
    generation = desk.add("r")
    desk.ledger.apply(StepDone(engine_epoch=1, step=0, failed=[Failed("r", code, "why")]))
    _, error = read(generation)
    assert type(error) is kind and error.code == code and error.message == "why"


def test_the_engine_s_refusals_name_the_parameter() -> None:
    desk = Desk()
    generation = desk.add("r")
    failed = Failed("r", "invalid_request", "too long for the small model", "entropy_adaptive")
    desk.ledger.apply(StepDone(engine_epoch=1, step=0, failed=[failed]))
    _, error = read(generation)
    assert type(error) is InvalidRequest and error.param == "entropy_adaptive"


def test_who_the_engine_has_no_room_for_is_told_when_to_come_back() -> None:
    desk = Desk()
    generation = desk.add("r")
    desk.ledger.apply(StepDone(engine_epoch=1, step=0, failed=[Failed("r", "overloaded", "late")]))
    _, error = read(generation)
    assert isinstance(error, Overloaded) and error.retry_after_s == 7.0


def test_prompt_logprobs_come_even_without_a_token() -> None:
    desk = Desk()
    generation = desk.add("r", max_tokens=0)
    entry = TokenLogprob(5, -2.0, 3)
    desk.step(Output("r", 0, [], None, [None, entry]), finished=(Finished("r", "length"),))
    delta, done = read(generation)
    assert delta.prompt_logprobs == [None, entry]
    assert isinstance(done, Done) and done.first_token_at is None
