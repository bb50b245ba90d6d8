"""A loramux server as its users run it: the command, in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from loramux.metrics.prometheus import CACHE_S

ROOT = Path(__file__).parents[2]


_tries = itertools.count()


def free_port() -> int:
    """One below those that the system gives to who asks for any: no test's server that does comes
    to it before who asked here. Test processes begin at different ones."""
    while True:
        port = 20_000 + (97 * os.getpid() + next(_tries)) % 12_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """``loramux serve`` on ``model``, ready when the constructor returns; ``command`` is the module
    that is run in its place."""

    def __init__(
        self, model: Path, data_dir: Path, *flags: str, command: str = "loramux.cli"
    ) -> None:
        self.port, self.data_dir = free_port(), data_dir
        self.url = f"http://127.0.0.1:{self.port}"
        paths = os.pathsep.join(str(ROOT / top) for top in ("server", "kernels", "."))
        self.log = data_dir.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", command, "serve"),
                *("--model", str(model), "--data-dir", str(data_dir)),
                *("--port", str(self.port), "--pool-memory", "64M", "--threads", "1", *flags),
            ],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=self.log,
            stderr=self.log,
        )
        self.http = httpx.Client(base_url=self.url, timeout=60)
        try:
            self.await_ready()
        except BaseException:
            self.close(signal.SIGKILL)
            raise

    def await_ready(self, timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, Path(self.log.name).read_text()
            try:
                if self.http.get("/health/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("not ready: " + Path(self.log.name).read_text())

    def child(self, module: str) -> int:
        """The pid of the server's child process that runs ``module``."""
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rsplit(")", 1)[1].split()
                command = (status.parent / "cmdline").read_text()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid and module in command:
                return int(status.parent.name)
        raise AssertionError(f"no child runs {module}")

    def metric(self, name: str) -> float:
        """The sum over the series of a metric, as it is now: an answer may be CACHE_S old."""
        time.sleep(CACHE_S)
        text = self.http.get("/metrics").text
        lines = [li for li in text.splitlines() if li.split("{")[0].split(" ")[0] == name]
        assert lines, f"no metric {name}"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def upload(self, name: str, folder: Path) -> httpx.Response:
        files = {
            "config": (folder / "adapter_config.json").read_bytes(),
            "weights": (folder / "adapter_model.safetensors").read_bytes(),
        }
        return self.http.post("/v1/adapters", params={"wait": 60}, data={"name": name}, files=files)

    def complete(self, model: str, prompt: object, **fields: object) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": model, "prompt": prompt, **fields})

    def close(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Stop the server; its exit code."""
        self.http.close()
        self.process.send_signal(how)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.log.close()
