"""What an adapter is once its file format is forgotten.

Low-rank pairs, ``y += scale * B (A x)``, at most one per (layer, module), and vectors beside them.
Between A and B may stand an R that is the adapter's alone, A and B being those of a *basis* that
many adapters share (see ``basis``):

    x' = (1 + input_gain) * x    y = (1 + gain) * (W x') + shift + b_base + scale * B (R (A x'))

A norm's gain is its new weight over the base's. Rows of embed_tokens and lm_head may change singly.

Matrices of the uploaded file are read when they are packed, others are computed then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

Dtype = Literal["float32", "float16", "bfloat16"]

ITEMSIZE: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
STORAGE: dict[Dtype, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""How numpy holds each dtype; it has no bfloat16, so those are their bits."""

Array = npt.NDArray[Any]


def widen(values: Array, dtype: Dtype) -> npt.NDArray[np.float32]:
    """``values`` as held for ``dtype``, as float32. Exact for every finite value."""
    if dtype == "bfloat16":
        return (values.astype("<u4") << 16).view("<f4")
    return values.astype("<f4")


class Matrix(Protocol):
    """A matrix that stays on the disk until it is asked for."""

    @property
    def dtype(self) -> Dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def read(self) -> Array:
        """All of it, ``shape``, in ``STORAGE[dtype]``."""
        ...

    def blocks(self) -> Iterator[Array]:
        """All of it in order, as flat pieces of bounded size."""
        ...


@dataclass(frozen=True, slots=True)
class LoraPair:
    """``y += scale * B (A x)`` in one module of one layer. ``a``: [rank, in]; ``b``: [out, rank].

    ``scale`` is exactly a float32. With a ``middle`` R [rank, rank] it is ``scale * B (R (A x))``.
    """

    layer: int
    module: str
    rank: int
    scale: float
    a: Matrix
    b: Matrix
    middle: Matrix | None = None

    def folded(self) -> LoraPair:
        """The same change without a middle: B R is its B."""
        if self.middle is None:
            return self
        b, middle = self.b, self.middle
        product = Computed(b.shape, lambda: read_as(b, "float32") @ read_as(middle, "float32"))
        return replace(self, b=product, middle=None)


def read_as(matrix: Matrix, dtype: Dtype) -> Array:
    """All of a matrix in ``STORAGE[dtype]``: its own dtype or float32."""
    values = matrix.read()
    return values if matrix.dtype == dtype else widen(values, matrix.dtype)


@dataclass(frozen=True, slots=True)
class Computed:
    """A float32 matrix made from others when it is read: ``compute`` gives [rows, columns]."""

    shape: tuple[int, ...]
    compute: Callable[[], npt.NDArray[np.float32]]

    @property
    def dtype(self) -> Dtype:
        return "float32"

    def read(self) -> Array:
        """See Matrix."""
        return self.compute()

    def blocks(self) -> Iterator[Array]:
        """See Matrix; one piece."""
        yield self.compute().reshape(-1)


VectorKind = Literal["gain", "shift", "input_gain"]
VECTOR_KINDS: tuple[VectorKind, ...] = ("gain", "shift", "input_gain")
"""In the order of the kernels' GAIN, SHIFT, INPUT_GAIN."""


@dataclass(frozen=True, slots=True, eq=False)
class ModuleVector:
    """One of the vectors of a module: ``gain`` and ``shift`` [out], ``input_gain`` [in]."""

    layer: int
    module: str
    kind: VectorKind
    values: npt.NDArray[np.float32]


TokenModule = Literal["embed_tokens", "lm_head"]
TOKEN_MODULES: tuple[TokenModule, ...] = ("embed_tokens", "lm_head")
"""In the order of the kernels' EMBEDDING, HEAD."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """What is added to single rows of embed_tokens or lm_head: increasing ``ids`` [n], ``rows``
    [n, hidden]."""

    module: TokenModule
    ids: npt.NDArray[np.int32]
    rows: Matrix


@dataclass(frozen=True, slots=True)
class CanonicalAdapter:
    """An adapter validated against one base. ``pairs`` are ordered by layer, then as TABLE_MODULES.

    ``dtype`` holds every matrix exactly: the one they share, else float32; float32 when there are
    ``vectors`` or ``tokens``. ``warnings`` are for the uploader: things that are legal and perhaps
    not meant.
    """

    dtype: Dtype
    pairs: tuple[LoraPair, ...]
    vectors: tuple[ModuleVector, ...] = ()
    tokens: tuple[TokenRows, ...] = ()
    warnings: tuple[str, ...] = ()
