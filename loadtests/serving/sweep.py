"""How many adapters, how many requests: open loop, beside divided pools and beside peers.

    python loadtests/serving/sweep.py [--quick] [--folder DIR] [--peers DIR]
                                      [--parts pool,http,rate,peft,vllm]

The model is a random Llama of 135M parameters in fp32. Adapters have ranks 8, 16, 32 and 64 in turn
on q, k, v, o in bf16; requests name one of n uniformly and arrive as a Poisson process; prompts
have 8 to 63 tokens, answers 8 to 39, always as long as asked. Every system gets the same plan.

    pool    the engine in this process, its memory as it is (*shared*), with 30 % of it for adapters
            only (*split*), and the same with every adapter in a slot of the largest rank
            (*padded*). The client is in the process too, so its tokens come later than the server's
    http    ``loramux serve`` with all adapters registered, streamed over HTTP
    rate    the same server and 100 adapters, from a sixth of the rate to twice as much
    peft    transformers ``generate()`` with one adapter name a row, up to 32 of what waits in a
            batch; nothing is streamed, so its TTFT is that of the whole answer
    vllm    vLLM's CPU build, streamed over HTTP, with 1 GB for its KV cache (ours: 0.18 GB for KV
            cache and adapters) and a slot more than adapters; ``loadtests/peers/README.md`` says
            how to install it below ``--peers``

1,000 adapters would be 14 GB of fp32 to either peer, and 30 GB of vLLM's slots, so both go up to
100.

The pool holds 240 frames of 16 tokens: about 18 requests of the mean length with an adapter of the
mean rank each. What has not ended 40 s after the last request left is *incomplete* and counts as a
miss. Rounds run the systems forwards and backwards; a cell is the median with the lowest and
the highest. The first run of a folder registers the adapters, which takes minutes and 7 GB; all of
it takes about an hour on two cores.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import report
import throughput
import uvloop
from pool_split import POLICIES, make_served
from population import Model, Population
from sweep_page import write_page
from targets import Batches, InProcess
from workload import Served

from loramux.adapters.pack import packed_path, read_header
from loramux.bench import traffic
from loramux.bench.figures import formulas, told
from loramux.bench.live import shown
from loramux.bench.open_loop import Ask, Bounds, Record, send
from loramux.bench.openai import OpenAi
from loramux.bench.traffic import Traffic

sys.path.insert(1, str(report.ROOT / "loadtests" / "peers"))

from cases import Job
from loramux_peer import peft
from peer import Models
from vllm_cpu import VllmCpu

MODELS = report.QUICK / "models"
PARTS = ("pool", "http", "rate", "peft", "vllm")
PEERS_MOST, PEERS_BATCH = 100, 32


@dataclass(frozen=True)
class Settings:
    """What a run of the sweep does. ``bounds`` are wide: some targets compute in this process, and
    what is told here is in seconds."""

    traffic: Traffic
    counts: tuple[int, ...]
    rates: tuple[float, ...]  # as multiples of the traffic's
    rate_adapters: int
    rounds: int
    drain_s: float
    frames: int
    model: Model
    bounds: Bounds


FULL = Settings(
    traffic=Traffic(
        rate=3.0, duration_s=40.0, prompt=(8, 64), output=(8, 40), ranks=(8, 16, 32, 64)
    ),
    counts=(1, 10, 100, 1000),
    rates=(1 / 6, 1 / 3, 2 / 3, 1.0, 4 / 3, 2.0),
    rate_adapters=100,
    rounds=2,
    drain_s=40.0,
    frames=240,
    model="135M",
    bounds=Bounds(lag_s=0.25, stall_s=0.25),
)
QUICK = replace(
    FULL,
    traffic=replace(FULL.traffic, rate=4.0, duration_s=3.0),
    counts=(1, 8),
    rates=(0.5, 1.5),
    rate_adapters=8,
    rounds=1,
    drain_s=20.0,
    frames=120,
    model="tiny",
    bounds=Bounds(lag_s=5.0, stall_s=5.0),
)


class Sweep:
    """Runs cells and keeps what they found."""

    def __init__(self, settings: Settings, home: Population, peers: Path) -> None:
        self.settings, self.home, self.peers = settings, home, peers
        self.cases: list[dict[str, Any]] = []
        self.late: list[str] = []

    def prompt(self, index: int, num: int) -> list[int]:
        """Of request ``index``; ids that every system understands."""
        return traffic.prompt_ids(self.settings.traffic.seed, index, num, self.home.vocabulary)

    async def cell(self, part: str, system: str, one: Traffic, ask: Ask) -> None:
        """Send one plan and keep its figures."""
        plan = traffic.draw(one)
        what = f"{system}, {one.adapters} adapters, {one.rate:g}/s"
        with shown(what, len(plan)) as show:
            run = await send(plan, ask, drain_s=self.settings.drain_s, show=show)
        if late := run.bottleneck(self.settings.bounds):
            self.late.append(f"{what}: {late}")
        which = {"part": part, "system": system, "adapters": one.adapters, "rate": one.rate}
        self.cases.append(which | told(run))

    def pool(self) -> None:
        """The three divisions of the same memory."""
        digests = self.home.digests()
        base, data_dir = self.home.base, self.home.data_dir
        served = self._divided(base, data_dir, digests)
        try:
            for round_ in range(self.settings.rounds):
                for num in self.settings.counts:
                    for policy in POLICIES if round_ % 2 == 0 else reversed(POLICIES):
                        served[policy].hold_only([])
                        one = replace(self.settings.traffic, adapters=num)
                        asyncio.run(self._in_process(policy, one, served[policy], digests))
        finally:
            for each in served.values():
                each.close()

    def _divided(self, base: Path, data_dir: Path, digests: Sequence[str]) -> dict[str, Served]:
        fingerprint, _ = self._probe()
        largest = max(
            read_header(packed_path(data_dir, digest, fingerprint)).num_bytes
            for digest in digests[: len(self.settings.traffic.ranks)]
        )
        frames = self.settings.frames
        return {
            p: make_served(p, base, data_dir, frames, largest, speculation="off") for p in POLICIES
        }

    async def _in_process(
        self, policy: str, one: Traffic, served: Served, digests: Sequence[str]
    ) -> None:
        target = InProcess(served, digests, self.prompt)
        try:
            await self.cell("pool", policy, one, target.ask)
        finally:
            await target.close()

    @contextmanager
    def _server(self) -> Iterator[Callable[[str, Traffic], Coroutine[Any, Any, None]]]:
        """A server with the same pool; gives what runs a cell of a part on it."""
        bytes_ = self.settings.frames * self._probe()[1]
        flags = ["--pool-memory", str(bytes_), "--threads", str(os.cpu_count() or 1)]
        flags += ["--no-prefix-caching", "--speculation", "off"]
        count = max(*self.settings.counts, self.settings.rate_adapters)
        server = self.home.serve(count, flags)

        async def run(part: str, one: Traffic) -> None:
            await self._over_http(part, "loramux serve", server.url, one)

        try:
            yield run
        finally:
            server.close()

    async def _over_http(self, part: str, system: str, url: str, one: Traffic) -> None:
        names = [f"a{index}" for index in range(one.adapters)]
        target = OpenAi(url, "base", names, self.prompt, extra={"ignore_eos": True})
        try:
            await self.cell(part, system, one, target.ask)
        finally:
            await target.close()

    def _probe(self) -> tuple[str, int]:
        """The base's fingerprint, and how many bytes a frame has."""
        served = make_served("shared", self.home.base, self.home.data_dir, 8, 0)
        found = served.base.fingerprint, served.assembled.ready.frame_bytes
        served.close()
        return found

    def http(self) -> None:
        """The server, by the number of adapters."""
        with self._server() as run:
            for _ in range(self.settings.rounds):
                for num in self.settings.counts:
                    uvloop.run(run("http", replace(self.settings.traffic, adapters=num)))

    def rate(self) -> None:
        """The server, by rate."""
        one = replace(self.settings.traffic, adapters=self.settings.rate_adapters)
        with self._server() as run:
            for times in self.settings.rates:
                uvloop.run(run("rate", replace(one, rate=times * one.rate)))

    def peft(self) -> None:
        """PEFT, by the number of adapters; a process of its own for each."""
        for one in self._for_peers():
            asyncio.run(self._peft(one))

    def vllm(self) -> None:
        """vLLM, by the number of adapters; a server for each."""
        server = VllmCpu(self.peers / "vllm" / "bin" / "vllm")
        if missing := server.missing():
            print(f"vllm is left out: {missing}", flush=True)
            return
        for one in self._for_peers():
            server.start(self._models(one))
            try:
                server.run(self._first_jobs(one), PEERS_BATCH)
                with server.awake() as url:
                    uvloop.run(self._over_http("vllm", "vLLM CPU", url, one))
            finally:
                server.stop()

    def _for_peers(self) -> list[Traffic]:
        counts = (num for num in self.settings.counts if num <= PEERS_MOST)
        return [replace(self.settings.traffic, adapters=num) for num in counts]

    def _models(self, one: Traffic) -> Models:
        paths = [self.home.adapter(index) for index in range(one.adapters)]
        return Models(self.home.home, self.home.base, paths)

    def _first_jobs(self, one: Traffic) -> list[Job]:
        """One for each adapter, so that a peer is warm before it is measured."""
        return [Job(index, self.prompt(index, 32), 8) for index in range(one.adapters)]

    async def _peft(self, one: Traffic) -> None:
        worker = peft()
        worker.start(self._models(one))
        worker.run(self._first_jobs(one), PEERS_BATCH)

        def generate(batch: list[tuple[int, Record]]) -> list[list[int]]:
            arrivals = [(index, record.arrival) for index, record in batch]
            jobs = [
                Job(a.adapter, self.prompt(index, a.prompt_tokens), a.output_tokens)
                for index, a in arrivals
            ]
            return worker.run(jobs, PEERS_BATCH).outputs

        target = Batches(generate, PEERS_BATCH)
        try:
            await self.cell("peft", "PEFT", one, target.ask)
        finally:
            await target.close()
            worker.stop()  # and with it a batch that nobody waits for any more


