"""What errors look like that say: there was no memory for this, and nothing is broken by it."""

from __future__ import annotations

import errno

import torch

_SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory", "alloc_failed")
"""Of torch's CPU allocator, CUDA's and Triton's calls, and cuBLAS, in lower case: they have no
exception of their own."""


def is_shortage(error: BaseException) -> bool:
    """Whether what raised ``error`` may be tried again, with less or later. Errors that a device
    keeps for good (an illegal access, a failed assertion on it) are none."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
