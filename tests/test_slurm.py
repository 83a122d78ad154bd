"""docs/clusters/slurm/train.sbatch: its options exist, and it does what it says when signals come.

Slurm is not here: `srun`, `scontrol` and `torchrun` are stand-ins on PATH that log how they are called. The
script itself, the server, the Redis users and the health check are the real ones.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.config import load_settings
from tests.faults import wait_until
from trainer_node.cli import cli

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "docs" / "clusters" / "slurm" / "train.sbatch"
TEXT = SCRIPT.read_text(encoding="utf-8")
OPTIONS = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", TEXT, re.MULTILINE))
# Long options in doc/man/man1/sbatch.1 of SchedMD/slurm 284c3b9 (Slurm 26.11), section OPTIONS.
OF_SBATCH = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment
    consolidate-segments constraint container contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu
    cpus-per-task deadline delay-boot dependency distribution error exclude exclusive export export-file
    extra extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
    gpus-per-task gres gres-flags help hint hold ignore-pbs input job-name kill-on-invalid-dep licenses
    mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mem-update mincpus network nice
    no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
    ntasks-per-socket oom-kill-step open-mode output overcommit oversubscribe parsable partition prefer
    priority profile propagate qos quiet reboot requeue reservation resources resv-ports runtime segment
    signal sockets-per-node spread-job spread-segments stepmgr switches test-only thread-spec
    threads-per-core time time-min tmp tres-bind tres-per-task uid usage use-min-nodes verbose version
    wait wait-all-nodes wckey wrap"""
# Of srun.1 there, those that shape what a step gets and how it ends.
OF_SRUN = "cpus-per-task exact export gpus-per-node kill-on-bad-exit label nodes ntasks overlap wait"
STAND_INS = {
    "scontrol": """
        echo "$@" >> "$LOG/scontrol"
        case "$1 $2" in
            "show hostnames") echo 127.0.0.1; echo 127.0.0.2 ;;
            "show job") echo "   PreemptEligibleTime=2026-11-21T10:00:00 PreemptTime=$PREEMPT_TIME" ;;
        esac""",
    "srun": """
        echo "$@" >> "$LOG/srun"
        while [[ $1 == --* ]]; do shift; done
        SLURM_NODEID=0 exec "$@" """,
    "torchrun": """
        printf '%s\\n' "$@" > "$LOG/torchrun"
        env | grep ^HPT_ > "$LOG/environment"
        trap 'touch "$LOG/stopped"; exit 1' TERM
        touch "$LOG/started"
        case $ENDING in finish) exit 0 ;; crash) exit 3 ;; esac
        while true; do sleep 0.02; done""",
    "predictor-node": """echo $$ >> "$LOG/pids"; echo "$@" > "$LOG/predictor"; exec sleep 60""",
    "monitor-node": """
        if [ "$1" = acl ]; then exec "$PYTHON" -c 'from monitor_node.cli import main; main()' "$@"; fi
        echo $$ >> "$LOG/pids"; echo "$@" > "$LOG/monitor"; exec sleep 60""",
    "python": 'exec "$PYTHON" "$@"',
}
# Without these the script starts in milliseconds: one test runs the real ones.
FASTER = STAND_INS | {
    "monitor-node": """
        if [ "$1" = acl ]; then mkdir -p "$(dirname "$5")"; exit 0; fi
        echo $$ >> "$LOG/pids"; echo "$@" > "$LOG/monitor"; exec sleep 60""",
    "python": """if [ "$1" = -c ]; then echo redis-server; fi""",
    "redis-server": """echo $$ >> "$LOG/pids"; exec sleep 60""",
}


@dataclass
class Job:
    folder: Path
    process: subprocess.Popen[bytes]

    def said(self, program: str) -> str:
        file = self.folder / program
        return file.read_text() if file.exists() else ""

    @property
    def requeued(self) -> bool:
        return "requeue" in self.said("scontrol")

    def wait_for(self, program: str, text: str = "") -> None:
        def is_there() -> bool:
            found = (self.folder / program).exists() and text in self.said(program)
            assert found or self.process.poll() is None, f"the script ended: {self.said('stderr')}"
            return found

        wait_until(is_there, 60.0)


Submit = Callable[..., Job]


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Submit]:
    started: list[Job] = []

    def start(
        ending: str, stand_ins: dict[str, str] = FASTER, *, number: int = 0, preempted: str = "None"
    ) -> Job:
        programs = tmp_path / "bin"
        programs.mkdir()
        for name, body in stand_ins.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n")
            (programs / name).chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HPT_")}
        environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "LOG": str(tmp_path),
            "ENDING": ending,
            "PREEMPT_TIME": preempted,
            "SLURM_JOB_ID": f"7{number:04}",
            "SLURM_JOB_NAME": "hpt",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_PER_TASK": "32",
            "SLURM_SUBMIT_DIR": str(tmp_path),
        }
        with (tmp_path / "stderr").open("wb") as said:
            process = subprocess.Popen(["bash", SCRIPT], env=environment, stderr=said)
        started.append(Job(tmp_path, process))
        return started[-1]

    yield start
    for job in started:
        if job.process.poll() is None:
            job.process.terminate()
        job.process.wait(timeout=30)


