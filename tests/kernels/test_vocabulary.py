"""Changes to single tokens: exact, only where they belong, in any batch the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loramux_kernels import dispatch
from loramux_kernels.lora import MODULES, AdapterTable, Runs
from loramux_kernels.lora.table import EMBEDDING, HEAD, TABLE_MODULES, VECTORS
from loramux_kernels.testing import assert_same, counting, integer_tensor
from loramux_kernels.vocabulary import change_embeddings, change_logits

HIDDEN, VOCABULARY, RANK, CHUNK = 40, 75, 3, 16
EMBED = TABLE_MODULES.index("embed_tokens")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class World:
    """Adapters with everything for tokens, over slices in any order."""

    def __init__(self, slice_bytes: int) -> None:
        self.generator = torch.Generator().manual_seed(5)
        widths = dict.fromkeys(MODULES, (HIDDEN, HIDDEN))
        widths |= {"embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (HIDDEN, VOCABULARY)}
        self.slice_bytes = slice_bytes
        self.table = AdapterTable(
            num_layers=1, widths=widths, slice_bytes=slice_bytes, chunk=CHUNK, device="cpu"
        )
        self.arena = torch.full((400 * slice_bytes,), 255, dtype=torch.uint8)
        self.free = torch.randperm(400, generator=self.generator).numpy() * slice_bytes
        self.slots: list[int] = []
        self.dense: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, dtype: torch.dtype, *, pair: bool, ids: tuple[list[int], list[int]]) -> None:
        """An adapter; ``dense`` keeps what it changes of [vocab, hidden], embedding and head."""
        pieces: list[torch.Tensor] = []

        def put(matrix: torch.Tensor) -> int:
            start = sum(piece.numel() for piece in pieces)
            pieces.append(torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % CHUNK)).flatten())
            return start

        shape = (1, len(TABLE_MODULES))
        a_offset, b_offset = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        rank = np.zeros(shape, np.int32)
        dense = [torch.zeros(VOCABULARY, HIDDEN), torch.zeros(VOCABULARY, HIDDEN)]
        if pair:
            a = integer_tensor(RANK, VOCABULARY, generator=self.generator)
            b = integer_tensor(RANK, HIDDEN, generator=self.generator)
            a_offset[0, EMBED], b_offset[0, EMBED] = put(a.to(dtype)), put(b.to(dtype))
            rank[0, EMBED] = RANK
            dense[EMBEDDING] += 0.5 * a.T @ b
        ids_at, rows_at = np.zeros(2, np.int64), np.zeros(2, np.int64)
        for where, chosen in enumerate(ids):
            rows = integer_tensor(len(chosen), HIDDEN, generator=self.generator)
            dense[where][chosen] += rows
            if chosen:
                ids_at[where] = put(torch.tensor(chosen, dtype=torch.int32).view(torch.float32))
                rows_at[where] = put(rows)
        data = torch.cat(pieces).to(dtype).view(torch.uint8) if pieces else torch.zeros(0)
        count = -(-len(data) // self.slice_bytes)
        slices, self.free = self.free[:count], self.free[count:]
        for index, at in enumerate(slices):
            piece = data[index * self.slice_bytes :][: self.slice_bytes]
            self.arena[at : at + len(piece)] = piece
        self.slots.append(
            self.table.add(
                slices=slices,
                a_offset=a_offset,
                b_offset=b_offset,
                rank=rank,
                scale=np.full(shape, 0.5, np.float32),
                dtype=dtype,
                vector_offset=np.full((*shape, len(VECTORS)), -1, np.int64),
                token_ids_offset=ids_at,
                token_rows_offset=rows_at,
                num_token_rows=np.array([len(chosen) for chosen in ids], np.int32),
            )
        )
        self.dense.append((dense[EMBEDDING], dense[HEAD]))


def world(slice_bytes: int = 320) -> World:
    made = World(slice_bytes)
    made.add(torch.float32, pair=True, ids=([0, 7, VOCABULARY - 1], [3]))
    made.add(torch.bfloat16, pair=True, ids=([], []))
    made.add(torch.float16, pair=True, ids=([], []))
    made.add(torch.float32, pair=False, ids=([], list(range(VOCABULARY))))
    made.add(torch.float32, pair=False, ids=([7], [0, 8, 9, VOCABULARY - 1]))
    return made


ROWS = [2, 1, 3, 20, 1, 2]
LISTS = [[(0, 1.0)], [], [(1, 2.0), (4, -1.0)], [(3, 0.5), (0, 2.0)], [(2, 4.0)], [(4, 1.0)]]


@pytest.mark.parametrize("slice_bytes", [64, 320, 1 << 16])
@pytest.mark.parametrize("backend", ["reference", "cpu", "gpu"])
def test_every_row_gets_its_own(backend: dispatch.Backend, slice_bytes: int) -> None:
    made = world(slice_bytes)
    runs = Runs.build(ROWS, [[(made.slots[i], c) for i, c in entries] for entries in LISTS])
    total = sum(ROWS)
    token_ids = torch.randint(0, VOCABULARY, (total,), generator=made.generator)
    token_ids[:2], token_ids[-2:] = torch.tensor([7, 0]), torch.tensor([7, 6])
    y = integer_tensor(total, HIDDEN, generator=made.generator)
    x = integer_tensor(total, HIDDEN, generator=made.generator)
    logits = integer_tensor(total, VOCABULARY, generator=made.generator)
    want_y, want_logits, row = y.clone(), logits.clone(), 0
    for count, entries in zip(ROWS, LISTS, strict=True):
        rows = slice(row, row + count)
        row += count
        for i, c in entries:
            want_y[rows] += c * made.dense[i][EMBEDDING][token_ids[rows]]
            want_logits[rows] += c * x[rows] @ made.dense[i][HEAD].T
    with dispatch.using(backend):
        change_embeddings(y, token_ids, made.arena, made.table, runs)
        change_logits(logits, x, made.arena, made.table, runs)
    assert_same(y, want_y)
    assert_same(logits, want_logits)


def test_nothing_is_called_for_adapters_that_change_no_token() -> None:
    made = World(320)
    made.add(torch.float32, pair=False, ids=([], []))
    runs = Runs.build([2, 1], [[(made.slots[0], 1.0)], []])
    ids = torch.zeros(3, dtype=torch.int64)
    with counting() as calls:
        change_embeddings(torch.zeros(3, HIDDEN), ids, made.arena, made.table, runs)
        change_logits(
            torch.zeros(3, VOCABULARY), torch.zeros(3, HIDDEN), made.arena, made.table, runs
        )
    assert not calls


def test_rows_of_a_batch_keep_their_entries_when_some_are_picked() -> None:
    runs = Runs.build([2, 0, 3, 1], [[(5, 1.0)], [(6, 1.0)], [], [(7, 2.0), (5, 1.0)]])
    picked = runs.of_rows(np.array([1, 2, 4, 5]))
    assert np.diff(picked.row_start).tolist() == [1, 2, 1]
    assert picked.entry_start.tolist() == [0, 1, 1, 3]
    assert picked.slot.tolist() == [5, 7, 5] and picked.scale.tolist() == [1.0, 2.0, 1.0]
    assert runs.of_rows(np.zeros(0, np.int64)).num_rows == 0
