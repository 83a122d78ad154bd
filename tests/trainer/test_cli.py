"""Bad input: one clear line that names the cure, exit 2 (1 for the environment's fault), nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common import sealed_folder
from tests.nodes import QUICK
from trainer_node.cli import main

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs a command in this process, in an empty folder; (exit code, what it said last on stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPT_REDIS_URL", raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["trainer-node", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("trainer-node:", "Error:"))]
        assert len(errors) <= 1
        return int(leaving.value.code or 0), errors[0] if errors else ""

    return run


def up(*more: str) -> list[str]:
    return ["up", "--preset", "digits", "--run-id", "bad", *more]


BAD_INPUT = {
    "wrong preset": (["up", "--preset", "nanoo"], "did you mean nano?"),
    "both preset and config": (["up", "--preset", "nano", "--config", "x.toml"], "not both"),
    "missing config": (["up", "--config", "none.toml"], "no such file"),
    "unknown key": (up("--set", "trainer.optimizer.rat=1"), "did you mean trainer.optimizer.rate?"),
    "negative": (up("--steps", "-1"), "must be at least 1"),
    "absurd": (up("--seed", "99999999999"), "must be at most"),
    "not a number": (up("--steps", "many"), "not a valid integer"),
    "bad run id": (["up", "--preset", "digits", "--run-id", "../x"], "letters, digits"),
    "missing path": (["up", "--data", "nowhere"], "nowhere"),
    "control character": (["up", "--data", "a\nb"], "control characters"),
    "unknown option": (["up", "--colour"], "No such option"),
    "unknown command": (["upp"], "No such command"),
    "no run there": (["resume", "nowhere"], "no config.toml there"),
    "no redis address": (["train", "--preset", "digits"], "HPT_REDIS_URL"),
    "wrong scheme": (["train", "--preset", "digits", "--redis", "http://x"], "unknown scheme"),
    "missing recording": (
        ["train", "--preset", "digits", "--redis", "memory://x", "--decisions", "none.hpt"], "none.hpt",
    ),
    "batch too large": (up("--set", "trainer.batch.sequences=5000"), "lower trainer.batch.sequences"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_a_users_mistake_is_one_line_exit_2_and_nothing_written(name: str, cli: Cli, tmp_path: Path) -> None:
    arguments, expected = BAD_INPUT[name]
    code, error = cli(*arguments)
    assert code == 2
    assert expected in error
    assert list(tmp_path.iterdir()) == []


def text_case(folder: Path, name: str) -> Path:
    folder.mkdir()
    if name == "binary":
        (folder / "a.bin").write_bytes(b"\0\1\2" * 100)
    if name == "small":
        (folder / "a.txt").write_text("too little\n")
        (folder / "b.txt").write_text("to learn from\n")
    return folder


@pytest.mark.parametrize("name", ["empty", "binary", "small"])
def test_data_that_cannot_be_learned_from_is_one_line_exit_2(name: str, cli: Cli, tmp_path: Path) -> None:
    data = text_case(tmp_path / "data", name)
    cache = tmp_path / "cache"
    code, error = cli("up", "--data", str(data), "--set", f"trainer.data.cache_dir={cache}")
    assert code == 2, error
    assert error.startswith("trainer-node: ")
    assert not (tmp_path / "runs").exists()


def test_one_unreadable_file_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    code, error = cli("up", "--data", str(tmp_path / "loop.txt"))
    assert code == 2
    assert "loop.txt" in error


def test_a_runs_folder_that_cannot_be_written_is_the_environments_fault(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file, not a folder")
    code, error = cli(*up())
    assert code == 1
    assert "choose another --runs-dir" in error


def test_no_server_is_the_environments_fault_without_a_password_in_sight(cli: Cli, tmp_path: Path) -> None:
    code, error = cli(
        "train", "--preset", "digits", "--run-id", "x", "--redis", "redis://:geheim@127.0.0.1:1"
    )
    assert code == 1
    assert "127.0.0.1" in error
    assert "geheim" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_password_is_refused_in_one_line(cli: Cli, server_url: str, tmp_path: Path) -> None:
    scheme, _, rest = server_url.partition("://")
    wrong = f"{scheme}://:falsch@{rest.rpartition('@')[2]}"
    code, error = cli("train", "--preset", "digits", "--run-id", "x", "--redis", wrong)
    assert code == 1
    assert "password" in error.lower()
    assert "falsch" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run over an in-process bus, with its checkpoints."""
    runs = tmp_path_factory.mktemp("finished")
    settings = [part for text in QUICK for part in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-m", "trainer_node", "train", "--preset", "digits", "--steps", "60", "--redis",
         "memory://x", "--run-id", "r", "--runs-dir", str(runs), *settings,
         "--set", "predictor.enabled=false"],
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return runs / "r"


def test_a_run_id_that_was_used_is_refused_and_left_alone(cli: Cli, finished_run: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file()}
    where = ["--run-id", "r", "--runs-dir", str(finished_run.parent)]
    code, error = cli("up", "--preset", "digits", *where)
    assert code == 2
    assert f"trainer-node resume {finished_run}" in error
    code, error = cli("train", "--preset", "digits", "--redis", "memory://y", *where)
    assert code == 2
    assert "--resume" in error
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*") if p.is_file()}


def test_damaged_checkpoints_are_passed_over_and_none_left_is_exit_2(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished_run, run)
    for folder in sealed_folder.folders(run / "checkpoints" / "trainer"):
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    code, error = cli("resume", str(run))
    assert code == 2
    assert "no checkpoint to go on from" in error
    assert "model.safetensors is damaged" in error


def test_a_run_that_is_no_language_model_cannot_be_sampled(cli: Cli, finished_run: Path) -> None:
    code, error = cli("sample", str(finished_run), "--prompt", "x")
    assert code == 2
    assert "is not a language model" in error


def test_a_checkpoint_of_another_model_is_named_and_refused(
    cli: Cli, finished_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "copy"
    shutil.copytree(finished_run, run)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("channels = 4", "channels = 5"))
    code, error = cli(
        "train", "--resume", "--config", str(config), "--redis", "memory://z", "--run-id", "copy",
        "--runs-dir", str(tmp_path),
    )  # fmt: skip
    assert code == 2
    assert "is of another model" in error


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_keeps_what_was_good(tmp_path: Path) -> None:
    """A real limit of the operating system on file size stands in for the full disk."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "sys.argv = ['trainer-node', *sys.argv[1:]];"
        "from trainer_node.cli import main; main()"
    )
    settings = [part for text in QUICK for part in ("--set", text)]
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "--preset", "digits", "--steps", "60", "--redis", "memory://x",
         "--run-id", "r", "--runs-dir", str(tmp_path), *settings, "--set", "predictor.enabled=false",
         "--set", "trainer.model.channels=16"],
        capture_output=True, text=True, check=False, timeout=100,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "the last checkpoint could not be saved" in done.stderr.splitlines()[-1]
    assert sealed_folder.folders(tmp_path / "r" / "checkpoints" / "trainer") == []


@pytest.mark.parametrize(
    "command", [[], ["up"], ["train"], ["resume"], ["sample"], ["presets"], ["settings"]]
)
def test_every_command_has_help_with_an_example(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trainer-node", *command, "--help"])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert "trainer-node" in text.split("Example")[1]


def test_presets_can_be_listed_and_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in ((["presets"], "gpt2-small"), (["presets", "nano"], "[trainer.model]")):
        monkeypatch.setattr(sys, "argv", ["trainer-node", *arguments])
        with pytest.raises(SystemExit) as leaving:
            main()
        assert leaving.value.code == 0
        assert expected in capsys.readouterr().out
