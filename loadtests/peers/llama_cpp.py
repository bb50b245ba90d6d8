"""llama.cpp's server: GGUF files made by its own scripts, one slot per request.

A request names its adapter in ``lora``; without that field the server adds up all adapters it was
started with. Requests whose adapters differ never share a batch there.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cases import Job
from http_peer import Server
from peer import THREADS, Models

HERE = Path(__file__).parent
CONTEXT = 256  # tokens a slot has room for: 128 of prompt and 64 new ones fit


@dataclass(frozen=True)
class LlamaCppFiles:
    """Where it is installed: the built server, its sources, a Python with ``gguf`` and torch."""

    server: Path
    source: Path
    python: Path


class LlamaCpp(Server):
    """``flags``: ``best`` (32 slots, flash attention, no cache of old prompts) or ``default``."""

    path = "/completion"

    def __init__(
        self, files: LlamaCppFiles, flags: Literal["best", "default"], outtype: str = "f32"
    ) -> None:
        super().__init__(f"llama.cpp-{flags}-{outtype}", files.server)
        self._files = files
        self._outtype = outtype
        self._flags = flags
        self._num_adapters = 0
        if outtype == "q8_0":
            self.tie = 0.1
        elif flags == "default":
            self.tie = 0.02  # a KV cache in fp16

    def missing(self) -> str | None:
        gone = [path for path in vars(self._files).values() if not path.exists()]
        return f"no {gone[0]}" if gone else None

    def command(self, models: Models, port: int) -> list[str | Path]:
        base = models.base.with_name(f"base-{self._outtype}.gguf")
        adapters = [path.with_suffix(".gguf") for path in models.adapters]
        self._convert(models, base, adapters)
        self._num_adapters = len(adapters)
        command: list[str | Path] = [self._files.server, "--model", base, "--port", str(port)]
        command += ["--threads", str(THREADS), "--log-verbosity", "2", "--offline"]
        if adapters:
            command += ["--lora", ",".join(map(str, adapters))]
        if self._flags == "best":
            command += ["--parallel", "32", "--ctx-size", str(32 * CONTEXT)]
            command += ["--flash-attn", "on", "--cache-type-k", "f32", "--cache-type-v", "f32"]
            command += ["--cache-ram", "0", "--no-webui"]
        return command

    def body(self, job: Job) -> dict[str, Any]:
        body = {
            "prompt": job.prompt,
            "n_predict": job.num_new,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
            "return_tokens": True,
        }
        if self._num_adapters:
            body["lora"] = [{"id": max(job.adapter, 0), "scale": float(job.adapter >= 0)}]
        return body

    def tokens(self, answer: dict[str, Any]) -> list[int]:
        ids: list[int] = answer["tokens"]
        return ids

    def _convert(self, models: Models, base: Path, adapters: Sequence[Path]) -> None:
        """Write what is not there yet; minutes for 32 adapters."""
        script = self._files.source / "convert_hf_to_gguf.py"
        tasks: dict[Path, list[str | Path]] = {
            base: [script, models.base, "--outtype", self._outtype]
        }
        script = self._files.source / "convert_lora_to_gguf.py"
        for folder, gguf in zip(models.adapters, adapters, strict=True):
            tasks[gguf] = [script, folder, "--base", models.base, "--outtype", "f32"]
        left = [
            [str(part) for part in (*task, "--outfile", gguf)]
            for gguf, task in tasks.items()
            if not gguf.exists()
        ]
        if left:
            command = [str(self._files.python), str(HERE / "gguf_child.py"), json.dumps(left)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"conversion to GGUF failed:\n{done.stderr[-3000:]}")
