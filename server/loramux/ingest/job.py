"""One job: from an adapter's blobs to a verdict and, if it is good, a packed file; or a blend to a
blob."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from loramux.adapters import basis as bases
from loramux.adapters import blend, pack, portable
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.canonical import CanonicalAdapter
from loramux.adapters.formats import MAX_CONFIG_BYTES
from loramux.adapters.heads_file import read_heads
from loramux.adapters.profile import MAX_PROFILE_BYTES
from loramux.errors import AdapterInvalid, LoramuxError, in_short
from loramux.ingest.profile import companions_of, problems_of
from loramux.ingest.reading import Read, read_adapter
from loramux.ingest.report import report_of
from loramux.wire import BaseDescription, BlendJob, IngestDone, IngestJob

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


def _verify(blobs: BlobStore, blob: str) -> None:
    if not blobs.verify(blob):
        text = "a stored file no longer has its digest: the disk damaged it; upload it again"
        raise AdapterInvalid(text, problems=[text], code="blob_corrupt")


@contextmanager
def _opened(blobs: BlobStore, files: tuple[str, str], base: BaseDescription) -> Iterator[Read]:
    """The adapter in two blobs, which stay open as its matrices are read when they are used."""
    for blob in files:
        _verify(blobs, blob)
    with blobs.open(files[0]) as file:
        config_bytes = file.read(MAX_CONFIG_BYTES + 1)
    with blobs.open(files[1]) as file:
        yield read_adapter(config_bytes, file, base)


def _run(job: IngestJob, data_dir: Path) -> IngestDone:
    blobs, files = BlobStore(data_dir), (job.config_digest, job.weights_digest)
    digest = adapter_digest(*files, job.profile_digest, job.heads_digest)
    profile = _read_profile(blobs, job) if job.profile_digest else b""
    beside = problems_of(profile, job.base) if profile else []
    guessing, wrong = _examine_heads(blobs, job)
    beside += wrong
    with ExitStack() as stack:
        try:
            read = stack.enter_context(_opened(blobs, files, job.base))
            adapter = read.canonical()
            check_size(adapter, job.base)
        except AdapterInvalid as error:
            if not beside:
                raise
            _refuse([*(error.problems or [error.message]), *beside])
        if beside:
            _refuse(beside)
        basis = bases.basis_of(adapter)
        if job.pack:
            if basis is not None:
                bases.keep(basis, job.base, data_dir)
            path = pack.packed_path(data_dir, digest, job.base.fingerprint)
            shared = basis.digest if basis else None
            layout = pack.pack(adapter, job.base, digest, path, basis=shared)
        else:
            layout = pack.lay_out(adapter, job.base)
        report = report_of(adapter, layout, basis, job.base, read)
    if profile:
        report["companions"] = companions_of(profile)
    if guessing:
        report["heads"] = guessing
    return IngestDone(job_id=job.job_id, digest=digest, report=report)


def _read_profile(blobs: BlobStore, job: IngestJob) -> bytes:
    _verify(blobs, job.profile_digest)
    with blobs.open(job.profile_digest) as file:
        return file.read(MAX_PROFILE_BYTES)


def _examine_heads(blobs: BlobStore, job: IngestJob) -> tuple[dict[str, int], list[str]]:
    """What is to be said of the adapter's own heads, nothing if it has none; and all that is wrong
    with them."""
    if not job.heads_digest:
        return {}, []
    _verify(blobs, job.heads_digest)
    hidden = job.base.widths["q_proj"][0]
    try:
        with blobs.open(job.heads_digest) as file:
            found = read_heads(file, hidden, job.base.vocab_size)
    except AdapterInvalid as error:
        return {}, [f"heads: {problem}" for problem in error.problems or [error.message]]
    return {"heads": len(found.blocks), "num_bytes": blobs.size(job.heads_digest)}, []


def _refuse(problems: list[str]) -> NoReturn:
    raise AdapterInvalid(in_short(problems), problems=problems)


def _run_blend(job: BlendJob, data_dir: Path) -> IngestDone:
    blobs = BlobStore(data_dir)
    with ExitStack() as files:
        sources = []
        for source in job.sources:
            digests = source.config_digest, source.weights_digest
            try:
                adapter = files.enter_context(_opened(blobs, digests, job.base)).canonical()
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


def check_size(adapter: CanonicalAdapter, base: BaseDescription) -> None:
    """Before anything is packed: one adapter, with its basis, must not crowd out the others.
    Without a limit set, whole embeddings may take a quarter of the pool. Raises AdapterInvalid
    (adapter_too_large)."""
    shared = bases.shared_of(adapter)
    size = sum(pack.lay_out(part, base).num_bytes for part in (adapter, shared) if part)
    limit = base.max_adapter_bytes or (base.pool_bytes // 4 if adapter.tokens else 0)
    if limit and size > limit:
        text = (
            f"the adapter takes {size} bytes of the memory pool; this server takes up to {limit} "
            "(--max-adapter-bytes)"
        )
        raise AdapterInvalid(text, problems=[text], code="adapter_too_large")
