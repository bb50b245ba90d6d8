"""One upload: from two blobs to a verdict and, if it is good, a packed file."""

from __future__ import annotations

import logging
from pathlib import Path

from loramux.adapters import pack
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.canonical import CanonicalAdapter
from loramux.adapters.formats import MAX_CONFIG_BYTES
from loramux.errors import AdapterInvalid, LoramuxError
from loramux.ingest.reading import read_adapter
from loramux.ingest.report import report_of
from loramux.wire import BaseDescription, IngestDone, IngestJob

log = logging.getLogger(__name__)


def run(job: IngestJob, data_dir: Path) -> IngestDone:
    """Validate the job's blobs against its base and pack them. Never raises."""
    try:
        return _run(job, data_dir)
    except LoramuxError as error:
        problems = list(error.problems) if isinstance(error, AdapterInvalid) else []
        return IngestDone(job_id=job.job_id, problems=problems or [error.message], code=error.code)
    except Exception:
        # What went wrong is ours to read in the log; the uploader could do nothing with it.
        log.exception("ingest of %s + %s failed", job.config_digest, job.weights_digest)
        problem = "the server failed to validate the adapter; its log says why"
        return IngestDone(job_id=job.job_id, problems=[problem], code=LoramuxError.code)


def _run(job: IngestJob, data_dir: Path) -> IngestDone:
    blobs = BlobStore(data_dir)
    digest = adapter_digest(job.config_digest, job.weights_digest)
    for blob in (job.config_digest, job.weights_digest):
        if not blobs.verify(blob):
            text = "a stored file no longer has its digest: the disk damaged it; upload it again"
            raise AdapterInvalid(text, problems=[text], code="blob_corrupt")
    with blobs.open(job.config_digest) as file:
        config_bytes = file.read(MAX_CONFIG_BYTES + 1)
    with blobs.open(job.weights_digest) as file:
        read = read_adapter(config_bytes, file, job.base)
        adapter = read.canonical()
        check_size(adapter, job.base)
        if job.pack:
            path = pack.packed_path(data_dir, digest, job.base.fingerprint)
            layout = pack.pack(adapter, job.base, digest, path)
        else:
            layout = pack.lay_out(adapter, job.base)
        report = report_of(adapter, layout, job.base, read)
    return IngestDone(job_id=job.job_id, digest=digest, report=report)


def check_size(adapter: CanonicalAdapter, base: BaseDescription) -> None:
    """Before anything is packed: one adapter must not crowd out the others. Without a limit set,
    whole embeddings may take a quarter of the pool. Raises AdapterInvalid (adapter_too_large)."""
    size = pack.lay_out(adapter, base).num_bytes
    limit = base.max_adapter_bytes or (base.pool_bytes // 4 if adapter.tokens else 0)
    if limit and size > limit:
        text = (
            f"the adapter takes {size} bytes of the memory pool; this server takes up to {limit} "
            "(--max-adapter-bytes)"
        )
        raise AdapterInvalid(text, problems=[text], code="adapter_too_large")
