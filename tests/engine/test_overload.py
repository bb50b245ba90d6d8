"""Ten times what the seats can do, in steps: the room refuses and the scheduler loses nothing."""

from __future__ import annotations

import numpy as np
from tests.engine.fakes import Bench

from loramux.errors import Overloaded
from loramux.front.admission import Claim, Room
from loramux.front.generation import GenerationSpec
from loramux.request import Request

SEATS, WAITING, OUTPUT, STEPS = 16, 16, 16, 300


class Server:
    """Admission before a scheduler; the clock is the step."""

    def __init__(self) -> None:
        self.bench = Bench(200, {f"a{i}": 1 for i in range(10)}, max_num_seqs=SEATS)
        self.now = 0.0
        self.rejected: list[str] = []
        self.room = Room(SEATS + WAITING, self.rejected.append, clock=lambda: self.now)
        self.room.max_tokens = 10**6
        self.running: dict[str, tuple[Request, GenerationSpec]] = {}
        self.serial = 0
        self.waits: list[float] = []

    def arrive(self) -> None:
        """One request; raises Overloaded when there is no room for it."""
        self.serial += 1
        adapter = f"a{self.serial % 10}"
        prompt = [self.serial, *range(7)]
        claim = Claim(tenant=adapter, prompt_tokens=len(prompt), output_tokens=OUTPUT)
        self.room.check(claim)
        request = self.bench.add(
            f"r{self.serial}", ids=prompt, max_tokens=OUTPUT, adapter=adapter, arrival=self.now
        )
        spec = GenerationSpec(
            request_id=request.id,
            tenant=adapter,
            adapters=(),
            prompt_ids=prompt,
            sampling=request.sampling,
        )
        self.room.start(spec)
        self.running[request.id] = request, spec

    def step(self) -> int:
        """Tokens it made."""
        before = {name: request.num_outputs for name, (request, _) in self.running.items()}
        self.bench.step()
        self.now += 1
        made = sum(self.running[name][0].num_outputs - num for name, num in before.items())
        for name, num in before.items():
            request, spec = self.running[name]
            if num == 0 and request.num_outputs:
                self.waits.append(self.now - request.arrival)
            if request.num_outputs == OUTPUT:
                self.room.end(spec)
                del self.running[name]
        return made


def test_ten_times_too_much_costs_nothing_and_is_soon_over() -> None:
    server = Server()
    peak = 0
    for _ in range(STEPS):  # a closed loop: as many as there are seats
        while len(server.running) < SEATS:
            server.arrive()
        peak += server.step()
    rng = np.random.default_rng(0)
    capacity = peak / STEPS / OUTPUT
    good, refused, hints = 0, 0, []
    server.waits.clear()
    for _ in range(STEPS):
        for _ in range(rng.poisson(10 * capacity)):
            try:
                server.arrive()
            except Overloaded as error:
                refused += 1
                hints.append(error.retry_after_s)
        good += server.step()
    assert good >= 0.8 * peak
    assert refused > 5 * STEPS * capacity and len(server.rejected) == refused
    assert all(1 <= hint <= 60 for hint in hints)
    longest = (SEATS + WAITING) / capacity
    assert max(server.waits) <= 3 * longest, "the room bounds what those who are let in wait"
    finished = 0
    while server.running:  # then nothing comes any more
        server.step()
        finished += 1
    assert finished <= 2 * longest and server.room.choices == server.room.tokens == 0
    server.arrive()
    server.step()
    assert server.waits[-1] == 1, "back to normal"
