"""The ingest process, driven over its socket as the front does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from tests.adapters.peft_files import (
    base_description,
    make_config,
    make_tensors,
    safetensors_bytes,
    tensor_name,
)

from loramux.adapters import pack
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.ingest import job as ingest_job
from loramux.wire import BaseDescription, IngestDone, IngestJob, decode_ingest_done, encode

ROOT = Path(__file__).parents[2]
BASE = base_description()
WAIT_MS = 30_000


def store(data_dir: Path, data: bytes) -> str:
    with BlobStore(data_dir).writer(1 << 30) as writer:
        writer.write(data)
        return writer.commit()


def make_job(
    data_dir: Path,
    config: Any,
    weights: bytes,
    *,
    job_id: int = 1,
    do_pack: bool = True,
    base: BaseDescription = BASE,
) -> IngestJob:
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return IngestJob(
        job_id=job_id,
        config_digest=store(data_dir, text),
        weights_digest=store(data_dir, weights),
        base=base,
        pack=do_pack,
    )


GOOD = safetensors_bytes(make_tensors(BASE))


class Process:
    """An ingest process and the front's end of its socket."""

    def __init__(self, folder: Path) -> None:
        self.data_dir = folder / "data"
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.PAIR)
        address = f"ipc://{folder}/s"
        self.socket.bind(address)
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "loramux.ingest.main", "--socket", address]
            + ["--data-dir", str(self.data_dir), "--parent", str(os.getpid())],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT / "server")},
        )

    def ask(self, job: IngestJob) -> IngestDone:
        self.socket.send(encode(job))
        assert self.socket.poll(WAIT_MS), "no answer"
        return decode_ingest_done(self.socket.recv())

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self._context.destroy(linger=0)


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("ingest"))
    yield process
    process.close()


def test_a_good_adapter_is_reported_and_packed(process: Process) -> None:
    job = make_job(process.data_dir, make_config(), GOOD)
    done = process.ask(job)
    assert done.problems == [] and done.job_id == 1
    assert done.digest == adapter_digest(job.config_digest, job.weights_digest)
    packed = pack.read_header(pack.packed_path(process.data_dir, done.digest, BASE.fingerprint))
    assert pack.verify_payload(packed) and packed.digest == done.digest
    by_module, cost = done.report.pop("by_module"), done.report.pop("cost")
    assert [by_module[m]["tensors"] for m in ("q_proj", "v_proj")] == [6, 6]
    assert cost == {"row_bytes": packed.num_bytes}  # how large the base is was not said
    assert done.report == {
        "rank": 4,
        "num_bytes": packed.num_bytes,
        "num_frames": packed.num_frames(BASE.slice_bytes),
        "dtype": "float32",
        "tensors": 12,
        "modules": ["q_proj", "v_proj"],
        "layers": [0, 1, 2],
        "vectors": [],
        "token_rows": {},
        "warnings": [],
    }


def test_validating_only_writes_nothing(process: Process) -> None:
    weights = safetensors_bytes(make_tensors(BASE, seed=1))
    done = process.ask(make_job(process.data_dir, make_config(), weights, do_pack=False))
    assert done.problems == [] and done.report["num_bytes"] > 0
    path = pack.packed_path(process.data_dir, done.digest, BASE.fingerprint)
    assert not path.exists()


def bad_uploads() -> list[tuple[Any, bytes, str]]:
    nan = make_tensors(BASE)
    nan[tensor_name(0, "q_proj", "A")][0, 0] = np.nan
    return [
        (make_config(), b"PK\x03\x04" + b"x" * 100, "not_safetensors"),
        (make_config(), b"\xff" * 100, "header_too_large"),
        (make_config(), GOOD[:-1], "header_invalid"),
        (make_config(), safetensors_bytes(nan), "non_finite"),
        (make_config(r=5), GOOD, "rank_mismatch"),
        (make_config(use_dora=True), GOOD, "adapter_invalid"),
        (b"[" * 60_000, GOOD, "adapter_invalid"),
        (b" " * (2 << 20), GOOD, "adapter_invalid"),
        (make_config(rank_pattern={"(.+)+\\d": 4}, target_modules="(.+)+\\d"), GOOD, ""),
        (make_config(**{"\ud800": 1}), GOOD, "adapter_invalid"),
    ]


