"""The systemd unit: lines that systemd knows, a process that is locked in, time to drain."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from loramux.config import ServerConfig
from loramux.http.serve import EXIT_CANNOT_START

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNIT = FOLDER / "loramux.service"
GPU = FOLDER / "loramux.service.d/gpu.conf"
Settings = dict[str, dict[str, list[str]]]


def parse(path: Path) -> Settings:
    """Section -> name -> values, in order: a name may stand several times."""
    found: Settings = {}
    section = ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if match := re.fullmatch(r"\[(\w+)\]", line):
            found[section := match[1]] = {}
            continue
        match = re.fullmatch(r"([A-Z]\w+)=(.*)", line)
        assert match and section, f"{path.name}:{number}: {line}"
        found[section].setdefault(match[1], []).append(match[2])
    return found


SERVICE = parse(UNIT)["Service"]


def test_the_service_is_locked_in() -> None:
    for name in (
        *("NoNewPrivileges", "PrivateTmp", "PrivateDevices", "ProtectHome", "ProtectClock"),
        *("ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables"),
        *("ProtectControlGroups", "ProtectHostname", "RestrictNamespaces", "RestrictSUIDSGID"),
        *("RestrictRealtime", "LockPersonality", "RemoveIPC"),
    ):
        assert SERVICE[name] == ["yes"], name
    assert SERVICE["User"] == SERVICE["Group"] == ["loramux"]
    assert SERVICE["ProtectSystem"] == ["strict"] and SERVICE["CapabilityBoundingSet"] == [""]
    assert SERVICE["RestrictAddressFamilies"] == ["AF_UNIX AF_INET AF_INET6"]
    assert SERVICE["SystemCallFilter"][0] == "@system-service"
    assert "MemoryDenyWriteExecute" not in SERVICE, "compiled kernels could not be loaded"
    [state] = SERVICE["StateDirectory"]
    settings = dict(item.split("=") for item in SERVICE["Environment"][0].split())
    assert settings["LORAMUX_DATA_DIR"] == settings["HOME"] == f"/var/lib/{state}"


def test_it_drains_and_is_not_started_again_when_it_cannot_be() -> None:
    assert SERVICE["KillMode"] == ["mixed"], "the engine must not hear the front's SIGTERM"
    assert int(SERVICE["TimeoutStopSec"][0]) >= ServerConfig.model_fields["drain_s"].default + 15
    assert SERVICE["Restart"] == ["on-failure"]
    assert SERVICE["RestartPreventExitStatus"] == [str(EXIT_CANNOT_START)]
    assert parse(UNIT)["Install"] == {"WantedBy": ["multi-user.target"]}


def test_the_gpus_drop_in_opens_devices_and_nothing_else() -> None:
    settings = parse(GPU)["Service"]
    assert set(settings) == {"PrivateDevices", "DevicePolicy", "DeviceAllow", "Environment"}
    assert settings["DevicePolicy"] == ["closed"]
    assert all("nvidia" in device for device in settings["DeviceAllow"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_knows_every_line(tmp_path: Path) -> None:
    for path in (UNIT, GPU):
        (copy := tmp_path / path.relative_to(FOLDER)).parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text().replace("/opt/loramux/bin/loramux", "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and str(tmp_path) not in done.stderr, done.stderr
