"""The comparison with other servers, without any of them: turns, floors, children, answers."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

LOADTESTS = Path(__file__).parents[2] / "loadtests"
sys.path[:0] = [str(LOADTESTS / "serving"), str(LOADTESTS / "peers")]

import check  # noqa: E402
import floor  # noqa: E402
from cases import Cell, Job, adapter_shape  # noqa: E402
from comparison import markdown  # noqa: E402
from http_peer import Server  # noqa: E402
from pairs import in_turns  # noqa: E402
from peer import Models, Run  # noqa: E402
from worker import Worker  # noqa: E402

MACHINE = {"cpu": "x", "cores": 2, "read_gb_s": 10.0, "gemm_gflops": 100.0}
CELLS = [(1, 0), (1, 1), (1, 32), (8, 1), (8, 32), (32, 8), (32, 32), (3, 7)]


@pytest.mark.parametrize(("concurrency", "adapters"), CELLS)
def test_a_cell_fills_its_places_and_names_adapters_that_exist(
    concurrency: int, adapters: int
) -> None:
    jobs = Cell(concurrency, adapters).jobs
    assert len(jobs) >= concurrency
    assert {job.adapter for job in jobs} <= ({*range(adapters)} or {-1})
    assert len({job.adapter for job in jobs}) == min(adapters or 1, len(jobs))
    assert jobs == Cell(concurrency, adapters).jobs


def test_a_mixed_set_has_every_rank_on_both_sets_of_modules() -> None:
    shapes = [adapter_shape("mixed", index) for index in range(8)]
    assert sorted(rank for rank, _ in shapes) == [8, 8, 16, 16, 32, 32, 64, 64]
    for rank in (8, 16, 32, 64):
        assert sorted(len(targets) for r, targets in shapes if r == rank) == [4, 7]


def test_turns_go_a_b_b_a() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    a, b = in_turns(lambda: side("a"), lambda: side("b"), 3, lambda text: None)
    assert "".join(order) == "abbaab"
    assert (a, b) == ([1, 4, 5], [2, 3, 6])


def test_the_floor_of_one_token_is_its_bytes_or_its_operations() -> None:
    job = Job(adapter=5, prompt=[1] * 3, num_new=1)
    adapter = floor.adapter_elements("rank16", 5)
    assert adapter == 30 * 16 * (2 * 576 + 2 * (576 + 192) + 2 * 576 + 3 * (576 + 1536))
    reads = floor.MATRICES + floor.HEAD + adapter + 30 * 2 * 192 * 3
    bytes_only = {**MACHINE, "gemm_gflops": 1e9}
    assert floor.floor_seconds([job], 1, "rank16", bytes_only) == pytest.approx(4 * reads / 1e10)
    seen = 1 + 2 + 3
    work = 2 * (3 * floor.MATRICES + floor.HEAD + 3 * adapter) + 30 * 4 * 576 * seen
    work_only = {**MACHINE, "read_gb_s": 1e9}
    assert floor.floor_seconds([job], 1, "rank16", work_only) == pytest.approx(work / 1e11)


def test_the_floor_adds_up_one_after_the_other_and_shares_side_by_side() -> None:
    jobs = [Job(i % 2, [1] * (5 + i), 3 + i) for i in range(5)]
    alone = [floor.floor_seconds([job], 1, "mixed", MACHINE) for job in jobs]
    assert floor.floor_seconds(jobs, 1, "mixed", MACHINE) == pytest.approx(sum(alone))
    assert floor.floor_seconds(jobs, 5, "mixed", MACHINE) < sum(alone)
    assert floor.floor_seconds([], 1, "mixed", MACHINE) == 0
    bytes_only = {**MACHINE, "gemm_gflops": 1e9}
    shared = floor.floor_seconds([Job(3, [1], 1)] * 2, 2, "mixed", bytes_only)
    apart = floor.floor_seconds([Job(3, [1], 1), Job(11, [1], 1)], 2, "mixed", bytes_only)
    assert floor.adapter_elements("mixed", 3) != floor.adapter_elements("mixed", 7)
    assert apart - shared == pytest.approx(4 * floor.adapter_elements("mixed", 11) / 1e10)


CHILD = """
import sys
sys.path.insert(0, {peers!r})
from child import main

def build(setup):
    print("noise on stdout")
    def serve(jobs, concurrency):
        if concurrency == 13:
            raise SystemExit("thirteen")
        return [[job["adapter"] + setup["threads"]] * job["num_new"] for job in jobs]
    return serve

