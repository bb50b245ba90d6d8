"""Places and tokens, counted: nobody takes all, and who is refused is told when to come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.errors import InvalidRequest, Overloaded, RateLimited
from loramux.front.admission import MOST_OUTPUT, SHARE, Admission, Claim, Room, estimate
from loramux.front.generation import GenerationSpec
from loramux.front.keys import Limits
from loramux.front.quotas import Quotas
from loramux.request import AdapterRef, SamplingParams


class Desk:
    """A room with a clock that is moved by hand."""

    def __init__(self, places: int = 1000, tokens: int = 10**6, **limits: int) -> None:
        self.now = 1000.0
        self.rejected: list[str] = []
        self.room = Room(places, self.rejected.append, clock=lambda: self.now)
        self.room.max_tokens = tokens
        self.quotas = Quotas(
            lambda tenant: Limits(**limits) if tenant == "acme" else Limits(),
            self.rejected.append,
            clock=lambda: self.now,
        )
        self.serial = 0

    def admit(self, **claim: object) -> Admission:
        return Admission(self.room, self.quotas, Claim(**claim))  # type: ignore[arg-type]

    def start(self, prompt: int = 1, output: int = 1, **fields: object) -> GenerationSpec:
        """One choice, admitted and submitted."""
        self.serial += 1
        tenant = fields.get("tenant", "")
        with self.admit(
            tenant=tenant,
            adapters=fields.get("adapters", ()),
            prompt_tokens=prompt,
            output_tokens=output,
            certain=prompt + output,
        ):
            spec = GenerationSpec(
                request_id=f"r{self.serial}",
                prompt_ids=[1] * prompt,
                sampling=SamplingParams(seed=1, max_tokens=output),
                adapters=fields.get("adapters", ()),  # type: ignore[arg-type]
                tenant=tenant,  # type: ignore[arg-type]
            )
            self.room.start(spec)
            self.quotas.start(spec)
        return spec

    def end(self, spec: GenerationSpec) -> None:
        self.room.end(spec)
        self.quotas.end(spec, spec.sampling.max_tokens)


def test_estimates() -> None:
    assert estimate([1, 2, 3]) == 3
    assert estimate("") == 0
    assert estimate("abcd") == 2
    assert estimate("äöü") == 2, "bytes, not characters"


def test_tokens_are_reserved_settled_and_given_back() -> None:
    desk = Desk(tokens=100)
    admission = desk.admit(prompt_tokens=40, output_tokens=20)
    assert desk.room.tokens == 60
    with pytest.raises(Overloaded, match="60 tokens of requests"):
        desk.admit(prompt_tokens=30, output_tokens=20)
    admission.release()
    admission.release()
    assert desk.room.tokens == desk.room.choices == 0
    low = desk.admit(prompt_tokens=10, output_tokens=20)
    with low:  # it turns out to need more than there is: that is borne
        spec = GenerationSpec(
            request_id="r",
            adapters=(),
            prompt_ids=[1] * 200,
            sampling=SamplingParams(seed=1, max_tokens=20),
        )
        desk.room.start(spec)
    assert desk.room.tokens == 220
    with pytest.raises(Overloaded):
        desk.admit(prompt_tokens=1)
    desk.room.end(spec)
    assert desk.room.tokens == desk.room.choices == 0


def test_a_long_answer_is_counted_as_a_usual_one() -> None:
    desk = Desk()
    with desk.admit(choices=2, prompt_tokens=10, output_tokens=100_000):
        assert desk.room.tokens == 10 + 2 * MOST_OUTPUT
    spec = desk.start(5, 100_000)
    assert desk.room.tokens == 5 + MOST_OUTPUT
    desk.end(spec)
    assert desk.room.tokens == 0


def test_more_tokens_than_there_are_wait_for_an_empty_room() -> None:
    desk = Desk(tokens=100)
    small = desk.admit(prompt_tokens=5)
    with pytest.raises(Overloaded):
        desk.admit(prompt_tokens=4000)
    small.release()
    with desk.admit(prompt_tokens=4000), pytest.raises(Overloaded):
        desk.admit(prompt_tokens=1)


def test_more_choices_than_places_never_fit() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Desk(places=4).admit(choices=5)
    assert caught.value.param == "n"


@pytest.mark.parametrize("by", ["adapter", "tenant"])
def test_a_flood_leaves_places_for_others(by: str) -> None:
    """Nineteen others find room however much one of them asks for."""
    desk = Desk(places=180)

    def wears(number: int) -> dict[str, object]:
        if by == "tenant":
            return {"tenant": f"t{number}", "adapters": ()}
        return {"tenant": "", "adapters": (AdapterRef(f"a{number}"),)}

    with pytest.raises(Overloaded, match="one (tenant|adapter)"):
        for _ in range(1000):
            desk.start(**wears(0))
    flood = desk.room.choices
    assert 140 < flood <= 180 * SHARE // (SHARE + 1)
    for number in range(1, 18):
        desk.start(**wears(number))
    with pytest.raises(Overloaded):
        desk.start(**wears(0))


def test_a_tenant_floods_with_many_adapters() -> None:
    desk = Desk(places=180)
    with pytest.raises(Overloaded, match="one tenant"):
        for number in range(1000):
            desk.start(tenant="acme", adapters=(AdapterRef(f"a{number % 50}"),))
    for number in range(15):
        desk.start(tenant="else", adapters=(AdapterRef(f"a{number}"),))


def test_a_flood_of_tokens_leaves_tokens() -> None:
    desk = Desk(tokens=9000)
    flood, other = (AdapterRef("a"),), (AdapterRef("b"),)
    with pytest.raises(Overloaded, match="one adapter"):
        for _ in range(1000):
            desk.start(90, 10, adapters=flood)
    assert 7000 <= desk.room.tokens < 8000
    desk.start(90, 10, adapters=other)


def test_a_small_room_may_be_filled_by_one() -> None:
    desk = Desk(places=SHARE)
    for _ in range(SHARE):
        desk.start(adapters=(AdapterRef("a"),))
    with pytest.raises(Overloaded):
        desk.start(adapters=(AdapterRef("b"),))


def test_who_is_refused_is_told_when_a_place_will_be_free() -> None:
    desk = Desk(places=16)
    running = [desk.start(tenant=str(i)) for i in range(16)]

    def refused(num: int = 1) -> float:
        with pytest.raises(Overloaded) as caught:
            desk.admit(choices=num, tenant="new")
        return caught.value.retry_after_s

    assert refused() == 1, "nothing has ended yet, so nothing is known"
    for spec in running[:5]:  # two a second
        desk.now += 0.5
        desk.end(spec)
        desk.start(tenant=f"next {desk.serial}")
    assert [refused() for _ in range(4)] == [1, 1, 1.5, 2], "one place each, one behind the other"
    assert refused(6) == 5
    desk.now += 4
    assert refused() > 1, "slower by now"
    for _ in range(1000):
        last = refused()
    assert last == 60, "nobody is sent away for longer"
    assert set(desk.rejected) == {"overloaded"}


def test_a_night_without_requests_does_not_slow_the_pace() -> None:
    desk = Desk(places=2)
    for _ in range(10):
        desk.end(desk.start())
    desk.now += 10 * 3600
    first, _ = desk.start(), desk.start()
    desk.now += 0.5
    desk.end(first)
    desk.start()
    with pytest.raises(Overloaded) as caught:
        desk.start()
    assert caught.value.retry_after_s == 1


def test_the_minute_of_a_tenant_is_reserved_before_its_prompts_are_known() -> None:
    desk = Desk(tokens_per_minute=100)
    with desk.admit(tenant="acme", prompt_tokens=50, output_tokens=30, certain=30):
        with pytest.raises(RateLimited) as caught:
            desk.admit(tenant="acme", prompt_tokens=20, output_tokens=10, certain=10)
        assert caught.value.retry_after_s == 6
        desk.admit(tenant="else", prompt_tokens=5000).release()
    assert desk.room.tokens == 0 and desk.rejected == ["rate_limit_exceeded"]
    with desk.admit(tenant="acme", prompt_tokens=1000, output_tokens=10, certain=10):
        pass  # an estimate alone makes nothing impossible; it takes the whole minute
    with pytest.raises(InvalidRequest) as refused:
        desk.admit(tenant="acme", prompt_tokens=91, output_tokens=10, certain=101)
    assert refused.value.param == "max_tokens"


def test_a_refusal_by_the_server_costs_the_tenant_nothing() -> None:
    desk = Desk(places=1, tokens_per_minute=100, max_requests=5)
    spec = desk.start(tenant="else")
    for _ in range(20):
        with pytest.raises(Overloaded):
            desk.admit(tenant="acme", output_tokens=50, certain=50)
    desk.end(spec)
    desk.admit(tenant="acme", output_tokens=100, certain=100).release()


@given(st.data())
def test_the_books_balance(data: st.DataObject) -> None:
    """Whatever order things come in; and nobody in the room is put out for another."""
    desk = Desk(places=12, tokens=300, max_requests=6, tokens_per_minute=10**6)
    held: list[Admission] = []
    running: list[GenerationSpec] = []
    for _ in range(data.draw(st.integers(1, 40))):
        what = data.draw(st.sampled_from(["admit", "start", "release", "end"]))
        who = data.draw(st.sampled_from(["acme", "else", ""]))
        size = data.draw(st.integers(1, 60))
        try:
            if what == "admit":
                held.append(desk.admit(choices=size % 4 + 1, tenant=who, prompt_tokens=size))
            elif what == "start":
                running.append(desk.start(size, size, tenant=who))
        except (Overloaded, RateLimited):
            pass
        if what == "release" and held:
            held.pop(size % len(held)).release()
        elif what == "end" and running:
            desk.end(running.pop(size % len(running)))
        assert desk.room.choices <= 12
        assert desk.room.choices >= len(running) + len(held)
    for admission in held:
        admission.release()
    for spec in running:
        desk.end(spec)
    room = desk.room
    assert room.choices == room.tokens == 0 and not room._choices and not room._tokens
    assert not desk.quotas._choices and not desk.quotas._reserved
