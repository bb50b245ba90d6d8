"""A peer that is a library: a warm child process with an interpreter of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import Job
from peer import THREADS, TIE_FP32, Models, Process, Run

HERE = Path(__file__).parent


class Worker:
    """Runs ``script`` (see ``child.py``) under ``python``; a base of the library peers."""

    against = "loramux-engine"
    tie = TIE_FP32

    def __init__(self, name: str, python: Path, script: str) -> None:
        self.name = name
        self._python = python
        self._script = HERE / script
        self._process: Process

    def missing(self) -> str | None:
        return None if self._python.exists() else f"no {self._python}"

    def setup(self, models: Models) -> dict[str, Any]:
        """What the child is told first."""
        return {
            "folder": str(models.folder),
            "base": str(models.base),
            "adapters": [str(path) for path in models.adapters],
            "threads": THREADS,
        }

    def start(self, models: Models) -> None:
        setup = self.setup(models)
        log = models.folder / "logs" / f"{self.name}.log"
        self._process = Process([self._python, self._script], log, talk=True)
        try:
            self._ask(setup)
        except BaseException:
            self._process.stop()
            raise

    def run(self, jobs: Sequence[Job], concurrency: int) -> Run:
        answer = self._ask({"jobs": [asdict(job) for job in jobs], "concurrency": concurrency})
        return Run(answer["seconds"], answer["outputs"])

    def idle_cpu(self) -> float:
        return self._process.idle_cpu()

    def stop(self) -> None:
        self._process.stop()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.popen.stdin, self._process.popen.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps(question).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            self._process.stop()
            raise RuntimeError(f"{self.name} ended:\n{self._process.tail()}")
        answer: dict[str, Any] = json.loads(line)
        return answer
