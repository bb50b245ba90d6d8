"""``loramux bench`` against a server: what it asks for, what it tells, and what it exits with."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.front.model_dir import write_model
from tests.http.conftest import Running, launch

from loramux import cli
from loramux.bench import server as served
from loramux.bench.open_loop import Record, Run
from loramux.bench.traffic import Arrival

QUICK = ["--rate", "100", "--duration", "0.3", "--prompt-tokens", "8:12", "--output-tokens", "3:5"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    server, stop = launch(write_model(tmp_path_factory.mktemp("bench") / "model"))
    yield server
    stop()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is a thread of this process: it is late, and no timing decides a test."""
    monkeypatch.setattr(served, "Bounds", lambda: served_bounds)


served_bounds = served.Bounds(lag_s=60, stall_s=60)


def bench(running: Running, *flags: str) -> int:
    return cli.main(["bench", "--url", running.url, *QUICK, *flags])


def test_every_adapter_is_asked_for_and_every_figure_told_with_its_formula(
    running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running.front.specs.clear()
    listed = running.http.get("/v1/models").json()["data"]
    adapters = {card["id"] for card in listed if card["parent"]}
    assert bench(running, "--json", str(tmp_path / "b.json")) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["figures"]["ok"] == found["figures"]["requests"] == 30 and not found["failed"]
    assert set(found["models"]) == adapters and found["traffic"]["adapters"] == len(adapters)
    specs = running.front.specs[1:]
    assert len({spec.adapters[0].digest for spec in specs}) == len(adapters)
    assert {spec.sampling.max_tokens for spec in specs} == {3, 4, 5}
    assert sum(spec.sampling.max_tokens for spec in specs) == found["figures"]["output_tokens"]
    lengths = [len(spec.prompt_ids) for spec in specs]
    assert 6 <= min(lengths) and max(lengths) <= 16, "words are counted in the server's tokens"
    first = running.front.specs[0].prompt_ids[:4]
    assert first not in [spec.prompt_ids[:4] for spec in specs], "the prefix cache would know it"
    told = capsys.readouterr()
    words = set(told.out.split())
    assert {name for name, value in found["figures"].items() if value is not None} <= words
    assert "ttft_p50_s" in words and "planned" in words
    assert "30/30 sent" in told.err


def test_the_same_seed_asks_for_the_same(running: Running) -> None:
    seen = []
    for seed in ("1", "1", "2"):
        running.front.specs.clear()
        assert bench(running, "--seed", seed) == 0
        seen.append(Counter((tuple(s.prompt_ids), s.adapters) for s in running.front.specs))
    assert seen[0] == seen[1] != seen[2]


def test_models_that_are_named_are_asked_for(running: Running) -> None:
    running.front.specs.clear()
    assert bench(running, "--models", "base,shout", "--alpha", "0.5") == 0
    by_base = Counter(not spec.adapters for spec in running.front.specs[1:])
    assert by_base[True] > by_base[False] > 0, "the first is the popular one"


def test_a_run_in_which_some_fail_counts_them(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(running, "--models", "base,nobody") == 0
    told = capsys.readouterr().out
    assert "times: 404 model_not_found" in told


def test_a_run_in_which_nothing_ended_well_exits_with_1(
    running: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def known(self: served.Bench) -> float:
        return 1.0

    monkeypatch.setattr(served.Bench, "_words_a_token", known)
    assert bench(running, "--models", "nobody") == 1
    told = capsys.readouterr()
    assert "30 times: 404" in told.out
    assert "nothing was measured: none of 30 requests ended well" in told.err


def test_a_client_that_was_late_exits_with_1(
    running: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "Bounds", lambda: type(served_bounds)(lag_s=-1))
    assert bench(running) == 1
    assert "the client was the bottleneck: requests left late" in capsys.readouterr().err


def test_without_adapters_the_base_is_asked_for(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "listed", lambda url, key: ("base", []))
    running.front.specs.clear()
    assert bench(running) == 0
    assert running.front.specs and not any(spec.adapters for spec in running.front.specs)


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a command that exits with 2 says."""
    try:
        code = cli.main(["bench", *flags])
    except SystemExit as end:
        code = int(end.code or 0)
    told = capsys.readouterr()
    assert code == 2 and told.out == ""
    return told.err


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    nobody = ("--url", "http://127.0.0.1:1")
    assert "make serve or loramux serve starts a server" in refusal(capsys, *nobody)
    assert "ConnectionRefusedError" in refusal(capsys, *nobody, "--models", "a")


def test_a_server_that_says_no(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    here = ("--url", running.url)
    assert "'nobody': 404 model_not_found" in refusal(capsys, *here, "--models", "nobody")
    assert "/health/v1/models answers 404" in refusal(capsys, "--url", f"{running.url}/health")


def test_a_server_that_wants_a_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.json"
    assert (
        cli.main(["keys", "create", "--api-keys", str(keys), "--tenant", "t", "--scopes", "infer"])
        == 0
    )
    key = next(w for w in capsys.readouterr().out.split() if w.startswith("lmx_"))
    server, stop = launch(write_model(tmp_path / "model"), api_keys=keys)
    try:
        assert "answers 401; --key" in refusal(capsys, "--url", server.url)
        assert bench(server, "--key", key) == 0
        monkeypatch.setenv("LORAMUX_API_KEY", key)
        assert bench(server) == 0
    finally:
        stop()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("<html>", "is no list of models"),
        ('{"object": "list"}', "is no list of models"),
        ('{"data": ["a"]}', "is no list of models"),
        ('{"data": [{"id": "a", "parent": "b"}]}', "lists no base model"),
    ],
)
def test_a_server_that_lists_no_models(
    body: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(url: str, **_: object) -> httpx.Response:
        return httpx.Response(200, text=body, request=httpx.Request("GET", url))

    monkeypatch.setattr(httpx, "get", get)
    assert told in refusal(capsys)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--rate", "0"], "--rate: '0' is not a number above 0"),
        (["--duration", "nan"], "--duration: 'nan'"),
        (["--cv", "x"], "--cv: 'x'"),
        (["--alpha", "-1"], "--alpha: '-1'"),
        (["--prompt-tokens", "9:8"], "--prompt-tokens: '9:8' is not LO:HI"),
        (["--output-tokens", "0:8"], "--output-tokens: '0:8' is not LO:HI"),
        (["--seed", "-1"], "--seed: '-1'"),
        (["--models", "a,,b"], "--models: 'a,,b'"),
        (["--url", "127.0.0.1:8000", "--models", "a"], "is not http://HOST"),
        (["--url", "127.0.0.1:8000"], "127.0.0.1:8000 cannot be asked"),
        (["--json", "/nowhere/x.json"], "--json: there is no folder /nowhere"),
    ],
)
def test_a_flag_with_a_mistake(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refusal(capsys, *flags)


def test_a_run_is_judged_by_its_answers_before_its_client() -> None:
    record = Record(Arrival(0.0, 0, 0, 0, 1, 1, False), sent_s=9.0)
    run = Run([record], 1.0, [], 0.1)
    assert served.failed(run) == "none of 1 requests ended well"
    record.finish(9.0, 1, 1)
    assert served.failed(run) is None