def main() -> int:
    parser = report.arguments(__doc__)
    parser.add_argument("--folder", type=Path, default=MODELS, help="where models are kept")
    parser.add_argument(
        "--rate",
        type=float,
        help="requests a second (default: 3; the part rate takes a sixth of it to twice as many)",
    )
    parser.add_argument("--peers", type=Path, default=MODELS, help="where peers are installed")
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no {sorted(unknown)}")
    settings = QUICK if args.quick else FULL
    if args.rate is not None:
        settings = replace(settings, traffic=replace(settings.traffic, rate=args.rate))
    home = Population(args.folder, settings.model, settings.traffic.ranks)
    found = throughput.header()
    count = max(*settings.counts, settings.rate_adapters)
    print(f"{count} adapters are made and registered, unless they are there", flush=True)
    home.serve(count).close()
    sweep = Sweep(settings, home, args.peers)
    for part in parts:
        getattr(sweep, part)()
    found |= {
        "parts": parts,
        "rounds": settings.rounds,
        "frames": settings.frames,
        "traffic": asdict(settings.traffic),
        "formulas": formulas(),
        "cases": sweep.cases,
        "late": sweep.late,
    }
    where = report.folder(args)
    report.save(found, where, "load-sweep")
    write_page(found, where)
    for late in sweep.late:
        print(f"BROKEN: {late}")
    return 1 if sweep.late else 0


if __name__ == "__main__":
    sys.exit(main())
