"""What a peer is: something that serves the base and a set of adapters, in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cases import Job

HZ = os.sysconf("SC_CLK_TCK")
THREADS = os.cpu_count() or 1
TIE_FP32 = 1e-3


@dataclass(frozen=True)
class Models:
    """What is served: a checkpoint and PEFT folders; ``folder`` keeps what is made from them."""

    folder: Path
    base: Path
    adapters: list[Path]


@dataclass(frozen=True)
class Run:
    """One run over all jobs: wall-clock seconds, and the new token ids of each job."""

    seconds: float
    outputs: list[list[int]]


class Peer(Protocol):
    """One way to serve. ``start`` may take minutes; ``run`` is what is timed.

    ``against``: which of ours it is compared with, ``loramux-http`` or ``loramux-engine``.
    ``tie``: how near the best two logits may be before its greedy token may differ from PEFT's.
    """

    name: str
    against: str
    tie: float

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""

    def start(self, models: Models) -> None:
        """Leaves nothing running when it fails."""

    def run(self, jobs: Sequence[Job], concurrency: int) -> Run: ...

    def idle_cpu(self) -> float:
        """CPU seconds per second that it takes while nobody asks anything."""

    def stop(self) -> None: ...


class Process:
    """A child with its own process group: its CPU time, and its end, include its children."""

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        talk: bool = False,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        pipe = subprocess.PIPE if talk else subprocess.DEVNULL
        self.log = log
        with log.open("wb") as errors:
            self.popen = subprocess.Popen(
                [str(part) for part in command],
                stdin=pipe,
                stdout=pipe if talk else errors,
                stderr=errors,
                env={**os.environ, "GOMP_SPINCOUNT": "10000", **(env or {})},
                start_new_session=True,
            )

    def cpu_seconds(self) -> float:
        """What all processes of the group have used so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            if int(fields[2]) == self.popen.pid:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / HZ

    def idle_cpu(self, seconds: float = 3.0) -> float:
        before = self.cpu_seconds()
        time.sleep(seconds)
        return (self.cpu_seconds() - before) / seconds

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = 600) -> None:
        deadline = time.monotonic() + timeout_s
        try:
            while not ready():
                if self.popen.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.popen.args!r} did not start:\n{self.tail()}")
                time.sleep(0.2)
        except BaseException:
            self.stop()
            raise

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def pause(self) -> None:
        """Keep the whole group from running until ``resume``."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, which: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.popen.pid, which)

    def stop(self) -> None:
        """End all of it; a second time does nothing."""
        for how in (signal.SIGTERM, signal.SIGKILL):
            self._signal(how)
            try:
                self.popen.wait(20)
            except subprocess.TimeoutExpired:
                continue
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()
