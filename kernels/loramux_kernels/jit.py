"""How the CPU kernels are compiled, and the one thread pool they share with torch.

Two OpenMP pools would spin against each other on a small machine. numba's OpenMP layer takes the
runtime it finds in the process, so torch, which brings its own libgomp, is imported first.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
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

_PACKAGE = Path(__file__).parent


@cache
def _name() -> str:
    """numba looks at the date of one file only, but a kernel holds the code of all it calls: the
    folder is named after the bytes of every source, so an edit anywhere compiles anew."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"compiled-{digest.hexdigest()[:16]}"


def _beside() -> Path | None:
    """The folder beside the sources, where that can be written."""
    folder = _PACKAGE / "__pycache__"
    if os.access(_PACKAGE, os.W_OK):
        folder.mkdir(exist_ok=True)
    return folder if os.access(folder, os.W_OK) else None


numba.config.CACHE_DIR = str((_beside() or Path.home() / ".cache" / "loramux") / _name())


def keep_compiled_in(folder: Path) -> None:
    """Keep compiled kernels in ``folder`` if they cannot lie beside the sources: a server's data
    outlives its container. To be called before a kernel is used; what other sources left in
    ``folder`` is removed."""
    if _beside():
        return
    for other in folder.glob("compiled-*"):
        if other.name != _name():
            shutil.rmtree(other, ignore_errors=True)
    numba.config.CACHE_DIR = str(folder / _name())


F = TypeVar("F", bound=Callable[..., object])


def parallel(signature: str) -> Callable[[F], F]:
    """Compile an entry point for one signature when its module is imported: parallel loops, no
    GIL, cached on disk. Operands of another dtype or layout raise TypeError, they never compile
    a second form while a request waits."""
    return _entry(signature, parallel=True)


def entry(signature: str) -> Callable[[F], F]:
    """The same without loops of its own to run in parallel: those it calls do."""
    return _entry(signature, parallel=False)


def _entry(signature: str, *, parallel: bool) -> Callable[[F], F]:
    def compile_(function: F) -> F:
        options = {"parallel": parallel, "nogil": True, "cache": True, "error_model": "numpy"}
        compiled: F = numba.njit(signature, **options)(function)
        return compiled

    return compile_


# Counting who holds an array costs atomic operations, some twenty cycles each, at every call. What
# is called by an entry borrows the entry's arrays for that time: it need not count, nor can it
# make arrays of its own. Nobody calls it from Python: a wrapper that unpacks some twenty-five
# arguments takes as long to compile as the function.
_INNER = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_BORROWING = {**_INNER, "_nrt": False}


def inner(function: F) -> F:
    """Compile a function that only compiled code calls; it makes no arrays."""
    compiled: F = numba.njit(**_BORROWING)(function)
    return compiled


def counting(function: F) -> F:
    """The same for what makes arrays, or calls what makes them."""
    compiled: F = numba.njit(**_INNER)(function)
    return compiled


def inlined(function: F) -> F:
    """``inner``, always a part of its caller: a call would pass tuples of lanes through memory."""
    compiled: F = numba.njit(**_BORROWING, forceinline=True)(function)
    return compiled


def set_num_threads(count: int) -> None:
    """Threads of torch's operations and of the CPU kernels alike."""
    torch.set_num_threads(count)
    numba.set_num_threads(count)
