"""The engine process: ``python -m loramux.engine.main --socket PATH --epoch N --parent PID``.

Reads the ServerConfig as one JSON line from stdin, connects to the front's socket, says Ready and
steps until the front goes away. Messages are handled between steps only, so the engine itself
needs no locks.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

import zmq

from loramux.config import ServerConfig
from loramux.engine.assemble import assemble
from loramux.engine.blackbox import BlackBox
from loramux.engine.engine import STATS_EVERY_S, Engine
from loramux.errors import ConfigError, LoramuxError
from loramux.wire import (
    Abort,
    Heartbeat,
    Reply,
    StepDone,
    Submit,
    ToEngine,
    decode_to_engine,
    encode,
)

log = logging.getLogger("loramux.engine")

EXIT_BROKEN = 70
"""The engine met something that no request is known to be to blame for."""


class EngineProcess:
    """An engine between its front and its step loop. ``box`` always says whom it is at."""

    def __init__(self, engine: Engine, inbox: zmq.Socket[bytes], epoch: int, box: BlackBox) -> None:
        self.step_began: float | None = None
        self._engine = engine
        self._box = box
        engine.on_running(box.note)
        self._inbox = inbox
        self._epoch = epoch
        self._told = 0.0
        self._loaded = os.eventfd(0, os.EFD_NONBLOCK)
        engine.on_loaded(lambda: os.eventfd_write(self._loaded, 1))
        self._poller = zmq.Poller()
        self._poller.register(inbox, zmq.POLLIN)
        self._poller.register(self._loaded, zmq.POLLIN)

    def run(self) -> NoReturn:
        """Step while there is work, sleep while there is none."""
        busy = False
        while True:
            self._receive(wait_s=0.0 if busy else STATS_EVERY_S)
            self.step_began = time.monotonic()
            done = self._engine.step()
            self.step_began = None
            busy = done.moved
            self._tell(done)

    @property
    def predicted_s(self) -> float:
        """How long the step that runs was expected to take."""
        return self._engine.predicted_s

    def _tell(self, done: StepDone) -> None:
        now = time.monotonic()
        lists = {"resident", "pinned", "waiting_adapters"}
        news = done.moved or lists & done.stats.keys()
        if news or now - self._told >= STATS_EVERY_S:
            self._told = now
            self._inbox.send(encode(done))

    def _receive(self, wait_s: float) -> None:
        ready = dict(self._poller.poll(int(wait_s * 1000)))
        if self._loaded in ready:
            os.eventfd_read(self._loaded)
        while True:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._handle(decode_to_engine(frame))

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            self._box.note([message.request_id])
            self._engine.submit(message)
            self._box.note(())
        elif isinstance(message, Abort):
            self._engine.abort(message.request_ids)
        else:
            reply = Reply(engine_epoch=self._epoch, command_id=message.command_id)
            try:
                reply.payload = self._engine.command(message)
            except LoramuxError as error:
                reply.error = (error.code, error.message)
            self._inbox.send(encode(reply))


class Courier(threading.Thread):
    """Carries frames between the front's socket and the engine's inbox, and says the process is
    alive: a ZeroMQ socket belongs to one thread, and the step loop is busy for whole steps."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        epoch: int,
        parent: int,
        every_s: float,
    ) -> None:
        super().__init__(name="courier", daemon=True)
        self.process: EngineProcess | None = None
        self._outer = context.socket(zmq.PAIR)
        self._inner = context.socket(zmq.PAIR)
        self._address = address
        self._epoch = epoch
        self._every_s = every_s
        self._parent = parent
        self._held: dict[zmq.Socket[bytes], bytes] = {}
        self._inner.bind("inproc://engine")

    def run(self) -> None:
        self._outer.connect(self._address)
        poller = zmq.Poller()
        ways = ((self._outer, self._inner), (self._inner, self._outer))
        due = 0.0
        while True:
            wanted = dict.fromkeys(ways[0], 0)
            for source, target in ways:
                full = target in self._held
                wanted[target if full else source] |= zmq.POLLOUT if full else zmq.POLLIN
            for socket, events in wanted.items():
                poller.register(socket, events)
            ready = dict(poller.poll(max(0, int((due - time.monotonic()) * 1000))))
            for source, target in ways:
                if ready.get(target, 0) & zmq.POLLOUT:
                    self._pass_on(self._held.pop(target), target)
                elif ready.get(source, 0) & zmq.POLLIN:
                    self._pass_on(source.recv(), target)
            if time.monotonic() >= due:
                due = time.monotonic() + self._every_s
                if os.getppid() != self._parent:
                    os._exit(0)  # the front is gone, and with it whoever wanted the answers
                with contextlib.suppress(zmq.Again):  # the front has not read earlier ones
                    self._outer.send(encode(self._heartbeat()), zmq.NOBLOCK)

    def _pass_on(self, frame: bytes, target: zmq.Socket[bytes]) -> None:
        """Waiting for room would silence the process: until there is some the frame is held, and
        none after it is read."""
        try:
            target.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            self._held[target] = frame

    def _heartbeat(self) -> Heartbeat:
        began = self.process.step_began if self.process else None
        if self.process is None or began is None:
            return Heartbeat(self._epoch)
        return Heartbeat(self._epoch, time.monotonic() - began, self.process.predicted_s)


class _Percent:
    """Logs every tenth of a load that is long enough to be waited for."""

    LARGE_BYTES = 1 << 30

    def __init__(self) -> None:
        self._told = 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // total
        if total >= self.LARGE_BYTES and tenth > self._told:
            self._told = tenth
            log.info("%d %% of %.1f GiB of weights", 10 * tenth, total / 2**30)


def main(argv: list[str] | None = None) -> int:
    """Run the engine process; exit code 2 when it cannot start as configured."""
    parser = argparse.ArgumentParser(prog="loramux.engine.main", description=__doc__)
    parser.add_argument("--socket", required=True, help="ZeroMQ address of the front")
    parser.add_argument("--epoch", type=int, required=True, help="how many engines came before")
    # Told, not asked for: a front may die in the seconds that the imports above take.
    parser.add_argument("--parent", type=int, required=True, help="the process to end with")
    parser.add_argument("--blackbox", required=True, help="file to say in what is computed now")
    args = parser.parse_args(argv)
    config = ServerConfig.model_validate_json(sys.stdin.readline())
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s engine: %(message)s")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    courier = Courier(
        context, args.socket, epoch=args.epoch, parent=args.parent, every_s=config.heartbeat_s
    )
    inbox = context.socket(zmq.PAIR)
    inbox.connect("inproc://engine")
    courier.start()
    try:
        assembled = assemble(config, epoch=args.epoch, progress=_Percent())
    except ConfigError as error:
        log.error("%s", error.message)
        return 2
    process = courier.process = EngineProcess(
        assembled.engine, inbox, args.epoch, BlackBox(Path(args.blackbox), config.max_num_seqs)
    )
    inbox.send(encode(assembled.ready))
    parts = ", ".join(f"{part} {s:.1f} s" for part, s in assembled.ready.startup_s.items())
    log.info("started: %s", parts)
    try:
        process.run()
    except BaseException:
        # What the device holds is not to be trusted any more; the next engine goes on with the
        # requests. Not by returning: threads and a broken device could keep us from our end.
        log.exception("the engine ends")
        os._exit(EXIT_BROKEN)


if __name__ == "__main__":
    sys.exit(main())
