"""One thread pool: numba's parallel loops run on the OpenMP threads that torch started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loramux_kernels import dispatch

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


COMPILED = """
from loramux_kernels import dispatch

dispatch.warm_up()
import sys
from numba.core.dispatcher import Dispatcher

modules = [m for name, m in sys.modules.items() if name.startswith("loramux_kernels")]
entries = {f for m in modules for f in vars(m).values() if isinstance(f, Dispatcher)}
hits = sum(sum(entry.stats.cache_hits.values()) for entry in entries)
print(hits, sum(sum(entry.stats.cache_misses.values()) for entry in entries))
"""


def test_another_process_compiles_nothing() -> None:
    """What one process compiled is read from disk by the next: a start takes no minute."""
    dispatch.warm_up()
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": "kernels"},
    )
    hits, misses = map(int, done.stdout.split())
    assert hits >= 10 and misses == 0


ELSEWHERE = """
import os, sys
from pathlib import Path

os.access = lambda *_: False
from loramux_kernels import jit

assert jit.numba.config.CACHE_DIR.startswith(os.environ["HOME"])
jit.keep_compiled_in(Path(sys.argv[1]))
from loramux_kernels.norm import cpu
"""


@pytest.mark.slow  # compiles anew: 15 s
def test_an_installation_that_cannot_be_written_compiles_into_the_data_folder(
    tmp_path: Path,
) -> None:
    data, home = tmp_path / "data", tmp_path / "home"
    stale = data / "compiled-0123456789abcdef"
    stale.mkdir(parents=True)
    environment = {"PYTHONPATH": "kernels", "HOME": str(home)}
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(data)], check=True, env=environment)
    (kept,) = data.iterdir()
    assert kept != stale and list(kept.rglob("*.nbc"))
    assert not home.exists()