def test_every_option_is_one_of_slurms_and_the_numbers_fit_together() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert len(OPTIONS) == TEXT.count("#SBATCH")
    assert OPTIONS.keys() <= set(OF_SBATCH.split())
    [step] = re.findall(r"srun ((?:--\S+ )+)", TEXT)
    of_step = dict(part.removeprefix("--").split("=") for part in shlex.split(step))
    assert of_step.keys() <= set(OF_SRUN.split())
    assert OPTIONS["ntasks-per-node"] == "1"  # one torchrun a node: it starts the ranks
    assert "requeue" in OPTIONS
    assert OPTIONS["open-mode"] == "append"  # a requeued job goes on in its log
    shell_only, _, lead_seconds = OPTIONS["signal"].partition("@")
    assert shell_only == "B:USR1"
    [shutdown_seconds] = re.findall(r"SHUTDOWN_SECONDS=(\d+)", TEXT)
    assert int(shutdown_seconds) <= int(lead_seconds) - 30, (
        "the checkpoint must be there before the time is up"
    )
    assert int(of_step["wait"]) >= int(shutdown_seconds)
    assert of_step["kill-on-bad-exit"] == "0"
    assert of_step["cpus-per-task"] == "$SLURM_CPUS_PER_TASK"


def free_number() -> int:
    """A job number whose port for the server is free."""
    for number in range(os.getpid() % 9000, 10000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", 20000 + number)):
                return number
    raise AssertionError("no free port")


def test_a_finished_run_ends_the_job_and_its_trainer_had_a_server_of_its_own(submit: Submit) -> None:
    from torch.distributed.run import get_args_parser

    number = free_number()
    job = submit("finish", STAND_INS, number=number)
    assert job.process.wait(timeout=60) == 0
    assert not job.requeued
    options = get_args_parser().parse_args(job.said("torchrun").splitlines())
    assert (options.nnodes, options.nproc_per_node, options.rdzv_backend) == ("2", "gpu", "c10d")
    assert options.rdzv_endpoint == f"127.0.0.1:{10000 + number}"
    assert options.rdzv_id == f"7{number:04}"
    assert dict(entry.split("=") for entry in options.rdzv_conf.split(","))["is_host"] == "1"
    assert (options.module, options.training_script) == (True, "trainer_node")
    command, *arguments = options.training_script_args
    params = cli.commands[command].make_context(command, arguments).params
    assert params["resume"]
    assert params["run_id"] == f"hpt-7{number:04}"
    settings = load_settings(preset=params["preset"], overrides=list(params["overrides"]))
    assert settings.trainer.parallel.kind == "ddp"
    environment = dict(line.split("=", 1) for line in job.said("environment").splitlines())
    assert environment["HPT_REDIS_URL"] == f"redis://127.0.0.1:{20000 + number}/0"
    assert environment["HPT_REDIS_USERNAME"] == "trainer"
    secrets = Path(environment["HPT_REDIS_PASSWORD_FILE"]).parent
    assert not secrets.exists(), "passwords outlive the job"


@pytest.mark.parametrize("name", ["predictor", "monitor"])
def test_services_are_called_as_their_programs_want(name: str, submit: Submit) -> None:
    job = submit("stay")
    job.wait_for(name, "\n")
    module = __import__(f"{name}_node.cli", fromlist=["cli"])
    command, *arguments = job.said(name).split()
    assert module.cli.commands[command].make_context(command, arguments).params["run_id"] == "hpt-70000"


def test_near_the_time_limit_the_trainers_are_stopped_and_the_job_queued_again(submit: Submit) -> None:
    job = submit("stay")
    job.wait_for("started")
    wait_until(lambda: len(job.said("pids").split()) == 3)
    job.process.send_signal(signal.SIGUSR1)
    job.process.wait(timeout=30)
    assert (job.folder / "stopped").exists(), "SIGTERM did not reach torchrun"
    assert "requeue 70000" in job.said("scontrol")
    for process_id in map(int, job.said("pids").split()):
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_a_cancelled_job_is_not_queued_again(submit: Submit) -> None:
    job = submit("stay")
    job.wait_for("started")
    job.process.terminate()
    assert job.process.wait(timeout=30) == 1
    assert (job.folder / "stopped").exists()
    assert not job.requeued


def test_a_crash_fails_the_job(submit: Submit) -> None:
    job = submit("crash")
    assert job.process.wait(timeout=30) == 3
    assert not job.requeued


def test_a_preempted_job_waits_for_slurm_to_queue_it_again(submit: Submit) -> None:
    job = submit("crash", preempted="2026-11-21T10:00:00")
    job.wait_for("scontrol", "show job 70000")
    with pytest.raises(subprocess.TimeoutExpired):
        job.process.wait(timeout=0.2)
    assert not job.requeued
