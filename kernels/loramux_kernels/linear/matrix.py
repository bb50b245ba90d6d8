"""A weight matrix as the kernels of its device read it.

    CPU     [panels, in, 32]   a panel is 32 output columns; the last one ends in zeros
    other   [out, in]          as it lies in the file, which is what cuBLAS likes

int8 holds each output column as whole numbers from -127 to 127 times a scale of its own
(round-to-nearest, symmetric); every other dtype holds the file's own numbers.

On a CPU a decode reads every weight once for a handful of rows, so the layout is the order of
reading: one stream per panel, whole cache lines, each used by all rows while it is in a register.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PANEL = 32

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
"""What a matrix may hold; kernels are given the index."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """``W [width_out, width_in]``; ``data`` is in the layout above, ``scales`` are fp32
    ``[width_out]`` for int8 and empty otherwise."""

    data: torch.Tensor
    scales: torch.Tensor
    width_out: int
    width_in: int

    @classmethod
    def empty(
        cls, width_out: int, width_in: int, dtype: torch.dtype, device: torch.device
    ) -> Matrix:
        """A matrix to be filled by ``write``."""
        packed = device.type == "cpu"
        panels = -(-width_out // PANEL)
        size = (panels, width_in, PANEL) if packed else (width_out, width_in)
        data = torch.empty(size, dtype=dtype, device=device)
        if packed and width_out % PANEL:
            data[-1, :, width_out % PANEL :] = 0
        scales = torch.empty(width_out if dtype == torch.int8 else 0, device=device)
        return cls(data, scales, width_out, width_in)

    @classmethod
    def of(cls, dense: torch.Tensor, dtype: torch.dtype | None = None) -> Matrix:
        """A copy of ``dense [out, in]``, in its own dtype or another."""
        width_out, width_in = dense.shape
        matrix = cls.empty(width_out, width_in, dtype or dense.dtype, dense.device)
        matrix.write(0, dense)
        return matrix

    @property
    def packed(self) -> bool:
        return self.data.dim() == 3

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Rows ``first`` onwards become ``rows [n, in]``, converted to this matrix's dtype."""
        if self.data.dtype == torch.int8:
            wide = rows.float()
            scales = wide.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            self.scales[first : first + len(rows)] = scales
            rows = (wide / scales[:, None]).round_().to(torch.int8)
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
        """``[out, in]``; a copy where it is held in another form."""
        dense = self.data
        if self.packed:
            dense = dense.transpose(1, 2).reshape(-1, self.width_in)[: self.width_out]
        return dense * self.scales[:, None] if self.data.dtype == torch.int8 else dense