def test_bad_adapters_are_refused_one_after_the_other_and_kill_nothing(process: Process) -> None:
    pid = process.popen.pid
    for number, (config, weights, code) in enumerate(bad_uploads()):
        done = process.ask(make_job(process.data_dir, config, weights, job_id=100 + number))
        assert done.job_id == 100 + number
        if code:
            assert done.code == code and done.problems and not done.digest, done
    done = process.ask(make_job(process.data_dir, make_config(), GOOD))
    assert done.problems == [] and process.popen.poll() is None and process.popen.pid == pid


def test_missing_and_rotten_blobs(process: Process) -> None:
    job = make_job(process.data_dir, make_config(), safetensors_bytes(make_tensors(BASE, seed=2)))
    path = BlobStore(process.data_dir).path(job.weights_digest)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert process.ask(job).code == "blob_corrupt"
    path.unlink()
    assert process.ask(job).code == "blob_not_found"
    job.weights_digest = "../../etc/passwd"
    assert process.ask(job).code == "digest_malformed"


def test_it_runs_at_the_lowest_priority_and_without_torch(process: Process) -> None:
    process.ask(make_job(process.data_dir, make_config(), GOOD))
    stat = Path(f"/proc/{process.popen.pid}/stat").read_text().rpartition(")")[2].split()
    assert int(stat[16]) == 19
    assert "torch" not in Path(f"/proc/{process.popen.pid}/maps").read_text()


def test_ctrl_c_is_left_to_the_front(process: Process) -> None:
    process.ask(make_job(process.data_dir, make_config(), GOOD))
    process.popen.send_signal(signal.SIGINT)
    done = process.ask(make_job(process.data_dir, make_config(), GOOD))
    assert done.problems == []


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_with_its_parent(tmp_path: Path, busy: bool) -> None:
    """A parent that is killed cannot tell it; the child notices by itself, also in the middle of a
    job: here one that never ends, as a file to read is a pipe nobody writes to."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-m', 'loramux.ingest.main',"
            " '--socket', 'ipc://' + sys.argv[1] + '/s', '--data-dir', sys.argv[1],\n"
            "    '--parent', str(os.getpid())])\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(600)",
            str(tmp_path),
        ],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "server")},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.bind(f"ipc://{tmp_path}/s")
        child = int(parent.stdout.readline())
        socket.send(encode(make_job(tmp_path, make_config(), GOOD)))
        assert socket.poll(WAIT_MS) and decode_ingest_done(socket.recv()).problems == []
        if busy:
            job = make_job(tmp_path, make_config(r=3), GOOD)
            blob = BlobStore(tmp_path).path(job.config_digest)
            blob.unlink()
            os.mkfifo(blob)
            socket.send(encode(job))
            silent = opened_with_its_reader(blob)
        parent.kill()
        parent.wait()
        parent.stdout.close()
        deadline = time.monotonic() + 30
        while is_running(child):
            assert time.monotonic() < deadline, "it outlived its parent"
            time.sleep(0.05)
    if busy:
        os.close(silent)


def opened_with_its_reader(pipe: Path) -> int:
    """The writing end of a named pipe, once somebody reads it."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # no reader yet
            assert time.monotonic() < deadline, "nobody reads"
            time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def test_a_bug_of_ours_is_an_answer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(ingest_job, "read_adapter", broken)
    done = ingest_job.run(make_job(tmp_path, make_config(), GOOD), tmp_path)
    assert done.code == "internal_error" and len(done.problems) == 1
    assert "secret" not in done.problems[0]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_job(tmp_path, make_config(), GOOD)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    done = ingest_job.run(job, tmp_path)
    assert done.code == "storage_full" and done.problems
    assert not list((tmp_path / "packed").iterdir())
