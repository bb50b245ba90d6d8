"""What carries messages between front and engine waits for neither of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from loramux import wire

ROOT = Path(__file__).parents[2]
ENGINE = """
import sys, threading, zmq
from loramux.engine.main import Courier

address, parent, what = sys.argv[1:]
context = zmq.Context()
courier = Courier(context, address, epoch=1, parent=int(parent), every_s=0.01)
inbox = context.socket(zmq.PAIR)
inbox.connect("inproc://engine")
courier.start()
if what == "deaf":
    sys.stdin.readline()
    for number in range(int(sys.stdin.readline())):
        assert inbox.recv() == b"%d" % number
    inbox.send(b"all of it")
else:
    inbox.set(zmq.SNDTIMEO, 1000)
    try:
        while True:
            inbox.send(b"a step is done")
    except zmq.Again:
        print("full", flush=True)
threading.Event().wait()
"""
FRONT = """
import os, subprocess, sys, zmq
socket = zmq.Context().socket(zmq.PAIR)
socket.set(zmq.RCVHWM, 1)
socket.bind(sys.argv[1])
command = [sys.executable, "-c", sys.argv[2], sys.argv[1], str(os.getpid()), "busy"]
subprocess.Popen(command, start_new_session=True).wait()
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT / 'server'}:{ROOT / 'kernels'}"}


def test_an_engine_that_takes_nothing_still_says_that_it_is_alive(tmp_path: Path) -> None:
    """A step may be long, and clients that come and leave make many messages."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as front:
        front.bind(f"ipc://{tmp_path}/s")
        front.set(zmq.RCVTIMEO, 20_000)
        front.set(zmq.SNDTIMEO, 500)
        front.set(zmq.LINGER, 0)
        engine = subprocess.Popen(
            [sys.executable, "-c", ENGINE, f"ipc://{tmp_path}/s", str(os.getpid()), "deaf"],
            env=ENVIRONMENT,
            stdin=subprocess.PIPE,
            text=True,
        )
        assert engine.stdin is not None
        try:
            front.recv()
            sent = 0
            with pytest.raises(zmq.Again):
                while True:
                    front.send(b"%d" % sent)
                    sent += 1
            while front.poll(0):
                front.recv()
            for _ in range(10):
                beat = wire.decode_from_engine(front.recv())
                assert isinstance(beat, wire.Heartbeat)
            engine.stdin.write(f"\n{sent}\n")
            engine.stdin.flush()
            while front.recv() != b"all of it":
                pass
        finally:
            engine.kill()
            engine.communicate()


def test_an_engine_ends_with_a_front_that_had_stopped_reading(tmp_path: Path) -> None:
    """The engine holds the other end of the pipe that is read here until it closes."""
    front = subprocess.Popen(
        [sys.executable, "-c", FRONT, f"ipc://{tmp_path}/s", ENGINE],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert front.stdout is not None
    assert front.stdout.readline() == "full\n"
    children = Path(f"/proc/{front.pid}/task/{front.pid}/children").read_text().split()
    front.kill()
    try:
        front.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        for orphan in children:
            os.kill(int(orphan), signal.SIGKILL)
        front.communicate()
        pytest.fail("the engine outlived its front")
