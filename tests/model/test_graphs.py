"""Recorded steps under Triton's interpreter, in a process of their own: Triton decides how to run
a kernel when it is imported. Over 10 s: whole engines step through interpreted kernels."""

from __future__ import annotations

import os
import subprocess
import sys


def test_recorded_steps_pass_under_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/model/graphs_interpreted.py", "-q", "-m", "gpu"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