main(build)
"""


@pytest.fixture
def models(tmp_path: Path) -> Models:
    return Models(tmp_path, tmp_path / "base", [])


def test_a_worker_answers_rests_and_its_death_is_told(models: Models) -> None:
    script = models.folder / "echo_child.py"
    script.write_text(CHILD.format(peers=str(LOADTESTS / "peers")))
    worker = Worker("echo", Path(sys.executable), str(script))
    assert worker.missing() is None
    assert Worker("gone", models.folder / "no-python", "x.py").missing() is not None
    worker.start(models)
    threads = worker.setup(models)["threads"]
    run = worker.run([Job(4, [1], 2), Job(-1, [], 0)], 2)
    assert run.outputs == [[4 + threads] * 2, []]
    assert run.seconds >= 0
    with pytest.raises(RuntimeError, match="thirteen"):
        worker.run([], 13)
    worker.stop()


class Counting(ThreadingHTTPServer):
    """Knows how many requests were answered at the same time at most."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Completions)
        self.lock = threading.Lock()
        self.now = self.most = 0


class Completions(BaseHTTPRequestHandler):
    server: Counting
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(0.02)
        with self.server.lock:
            self.server.now -= 1
        ids = [len(body["prompt"])] * body["max_tokens"]
        answer = json.dumps({"choices": [{"token_ids": ids}]}).encode()
        self.send_response(404 if body["model"] == "a9" else 200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def counting() -> Iterator[Counting]:
    with Counting() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_is_asked_as_much_at_once_as_agreed(counting: Counting) -> None:
    peer = Server("counting", Path(sys.executable))
    peer._url = f"http://127.0.0.1:{counting.server_port}"
    jobs = [Job(i % 3 - 1, [7] * (i + 1), i) for i in range(9)]
    assert peer.run(jobs, 3).outputs == [[i + 1] * i for i in range(9)]
    assert counting.most <= 3
    with pytest.raises(RuntimeError, match="404"):
        peer.run([Job(9, [1], 1)], 1)


class Parrot:
    """A peer that says, for every adapter, what it was given."""

    name = "parrot"

    def __init__(self, says: dict[int, list[int]]) -> None:
        self.says = says

    def run(self, jobs: Sequence[Job], concurrency: int) -> Run:
        return Run(1.0, [self.says.get(job.adapter, []) for job in jobs])


def test_a_peer_that_serves_the_base_for_an_adapter_is_found(
    monkeypatch: pytest.MonkeyPatch, models: Models
) -> None:
    right = {-1: [1] * 8, 3: [2, 3, 4, 5, 6, 7, 8, 9], 31: [3] * 8}
    gaps = [1.0] * 6 + [1e-4, 1.0]  # the last two positions are a tie and what follows it

    def ask(models: Models, jobs: Sequence[Job]) -> dict[tuple[int, int], check.Expected]:
        assert [job.adapter for job in jobs] == [-1, 3, 31, -1]
        return {(j.adapter, j.prompt[0]): check.Expected(right[j.adapter], gaps) for j in jobs}

    monkeypatch.setattr(check, "_ask_peft", ask)
    paths = [models.folder / str(i) for i in range(32)]
    checker = check.Check(Models(models.folder, models.base, paths))
    tied = {**right, 3: [2, 3, 4, 5, 6, 7, 0, 0]}
    compared = {"tokens_compared": {-1: 12, 3: 6, 31: 6}}
    assert checker.run(Parrot(right), 1e-3) == compared  # type: ignore[arg-type]
    assert checker.run(Parrot(tied), 1e-3) == compared  # type: ignore[arg-type]
    for wrong in ({**right, 31: right[-1]}, {**right, -1: right[3]}, {**right, 3: []}):
        with pytest.raises(check.WrongAnswer, match="PEFT says"):
            checker.run(Parrot(wrong), 1e-3)  # type: ignore[arg-type]
    with pytest.raises(check.WrongAnswer, match="nothing could be compared"):
        checker.run(Parrot(right), 2.0)  # type: ignore[arg-type]


def test_a_table_has_a_row_for_each_cell_and_a_column_for_each_peer() -> None:
    case = {
        "mix": "mixed",
        "concurrency": 8,
        "adapters": 32,
        "tokens": 100,
        "floor_tok_s": 50.0,
        "ours": "loramux-http",
        "peer": "slow",
        "peer_tok_s": 10.0,
        "ratio": [2.5, 2.4, 2.6],
        "ours_over_ours": [1.0, 0.98, 1.02],
        "seconds": {"ours": [4.0, 4.0], "peer": [10.0, 10.0]},
    }
    other = {**case, "peer": "slower", "concurrency": 1, "ours_over_ours": None}
    report = {
        "command": "python x",
        "commit": "abc",
        "machine": MACHINE,
        "cases": [case, other],
        "failed": [{"mix": "mixed", "peer": "gone", "why": "?"}],
    }
    text = markdown(report)
    assert "| 8 x 32 | 50.0 | 25.0, 50 % (0.98-1.02) | 10.0, 2.50 (2.40-2.60) |  |" in text
    assert "| 1 x 32 | 50.0 | 25.0, 50 % |  | 10.0, 2.50 (2.40-2.60) |" in text
    assert "mixed: gone failed." in text
