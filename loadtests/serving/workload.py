"""What the load tests of the pool share: many adapters made quickly, and requests sent to an
engine in this process that stay a fixed number in flight.

Registered adapters may share their bytes on disk: ``Served.install`` writes a few different ones
and gives the others hard links to those files. Each has a digest of its own, so each is loaded,
held in frames of its own and evicted by itself; what they share is the page cache they are read
from.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import throughput
import torch
from cases import ATTENTION, Job
from safetensors.torch import save_file

from loramux.adapters import packed_files
from loramux.adapters.pack import PackedAdapter, packed_path, read_header
from loramux.config import ServerConfig
from loramux.engine.assemble import Assembled, assemble
from loramux.request import AdapterRef, SamplingParams
from loramux.wire import BaseDescription, StepDone, Submit


def _header(path: Path) -> PackedAdapter:
    """A linked file's header names the adapter it was written for, its path the one it stands for;
    the server refuses such files."""
    return replace(read_header(path), digest=path.name.partition("-")[0])


packed_files.read_header = _header


def write_adapter(folder: Path, base: BaseDescription, rank: int, seed: int) -> Path:
    """A random fp32 LoRA of ``rank`` on all linear modules, as PEFT writes it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(base.num_layers):
        for module, (width_in, width_out) in base.widths.items():
            part = "self_attn" if module in ATTENTION else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            a = 0.02 * torch.randn(rank, width_in, generator=generator)
            b = 0.02 * torch.randn(width_out, rank, generator=generator)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(base.widths),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@dataclass
class Pass:
    """What one run over a list of requests took and did.

    ``rows`` and ``distinct`` (adapters) are means over the steps that computed, ``in_flight`` is
    the mean of admitted requests over time, ``load_s`` the sum of every load's own time.
    """

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    rows: float = 0.0
    distinct: float = 0.0
    in_flight: float = 0.0
    loads: int = 0
    load_bytes: int = 0
    load_s: float = 0.0
    evictions: int = 0
    preemptions: int = 0

    @property
    def tok_s(self) -> float:
        return self.tokens / self.seconds

    def count(self, done: StepDone, seconds: float) -> None:
        """One more step, of ``seconds``."""
        stats = done.stats
        self.seconds += seconds
        self.tokens += sum(len(output.token_ids) for output in done.outputs)
        self.steps += "batch_rows" in stats
        self.rows += stats.get("batch_rows", 0)
        self.distinct += stats.get("batch_adapters", 0)
        self.in_flight += seconds * (stats.get("num_running", 0) + len(done.finished))
        for _, asked_to_landed, num_bytes in stats.get("loads", ()):
            self.loads += 1
            self.load_bytes += num_bytes
            self.load_s += asked_to_landed
        self.evictions += stats.get("evictions", {}).get("adapter", 0)
        self.preemptions += stats.get("preemptions", 0)

    def end(self) -> None:
        """Turn sums into means."""
        self.rows /= self.steps
        self.distinct /= self.steps
        self.in_flight /= self.seconds


