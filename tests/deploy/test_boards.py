"""Every query of every board and alert asks for what a running server tells."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import tiny
from tests.deploy.queries import Live, of_board, of_rules
from tests.e2e.server import Server

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
BOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
RULES = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())


def told(server: Server, what: str) -> str:
    """/metrics once ``what`` is in it: an engine tells of its adapters once a second."""
    deadline = time.monotonic() + 30
    while what not in (text := server.http.get("/metrics").text):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    return text


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """/metrics of a server that has had a little of everything. Starting one takes ten seconds and
    more, and is the point: what a dashboard names is only there if a real engine tells it."""
    folder = tmp_path_factory.mktemp("boards")
    model = tiny.write_model(folder / "tiny", "llama", shoutable=True)
    adapter = tiny.shouting_adapter(folder / "a", model, 40)
    server = Server(model, folder / "data")
    try:
        assert server.upload("shout", adapter).status_code == 201
        config = json.loads((adapter / "adapter_config.json").read_text())
        broken = {"config": json.dumps(config | {"r": 3}), "weights": b"no safetensors"}
        asked = {"params": {"wait": 60}, "data": {"name": "broken"}}
        assert server.http.post("/v1/adapters", files=broken, **asked).status_code == 422
        guess = {"drafters": ["lookup"], "max_draft_tokens": 3}
        prompt = [40] * 20
        for fields in ({"stream": True}, {"speculation": guess, "max_tokens": 20}):
            answer = server.complete("shout", prompt, temperature=0, **fields)
            assert answer.status_code == 200, answer.text
        assert server.complete("nobody", [5]).status_code == 404
        yield Live.of(told(server, 'running_lora_adapters="shout"'))
    finally:
        server.close()


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_boards_queries_find_their_metrics(live: Live, path: Path) -> None:
    board = json.loads(path.read_text())
    found = {f"{title}: {query}": live.problems(query) for title, query, _ in of_board(board)}
    assert {query: problems for query, problems in found.items() if problems} == {}


def test_the_alerts_queries_find_their_metrics(live: Live) -> None:
    found = {name: live.problems(query) for name, query in of_rules(RULES)}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_what_else_names_metrics_finds_them(live: Live) -> None:
    """The autoscaler's query, what Prometheus is told to drop, what the README promises routers."""
    folder = DEPLOY / "kubernetes/components"
    scaled = yaml.safe_load((folder / "autoscaling/scaledobject.yaml").read_text())
    for trigger in scaled["spec"]["triggers"]:
        assert live.problems(trigger["metadata"]["query"]) == []
    [scrape] = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    monitor = yaml.safe_load((folder / "monitoring/servicemonitor.yaml").read_text())
    [endpoint] = monitor["spec"]["endpoints"]
    dropped = {rule["regex"] for rule in scrape["metric_relabel_configs"]}
    assert dropped == {rule["regex"] for rule in endpoint["metricRelabelings"]} <= set(live.labels)
    named = set(re.findall(r"`((?:vllm:|loramux_)\w+)`", (DEPLOY / "README.md").read_text()))
    assert {"vllm:num_requests_waiting", "vllm:lora_requests_info"} <= named
    assert {name for name in named if not live.has(name)} == set()
    lora = live.labels["vllm:lora_requests_info"]
    assert set(lora) == {"max_lora", "running_lora_adapters", "waiting_lora_adapters"}
    assert lora["running_lora_adapters"] == {"shout"}, "nobody runs on it any more"


def test_what_is_wrong_with_a_query_is_found(live: Live) -> None:
    for query, problem in (
        ("rate(vllm:nothing_total[5m])", "no metric"),
        ("sum by (adapter) (vllm:num_requests_running)", "no label adapter"),
        ('loramux_pool_frames{owner="nobody"}', "no series with owner"),
        ('loramux_pool_frames{owner=~"kv|nobody"}', "no series with owner"),
        ('loramux_pool_frames{holder="kv"}', "no label holder"),
        ("loramux_ready and on (adapter) up == 1", "no label adapter"),
    ):
        assert any(problem in found for found in live.problems(query)), query
    assert live.problems('sum by (owner, job) (loramux_pool_frames{owner="kv", job="x"})') == []
    with pytest.raises(ValueError):
        live.problems("sum(rate(up[5m])")


def test_the_boards_are_what_the_script_writes() -> None:
    script = runpy.run_path(str(DEPLOY / "boards.py"))
    assert {path.stem for path in BOARDS} == set(script["BOARDS"])
    for path in BOARDS:
        assert path.read_text() == script["text"](path.stem), "run python deploy/boards.py"


@pytest.mark.parametrize("path", BOARDS, ids=lambda path: path.stem)
def test_a_boards_panels_fit_and_their_legends_name_labels(path: Path) -> None:
    board = json.loads(path.read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
    for title, query, legend in of_board(board):
        for label in re.findall(r"{{(\w+)}}", legend):
            kept = re.findall(r"by \(([^)]*)\)", query)
            assert any(label in names.replace(" ", "").split(",") for names in kept), title
    assert len({panel["title"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is Prometheus' own")
def test_the_alerts_fire_when_they_should() -> None:
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            ["promtool", *command],
            cwd=DEPLOY / "prometheus",
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_says_whom_to_wake_and_why() -> None:
    rules: list[dict[str, Any]] = RULES["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule["alert"]
        assert "$labels.instance" in rule["annotations"]["summary"], rule["alert"]
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))
