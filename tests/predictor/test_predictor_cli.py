"""The predictor's commands: exit codes, one clear line per mistake, signals, the real server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from common.bus import STREAM_START, Entry
from common.command import run_command
from common.embedded import EmbeddedServer, start_server
from common.open_bus import open_bus
from common.recording_writer import RecordingWriter
from common.streams import PREDICTOR, notes_of
from predictor_node import cli
from tests.predictor.bus_trainer import BusTrainer
from tests.predictor.controlled_run import World
from tests.predictor.scripted import RUN_ID, ScriptedTrainer, small_settings
from tests.predictor.test_pilot import entries_of, fly
from tests.predictor.test_replay import ENTRIES, HISTORY_ENTRIES, WHOLE, with_decision
from tests.predictor.test_serve import EXPECTED, bodies_on

ROOT = Path(__file__).parents[2]

Run = Callable[..., tuple[int, str, str]]  # arguments -> exit code, stdout, stderr


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(cli, "stop_on_signals", lambda stop: None)
    monkeypatch.delenv("HPT_REDIS_URL", raising=False)

    def run_it(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predictor-node", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            run_command(cli.cli, "predictor-node")
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    return run_it


def recording_of(path: Path, entries: Sequence[Entry], *, sealed: bool = True) -> Path:
    writer = RecordingWriter(path, run_id=RUN_ID, created_unix_seconds=0.0)
    for entry in entries:
        writer.append(entry)
    if sealed:
        writer.seal()
    else:
        writer.close()
    return path


def assert_one_line(code: int, out: str, err: str, *, expected_code: int, says: str) -> None:
    assert code == expected_code
    assert says in err
    *warnings, _ = err.splitlines()
    assert all(warning.startswith("warning: ") for warning in warnings)  # of the password in an argument
    assert "Traceback" not in out + err


@pytest.mark.parametrize("arguments", [(), ("serve",), ("replay",)])
def test_help_has_examples(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, _ = run(*arguments, "--help")
    assert code == 0
    assert "Example" in out


def test_check_says_how_many_decisions_were_reproduced(run: Run, tmp_path: Path) -> None:
    code, out, err = run("replay", recording_of(tmp_path / "r.hpt", ENTRIES), "--check")
    assert (code, out, err) == (0, f"{len(WHOLE.decisions)} decisions reproduced byte for byte\n", "")


def test_replay_prints_one_line_per_decision_and_totals(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("replay", recording_of(tmp_path / "r.hpt", ENTRIES))
    assert code == 0
    assert len(out.splitlines()) == len(WHOLE.decisions) + 2
    proposals = [decision for decision in WHOLE.decisions if decision.horizon_steps]
    virtual_steps = sum(decision.horizon_steps for decision in proposals)
    assert f"{len(proposals)} proposals over {virtual_steps} virtual steps" in out


def test_replay_counts_a_trial_of_controls_among_the_proposals(run: Run, tmp_path: Path) -> None:
    flight = fly("trainer.controls.rate=true", world=World(best_rate=1 / 8), until_step=100)
    assert flight.arms
    code, out, _ = run("replay", recording_of(tmp_path / "r.hpt", entries_of(flight.log), sealed=False))
    rests = len(flight.log.decisions) - len(flight.arms)
    assert code == 0
    assert f"{len(flight.arms)} proposals over 0 virtual steps, {rests} rests" in out


def test_planted_difference_is_told_field_by_field_and_exits_1(run: Run, tmp_path: Path) -> None:
    path = recording_of(tmp_path / "r.hpt", with_decision(9, reason="planted", horizon_steps=99))
    code, out, _ = run("replay", path, "--check")
    assert code == 1
    assert [line.strip().partition(":")[0] for line in out.splitlines()[1:]] == ["horizon_steps", "reason"]
    assert "recorded 'planted'" in out


def test_gap_in_the_recorded_history_exits_1(run: Run, tmp_path: Path) -> None:
    thinned = [entry for entry in ENTRIES if entry is not HISTORY_ENTRIES[20]]
    code, out, err = run("replay", recording_of(tmp_path / "r.hpt", thinned), "--check")
    assert_one_line(code, out, err, expected_code=1, says="1-21 is missing")


def test_torn_recording_is_checked_as_far_as_it_goes(run: Run, tmp_path: Path) -> None:
    path = recording_of(tmp_path / "r.hpt", ENTRIES, sealed=False)
    path.write_bytes(path.read_bytes()[:-5])
    code, out, _ = run("replay", path, "--check")
    assert code == 0
    assert "1 not recorded before a crash" in out


def test_missing_recording_exits_2(run: Run, tmp_path: Path) -> None:
    code, out, err = run("replay", tmp_path / "nowhere.hpt")
    assert_one_line(code, out, err, expected_code=2, says="nowhere.hpt")


def test_damaged_recording_exits_2(run: Run, tmp_path: Path) -> None:
    path = recording_of(tmp_path / "r.hpt", ENTRIES)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, out, err = run("replay", path, "--check")
    assert_one_line(code, out, err, expected_code=2, says="r.hpt")


def test_recording_without_history_exits_2_and_names_the_file(run: Run, tmp_path: Path) -> None:
    code, out, err = run("replay", recording_of(tmp_path / "r.hpt", []))
    assert_one_line(code, out, err, expected_code=2, says="r.hpt: holds no history")


@pytest.mark.parametrize("url", ["nonsense", "http://localhost", "redis://", "embedded://"])
def test_wrong_address_exits_2_and_writes_nothing(run: Run, tmp_path: Path, url: str) -> None:
    state_dir = tmp_path / "states"
    code, out, err = run("serve", "--redis", url, "--run-id", "r", "--state-dir", state_dir)
    assert_one_line(code, out, err, expected_code=2, says="address")
    assert not state_dir.exists()


def test_no_address_exits_2(run: Run) -> None:
    code, out, err = run("serve", "--run-id", "r")
    assert_one_line(code, out, err, expected_code=2, says="HPT_REDIS_URL")


def test_server_that_is_not_there_exits_1(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("predictor_node.serve.OPEN_SECONDS", 0.0)
    code, out, err = run("serve", "--redis", f"unix://{tmp_path}/no.sock", "--run-id", "r")
    assert_one_line(code, out, err, expected_code=1, says="no server for")


def test_state_folder_that_cannot_be_written_exits_1(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    state_dir = tmp_path / "file" / "states"
    code, out, err = run("serve", "--redis", "memory://cli-test", "--run-id", "r", "--state-dir", state_dir)
    assert_one_line(code, out, err, expected_code=1, says="cannot be written")


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with start_server() as running:
        yield running


def start_process(server: EmbeddedServer, run_id: str, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "predictor_node", "serve", "--run-id", run_id, *options],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "HPT_REDIS_URL": server.url},
    )


def wait_for_heartbeat(server: EmbeddedServer, run_id: str) -> None:
    bus = open_bus(server.url, run_id)
    assert bus.read_after({notes_of(PREDICTOR): STREAM_START}, max_count=1, block_seconds=30.0)
    bus.close()


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "parent"])
def test_process_stops_gracefully(server: EmbeddedServer, way: str) -> None:
    run_id = f"stop-{way}"
    options = ["--stop-with-parent"] if way == "parent" else []
    with start_process(server, run_id, *options) as process:
        wait_for_heartbeat(server, run_id)
        assert process.stdin is not None
        if way == "parent":
            process.stdin.close()
        else:
            process.send_signal(signal.Signals[way])
        assert process.wait(20.0) == 0
        assert process.stderr is not None
        log = process.stderr.read().decode()
    assert '"event": "stopped"' in log
    assert "Traceback" not in log
    assert server.url not in log, "the address holds the password"


def test_process_on_a_real_server_decides_as_the_pure_core(server: EmbeddedServer, tmp_path: Path) -> None:
    bus = open_bus(server.url, RUN_ID)
    with start_process(server, RUN_ID, "--state-dir", str(tmp_path / "states")) as process:
        ScriptedTrainer(small_settings()).run(BusTrainer(bus).publish)
        assert process.wait(20.0) == 0, "ends by itself after RunEnded"
    assert bodies_on(bus) == EXPECTED
    kept = sorted(path.name for path in (tmp_path / "states").iterdir())
    assert len(kept) == 1 + small_settings().trainer.checkpoint.keep
    bus.close()


def test_wrong_password_exits_1(server: EmbeddedServer, run: Run) -> None:
    scheme, _, rest = server.url.partition("://")
    wrong = f"{scheme}://:wrong@{rest.rpartition('@')[2]}"
    code, out, err = run("serve", "--redis", wrong, "--run-id", "r")
    assert_one_line(code, out, err, expected_code=1, says="HPT_REDIS_PASSWORD")
