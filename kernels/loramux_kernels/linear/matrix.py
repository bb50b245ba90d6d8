"""A weight matrix as the kernels of its device read it.

    CPU     [panels, in, 32]   a panel is 32 output columns; the last one ends in zeros
    other   [out, in]          as it lies in the file, which is what cuBLAS likes

On a CPU a decode reads every weight once for a handful of rows, so the layout is the order of
reading: one stream per panel, whole cache lines, each used by all rows while it is in a register.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PANEL = 32


@dataclass(frozen=True, eq=False)
class Matrix:
    """``W [width_out, width_in]``; ``data`` is in the layout above, in the dtype of its file."""

    data: torch.Tensor
    width_out: int
    width_in: int

    @classmethod
    def empty(
        cls, width_out: int, width_in: int, dtype: torch.dtype, device: torch.device
    ) -> Matrix:
        """A matrix to be filled by ``write``."""
        if device.type != "cpu":
            return cls(
                torch.empty(width_out, width_in, dtype=dtype, device=device), width_out, width_in
            )
        panels = -(-width_out // PANEL)
        data = torch.empty(panels, width_in, PANEL, dtype=dtype)
        if width_out % PANEL:
            data[-1, :, width_out % PANEL :] = 0
        return cls(data, width_out, width_in)

    @classmethod
    def of(cls, dense: torch.Tensor) -> Matrix:
        """A copy of ``dense [out, in]``."""
        width_out, width_in = dense.shape
        matrix = cls.empty(width_out, width_in, dense.dtype, dense.device)
        matrix.write(0, dense)
        return matrix

    @property
    def packed(self) -> bool:
        return self.data.dim() == 3

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Rows ``first`` onwards become ``rows [n, in]``, converted to this matrix's dtype."""
        if not self.packed:
            self.data[first : first + len(rows)] = rows
            return
        done = 0
        while done < len(rows):
            panel, column = divmod(first + done, PANEL)
            if column or len(rows) - done < PANEL:
                count = min(PANEL - column, len(rows) - done)
                self.data[panel, :, column : column + count] = rows[done : done + count].t()
            else:
                count = (len(rows) - done) // PANEL * PANEL
                whole = rows[done : done + count].view(-1, PANEL, self.width_in)
                self.data[panel : panel + len(whole)] = whole.transpose(1, 2)
            done += count

    def dense(self) -> torch.Tensor:
        """``[out, in]``; a copy where the layout is another."""
        if not self.packed:
            return self.data
        return self.data.transpose(1, 2).reshape(-1, self.width_in)[: self.width_out]
