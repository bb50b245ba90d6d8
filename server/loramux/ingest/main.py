"""The ingest process: ``python -m loramux.ingest.main --socket ipc://... --data-dir DIR --parent
PID``.

Uploads are read here, away from the event loop and from the engine, at the lowest priority: a bad
upload can cost time and, at worst, this process, which keeps no state and is simply started again.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from pathlib import Path
from threading import Thread

from zmq.constants import SocketType
from zmq.sugar.context import Context

from loramux.adapters import pack
from loramux.ingest import job
from loramux.wire import decode_ingest_job, encode

NICENESS = 19
PARENT_POLL_S = 0.5

log = logging.getLogger(__name__)


def serve(socket_address: str, data_dir: Path, parent: int) -> None:
    """Answer every job with an IngestDone, in order, until the process ``parent`` is gone."""
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    pack.sweep(data_dir)
    context = Context()
    socket = context.socket(SocketType.PAIR)
    # With the front gone nobody reads what is still to be sent.
    socket.linger = 0
    socket.connect(socket_address)
    try:
        while True:
            done = job.run(decode_ingest_job(socket.recv()), data_dir)
            socket.send(encode(done))
    finally:
        context.destroy()


def _end_with(parent: int) -> None:
    """Also in the middle of a job, which may be long: nobody is left to hear of it."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_S)
    os._exit(0)


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="loramux.ingest.main", description=__doc__)
    parser.add_argument("--socket", required=True, help="address the front process has bound")
    parser.add_argument("--data-dir", required=True, type=Path, help="blobs and packed adapters")
    parser.add_argument("--parent", required=True, type=int, help="process to end with")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s ingest %(levelname)s %(message)s")
    # Ctrl-C reaches the whole process group; the front decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    serve(args.socket, args.data_dir, args.parent)


if __name__ == "__main__":
    main()
