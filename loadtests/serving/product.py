"""What an adapter costs to bring in, to load into the pool, and to wear.

    python loadtests/serving/product.py [--quick]

All on the 135M shape of ``throughput.py``, fp32.

*Import*: an adapter of rank 128 on all linear modules (156 MB), as PEFT saves it; every phase of
its way in is timed by itself, in the order the server goes through them, on files in the page
cache. The write ends with fsync, twice: the blob's and the packed file's.

*Load*: that adapter's stream from its packed file into frames, checksum of the first time apart,
beside two copies of as many bytes: from memory to memory, and from the page cache into one buffer.

*Wear*: decode steps of rows with an adapter each: LoRA of rank 16, DoRA of the same rank, two LoRA
of rank 16 a row, and one of rank 32, which is as many bytes. Every kind is measured in turns with
the first; A/A is neighbouring steps of the first.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pairs as pairing
import report
import throughput
import torch
from cases import write_base
from safetensors.torch import load_file, save_file
from workload import Served, write_adapter

from loramux.adapters import pack
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.formats import import_adapter, parse_config
from loramux.adapters.safetensors_file import read_tensors
from loramux.ingest.base import CheckpointWeights
from loramux.memory.frames import Owner
from loramux.request import AdapterRef, SamplingParams
from loramux.wire import Submit

BLOCK = 1 << 20
LARGE_RANK, RANK = 128, 16
PROMPT, STEPS = 64, 12
FRAMES = 3072
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def write_dora(folder: Path, base: Any, rank: int, seed: int) -> Path:
    """The LoRA of ``write_adapter`` with magnitudes beside it."""
    write_adapter(folder, base, rank, seed)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if name.endswith(".lora_B.weight")]:
        path = name.removesuffix(".lora_B.weight")
        tensors[f"{path}.lora_magnitude_vector"] = torch.full((len(tensors[name]),), 0.5)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_dora": True}))
    return folder


class Stopwatch:
    """Milliseconds of named phases, one after the other."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What came since the last lap was this phase."""
        now = time.perf_counter()
        self.phases[name] = 1e3 * (now - self._last)
        self._last = now


def bring_in(folder: Path, served: Served, data_dir: Path) -> dict[str, float]:
    """One import, as the client, the front and the ingest process do it."""
    store, base = BlobStore(data_dir), served.base
    watch = Stopwatch()
    with open(folder / WEIGHTS, "rb") as file:
        hashlib.file_digest(file, "sha256")
    watch.lap("client: hash")
    digests = []
    for name in (CONFIG, WEIGHTS):
        with store.writer(1 << 40) as writer, open(folder / name, "rb") as file:
            while block := file.read(BLOCK):
                writer.write(block)
            digests.append(writer.commit())
    watch.lap("front: write and hash, fsync")
    assert all(store.verify(digest) for digest in digests)
    watch.lap("ingest: hash again")
    config = parse_config((folder / CONFIG).read_bytes())
    with store.open(digests[1]) as file:
        tensors = read_tensors(file)
        watch.lap("ingest: read the header")
        adapter = import_adapter(config, tensors, base, CheckpointWeights(Path(base.directory)))
        watch.lap("ingest: map every tensor")
        digest = adapter_digest(*digests)
        pack.pack(adapter, base, digest, pack.packed_path(data_dir, digest, base.fingerprint))
    watch.lap("ingest: check, pack, fsync")
    return watch.phases


