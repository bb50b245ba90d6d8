"""One thread pool: numba's parallel loops run on the OpenMP threads that torch started."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
import torch
from loramux_kernels import jit, norm

jit.set_num_threads(2)
x = torch.ones(512, 512)
out = torch.empty_like(x)
torch.mm(x, x, out=out)
torch.exp(x, out=out)
tasks = len(os.listdir("/proc/self/task"))
for _ in range(3):
    norm.rms_norm(out, x, x[0], 1e-5)
    torch.exp(x, out=out)
import numba
print(numba.threading_layer(), torch.get_num_threads(), numba.get_num_threads())
print(len(os.listdir("/proc/self/task")) - tasks)
"""


def test_numba_uses_torchs_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": "kernels", "NUMBA_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"},
    )
    assert done.stdout.split() == ["omp", "2", "2", "0"], done.stderr
