"""The front's side of an engine without processes: every message, death and restart by hand."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

import msgspec
from tests.front.fake_engine import ready
from tests.front.model_dir import KINDS

from loramux import wire
from loramux.config import ServerConfig
from loramux.engine.blackbox import BlackBox
from loramux.front.detokenizer import TextStream, TokenBytes
from loramux.front.engine_client import EngineClient
from loramux.front.generation import Delta, Generation, GenerationSpec
from loramux.front.ledger import Ledger
from loramux.front.observations import Observations
from loramux.front.vital import Vital
from loramux.request import AdapterRef, EntropyAdaptive, SamplingParams, Speculation
from loramux.wire import TokenLogprob

TOKENIZER = KINDS["byte_level"]()
TABLE = TokenBytes(TOKENIZER)
IDS = TOKENIZER.encode("the stop sign 日本").ids
MAX_SEQS = 8


class Line:
    """In place of the supervisor: holds what is sent until the engine takes it."""

    given_up = False

    def __init__(self) -> None:
        self.sent: deque[bytes] = deque()

    def send(self, message: bytes) -> None:
        self.sent.append(message)

    def progress(self) -> None: ...

    async def stop(self) -> None: ...


class Scripted:
    """An EngineClient and the engine it talks to. Token i of a request is ``IDS[(seed + i) % n]``;
    ``kills`` maps request ids to the position at which computing them ends the engine."""

    def __init__(self, config: ServerConfig, folder: Path) -> None:
        self.folder, self.line = folder, Line()
        self.observations = Observations()
        self.ended: Counter[str] = Counter()
        self.ledger = Ledger(
            self.observations,
            lambda _: None,
            lambda _: None,
            lambda spec, _: self.ended.update([spec.request_id]),
        )
        self.client = EngineClient(
            config, (), self.ledger, self.observations, lambda _: None, Vital()
        )
        self.client._supervisor = self.line  # type: ignore[assignment]
        self.generations: dict[str, Generation] = {}
        self.kills: dict[str, int] = {}
        self.epoch = 0
        self.deaths = 0
        self.alive = False
        self.rows: dict[str, wire.Submit] = {}
        self.outbox: deque[bytes] = deque()
        self.submissions: list[wire.Submit] = []

    def say(self, message: Any) -> None:
        self.outbox.append(wire.encode(message))

    # The engine.

    def birth(self) -> None:
        self.epoch += 1
        self.rows = {}
        self.outbox.clear()
        command = self.client.command(self.epoch, f"ipc://{self.folder}/engine-{self.epoch}")
        self.box = BlackBox(Path(command[command.index("--blackbox") + 1]), MAX_SEQS)
        self.client.born(self.epoch)
        self.alive = True
        self.say(ready(self.epoch))

    def die(self, reason: str) -> None:
        """What was said and not yet heard is lost, what was sent and not yet taken too."""
        self.alive = False
        self.deaths += 1
        self.line.sent.clear()
        self.client.died(reason)

    def take(self) -> None:
        """Read everything that was sent."""
        while self.line.sent:
            match wire.decode_to_engine(self.line.sent.popleft()):
                case wire.Submit() as submit:
                    assert submit.request_id not in self.rows, "submitted twice"
                    self.rows[submit.request_id] = submit
                    self.submissions.append(submit)
                case wire.Abort(request_ids):
                    for request_id in request_ids:
                        self.rows.pop(request_id, None)
                case wire.Command() as command:
                    reply = wire.Reply(engine_epoch=self.epoch, command_id=command.command_id)
                    self.say(reply)

    def step(self, burst: int = 1, *, told: bool = True) -> None:
        """A step of everything; ``told=False``: killed from outside before it says so."""
        running = dict(list(self.rows.items())[:MAX_SEQS])
        self.box.note(list(running))
        deadly = [r for r, row in running.items() if len(row.output_ids) == self.kills.get(r)]
        if deadly:
            self.die("exit -11")
            return
        done = wire.StepDone(engine_epoch=self.epoch, step=0)
        for submit in running.values():
            self._advance(submit, burst, done)
        if not told:
            self.die("exit -9")
            return
        self.box.note(())
        self.say(done)

    def _advance(self, submit: wire.Submit, burst: int, done: wire.StepDone) -> None:
        params, start = submit.sampling, len(submit.output_ids)
        if submit.entropy is not None:
            assert (submit.resume or b"0") == str(start).encode(), "not the state of these tokens"
        end = min(start + burst, params.max_tokens)
        if (kills := self.kills.get(submit.request_id)) is not None and kills > start:
            end = min(end, kills)
        ids = [IDS[(params.seed + i) % len(IDS)] for i in range(start, end)]
        output = wire.Output(submit.request_id, start, ids)
        if params.logprobs is not None:
            output.logprobs = [TokenLogprob(token, -1.0, 1) for token in ids]
        if params.prompt_logprobs is not None and start == 0:
            output.prompt_logprobs = [None, TokenLogprob(6, -2.0, 3)]
        if submit.speculation is not None and len(ids) > 1:
            output.drafted = ("lookup", 4, 4)
        if submit.entropy is not None:
            output.resume = str(end).encode()
            output.ledger = (end, 0, end, 0)
        done.outputs.append(output)
        self.rows[submit.request_id] = msgspec.structs.replace(
            submit, output_ids=[*submit.output_ids, *ids], resume=output.resume
        )
        if end == params.max_tokens:
            done.finished.append(wire.Finished(submit.request_id, "length", None, end))
            del self.rows[submit.request_id]

    # The front and its clients.

    def hear(self, num: int = 1000) -> None:
        """Let the front read so many messages."""
        while self.outbox and num:
            self.client.received(self.outbox.popleft())
            num -= 1

    @property
    def open(self) -> bool:
        return self.client.info is not None and not self.client.recovering

    def submit(self, request_id: str, seed: int, max_tokens: int, **fields: Any) -> Generation:
        adaptive = fields.pop("adaptive", False)
        spec = GenerationSpec(
            request_id=request_id,
            adapters=(AdapterRef("a" * 64),),
            prompt_ids=[5, 6],
            sampling=SamplingParams(
                seed=seed, max_tokens=max_tokens, logprobs=0, prompt_logprobs=0
            ),
            speculation=None if adaptive else Speculation(drafters=("lookup",)),
            entropy=EntropyAdaptive(threshold=1.0) if adaptive else None,
            **fields,
        )
        text = TextStream(TABLE, stop=spec.stop, skip_special_tokens=True)
        generation = Generation(spec, self._cancel)
        self.generations[request_id] = generation
        entry = self.ledger.add(spec, generation, text)
        self.observations.submitted(spec)
        self.client.submit(entry)
        return generation

    def _cancel(self, request_id: str) -> None:
        if self.ledger.cancel(request_id):
            self.client.abort([request_id])

    async def settle(self) -> None:
        """Let the tasks of the front run as far as they can."""
        for _ in range(10):
            await asyncio.sleep(0)

    async def turn(self) -> None:
        """The front reads what was said and answers, and the engine reads the answer."""
        self.hear()
        await self.settle()
        self.take()

    async def finish(self) -> None:
        """Until every request has ended; an engine that is not there is started."""
        limit = time.monotonic() + 60
        while len(self.ledger):
            assert time.monotonic() < limit, "it does not come to an end"
            if not self.alive:
                self.birth()
            self.hear()
            await self.settle()
            self.take()
            if self.alive and self.rows:
                self.step()
        await self.client.stop()


async def read(generation: Generation) -> Delta:
    """What a reader gets; the error, if there was one, is in the generation."""
    whole = Delta()
    try:
        async for delta in generation:
            whole.extend(delta)
    except Exception:
        assert generation.error is not None
    return whole


def text_of(seed: int, max_tokens: int, stop: tuple[str, ...]) -> tuple[str, int]:
    """What a request is answered, and with how many tokens, when nobody dies."""
    stream = TextStream(TABLE, stop=stop, skip_special_tokens=True)
    text = ""
    for count in range(max_tokens):
        piece, _ = stream.feed([IDS[(seed + count) % len(IDS)]])
        text += piece
        if stream.matched is not None:
            return text, count + 1
    return text + stream.finish(), max_tokens
