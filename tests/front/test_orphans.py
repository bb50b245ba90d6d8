"""A front that dies in the seconds its processes take to start leaves none of them behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny

from loramux.config import ServerConfig
from loramux.front.front import ENGINE, INGEST

ROOT = Path(__file__).parents[2]
FRONT = """
import os, subprocess, sys
child = subprocess.Popen([*sys.argv[1:], "--parent", str(os.getpid())], start_new_session=True)
print(child.pid, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("process", ["engine", "ingest"])
def test_a_process_ends_whose_front_died_during_its_imports(process: str, tmp_path: Path) -> None:
    """The orphan holds the other end of the pipe that is read here until it closes."""
    address = f"ipc://{tmp_path}/s"
    if process == "engine":
        box = str(tmp_path / "steps")
        command = [*ENGINE, "--socket", address, "--epoch", "1", "--blackbox", box]
    else:
        command = [*INGEST, "--socket", address, "--data-dir", str(tmp_path / "data")]
    model = tiny.write_model(tmp_path / "base")
    config = ServerConfig(model=model, data_dir=tmp_path / "data", device="cpu", pool_memory="1M")
    line = tmp_path / "config"
    line.write_text(config.model_dump_json() + "\n")
    with open(line) as stdin:
        front = subprocess.Popen(
            [sys.executable, "-c", FRONT, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'kernels'}"},
            stdin=stdin,
            stdout=subprocess.PIPE,
            text=True,
        )
    assert front.stdout is not None
    orphan = int(front.stdout.readline())
    try:
        front.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.kill(orphan, signal.SIGKILL)
        front.communicate()
        pytest.fail(f"the {process} process outlived its front")
