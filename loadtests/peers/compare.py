"""Output tokens per second of loramux and its peers on the same requests, in interleaved pairs.

    python loadtests/peers/compare.py --peers DIR --folder DIR [--out docs/results/peers.json]

How to install the peers is in README.md; one that is not in ``--peers`` is skipped. ``--folder``
keeps the models and everything converted from them. For each mix of adapters, ours and one peer at
a time are started; first the peer must say what PEFT says (``check.py``) and be idle when nobody
asks. Each cell CxN has C requests in flight over N adapters, greedy, EOS ignored. Both sides run
once to get warm, then in turns, A B B A. Servers are compared with loramux over HTTP, libraries
with its engine in a process of its own. Only one side computes at any time.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parents[1] / "serving"))

from cases import Cell, Mix
from check import Check
from comparison import markdown
from floor import floor_seconds
from llama_cpp import LlamaCpp, LlamaCppFiles
from loramux_peer import LoramuxEngine, LoramuxServer, peft
from make_models import make_models
from openvino_peer import openvino
from pairs import header, in_turns, median_interval, self_ratio
from peer import Models, Peer
from vllm_cpu import VllmCpu

CELLS: dict[Mix, str] = {
    "base": "1x0,8x0,32x0",
    "rank16": "1x1,1x8,1x32,8x1,8x8,8x32,32x1,32x8,32x32",
    "mixed": "1x32,8x8,8x32,32x8,32x32",
}
MOST_IDLE_CPU = 0.05


def all_peers(folder: Path) -> list[Peer]:
    """Every peer there is a driver for, where README.md has it installed."""
    llama = LlamaCppFiles(
        server=folder / "llama.cpp/build/bin/llama-server",
        source=folder / "llama.cpp/source",
        python=folder / "gguf/bin/python",
    )
    return [
        LoramuxEngine(),
        peft(),
        openvino(folder / "openvino/bin/python"),
        LlamaCpp(llama, "best"),
        LlamaCpp(llama, "default"),
        LlamaCpp(llama, "best", "q8_0"),
        VllmCpu(folder / "vllm/bin/vllm"),
    ]


class Bench:
    """One mix: loramux as it is needed, and the peers after each other."""

    def __init__(self, mix: Mix, models: Models, report: dict[str, Any], pairs: int) -> None:
        self._mix = mix
        self._models = models
        self._report = report
        self._pairs = pairs
        self._check = Check(models)
        self._ours: dict[str, Peer] = {}

    def _start(self, peer: Peer) -> None:
        say(f"{self._mix}: {peer.name} starts")
        peer.start(self._models)

    def _hold(self, peer: Peer) -> None:
        """To PEFT's answers, and to rest when nobody asks."""
        facts = self._check.run(peer, peer.tie)
        facts["idle_cpu"] = round(peer.idle_cpu(), 3)
        if facts["idle_cpu"] > MOST_IDLE_CPU:
            raise RuntimeError(f"{peer.name} uses {facts['idle_cpu']} CPUs while idle")
        facts = {"mix": self._mix, "peer": peer.name, **facts}
        print(json.dumps(facts), flush=True)
        self._report["checks"].append(facts)

    def against(self, peer: Peer, cells: Sequence[Cell]) -> None:
        """All cells of one peer."""
        if peer.against not in self._ours:
            ours = LoramuxServer() if peer.against == "loramux-http" else LoramuxEngine()
            self._start(ours)
            self._ours[peer.against] = ours
            self._hold(ours)
        self._start(peer)
        try:
            self._hold(peer)
            for cell in cells:
                self._report["cases"].append(self._case(cell, self._ours[peer.against], peer))
                print(json.dumps({**self._report["cases"][-1], "seconds": "..."}), flush=True)
        finally:
            peer.stop()

    def _case(self, cell: Cell, ours: Peer, peer: Peer) -> dict[str, Any]:
        jobs = cell.jobs
        tokens = [job.num_new for job in jobs]

        def run(side: Peer) -> float:
            run = side.run(jobs, cell.concurrency)
            if [len(output) for output in run.outputs] != tokens:
                raise RuntimeError(f"{side.name} gave {[len(output) for output in run.outputs]}")
            return run.seconds

        def progress(text: str) -> None:
            say(f"{self._mix} {cell.concurrency}x{cell.adapters} {peer.name}: {text}")

        run(ours), run(peer)
        a, b = in_turns(lambda: run(ours), lambda: run(peer), self._pairs, progress)
        floor = floor_seconds(jobs, cell.concurrency, self._mix, self._report["machine"])
        return {
            "mix": self._mix,
            "concurrency": cell.concurrency,
            "adapters": cell.adapters,
            "requests": len(jobs),
            "tokens": sum(tokens),
            "floor_tok_s": round(sum(tokens) / floor, 1),
            "ours": ours.name,
            "peer": peer.name,
            "ours_tok_s": round(sum(tokens) / statistics.median(a), 1),
            "peer_tok_s": round(sum(tokens) / statistics.median(b), 1),
            "ratio": median_interval([y / x for x, y in zip(a, b, strict=True)]),
            "ours_over_ours": self_ratio(a) if len(a) > 1 else None,
            "seconds": {"ours": a, "peer": b},
        }

    def stop(self) -> None:
        for ours in self._ours.values():
            ours.stop()


def say(text: str) -> None:
    print(f"\r{text:<72}", end="", file=sys.stderr, flush=True)


def chosen(peers: list[Peer], only: str | None) -> list[Peer]:
    """The peers asked for that are there; says why the others are not."""
    if only is not None:
        unknown = set(only.split(",")) - {peer.name for peer in peers}
        if unknown:
            raise SystemExit(f"--only: no {unknown}; there are {[peer.name for peer in peers]}")
        peers = [peer for peer in peers if peer.name in only.split(",")]
    for peer in peers:
        if why := peer.missing():
            print(f"{peer.name} is skipped: {why}")
    return [peer for peer in peers if not peer.missing()]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=Path, required=True, help="where they are installed")
    parser.add_argument("--folder", type=Path, required=True, help="keeps models between runs")
    parser.add_argument("--only", help="names of peers, with commas between")
    parser.add_argument("--mixes", default=",".join(CELLS))
    parser.add_argument("--cells", help="CxN,...: C requests in flight over N adapters")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a .json file; a table is written beside it")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing stays behind
    peers = chosen(all_peers(args.peers.absolute()), args.only)
    report = {**header(), "checks": [], "failed": []}
    print(json.dumps(report["machine"]))
    for mix in args.mixes.split(","):
        cells = [Cell(*map(int, cell.split("x"))) for cell in (args.cells or CELLS[mix]).split(",")]
        bench = Bench(mix, make_models(args.folder.absolute(), mix), report, args.pairs)
        try:
            for peer in peers:
                try:
                    bench.against(peer, cells)
                except RuntimeError as error:
                    print(f"\n{peer.name} failed: {error}")
                    report["failed"].append({"mix": mix, "peer": peer.name, "why": str(error)})
                if args.out:
                    args.out.write_text(json.dumps(report, indent=1) + "\n")
                    args.out.with_suffix(".md").write_text(markdown(report))
        finally:
            bench.stop()
    print(markdown(report))


if __name__ == "__main__":
    main()
