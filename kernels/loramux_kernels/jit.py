"""How the CPU kernels are compiled, and the one thread pool they share with torch.

Two OpenMP pools would spin against each other on a small machine. numba's OpenMP layer takes the
runtime it finds in the process, so torch, which brings its own libgomp, is imported first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TypeVar

import numba
import torch

numba.config.THREADING_LAYER = "omp"
try:
    import_module("numba.np.ufunc.omppool")
except ImportError as error:
    raise ImportError(
        "the CPU kernels need the GNU OpenMP runtime (on Debian: apt install libgomp1)"
    ) from error

F = TypeVar("F", bound=Callable[..., object])


def parallel(signature: str) -> Callable[[F], F]:
    """Compile an entry point for one signature when its module is imported: parallel loops, no
    GIL, cached on disk. Operands of another dtype or layout raise TypeError, they never compile
    a second form while a request waits."""

    def compile_(function: F) -> F:
        options = {"parallel": True, "nogil": True, "cache": True, "error_model": "numpy"}
        compiled: F = numba.njit(signature, **options)(function)
        return compiled

    return compile_


def inner(function: F) -> F:
    """Compile a function that only compiled code calls."""
    compiled: F = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


def set_num_threads(count: int) -> None:
    """Threads of torch's operations and of the CPU kernels alike."""
    torch.set_num_threads(count)
    numba.set_num_threads(count)
