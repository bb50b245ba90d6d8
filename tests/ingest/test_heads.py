"""An adapter's own Medusa heads, as the ingest process judges them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from tests.adapters.peft_files import base_description, make_config
from tests.heads import saying
from tests.ingest.test_ingest import GOOD, make_job, store

from loramux.adapters import pack
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.ingest.job import run
from loramux.wire import IngestJob

VOCAB = 50
BASE = replace(base_description(), vocab_size=VOCAB)
HIDDEN = BASE.widths["q_proj"][0]


def job_of(data_dir: Path, heads: bytes, weights: bytes = GOOD) -> IngestJob:
    job = make_job(data_dir, make_config(), weights, base=BASE)
    job.heads_digest = store(data_dir, heads)
    return job


def test_good_ones_are_reported_and_change_nothing_that_is_packed(tmp_path: Path) -> None:
    heads = saying(3, HIDDEN, VOCAB, heads=2)
    job = job_of(tmp_path, heads)
    done = run(job, tmp_path)
    files = job.config_digest, job.weights_digest
    assert done.problems == [] and done.digest == adapter_digest(*files, "", job.heads_digest)
    assert done.report.pop("heads") == {"heads": 2, "num_bytes": len(heads)}
    job.heads_digest = ""
    plain = run(job, tmp_path)
    assert plain.report == done.report and plain.digest == adapter_digest(*files)
    payloads = [
        pack.read_header(pack.packed_path(tmp_path, digest, BASE.fingerprint)).payload_sum
        for digest in (done.digest, plain.digest)
    ]
    assert payloads[0] == payloads[1]


def test_bad_ones_are_listed_after_what_is_wrong_with_the_weights(tmp_path: Path) -> None:
    bad = saying(3, HIDDEN, VOCAB, heads=1, **{"0.0.linear.bias": torch.full((HIDDEN,), torch.inf)})
    for weights, others in ((GOOD, 0), (GOOD[:-1], 1)):
        done = run(job_of(tmp_path, bad, weights), tmp_path)
        assert len(done.problems) == others + 1 and done.digest == ""
        assert done.problems[-1] == (
            "heads: tensor 0.0.linear.bias holds a value that is not finite"
        )
    assert not list(tmp_path.glob("packed/*")), "nothing is packed"


@pytest.mark.parametrize("vocab_size", [VOCAB - 1, VOCAB + 1])
def test_they_are_for_this_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    done = run(job_of(tmp_path, saying(3, HIDDEN, vocab_size, heads=3)), tmp_path)
    assert [p.partition(": shape")[0] for p in done.problems] == [
        f"heads: tensor {j}.1.weight" for j in range(3)
    ]


def test_damaged_ones_are_not_judged(tmp_path: Path) -> None:
    job = job_of(tmp_path, saying(3, HIDDEN, VOCAB))
    path = BlobStore(tmp_path).path(job.heads_digest)
    path.write_bytes(saying(4, HIDDEN, VOCAB))
    done = run(job, tmp_path)
    assert done.code == "blob_corrupt" and not list(tmp_path.glob("packed/*"))
