"""An ingest process without an importer: a config of ``{"bad": [...]}`` is refused for those
reasons (by the ``"code"``), ``{"die": true}`` kills the process, anything else is good after
``{"wait": seconds}``. ``{"basis": digest}`` shares that one, which is there before the wait."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import zmq

from loramux import wire
from loramux.adapters.blobs import BlobStore, adapter_digest
from loramux.adapters.pack import packed_path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    socket = zmq.Context().socket(zmq.PAIR)
    socket.connect(options.socket)
    store = BlobStore(options.data_dir)
    while os.getppid() == options.parent:
        if not socket.poll(50):
            continue
        job = wire.decode_ingest_job(socket.recv())
        config = json.loads(store.path(job.config_digest).read_bytes())
        if config.get("die"):
            os._exit(4)
        basis = config.get("basis")
        if basis and job.pack:
            keep(options.data_dir, basis, job.base.fingerprint)
        time.sleep(config.get("wait", 0))
        done = wire.IngestDone(job_id=job.job_id, problems=config.get("bad", []))
        done.code = config.get("code", done.code)
        if not done.problems:
            done.digest = adapter_digest(
                job.config_digest, job.weights_digest, job.profile_digest, job.heads_digest
            )
            done.report = {"rank": 4, "num_bytes": 128, "num_frames": 1}
            if job.profile_digest:
                profile = json.loads(store.path(job.profile_digest).read_bytes())
                done.report["companions"] = profile.get("companions", {})
            if basis:
                done.report["basis"] = {"digest": basis, "num_bytes": 1024, "num_frames": 2}
            if job.pack:
                keep(options.data_dir, done.digest, job.base.fingerprint)
        socket.send(wire.encode(done))


def keep(data_dir: Path, digest: str, fingerprint: str) -> None:
    path = packed_path(data_dir, digest, fingerprint)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"packed")


if __name__ == "__main__":
    main()
