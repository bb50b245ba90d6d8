"""The Dockerfile and the compose files: parsed, held to their schema and to rules of our own."""

from __future__ import annotations

import importlib.resources
import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from loramux.config import ServerConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FLOATING = {"latest", "main", "nightly", "edge", ""}
Instruction = dict[str, Any]
COMPOSE = yaml.safe_load((DEPLOY / "compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
FLAGS = {f"LORAMUX_{name.upper()}" for name in ServerConfig.model_fields}


def tag(image: str) -> str:
    """What pins an image: its digest, else its tag."""
    _, at, digest = image.partition("@")
    return digest if at else image.rpartition("/")[2].partition(":")[2]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Instruction]]:
    """The instructions of each stage, those of the stages it is made from first."""
    parser = DockerfileParser(str(tmp_path_factory.mktemp("image") / "Dockerfile"))
    parser.content = (DEPLOY / "Dockerfile").read_text()
    own: dict[str, list[Instruction]] = {}
    name = ""
    for instruction in parser.structure:
        if instruction["instruction"] == "FROM":
            parent, _, name = instruction["value"].split()
            own[name] = [{"instruction": "FROM", "value": parent}, *own.get(parent, [])]
        elif name and instruction["instruction"] != "COMMENT":
            own[name].append(instruction)
    return own


def values(stage: list[Instruction], kind: str) -> list[str]:
    return [one["value"] for one in stage if one["instruction"] == kind]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_an_image_runs_as_nobody_and_stops_in_order(
    stages: dict[str, list[Instruction]], target: str
) -> None:
    stage = stages[target]
    assert stage[-1] == {**stage[-1], "instruction": "USER", "value": "10001:10001"}
    assert values(stage, "STOPSIGNAL") == ["SIGTERM"]
    entry = json.loads(values(stage, "ENTRYPOINT")[-1])
    assert entry == ["tini", "--", "loramux"] and json.loads(values(stage, "CMD")[-1]) == ["serve"]
    [check] = values(stage, "HEALTHCHECK")
    command = json.loads(check[check.index("CMD") + 3 :])
    assert f"COPY deploy/healthcheck.py {command[-1]}" in {
        f"COPY {value}" for value in values(stage, "COPY")
    }
    assert values(stage, "VOLUME") == ['["/data"]'] and values(stage, "EXPOSE") == ["8000"]
    labels = " ".join(values(stage, "LABEL"))
    for name in ("title", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    assert not values(stage, "ADD"), "COPY opens no archives and no URLs"


def test_bases_are_pinned_and_nothing_is_left_of_apt(
    stages: dict[str, list[Instruction]],
) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    [base] = re.findall(r"^ARG PYTHON=(\S+)", text, re.M)
    assert re.fullmatch(r"3\.1[12]\.\d+-slim-bookworm(@sha256:[0-9a-f]{64})?", base)
    bases = set(re.findall(r"^FROM (\S+)", text, re.M)) - set(stages)
    assert bases == {"python:${PYTHON}"}
    for name, stage in stages.items():
        for run in values(stage, "RUN"):
            if "apt-get install" in run:
                assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists" in run, name
            assert "sudo" not in run and "curl" not in run and "| sh" not in run
    assert "PIP_NO_CACHE_DIR=1" in text and "PYTHONDONTWRITEBYTECODE=1" in text


def test_what_the_dockerfile_sets_are_settings(stages: dict[str, list[Instruction]]) -> None:
    for target in ("cpu", "cuda"):
        for found in re.findall(r"\bLORAMUX_\w+", " ".join(values(stages[target], "ENV"))):
            assert found in FLAGS


def test_what_is_copied_is_there_and_let_through() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    ignore = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing goes to the builder unless it is named"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    copied: set[str] = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M):
        copied |= set(line.split()[:-1])
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert package.split("/")[0] in copied


def test_the_health_check_tells_a_front_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Front(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/health/live" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    def check(**environment: str) -> int:
        command = [sys.executable, str(DEPLOY / "healthcheck.py")]
        return subprocess.run(command, env=environment, capture_output=True).returncode

    with HTTPServer(("127.0.0.1", 0), Front) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            port = str(server.server_port)
            assert check(LORAMUX_PORT=port) == 0
            assert check(LORAMUX_PORT="1", LORAMUX_ADMIN_PORT=port) == 0
            Front.status = 503
            assert check(LORAMUX_PORT=port) == 1
        finally:
            server.shutdown()
            thread.join()
    assert check(LORAMUX_PORT=port) == 1, "nobody listens any more"


@pytest.mark.parametrize("name", ["compose.yml", "compose.cuda.yml"])
def test_compose_files_follow_the_compose_specification(name: str) -> None:
    vendored = importlib.resources.files("check_jsonschema.builtin_schemas.vendor")
    schema = json.loads(vendored.joinpath("compose-spec.json").read_text())
    document = yaml.safe_load((DEPLOY / name).read_text())
    jsonschema.validate(document, schema)
    document["services"]["loramux"]["imagee"] = "x"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert "privileged" not in service and "network_mode" not in service
    assert tag(service["image"]) not in FLOATING
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    limits = service["deploy"]["resources"]["limits"]
    assert limits["memory"] and limits["cpus"] and service["pids_limit"]
    for volume in service["volumes"]:
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            assert (DEPLOY / source).exists() and mode == ["ro"], volume
        else:
            assert source in COMPOSE["volumes"] and target.startswith("/")


def test_the_server_of_compose_is_the_image_that_is_built() -> None:
    server = SERVICES["loramux"]
    assert (DEPLOY / server["build"]["context"]).resolve() == ROOT
    assert (ROOT / server["build"]["dockerfile"]).exists()
    assert server["image"] == f"loramux:{server['build']['target']}"
    assert set(server["environment"]) <= FLAGS
    grace = int(server["stop_grace_period"].removesuffix("s"))
    assert grace >= ServerConfig.model_fields["drain_s"].default + 15
    published = {port.rsplit(":", 1)[1] for port in server["ports"]}
    assert server["environment"]["LORAMUX_ADMIN_PORT"] not in published
    cuda = yaml.safe_load((DEPLOY / "compose.cuda.yml").read_text())["services"]["loramux"]
    assert cuda["image"] == f"loramux:{cuda['build']['target']}"


def test_prometheus_scrapes_the_server_and_grafana_asks_prometheus() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    [scrape] = config["scrape_configs"]
    port = SERVICES["loramux"]["environment"]["LORAMUX_ADMIN_PORT"]
    assert scrape["static_configs"] == [{"targets": [f"loramux:{port}"]}]
    assert scrape["job_name"] == "loramux", "an alert asks for up{job=...}"
    assert all((DEPLOY / "prometheus" / name).exists() for name in config["rule_files"])
    provisioning = DEPLOY / "grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in SERVICES
    [boards] = yaml.safe_load((provisioning / "dashboards/boards.yml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert boards["options"]["path"] == mounts["./grafana/dashboards"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (DEPLOY / "grafana/dashboards" / Path(home).name).exists()


def test_make_builds_what_compose_runs() -> None:
    recipe = (ROOT / "Makefile").read_text()
    assert "-f deploy/Dockerfile --target $(TARGET) -t loramux:$(TARGET)" in recipe
