"""An engine process without a model: it speaks the wire and misbehaves on request.

Token i of a request is its prompt's token i modulo the prompt's length. A request's ``cache_salt``
is its script, words in any order. It goes on behind the tokens that are submitted with it:

    burst=K     K tokens a step            delay=S     seconds before each of its steps
    die=N       exit before token N        skip=N      claim token N+1 comes where N should
    repeat=N    send token N twice         stale=N     a wrong token N from an older epoch, first
    fail=CODE   failed at once             hang        stop stepping and report a long step
    mute        no heartbeats from now on  garbage     send bytes that are no message
    stop=T      token T ends the request   kill=N      as die, but from outside (SIGKILL)
    gate=FILE   no second token before there is that file
    word@E      only in the engine of epoch E
    draft=K     when asked to guess, each step verifies K guesses, of which burst-1 are right
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zmq
from msgspec.structs import replace

from loramux import wire
from loramux.engine.blackbox import BlackBox
from loramux.metrics.stats import StepStats
from loramux.request import DRAFT_MODEL_ID, SMALL_MODEL_ID, Adapters


@dataclass
class Row:
    submit: wire.Submit
    script: dict[str, str]
    sent: list[int] = field(default_factory=list)
    began: bool = False


class FakeEngine:
    def __init__(
        self, address: str, epoch: int, parent: int, box: str, config: dict[str, Any]
    ) -> None:
        self.epoch = epoch
        self.heartbeat_s = config["heartbeat_s"]
        self.models = [config[key] for key in ("model", "draft_model", "small_model")]
        self.socket = zmq.Context().socket(zmq.PAIR)
        self.socket.connect(address)
        self.box = BlackBox(Path(box), 64)
        self.rows: dict[str, Row] = {}
        self.step = 0
        self.mute = False
        self.hung_since: float | None = None
        self.aborted: list[str] = []
        self.commands: list[tuple[str, str | None]] = []
        self.tenants: list[str] = []
        self.companions: dict[str, dict[int, Adapters]] = {}
        self.wishes: list[Any] = []
        self.parent = parent
        self.off_key: Path | None = None

    def send(self, message: Any) -> None:
        self.socket.send(wire.encode(message))

    def run(self) -> None:
        self.send(ready(self.epoch, *self.models))
        beat = 0.0
        while True:
            if not self.mute and time.monotonic() - beat > self.heartbeat_s:
                beat = time.monotonic()
                running = beat - self.hung_since if self.hung_since else 0.0
                self.send(wire.Heartbeat(self.epoch, running))
            while self.socket.poll(0 if self.rows and not self.hung_since else 5):
                self.receive(wire.decode_to_engine(self.socket.recv()))
            if os.getppid() != self.parent:
                os._exit(0)  # zmq would wait to send to nobody
            if self.rows and not self.hung_since:
                self.take_step()

    def receive(self, message: Any) -> None:
        match message:
            case wire.Submit():
                timed = (word.partition("@") for word in message.cache_salt.split())
                now = (word for word, _, epoch in timed if epoch in ("", str(self.epoch)))
                words = (word.partition("=") for word in now)
                self.tenants.append(message.tenant)
                self.companions[message.request_id] = message.companions
                self.wishes.append([message.speculation, message.entropy, message.companions])
                self.rows[message.request_id] = Row(
                    message, {a: b for a, _, b in words}, list(message.output_ids)
                )
            case wire.Abort():
                self.aborted += message.request_ids
                for request_id in message.request_ids:
                    self.rows.pop(request_id, None)
            case wire.Command():
                self.commands.append((message.kind, message.digest))
                reply = wire.Reply(engine_epoch=self.epoch, command_id=message.command_id)
                reply.payload = {
                    "aborted": self.aborted,
                    "commands": self.commands,
                    "tenants": self.tenants,
                    "companions": self.companions,
                    "wishes": msgspec.to_builtins(self.wishes),
                    "pid": os.getpid(),
                }
                if message.kind == "evict" and message.digest == "0" * 64:
                    reply.error = ("adapter_pinned", "it is pinned")
                self.send(reply)

    def take_step(self) -> None:
        self.box.note(list(self.rows))
        done = wire.StepDone(engine_epoch=self.epoch, step=self.step)
        rows = len(self.rows)
        stats = StepStats(num_running=rows, generation_tokens=rows, batch_rows=rows)
        stats.phase_s = dict.fromkeys(("schedule", "forward", "sample", "commit"), 0.001)
        done.stats = msgspec.to_builtins(stats)
        self.step += 1
        for row in list(self.rows.values()):
            self.advance(row, done)
        if not self.hung_since:
            self.box.note(())
        self.send(done)

    def advance(self, row: Row, done: wire.StepDone) -> None:
        submit, script = row.submit, row.script
        request_id, params = submit.request_id, submit.sampling
        if "fail" in script:
            done.failed.append(wire.Failed(request_id, script["fail"], "as scripted"))
            del self.rows[request_id]
            return
        if "garbage" in script:
            self.socket.send(b"\xc1 no message")
        self.mute = self.mute or "mute" in script
        if "hang" in script:
            self.hung_since = time.monotonic()
            return
        time.sleep(float(script.get("delay", 0)))
        start = len(row.sent)
        if start and "gate" in script and not Path(script["gate"]).exists():
            time.sleep(0.001)
            return
        left = params.max_tokens - start
        prompt = submit.prompt_ids
        end = start + min(left, int(script.get("burst", 1)))
        ids = [prompt[i % len(prompt)] for i in range(start, end)]
        if request_id.startswith("canary") and self.off_key and self.off_key.exists():
            ids = [ids[0] + (str(self.epoch) in self.off_key.read_text().split())]
        if script.get("die") == str(start):
            os._exit(3)
        if script.get("kill") == str(start):
            os.kill(os.getpid(), signal.SIGKILL)
        if script.get("stale") == str(start):
            wrong = wire.Output(request_id, start, [prompt[0] + 1])
            self.send(wire.StepDone(engine_epoch=self.epoch - 1, step=0, outputs=[wrong]))
        stop = None
        for index, token in enumerate(ids):
            if script.get("stop") == str(token):
                ids, stop = ids[: index + 1], token
                break
        started = None if row.began else (1 + start, 0.25, 0.5)
        row.began = True
        shift = script.get("skip") == str(start)
        logprobs = None
        if params.logprobs is not None:
            logprobs = [wire.TokenLogprob(token, -1.0, 1) for token in ids]
        output = wire.Output(request_id, start + shift, ids, logprobs, None, None, started)
        if submit.speculation is not None and "draft" in script:
            num = int(script["draft"])
            output.drafted = (submit.speculation.drafters[0], num, num)
        done.outputs.append(output)
        if script.get("repeat") == str(start):
            done.outputs.append(wire.Output(request_id, start, ids))
        row.sent += ids
        if stop is not None or len(row.sent) >= params.max_tokens:
            reason = "stop" if stop is not None else "length"
            done.finished.append(wire.Finished(request_id, reason, stop, 7, 0.75, 1.5))
            del self.rows[request_id]


def ready(
    epoch: int, model: str = "", draft: str | None = None, small: str | None = None
) -> wire.Ready:
    """Partners are what their folders are called; half as wide as the base, and twice as deep."""
    base = wire.BaseDescription(
        fingerprint="fake-base",
        num_layers=1,
        widths={module: (16, 16) for module in wire.MODULES},
        slice_bytes=4096,
        max_rank=64,
        vocab_size=320,
        directory=model,
    )
    halves = {module: (8, 8) for module in wire.MODULES}
    partners = {
        model_id: replace(
            base, fingerprint=Path(folder).name, num_layers=2, widths=halves, directory=folder
        )
        for model_id, folder in {DRAFT_MODEL_ID: draft, SMALL_MODEL_ID: small}.items()
        if folder is not None
    }
    return wire.Ready(
        engine_epoch=epoch,
        base=base,
        partners=partners,
        vocab_size=288,
        max_model_len=512,
        page_tokens=16,
        num_frames=64,
        frame_bytes=4096,
        max_num_seqs=8,
        device="cpu",
        dtype="float32",
        drafters=("lookup", "suffix"),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--die", type=int, help="exit before readiness with this code")
    parser.add_argument("--off-key", help="a file of the epochs whose canaries are wrong")
    parser.add_argument("--socket")
    parser.add_argument("--epoch", type=int)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--blackbox")
    options = parser.parse_args()
    config = json.loads(sys.stdin.readline())
    assert StepStats().num_running == 0 and config["device"]
    if options.die:
        sys.exit(options.die)
    engine = FakeEngine(options.socket, options.epoch, options.parent, options.blackbox, config)
    engine.off_key = Path(options.off_key) if options.off_key else None
    engine.run()


if __name__ == "__main__":
    main()
