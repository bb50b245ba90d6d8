"""One job: from two blobs to a verdict and, if it is good, a packed file; or a blend to a blob."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from loramux.adapters import blend, pack, portable
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.canonical import TOKEN_MODULES, VECTOR_KINDS, CanonicalAdapter
from loramux.adapters.formats import MAX_CONFIG_BYTES, import_adapter, parse_config
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid, LoramuxError
from loramux.ingest.base import CheckpointWeights
from loramux.wire import TABLE_MODULES, BaseDescription, BlendJob, IngestDone, IngestJob

log = logging.getLogger(__name__)


def run(job: IngestJob | BlendJob, data_dir: Path) -> IngestDone:
    """Validate the job's blobs against its base and pack them, or blend. Never raises."""
    try:
        return _run_blend(job, data_dir) if isinstance(job, BlendJob) else _run(job, data_dir)
    except LoramuxError as error:
        problems = list(error.problems) if isinstance(error, AdapterInvalid) else []
        return IngestDone(job_id=job.job_id, problems=problems or [error.message], code=error.code)
    except Exception:
        # What went wrong is ours to read in the log; the uploader could do nothing with it.
        log.exception("this job failed: %r", job)
        problem = "the server failed to validate the adapter; its log says why"
        return IngestDone(job_id=job.job_id, problems=[problem], code=LoramuxError.code)


@contextmanager
def _opened(
    blobs: BlobStore, files: tuple[str, str], base: BaseDescription
) -> Iterator[tuple[CanonicalAdapter, int]]:
    """The adapter in two blobs, which stay open as its matrices are read when they are used; and
    how many tensors its file has."""
    for blob in files:
        if not blobs.verify(blob):
            text = "a stored file no longer has its digest: the disk damaged it; upload it again"
            raise AdapterInvalid(text, problems=[text], code="blob_corrupt")
    with blobs.open(files[0]) as file:
        config_bytes = file.read(MAX_CONFIG_BYTES + 1)
    with blobs.open(files[1]) as file:
        tensors = read_tensors(file)
        weights = CheckpointWeights(Path(base.directory))
        yield import_adapter(parse_config(config_bytes), tensors, base, weights), len(tensors)


def _run(job: IngestJob, data_dir: Path) -> IngestDone:
    blobs, files = BlobStore(data_dir), (job.config_digest, job.weights_digest)
    digest = adapter_digest(*files)
    with _opened(blobs, files, job.base) as (adapter, num_tensors):
        _check_size(adapter, job.base)
        if job.pack:
            path = pack.packed_path(data_dir, digest, job.base.fingerprint)
            layout = pack.pack(adapter, job.base, digest, path)
        else:
            layout = pack.lay_out(adapter, job.base)
    report = _report(adapter, layout, job.base.slice_bytes, num_tensors)
    return IngestDone(job_id=job.job_id, digest=digest, report=report)


def _run_blend(job: BlendJob, data_dir: Path) -> IngestDone:
    blobs = BlobStore(data_dir)
    with ExitStack() as files:
        sources = []
        for source in job.sources:
            digests = source.config_digest, source.weights_digest
            try:
                adapter, _ = files.enter_context(_opened(blobs, digests, job.base))
            except AdapterInvalid as error:
                problems = [f"{source.name}: {problem}" for problem in error.problems]
                raise AdapterInvalid(problems[0], problems=problems, code=error.code) from None
            sources.append(blend.Source(source.name, adapter, source.weight))
        made = blend.Blend(sources, job.recipe, job.base)
        with blobs.writer(job.limit_bytes) as writer:
            writer.write(portable.weights_header(made.ranks, job.base))
            for pair in made.pairs():
                for half in pair:
                    writer.write(half.astype("<f4").tobytes())
            digest = writer.commit()
    config = portable.config_bytes(made.ranks, job.base)
    return IngestDone(job_id=job.job_id, digest=digest, config=config, report=made.report())


def _check_size(adapter: CanonicalAdapter, base: BaseDescription) -> None:
    """Before anything is packed: one adapter must not crowd out the others. Without a limit set,
    whole embeddings may take a quarter of the pool."""
    size = pack.lay_out(adapter, base).num_bytes
    limit = base.max_adapter_bytes or (base.pool_bytes // 4 if adapter.tokens else 0)
    if limit and size > limit:
        text = (
            f"the adapter takes {size} bytes of the memory pool; this server takes up to {limit} "
            "(--max-adapter-bytes)"
        )
        raise AdapterInvalid(text, problems=[text], code="adapter_too_large")


def _report(
    adapter: CanonicalAdapter, layout: pack.Layout, slice_bytes: int, num_tensors: int
) -> dict[str, Any]:
    changed = {(pair.layer, pair.module) for pair in adapter.pairs}
    changed |= {(vector.layer, vector.module) for vector in adapter.vectors}
    used = {module for _, module in changed} | {tokens.module for tokens in adapter.tokens}
    return {
        "rank": layout.max_rank,
        "num_bytes": layout.num_bytes,
        "num_frames": layout.num_frames(slice_bytes),
        "dtype": layout.dtype,
        "vectors": [kind for kind in VECTOR_KINDS if any(v.kind == kind for v in adapter.vectors)],
        "tensors": num_tensors,
        "modules": [module for module in TABLE_MODULES if module in used],
        "layers": sorted({layer for layer, module in changed if module not in TOKEN_MODULES}),
        "token_rows": {tokens.module: len(tokens.ids) for tokens in adapter.tokens},
        "warnings": list(adapter.warnings),
    }
