"""The Kubernetes examples of docs/clusters fit the programs that they start: no cluster needed to find out.

Command lines are parsed by the real command-line interfaces and by torchrun's parser, Redis' arguments and
the probes run against a real redis-server, names and numbers that must agree are compared. Schemas:
tests/test_cluster_schemas.py; Slurm: tests/test_slurm.py.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from common.config import load_settings
from monitor_node.acl import ROLES
from monitor_node.acl_files import make_users
from monitor_node.web import hosts_for, split_address
from tests.cluster_examples import DOCUMENTS, JOB, JOBSET, NODES, PODS, REPLICATED_JOB, ROOT, RUN
from tests.faults import wait_until

SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize(("role", "name"), NODES.items())
def test_a_node_has_its_own_user_and_what_it_names_is_there(role: str, name: str) -> None:
    [container] = PODS[name]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert container["envFrom"] == [{"configMapRef": {"name": "hpt-run"}}]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in PODS[name]["volumes"]}
    assert mounts.keys() == volumes.keys()
    secret = volumes["password"]["secret"]
    assert environment["HPT_REDIS_USERNAME"] == role
    assert secret["items"] == [{"key": role, "path": "password"}], "a node has no password but its own"
    assert environment["HPT_REDIS_PASSWORD_FILE"] == f"{mounts['password']}/password"
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == "hpt-runs"
    known = (ROOT / "common" / "open_bus.py").read_text("utf-8")
    ours = {"HPT_RUN_ID", "HPT_PRESET", "HPT_PARALLEL"}
    assert all(word in known for word in {*environment, *RUN} - ours if word.startswith("HPT_"))


def test_the_secret_that_the_page_makes_holds_what_the_pods_read(tmp_path: Path) -> None:
    make_users("*", ROLES, out_file=tmp_path / "users.acl", password_folder=tmp_path / "secrets")
    made = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    redis = PODS["StatefulSet/hpt-redis"]
    [password] = [entry["valueFrom"]["secretKeyRef"] for entry in redis["containers"][0]["env"]]
    sources = [volume["secret"] for pod in PODS.values() for volume in pod["volumes"] if "secret" in volume]
    assert {password["name"], *(source["secretName"] for source in sources)} == {"hpt-redis"}
    assert {password["key"], *(item["key"] for source in sources for item in source["items"])} == made
    page = (ROOT / "docs" / "clusters.md").read_text("utf-8")
    assert "create secret generic hpt-redis --from-file=users.acl --from-file=secrets" in page
    assert not any(document["kind"] == "Secret" for document in DOCUMENTS.values()), "no secret in a file"


def test_services_lead_to_pods_and_the_address_of_the_bus_to_redis() -> None:
    labels = {
        name: (document["spec"]["template"] if name != "JobSet/hpt" else JOB["template"])["metadata"][
            "labels"
        ]
        for name, document in DOCUMENTS.items()
        if name in PODS
    }
    for service, target in {"hpt-redis": "StatefulSet/hpt-redis", "hpt-monitor": NODES["monitor"]}.items():
        spec = DOCUMENTS[f"Service/{service}"]["spec"]
        assert spec["selector"] == labels[target]
        ports = {port["name"]: port["containerPort"] for port in PODS[target]["containers"][0]["ports"]}
        assert {port["targetPort"]: port["port"] for port in spec["ports"]} == ports
    assert RUN["HPT_REDIS_URL"] == "redis://hpt-redis:6379/0"
    policy = DOCUMENTS["NetworkPolicy/hpt-redis"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels["StatefulSet/hpt-redis"]
    [expression] = policy["ingress"][0]["from"][0]["podSelector"]["matchExpressions"]
    assert set(expression["values"]) == {labels[name]["app.kubernetes.io/name"] for name in NODES.values()}


def understood(arguments: list[str]) -> dict[str, Any]:
    """Parsed by the program's own command line; UsageError for an unknown option."""
    program, command, *rest = arguments
    cli = importlib.import_module(SCRIPTS[program].partition(":")[0]).cli
    assert isinstance(cli, click.Group)
    return cli.commands[command].make_context(command, rest).params


