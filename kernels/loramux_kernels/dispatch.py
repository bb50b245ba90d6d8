"""Which implementation runs an operation, and a count of what ran.

Every operation's folder holds one module per backend with the same functions: ``gpu`` (Triton),
``cpu`` (numba) and ``reference`` (torch). The reference is production code for the cases no
kernel is worth writing for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any, Literal

import torch

Backend = Literal["gpu", "cpu", "reference"]

calls: Counter[str] = Counter()
"""Kernel calls so far, by ``"backend:operation"``; see :func:`loramux_kernels.testing.counting`."""

_forced: Backend | None = None


def implementation(package: str, tensor: torch.Tensor) -> Any:
    """The module of ``package`` that runs operations which write ``tensor``."""
    return _module(package, backend(tensor))


def backend(tensor: torch.Tensor) -> Backend:
    """Which backend runs operations that write ``tensor``."""
    return _forced or _natural(tensor)


@cache
def _module(package: str, backend: Backend) -> Any:
    return import_module(f"{package}.{backend}")


def warm_up() -> None:
    """Compile every CPU kernel, or load it from numba's cache on disk."""
    for operation in ("attention", "layers", "linear", "lora", "modulate", "norm", "vocabulary"):
        _module(f"loramux_kernels.{operation}", "cpu")


def _natural(tensor: torch.Tensor) -> Backend:
    if tensor.is_cuda:
        return "gpu"
    if tensor.device.type == "cpu" and tensor.dtype == torch.float32:
        return "cpu"
    return "reference"


@contextmanager
def using(backend: Backend) -> Iterator[None]:
    """Force one backend: for tests that compare them and for Triton's interpreter."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
