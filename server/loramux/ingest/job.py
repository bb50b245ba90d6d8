"""One upload: from its blobs to a verdict and, if it is good, a packed file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

from loramux.adapters import pack
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.canonical import TOKEN_MODULES, VECTOR_KINDS, CanonicalAdapter
from loramux.adapters.formats import MAX_CONFIG_BYTES, import_adapter, parse_config
from loramux.adapters.profile import MAX_PROFILE_BYTES
from loramux.adapters.safetensors_file import read_tensors
from loramux.errors import AdapterInvalid, LoramuxError
from loramux.ingest.base import CheckpointWeights
from loramux.ingest.profile import problems_of
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
    files = (job.config_digest, job.weights_digest, job.profile_digest)
    digest = adapter_digest(*files)
    for blob in filter(None, files):
        if not blobs.verify(blob):
            text = "a stored file no longer has its digest: the disk damaged it; upload it again"
            raise AdapterInvalid(text, problems=[text], code="blob_corrupt")
    with blobs.open(job.config_digest) as file:
        config_bytes = file.read(MAX_CONFIG_BYTES + 1)
    profile_problems = _problems_of_profile(blobs, job) if job.profile_digest else []
    with blobs.open(job.weights_digest) as file:
        tensors = read_tensors(file)
        weights = CheckpointWeights(Path(job.base.directory))
        try:
            adapter = import_adapter(parse_config(config_bytes), tensors, job.base, weights)
            _check_size(adapter, job.base)
        except AdapterInvalid as error:
            if not profile_problems:
                raise
            _refuse([*(error.problems or [error.message]), *profile_problems])
        if profile_problems:
            _refuse(profile_problems)
        if job.pack:
            path = pack.packed_path(data_dir, digest, job.base.fingerprint)
            layout = pack.pack(adapter, job.base, digest, path)
        else:
            layout = pack.lay_out(adapter, job.base)
    report = _report(adapter, layout, job.base.slice_bytes, len(tensors))
    return IngestDone(job_id=job.job_id, digest=digest, report=report)


def _problems_of_profile(blobs: BlobStore, job: IngestJob) -> list[str]:
    with blobs.open(job.profile_digest) as file:
        data = file.read(MAX_PROFILE_BYTES)
    return problems_of(data, job.base)


def _refuse(problems: list[str]) -> NoReturn:
    message = problems[0] if len(problems) == 1 else f"{len(problems)} problems"
    raise AdapterInvalid(message, problems=problems)


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