@pytest.mark.parametrize("role", ["predictor", "monitor"])
def test_a_light_node_is_called_as_its_program_wants(role: str) -> None:
    [container] = PODS[NODES[role]]["containers"]
    assert container["image"] == "hpt-light"
    arguments = [re.sub(r"\$\((\w+)\)", lambda match: RUN[match[1]], part) for part in container["args"]]
    params = understood(arguments)
    assert params["run_id"] == RUN["HPT_RUN_ID"]
    document = DOCUMENTS[NODES[role]]["spec"]
    assert (document["replicas"], document["strategy"]) == (1, {"type": "Recreate"})
    if role == "monitor":
        host, port = split_address(params["http"])
        assert "*ip" in hosts_for(host, host), "the page would refuse the kubelet's probe"
        assert container["ports"] == [{"name": "page", "containerPort": port}]
        probes = [container[kind]["httpGet"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")]
        assert all(probe == {"path": "/healthz", "port": "page"} for probe in probes)
        assert '"/healthz"' in (ROOT / "monitor_node" / "web.py").read_text("utf-8")
    else:
        [_, module_option, module] = container["readinessProbe"]["exec"]["command"]
        assert (module_option, module) == ("-m", "common.healthcheck")
        assert importlib.util.find_spec(module) is not None


def torchrun_arguments(shell_command: list[str], environment: dict[str, str], folder: Path) -> list[str]:
    """What torchrun is called with, by the shell itself."""
    stand_in = folder / "torchrun"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    stand_in.chmod(0o755)
    environment = {**environment, "PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(shell_command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("index", [0, 1])
def test_all_trainers_meet_at_the_first_one_and_end_before_their_pod_does(index: int, tmp_path: Path) -> None:
    from torch.distributed.run import get_args_parser

    [container] = PODS["JobSet/hpt"]["containers"]
    environment = {**RUN, "JOB_COMPLETION_INDEX": str(index), "POD_IP": "10.0.0.7"}
    command = [*container["command"], *container["args"]]
    options = get_args_parser().parse_args(torchrun_arguments(command, environment, tmp_path))
    assert int(options.nnodes) == JOB["completions"] == JOB["parallelism"]
    assert options.nproc_per_node == "gpu"
    assert (options.rdzv_backend, options.rdzv_id) == ("c10d", RUN["HPT_RUN_ID"])
    host, _, port = options.rdzv_endpoint.partition(":")
    first = f"{JOBSET['metadata']['name']}-{REPLICATED_JOB['name']}-0-0"
    assert host == f"{first}.{JOBSET['metadata']['name']}"  # pod's hostname . the JobSet's own subdomain
    assert container["ports"] == [{"name": "rendezvous", "containerPort": int(port), "protocol": "TCP"}]
    conf = dict(entry.split("=") for entry in options.rdzv_conf.split(","))
    assert conf["is_host"] == str(int(index == 0))
    assert options.local_addr == "10.0.0.7"
    grace_seconds = JOB["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 60 <= options.shutdown_timeout <= grace_seconds - 30
    assert options.module
    assert options.training_script == "trainer_node"
    params = understood(["trainer-node", *options.training_script_args])
    assert params["resume"]
    assert str(params["runs_dir"]) == "/runs"
    settings = load_settings(preset=params["preset"], overrides=list(params["overrides"]))
    assert settings.trainer.data.cache_dir == "/runs/cache"
    assert settings.trainer.parallel.kind == "ddp"
    limits = container["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) >= 1
    assert JOB["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy wants it
    assert JOB["backoffLimit"] == 0


def test_redis_starts_as_written_and_its_probe_compares_the_answer(tmp_path: Path) -> None:
    if not shutil.which("redis-server") or not shutil.which("redis-cli"):
        if os.environ.get("CI"):
            pytest.fail("redis-server and redis-cli must be there in CI")
        pytest.skip("needs redis-server and redis-cli on PATH")
    make_users("*", ROLES, out_file=tmp_path / "users.acl", password_folder=tmp_path / "secrets")
    [container] = PODS["StatefulSet/hpt-redis"]["containers"]
    with tempfile.TemporaryDirectory(prefix="hpt-") as short_folder:
        socket = Path(short_folder) / "s"
        here = {"/data": short_folder, "/etc/hpt/users.acl": str(tmp_path / "users.acl")}
        arguments = [here.get(part, part) for part in container["args"]]
        command = [*container["command"], *arguments, "--port", "0", "--unixsocket", str(socket)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_until(socket.exists)
            shell, option, probe = container["readinessProbe"]["exec"]["command"]
            probe = probe.replace("redis-cli", f"redis-cli -s {socket}")

            def code(password: str) -> int:
                environment = {**os.environ, "REDISCLI_AUTH": password}
                return subprocess.run(
                    [shell, option, probe], env=environment, stderr=subprocess.DEVNULL
                ).returncode

            assert code((tmp_path / "secrets" / "page").read_text().strip()) == 0
            assert code("wrong") != 0
            environment = {**os.environ, "HPT_REDIS_URL": f"unix://{socket}", "PYTHONPATH": str(ROOT)}
            environment |= {
                "HPT_REDIS_USERNAME": "predictor",
                "HPT_REDIS_PASSWORD_FILE": str(tmp_path / "secrets" / "predictor"),
            }
            _, *health = PODS[NODES["predictor"]]["containers"][0]["readinessProbe"]["exec"]["command"]
            subprocess.run([sys.executable, *health], env=environment, check=True, stdout=subprocess.DEVNULL)
        finally:
            server.terminate()
            assert server.wait(timeout=10) == 0
