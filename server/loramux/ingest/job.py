"""One upload: from two blobs to a verdict and, if it is good, a packed file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from loramux.adapters import basis as bases
from loramux.adapters import pack
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.canonical import TOKEN_MODULES, VECTOR_KINDS, CanonicalAdapter
from loramux.adapters.formats import MAX_CONFIG_BYTES, import_adapter, parse_config
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid, LoramuxError
from loramux.ingest.base import CheckpointWeights
from loramux.wire import TABLE_MODULES, BaseDescription, IngestDone, IngestJob

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
        tensors = read_tensors(file)
        weights = CheckpointWeights(Path(job.base.directory))
        adapter = import_adapter(parse_config(config_bytes), tensors, job.base, weights)
        basis = bases.basis_of(adapter)
        _check_size(adapter, basis, job.base)
        if job.pack:
            if basis is not None:
                bases.keep(basis, job.base, data_dir)
            path = pack.packed_path(data_dir, digest, job.base.fingerprint)
            shared = basis.digest if basis else None
            layout = pack.pack(adapter, job.base, digest, path, basis=shared)
        else:
            layout = pack.lay_out(adapter, job.base)
    report = _report(adapter, layout, job.base.slice_bytes, len(tensors))
    if basis is not None:
        report["basis"] = bases.facts(basis, job.base)
    return IngestDone(job_id=job.job_id, digest=digest, report=report)


def _check_size(
    adapter: CanonicalAdapter, basis: bases.Basis | None, base: BaseDescription
) -> None:
    """Before anything is packed: one adapter, its basis included, must not crowd out the others.
    Without a limit set, whole embeddings may take a quarter of the pool."""
    parts = [adapter, basis.pairs] if basis else [adapter]
    size = sum(pack.lay_out(part, base).num_bytes for part in parts)
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