def load(served: Served, digest: str) -> dict[str, float]:
    """Gigabytes a second of the ways to move one adapter's stream."""
    residency, pool = served.engine.residency, served.engine.pool
    store: Any = residency._store
    packed = store.header(digest)
    frames = pool.obtain(residency.num_frames(digest), Owner.LOADING)
    assert frames is not None
    known = store._files._known[digest]
    source = np.fromfile(packed.path, np.uint8, packed.num_bytes)
    target = np.zeros_like(source)

    def page_cache() -> None:
        file = os.open(packed.path, os.O_RDONLY)
        try:
            os.preadv(file, [target], packed.payload_offset)
        finally:
            os.close(file)

    def first() -> None:
        known.verified = None
        store.read_into(packed, frames, None)

    ways: dict[str, Callable[[], object]] = {
        "into frames, first time": first,
        "into frames": lambda: store.read_into(packed, frames, None),
        "copy of the file": page_cache,
        "copy in memory": lambda: np.copyto(target, source),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(10):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            speeds[way].append(packed.num_bytes / (time.perf_counter() - start) / 1e9)
    pool.frames.give_back(frames, Owner.LOADING)
    return {way: statistics.median(values) for way, values in speeds.items()}


Worn = list[tuple[str, ...]]
"""The adapters each row wears."""


class Wardrobe:
    """The kinds of rows that are compared."""

    def __init__(self, served: Served, folder: Path, rows: int) -> None:
        self._served = served
        plain = served.install(RANK, 2 * rows, different=2 * rows)
        wide = served.install(2 * RANK, rows, different=rows)
        dora = [self._dora(folder / f"dora{seed}", seed) for seed in range(rows)]
        self.kinds: dict[str, Worn] = {
            f"LoRA r{RANK}": [(digest,) for digest in plain[:rows]],
            f"DoRA r{RANK}": [(digest,) for digest in dora],
            f"two LoRA r{RANK}": [(plain[i], plain[rows + i]) for i in range(rows)],
            f"LoRA r{2 * RANK}": [(digest,) for digest in wide],
        }

    def _dora(self, folder: Path, seed: int) -> str:
        write_dora(folder, self._served.base, RANK, seed)
        return throughput.install_adapter(folder, self._served.data_dir, self._served.base)

    def step_s(self, kind: str) -> float:
        """Median seconds of a decode step of rows of this kind."""
        engine, worn = self._served.engine, self.kinds[kind]
        self._served.hold_only({digest for digests in worn for digest in digests})
        for row, digests in enumerate(worn):
            engine.submit(
                Submit(
                    request_id=f"{kind}-{row}",
                    tenant="",
                    model_id=0,
                    adapters=tuple(AdapterRef(digest) for digest in digests),
                    prompt_ids=list(range(10, 10 + PROMPT)),
                    sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=4 * STEPS),
                )
            )
        while len(engine.scheduler.waiting) or any(
            row.num_pending > 1 for row in engine.scheduler.running
        ):
            self._served.step()
        seconds = []
        for _ in range(STEPS):
            start = time.perf_counter()
            self._served.step()
            seconds.append(time.perf_counter() - start)
        engine.abort([f"{kind}-{row}" for row in range(len(worn))])
        return statistics.median(seconds)


def wear(served: Served, folder: Path, rows: int, pairs: int) -> list[dict[str, Any]]:
    """A case for every kind of row, each beside plain LoRA."""
    wardrobe = Wardrobe(served, folder / str(rows), rows)
    plain, *others = wardrobe.kinds
    cases = []
    for kind in others:
        for side in (plain, kind):
            wardrobe.step_s(side)
        a, b = pairing.in_turns(
            lambda: wardrobe.step_s(plain),
            lambda kind=kind: wardrobe.step_s(kind),  # type: ignore[misc]
            pairs,
            lambda text, kind=kind: print(f"{rows} rows, {kind}: {text}"),  # type: ignore[misc]
        )
        cases.append(
            {
                "rows": rows,
                "kind": kind,
                "plain_ms": 1e3 * statistics.median(a),
                "kind_ms": 1e3 * statistics.median(b),
                "ratio": pairing.median_interval([y / x for x, y in zip(a, b, strict=True)]),
                "a_a": pairing.self_ratio(a),
            }
        )
    return cases


WEAR = {
    "rows": "rows",
    "kind": "each row wears",
    "plain_ms": f"step with LoRA r{RANK}, ms",
    "kind_ms": "step, ms",
    "ratio": "ratio",
    "a_a": "A/A",
}


def main() -> None:
    args = report.arguments(__doc__).parse_args()
    runs, pairs, batches, large = (2, 3, (2,), 16) if args.quick else (7, 10, (1, 8), LARGE_RANK)
    found = throughput.header()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = write_base(folder / "base", throughput.SHAPE)
        served = Served(base, folder / "data", FRAMES, max_rank=max(256, large))
        source = write_adapter(folder / "large", served.base, large, 0)
        imports = [bring_in(source, served, folder / f"import{run}") for run in range(runs)]
        found["import"] = {
            "megabytes": (source / WEIGHTS).stat().st_size / 1e6,
            "runs": runs,
            "phases_ms": {
                phase: statistics.median(phases[phase] for phases in imports)
                for phase in imports[0]
            },
            "total_ms": pairing.median_interval([sum(p.values()) for p in imports]),
        }
        digest = throughput.install_adapter(source, folder / "data", served.base)
        found["load_gb_s"] = load(served, digest)
        found["wear"] = [case for rows in batches for case in wear(served, folder, rows, pairs)]
        served.close()
    where = report.folder(args)
    report.save(found, where, "product")
    print(json.dumps({key: found[key] for key in ("import", "load_gb_s")}, indent=1))
    print("\n" + report.markdown(found["wear"], WEAR))


if __name__ == "__main__":
    main()
