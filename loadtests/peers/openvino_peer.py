"""OpenVINO GenAI's continuous batching, in fp32, grouped by hand."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from peer import Models
from worker import Worker


class OpenVino(Worker):
    """The base is converted by optimum-intel once; adapters are read from PEFT's files."""

    def setup(self, models: Models) -> dict[str, Any]:
        converted = models.base.with_name("base-openvino")
        if not converted.exists():
            self._export(models.base, converted)
        return {**super().setup(models), "base": str(converted)}

    def _export(self, base: Path, converted: Path) -> None:
        partial = converted.with_suffix(".partial")
        command = [str(self._python.with_name("optimum-cli")), "export", "openvino"]
        command += ["--model", str(base), "--task", "text-generation-with-past"]
        command += ["--weight-format", "fp32", str(partial)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"conversion for OpenVINO failed:\n{done.stderr[-3000:]}")
        partial.rename(converted)


def openvino(python: Path) -> OpenVino:
    """``python`` is that of a virtual environment with openvino-genai and optimum-intel."""
    return OpenVino("openvino", python, "openvino_child.py")
