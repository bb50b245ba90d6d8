"""A decoder on a hand-made pool: every page of every layer anywhere, and NaN wherever nobody is."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from loramux.model.architecture import Architecture, read_architecture
from loramux.model.decoder import Decoder
from loramux.model.inputs import ModelInputs
from loramux.model.loader import Weights, load_weights
from loramux.wire import TABLE_MODULES, table_widths
from loramux_kernels.attention import Pages
from loramux_kernels.lora import AdapterTable, Runs

CPU = torch.device("cpu")
CHUNK = 16


@dataclass
class Request:
    """Token ids, how many of them are in the KV cache, and the slices they lie in."""

    ids: list[int]
    adapters: tuple[tuple[int, float], ...] = ()
    done: int = 0
    pages: list[npt.NDArray[np.int64]] = field(default_factory=list)


class Paged:
    """Runs requests through a Decoder; slices are drawn at random and free ones hold NaN."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Weights,
        *,
        page_tokens: int = 4,
        num_slices: int = 600,
        max_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        arch = self.architecture = architecture
        self.page_tokens = page_tokens
        self.random = random.Random(seed)
        self.slice_bytes = page_tokens * 2 * arch.num_kv_heads * arch.head_dim * 4
        # all ones is a NaN in float32, bfloat16 and float16 alike
        self.arena = torch.full((num_slices * self.slice_bytes,), 0xFF, dtype=torch.uint8)
        self.free = list(range(num_slices))
        self.random.shuffle(self.free)
        self.table = AdapterTable(
            num_layers=arch.num_layers,
            widths=table_widths(arch.widths, arch.vocab_size),
            slice_bytes=self.slice_bytes,
            chunk=CHUNK,
            device=CPU,
        )
        self.decoder = Decoder(arch, weights, self.arena, self.table, CPU, max_tokens)

    @classmethod
    def load(cls, directory: Path, **options: int) -> Paged:
        architecture = read_architecture(directory)
        weights = load_weights(directory, architecture, dtype=torch.float32, device=CPU)
        return cls(architecture, weights, **options)

    def inputs(self, parts: Sequence[tuple[Request, int]]) -> ModelInputs:
        """The next ``n`` tokens of each request as one batch, all rows scored."""
        for request, count in parts:
            while len(request.pages) * self.page_tokens < request.done + count:
                request.pages.append(self._take(self.architecture.num_layers))
        ids = [i for r, n in parts for i in r.ids[r.done : r.done + n]]
        positions = [p for r, n in parts for p in range(r.done, r.done + n)]
        assert len(ids) == len(positions)
        for request, count in parts:
            request.done += count
        return ModelInputs(
            token_ids=torch.tensor(ids, dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            pages=self._tables(parts),
            runs=Runs.build([n for _, n in parts], [r.adapters for r, _ in parts]),
            scored=torch.arange(len(ids)),
            scored_rows=np.arange(len(ids)),
        )

    def step(self, parts: Sequence[tuple[Request, int]]) -> list[torch.Tensor]:
        """Run the next ``n`` tokens of each request; logits of all its rows, per request."""
        logits = self.decoder.forward(self.inputs(parts))
        return list(torch.split(logits.clone(), [n for _, n in parts]))

    def run(
        self,
        ids: Sequence[int],
        chunks: Sequence[int] = (),
        adapters: tuple[tuple[int, float], ...] = (),
    ) -> torch.Tensor:
        """Logits of all positions of one request alone, in the given chunks, then forgotten."""
        request = Request(list(ids), adapters)
        logits = torch.cat([self.step([(request, n)])[0] for n in chunks or [len(ids)]])
        self.finish(request)
        return logits

    def finish(self, request: Request) -> None:
        """Give the slices back, as NaN."""
        for offset in np.concatenate(request.pages).tolist():
            self.arena[offset : offset + self.slice_bytes] = 0xFF
            self.free.append(offset // self.slice_bytes)
        request.pages.clear()
        self.random.shuffle(self.free)

    def add_adapter(self, directory: Path) -> int:
        """Put a PEFT adapter (no patterns) into the pool; its slot."""
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        shape = (self.architecture.num_layers, len(TABLE_MODULES))
        offsets = {"lora_A": np.zeros(shape, np.int64), "lora_B": np.zeros(shape, np.int64)}
        rank, stream = np.zeros(shape, np.int32), [torch.zeros(0)]
        for name, tensor in tensors.items():
            parts = name.split(".")
            at = int(parts[parts.index("layers") + 1]), TABLE_MODULES.index(parts[-3])
            vectors = tensor if parts[-2] == "lora_A" else tensor.T
            offsets[parts[-2]][at] = sum(part.numel() for part in stream)
            rank[at] = len(vectors)
            width = -(-vectors.shape[1] // CHUNK) * CHUNK
            padded = torch.zeros(len(vectors), width)
            padded[:, : vectors.shape[1]] = vectors
            stream.append(padded.flatten())
        data = torch.cat(stream).view(torch.uint8)
        slices = self._take(-(-len(data) // self.slice_bytes))
        for index, offset in enumerate(slices.tolist()):
            piece = data[index * self.slice_bytes :][: self.slice_bytes]
            self.arena[offset : offset + len(piece)] = piece
        return self.table.add(
            slices=slices,
            a_offset=offsets["lora_A"],
            b_offset=offsets["lora_B"],
            rank=rank,
            scale=np.full(shape, config["lora_alpha"] / config["r"], np.float32),
            dtype=torch.float32,
        )

    def _take(self, count: int) -> npt.NDArray[np.int64]:
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "the test's pool is too small"
        return np.array(taken, dtype=np.int64) * self.slice_bytes

    def _tables(self, parts: Sequence[tuple[Request, int]]) -> Pages:
        arch = self.architecture
        longest = max((len(r.pages) for r, _ in parts), default=0)
        # an offset outside the arena: an entry past the context must not even be looked at
        offsets = np.full((arch.num_layers, len(parts), longest), 1 << 60, dtype=np.int64)
        for row, (request, _) in enumerate(parts):
            for page, slices in enumerate(request.pages):
                offsets[:, row, page] = slices
        return Pages(
            offsets=offsets,
            row_start=np.cumsum([0] + [n for _, n in parts], dtype=np.int32),
            context=np.array([r.done for r, _ in parts], dtype=np.int32),
            page_tokens=self.page_tokens,
            num_kv_heads=arch.num_kv_heads,
            head_dim=arch.head_dim,
            dtype=torch.float32,
        )