class Served:
    """The engine in this process, and the adapters it knows."""

    def __init__(self, base: Path, data_dir: Path, num_frames: int, **config: Any) -> None:
        # Nothing may come from the prefix cache: requests are told apart by their adapters only.
        settings = ServerConfig(
            model=base, data_dir=data_dir, device="auto", prefix_caching=False, **config
        )
        self.assembled: Assembled = assemble(settings, num_frames=num_frames)
        self.engine = self.assembled.engine
        self.base = self.assembled.ready.base
        self.vocabulary = self.assembled.ready.vocab_size
        self.data_dir = data_dir
        self._loaded = threading.Event()
        self.engine.on_loaded(self._loaded.set)
        self._serial = 0

    def install(self, rank: int, count: int, *, different: int = 8) -> list[str]:
        """Register ``count`` adapters of ``rank``, ``different`` of them with bytes of their own,
        the others hard links to those; their digests."""
        digests = []
        for seed in range(min(count, different)):
            folder = self.data_dir / "peft" / f"r{rank}-{seed}"
            if not folder.exists():
                write_adapter(folder, self.base, rank, seed)
            digests.append(throughput.install_adapter(folder, self.data_dir, self.base))
        for index in range(len(digests), count):
            digest = hashlib.sha256(f"rank {rank}, link {index}".encode()).hexdigest()
            link = self._packed(digest)
            if not link.exists():
                os.link(self._packed(digests[index % different]), link)
            digests.append(digest)
        return digests

    def _packed(self, digest: str) -> Path:
        return packed_path(self.data_dir, digest, self.base.fingerprint)

    def submit(self, prompt: list[int], num_new: int, digest: str) -> str:
        """Queue one greedy request; its id."""
        self._serial += 1
        self.engine.submit(
            Submit(
                request_id=str(self._serial),
                tenant="",
                model_id=0,
                adapters=(AdapterRef(digest),),
                prompt_ids=prompt,
                sampling=SamplingParams(seed=0, temperature=0.0, max_tokens=num_new),
            )
        )
        return str(self._serial)

    def step(self) -> StepDone:
        """One step; when nothing could run, sleep until a load has landed, as the server does."""
        done = self.engine.step()
        assert not done.failed, done.failed
        if "batch_rows" not in done.stats and self.engine.residency.num_loading:
            self._loaded.wait(timeout=10)
        self._loaded.clear()
        return done

    def make_resident(self, digests: Iterable[str]) -> None:
        """Load what is not here yet, one after the other, without computing."""
        residency = self.engine.residency
        for digest in digests:
            assert residency.load(digest), "the pool is full of adapters in use"
            while not residency.is_resident(digest):
                self._loaded.wait(timeout=10)
                self._loaded.clear()
                residency.poll()
        residency.finished_loads.clear()  # not the next step's

    def hold_only(self, digests: Iterable[str]) -> None:
        """These adapters are in the pool, if they fit, and no others."""
        wanted = set(digests)
        residency = self.engine.residency
        for digest in set(residency.resident()) - wanted:
            assert residency.evict(digest)
        self.make_resident(wanted)
        assert wanted == set(residency.resident())

    def run(self, jobs: Sequence[Job], digests: Sequence[str], concurrency: int) -> Pass:
        """All of ``jobs``, ``concurrency`` of them at a time."""
        left = iter(jobs)
        result = Pass()
        open_ = 0
        while True:
            while open_ < concurrency and (job := next(left, None)) is not None:
                self.submit(job.prompt, job.num_new, digests[job.adapter])
                open_ += 1
            if not open_:
                break
            start = time.perf_counter()
            done = self.step()
            result.count(done, time.perf_counter() - start)
            open_ -= len(done.finished)
        result.end()
        assert result.tokens == sum(job.num_new for job in jobs)
        return result

    def saturate(
        self,
        jobs: Sequence[Job],
        digests: Sequence[str],
        open_: int,
        *,
        ramp: int,
        steps: int,
    ) -> Pass:
        """Keep ``open_`` of ``jobs`` (over and over) submitted; what happened in ``steps`` steps
        after the first ``ramp``. What is unfinished then is dropped."""
        again = cycle(jobs)
        result = Pass()
        unfinished: set[str] = set()
        while result.steps < steps:
            while len(unfinished) < open_:
                job = next(again)
                unfinished.add(self.submit(job.prompt, job.num_new, digests[job.adapter]))
            start = time.perf_counter()
            done = self.step()
            ramp -= "batch_rows" in done.stats
            if ramp < 0:
                result.count(done, time.perf_counter() - start)
            unfinished -= {finished.request_id for finished in done.finished}
        self.drop(unfinished)
        result.end()
        return result

    def drop(self, unfinished: set[str]) -> None:
        """Give these requests up, and let what loads for them land."""
        self.engine.abort(unfinished)
        while self.engine.residency.num_loading:
            self.step()
        self.engine.check()

    def close(self) -> None:
        self.engine.close()
