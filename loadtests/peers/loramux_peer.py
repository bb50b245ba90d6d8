"""loramux itself, over HTTP and as an engine without one, and transformers with PEFT."""

from __future__ import annotations

import sys
from pathlib import Path

from http_peer import Server
from peer import Models
from worker import Worker

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)


class LoramuxServer(Server):
    """``loramux serve`` with the adapters registered at start."""

    health = "/health/ready"

    def __init__(self) -> None:
        super().__init__("loramux-http", PYTHON)

    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'kernels'}"}

    def command(self, models: Models, port: int) -> list[str | Path]:
        code = "import sys; from loramux.cli import main; sys.exit(main())"
        command: list[str | Path] = [PYTHON, "-c", code, "serve", "--model", models.base]
        command += ["--served-model-name", "base", "--device", "cpu", "--pool-memory", "3G"]
        command += ["--port", str(port), "--data-dir", models.folder / "data-http"]
        command += ["--no-prefix-caching"]
        for index, path in enumerate(models.adapters):
            command += ["--adapter", f"a{index}={path}"]
        return command


class LoramuxEngine(Worker):
    """The engine in a process of its own, without front or HTTP."""

    against = "loramux-http"

    def __init__(self) -> None:
        super().__init__("loramux-engine", PYTHON, "loramux_child.py")


def peft() -> Worker:
    """transformers ``generate()`` with one adapter name per row, as ``throughput.py`` does it."""
    return Worker("peft", PYTHON, "peft_child.py")
