"""An engine in this process for tests: adapters from PEFT folders, token ids in, token ids out."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loramux.adapters.blobs import BlobStore
from loramux.config import ServerConfig
from loramux.engine.assemble import assemble
from loramux.ingest.job import run
from loramux.request import (
    BASE_MODEL_ID,
    SMALL_MODEL_ID,
    AdapterRef,
    EntropyAdaptive,
    SamplingParams,
    Speculation,
)
from loramux.wire import BaseDescription, Failed, Finished, IngestJob, Output, StepDone, Submit


def install_adapter(folder: Path, data_dir: Path, base: BaseDescription) -> str:
    """What an upload does to the data directory, without the upload; the adapter's digest."""
    blobs = BlobStore(data_dir)
    digests = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with blobs.writer(1 << 40) as writer:
            writer.write((folder / name).read_bytes())
            digests.append(writer.commit())
    done = run(
        IngestJob(job_id=0, config_digest=digests[0], weights_digest=digests[1], base=base),
        data_dir,
    )
    assert not done.problems, done.problems
    return done.digest


class Harness:
    """One engine with NaN in every freed frame, checked after every step."""

    def __init__(
        self,
        model: Path,
        *,
        num_frames: int = 400,
        check: bool = True,
        overlap: bool | None = None,
        **config: Any,
    ) -> None:
        self.data_dir = Path(config.pop("data_dir", None) or tempfile.mkdtemp())
        settings = {"max_num_seqs": 16, "speculation": "off", **config}  # off: all is verified
        self.config = ServerConfig(model=model, data_dir=self.data_dir, device="cpu", **settings)
        assembled = assemble(self.config, poison=True, num_frames=num_frames, overlap=overlap)
        self.engine = assembled.engine
        self._loaded = threading.Event()
        self.engine.on_loaded(self._loaded.set)
        self.ready = assembled.ready
        self.check = check
        self.digests: dict[str, str] = {}
        self.outputs: dict[str, list[int]] = {}
        self.details: dict[str, list[Output]] = {}
        self.finished: dict[str, Finished] = {}
        self.failed: dict[str, Failed] = {}
        self.steps: list[StepDone] = []
        self._serial = 0

    @property
    def arena_bytes(self) -> int:
        return self.ready.num_frames * self.ready.frame_bytes

    def install(self, folder: Path, model_id: int = BASE_MODEL_ID) -> str:
        """Make the adapter in ``folder`` known; its digest."""
        key = f"{folder} for {model_id}" if model_id else str(folder)
        if key not in self.digests:
            base = self.ready.partners[model_id] if model_id else self.ready.base
            self.digests[key] = install_adapter(folder, self.data_dir, base)
        return self.digests[key]

    def submit(
        self,
        prompt_ids: Sequence[int],
        adapter: Path | None | Sequence[tuple[Path, float]] = None,
        *,
        name: str | None = None,
        tenant: str = "",
        pool_share: float | None = None,
        cache_salt: str = "",
        output_ids: Sequence[int] = (),
        deadline_s: float | None = None,
        speculation: Speculation | None = None,
        entropy: EntropyAdaptive | None = None,
        resume: bytes | None = None,
        small_adapter: Path | None = None,
        **sampling: Any,
    ) -> str:
        """Queue a request (greedy unless told otherwise); its id."""
        self._serial += 1
        request_id = name or f"r{self._serial}"
        if adapter is None:
            adapter = ()
        elif isinstance(adapter, Path):
            adapter = [(adapter, 1.0)]
        companions = {}
        if small_adapter is not None:
            digest = self.install(small_adapter, SMALL_MODEL_ID)
            companions[SMALL_MODEL_ID] = (AdapterRef(digest),)
        params = {"seed": 0, "temperature": 0.0, "max_tokens": 8, **sampling}
        self.outputs[request_id] = list(output_ids)
        self.details[request_id] = []
        self.engine.submit(
            Submit(
                request_id=request_id,
                tenant=tenant,
                pool_share=pool_share,
                model_id=0,
                adapters=tuple(AdapterRef(self.install(path), scale) for path, scale in adapter),
                prompt_ids=list(prompt_ids),
                output_ids=list(output_ids),
                cache_salt=cache_salt,
                deadline_s=deadline_s,
                speculation=speculation,
                entropy=entropy,
                resume=resume,
                companions=companions,
                sampling=SamplingParams(**params),
            )
        )
        return request_id

    def step(self) -> StepDone:
        """One step, its outputs appended where they belong; when nothing could run, sleep until a
        load has landed, as the server does."""
        done = self.engine.step()
        if not done.moved and self.engine.num_loading:
            self._loaded.wait(timeout=1)
        self._loaded.clear()
        self.steps.append(done)
        for output in done.outputs:
            tokens = self.outputs[output.request_id]
            assert output.start_index == len(tokens), "an output came twice, or one is missing"
            tokens += output.token_ids
            self.details[output.request_id].append(output)
        for finished in done.finished:
            assert finished.request_id not in self.finished
            assert finished.request_id not in self.failed
            self.finished[finished.request_id] = finished
        for failed in done.failed:
            assert failed.request_id not in self.finished
            assert failed.request_id not in self.failed
            self.failed[failed.request_id] = failed
        if self.check:
            self.engine.check()
        return done

    def run(self, most: int = 20_000) -> dict[str, list[int]]:
        """Step until every request has ended; all outputs so far by request id."""
        for _ in range(most):
            if not self.engine.has_work:
                self.engine.check()
                return self.outputs
            self.step()
        raise AssertionError("the engine does not come to an end")

    def run_preempting(self, rng: np.random.Generator, share: float) -> int:
        """Run to the end; after a ``share`` of the steps somebody who runs is preempted. How often
        that was."""
        count = 0
        while self.engine.has_work:
            self.step()
            running = self.engine.scheduler.running
            if running and rng.random() < share:
                self.engine.scheduler._preempt(running[int(rng.integers(len(running)))])
                count += 1
        return count

    def generate(
        self, prompt_ids: Sequence[int], adapter: Any = None, **sampling: Any
    ) -> list[int]:
        """One request from beginning to end."""
        request_id = self.submit(prompt_ids, adapter, **sampling)
        self.run()
        assert request_id not in self.failed, self.failed[request_id]
        return self.outputs[request_id]

    def close(self) -> None:
        self.engine.close()
