"""The base's own weights, for formats that say what they change in terms of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]


class BaseWeights(Protocol):
    """The weights as the base's files hold them, widened to float32."""

    def blocks(self, layer: int, module: str) -> Iterator[Float32]:
        """A module's weight [out, in] in pieces of whole rows, first to last; a norm's is one row.
        That of a tied lm_head is embed_tokens'."""
        ...

    def bias(self, layer: int, module: str) -> Float32 | None:
        """A linear module's bias [out]; None when it has none."""
        ...
