"""The Kubernetes manifests: core kinds against Kubernetes' own schemas, the others against ours."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from tests.deploy.test_images import FLAGS, tag

from loramux.config import ServerConfig

KUBERNETES = Path(__file__).parents[2] / "deploy/kubernetes"
SCHEMAS = Path(__file__).parent / "schemas"
FILES = sorted(KUBERNETES.rglob("*.yaml"))
MANIFESTS = [path for path in FILES if path.name != "kustomization.yaml"]
KUSTOMIZATIONS = [path for path in FILES if path.name == "kustomization.yaml"]
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
OTHERS = {path.stem: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
"""Kinds that Kubernetes itself does not have: small schemas of the fields we use, by kind. They
refuse a field that is misspelt; what a field may say is their projects' to tell."""


def name(path: Path) -> str:
    return str(path.relative_to(KUBERNETES))


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def check(document: dict[str, Any]) -> None:
    """Raises when ``document`` is not what its kind may be."""
    if document["kind"] in OTHERS:
        jsonschema.validate(document, OTHERS[document["kind"]])
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_a_manifest_is_what_its_kind_may_be(path: Path) -> None:
    document = load(path)
    check(document)
    document["spec"]["misspelt"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=name)
def test_a_kustomization_names_what_there_is(path: Path) -> None:
    document = load(path)
    assert document["kind"] == ("Component" if "components" in path.parts else "Kustomization")
    listed = document.get("resources", [])
    assert all((path.parent / entry).exists() for entry in listed)
    there = {found.name for found in path.parent.glob("*.yaml")} - {"kustomization.yaml"}
    assert there == {entry for entry in listed if entry.endswith(".yaml")}
    for image in document.get("images", []):
        assert image["newTag"] in ("cpu", "cuda")
    for generator in document.get("configMapGenerator", []):
        assert {literal.split("=")[0] for literal in generator["literals"]} <= FLAGS


def workloads() -> tuple[dict[str, Any], dict[str, Any]]:
    """The Deployment and the StatefulSet."""
    return (
        load(KUBERNETES / "base/deployment.yaml"),
        load(KUBERNETES / "stateful/statefulset.yaml"),
    )


@pytest.mark.parametrize("workload", workloads(), ids=lambda workload: workload["kind"])
def test_a_pod_may_do_little_and_has_time_to_drain(workload: dict[str, Any]) -> None:
    pod = workload["spec"]["template"]["spec"]
    [server] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False, "LORAMUX_PORT would be the Service's address"
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert server["resources"]["limits"]["memory"] == server["resources"]["requests"]["memory"]
    wait = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = ServerConfig.model_fields["drain_s"].default
    assert pod["terminationGracePeriodSeconds"] >= wait + drain + 15
    probes = {kind: server[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: probe["httpGet"]["path"] for kind, probe in probes.items()}
    ready = "/health/ready"
    assert paths == {"startup": ready, "readiness": ready, "liveness": "/health/live"}
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 600
    for mount in server["volumeMounts"]:
        claims = [c["metadata"]["name"] for c in workload["spec"].get("volumeClaimTemplates", [])]
        assert mount["name"] in [*(volume["name"] for volume in pod["volumes"]), *claims]


def test_the_stateful_pods_are_the_others_with_a_disk_of_their_own() -> None:
    one, other = workloads()
    plain, stateful = one["spec"]["template"], other["spec"]["template"]
    kept = [volume for volume in plain["spec"]["volumes"] if volume["name"] != "data"]
    assert stateful["spec"].pop("volumes") == kept
    del plain["spec"]["volumes"]
    assert stateful == plain
    headless = load(KUBERNETES / "stateful/headless.yaml")
    assert other["spec"]["serviceName"] == headless["metadata"]["name"]
    [claim] = other["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "data"


def test_what_refers_to_the_pods_finds_them() -> None:
    labels = {"app.kubernetes.io/name": "loramux"}
    base = load(KUBERNETES / "base/kustomization.yaml")
    assert base["labels"] == [{"pairs": labels, "includeSelectors": True}]
    [port] = workloads()[0]["spec"]["template"]["spec"]["containers"][0]["ports"]
    pool = load(KUBERNETES / "components/gateway/inferencepool.yaml")["spec"]
    assert pool["selector"]["matchLabels"] == labels
    assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    service = load(KUBERNETES / "base/service.yaml")
    monitor = load(KUBERNETES / "components/monitoring/servicemonitor.yaml")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    settings = dict(item.split("=") for item in base["configMapGenerator"][0]["literals"])
    assert settings["LORAMUX_PUBLIC_METRICS"] == "true", "scrapers send no key"


def test_the_gateway_lets_nothing_of_the_operators_through() -> None:
    route = load(KUBERNETES / "components/gateway/httproute.yaml")["spec"]
    paths = [match["path"]["value"] for rule in route["rules"] for match in rule["matches"]]
    assert set(paths) == {"/v1/completions", "/v1/chat/completions", "/v1/models"}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds kustomizations")
@pytest.mark.parametrize("base", ["base", "stateful"])
def test_everything_put_together_is_valid(base: str, tmp_path: Path) -> None:
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    (folder := tmp_path / "kubernetes/all").mkdir()
    (folder / "kustomization.yaml").write_text(
        yaml.safe_dump(
            {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [f"../{base}"],
                "components": [f"../components/{name}" for name in COMPONENTS],
            }
        )
    )
    command = ["kubectl", "kustomize", str(folder)]
    built = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    documents = list(yaml.safe_load_all(built.stdout))
    kinds = [document["kind"] for document in documents]
    workload = {"base": "Deployment", "stateful": "StatefulSet"}[base]
    assert kinds.count(workload) == 1 and not {"Deployment", "StatefulSet"} - {workload} & set(
        kinds
    )
    for document in documents:
        check(document)
        if document["kind"] == workload:
            pod = document["spec"]["template"]
            [server] = pod["spec"]["containers"]
            assert server["image"] == "loramux:cuda" and tag(server["image"])
            assert document["spec"]["selector"]["matchLabels"].items() <= (
                pod["metadata"]["labels"].items()
            )
            assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
            mounted = {mount["mountPath"] for mount in server["volumeMounts"]}
            assert {"/data", "/tmp", "/etc/loramux", "/models", "/adapters"} == mounted
        if document["kind"] == "ConfigMap":
            assert document["data"]["LORAMUX_MODEL"].startswith("/models/")
