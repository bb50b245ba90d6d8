"""GPU tests under Triton's interpreter, in a process of their own: Triton decides how to run a
kernel when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys


def passes(tests: str) -> None:
    """The tests marked ``gpu`` in the file ``tests`` pass, and none is skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", tests, "-q", "-m", "gpu"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
