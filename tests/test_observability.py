"""The compose profile `observability`: Prometheus and Grafana ask for what the monitor exports.

No engine runs here: files are compared with each other, with the exporter and with the page's own rules.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from monitor_node.prometheus import SnapshotCollector, exposition
from monitor_node.web import hosts_for, split_address

ROOT = Path(__file__).resolve().parent.parent
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))[
    "services"
]
OBSERVABILITY = ("prometheus", "grafana")
FOLDER = ROOT / "docs" / "observability"
DASHBOARD = json.loads((FOLDER / "grafana" / "dashboards" / "run.json").read_text("utf-8"))
STREAM_COUNTS = ("lag_steps", "pending", "dead_letters", "fenced", "duplicates", "gaps", "damaged")


def read_yaml(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text("utf-8"))


def test_the_compose_file_is_valid_with_its_profile() -> None:
    program = shutil.which("docker-compose")
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("docker-compose must be there in CI")
        pytest.skip("needs docker-compose on PATH; it validates without an engine")
    environment = {**os.environ, "HPT_REDIS_PASSWORD": "x"}
    command = [program, "--profile", "observability", "config"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    resolved = yaml.safe_load(done.stdout)["services"]
    assert set(OBSERVABILITY) <= set(resolved)
    assert all(resolved[name]["profiles"] == ["observability"] for name in OBSERVABILITY)


@pytest.mark.parametrize("name", OBSERVABILITY)
def test_prometheus_and_grafana_are_pinned_have_few_rights_and_write_only_their_own_data(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for volume in service["volumes"]:
        source, target, *mode = volume.split(":")
        assert target.startswith("/")
        if source.startswith("./"):
            assert mode == ["ro"]
            assert (ROOT / source).exists()
        else:
            assert source == f"{name}-data"


def test_grafana_lets_everybody_look_and_nobody_in() -> None:
    said = SERVICES["grafana"]["environment"]
    assert said["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert said["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert said["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"  # else admin:admin exists
    assert said["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert said["GF_AUTH_BASIC_ENABLED"] == said["GF_USERS_ALLOW_SIGN_UP"] == "false"
    assert not any("PASSWORD" in key for key in said)


def test_prometheus_asks_the_monitor_under_a_name_that_the_page_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = read_yaml("prometheus.yml")
    [job] = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    [target] = job["static_configs"][0]["targets"]
    name, _, port = target.partition(":")
    command = SERVICES["monitor"]["command"]
    host, http_port = split_address(command[command.index("--http") + 1])
    assert int(port) == http_port
    monkeypatch.setattr(socket, "gethostname", lambda: SERVICES["monitor"]["hostname"])
    assert name in hosts_for(host, host)


def test_grafana_finds_its_data_source_and_its_dashboard() -> None:
    [source] = read_yaml("grafana/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["editable"] is False
    sources = [item["datasource"] for panel in DASHBOARD["panels"] for item in (panel, *panel["targets"])]
    assert all(item == {"type": "prometheus", "uid": source["uid"]} for item in sources)
    [provider] = read_yaml("grafana/dashboards/provider.yml")["providers"]
    assert provider["allowUiUpdates"] is False
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    assert mounts["./docs/observability/grafana/dashboards"] == provider["options"]["path"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/run.json"


def test_the_dashboard_asks_only_for_metrics_and_labels_that_the_monitor_exports() -> None:
    exported = exported_labels()
    used = set()
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            [name] = set(re.findall(r"\bhpt_\w+", target["expr"]))
            assert name in exported, f"{panel['title']}: the monitor exports no {name}"
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= exported[name], (
                f"{panel['title']}: {name} has no label {labels - exported[name]}"
            )
            used.add(name)
    assert len(used) > 20


def test_no_two_panels_of_the_dashboard_overlap() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def exported_labels() -> dict[str, set[str]]:
    """Name of a sample -> its labels, of a run of which everything is known."""
    rows = {
        "nodes": [{"node": "trainer", "liveness": "alive", "heartbeat_age_seconds": 1.0}],
        "stream_health": [{"stream": "history", **dict.fromkeys(STREAM_COUNTS, 0)}],
    }
    progress = ("step", "total_steps", "loss", "held_out_loss", "steps_per_second", "units_per_second")
    memory = ("used_bytes", "total_bytes", "trainer_bytes", "cleanup_bytes")
    known: dict[str, Any] = {
        "run": {"status": "running", "veto": None},
        "progress": dict.fromkeys((*progress, "eta_seconds", "lost_steps"), 1.0),
        "counters": {"accepted": 1},
        "pace": dict.fromkeys(("progress_per_second", "plain_progress_per_second", "saved_share"), 1.0),
        "memory": {
            **dict.fromkeys(memory, 1),
            "report": {"holders": [{"name": "weights", "place": "device", "num_bytes": 1}]},
            "readings": {"power": {"value": 1.0, "unit": "W", "source": "nvml"}},
        },
        "checkpoint": {"step": 1, "at_unix_seconds": 1.0},
        "timing": {"shares": {"steps": 1.0}},
        "server": {"connected": True, "away_seconds": 0},
        "actions": {"paused": False},
        **rows,
    }
    body, _ = exposition(SnapshotCollector(lambda: known), "")
    families = text_string_to_metric_families(body.decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}
