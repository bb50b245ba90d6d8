"""Templates from strangers, rendered in a process of their own that may die of them.

Fuel bounds how many steps a template takes and not what a step costs: one that doubles a text at
each of sixty steps would take the server's memory and then the server. The process has no
environment, a bounded address space, and an alarm on its own CPU time; it is started when first
needed and again after a death.

    python -m loramux.adapters.renderer     requests on stdin, answers on stdout, both framed
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

import msgspec

from loramux.adapters.chat_template import ChatTemplate, TemplateRefuses
from loramux.errors import ConfigError, InvalidRequest

MAX_MEMORY_BYTES = 256 << 20
"""A chat as long as a request may be takes about half of it."""
MAX_CPU_S = 1.0
_MAX_TEMPLATES = 64
"""Compiled ones kept."""


class Job(msgspec.Struct, array_like=True):
    """One prompt to make. Special tokens are pairs, so that a job's template can be looked up."""

    source: str
    special_tokens: tuple[tuple[str, str], ...]
    messages: list[dict[str, Any]]
    variables: dict[str, Any]


class Rendered(msgspec.Struct, array_like=True):
    """The prompt, or why there is none; ``refused`` when the template itself said no."""

    text: str = ""
    error: str = ""
    refused: bool = False


class Renderer:
    """Makes prompts of adapters' templates. Blocks; calls from several threads take turns."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def render(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        messages: Sequence[dict[str, Any]],
        variables: dict[str, Any],
    ) -> str:
        """See ChatTemplate.render. Raises InvalidRequest, also for a template that does not
        compile or that takes too much time or memory."""
        specials = tuple(sorted(special_tokens.items()))
        job = msgspec.msgpack.encode(Job(source, specials, list(messages), variables))
        with self._lock:
            done = self._ask(job)
            if isinstance(done, int) and done != -signal.SIGPROF:
                done = self._ask(job)  # the first time others' templates may have filled it
        if isinstance(done, int):
            spent = "time" if done == -signal.SIGPROF else "memory"
            done = Rendered(error=f"the adapter's chat template takes too much {spent}")
        if done.error:
            kind = TemplateRefuses if done.refused else InvalidRequest
            raise kind(done.error, param="messages")
        return done.text

    def _ask(self, job: bytes) -> Rendered | int:
        """The answer, or with what the process ended instead."""
        process = self._process = self._process or _start()
        assert process.stdin is not None and process.stdout is not None
        try:
            _write(process.stdin, job)
            answer = _read(process.stdout)
        except OSError:  # it died before it had read all
            answer = None
        if answer is not None:
            return msgspec.msgpack.decode(answer, type=Rendered)
        self._end()
        return process.returncode

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes the pipes, waits
                pass

    def close(self) -> None:
        """End the process. The next ``render`` would start another."""
        with self._lock:
            self._end()


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "loramux.adapters.renderer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
        bufsize=0,
    )


def _write(pipe: IO[bytes], frame: bytes) -> None:
    view = memoryview(len(frame).to_bytes(4, "little") + frame)
    while view:
        view = view[pipe.write(view) :]


def _read(pipe: IO[bytes]) -> bytes | None:
    """One frame; None when the other end is gone."""
    if (head := _exactly(pipe, 4)) is None:
        return None
    return _exactly(pipe, int.from_bytes(head, "little"))


def _exactly(pipe: IO[bytes], size: int) -> bytes | None:
    pieces = []
    while size:
        if not (piece := pipe.read(min(size, 1 << 20))):
            return None
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


@functools.lru_cache(maxsize=_MAX_TEMPLATES)
def _template(source: str, special_tokens: tuple[tuple[str, str], ...]) -> ChatTemplate:
    return ChatTemplate(source, dict(special_tokens), owner="the adapter's")


def _render(data: bytes) -> Rendered:
    try:
        job = msgspec.msgpack.decode(data, type=Job)
        template = _template(job.source, job.special_tokens)
        return Rendered(template.render(job.messages, job.variables))
    except TemplateRefuses as error:
        return Rendered(error=error.message, refused=True)
    except (InvalidRequest, ConfigError) as error:
        return Rendered(error=error.message)


def main() -> None:
    """Answer until nobody asks any more. Too much memory ends the process, wherever it is met."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    questions, answers = os.fdopen(0, "rb", 0), os.fdopen(1, "wb", 0)
    while (data := _read(questions)) is not None:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)  # its signal kills, even inside a filter
        answer = msgspec.msgpack.encode(_render(data))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(answers, answer)


if __name__ == "__main__":
    main()
