"""The folder of one run: names of its files, and the checks before anything is written into it.

config.toml  metrics.jsonl  recording.hpt  summary.json
checkpoints/trainer/  checkpoints/predictor/  logs/  tensorboard/
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from common import sealed_folder
from common.config import dump_settings, load_settings
from common.errors import CheckpointError, EnvironmentFault, UserError
from common.settings import RunSettings

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def recording(self) -> Path:
        return self.path / "recording.hpt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def trainer_checkpoints(self) -> Path:
        return self.path / "checkpoints" / "trainer"

    @property
    def predictor_checkpoints(self) -> Path:
        return self.path / "checkpoints" / "predictor"

    @property
    def generation(self) -> Path:
        return self.path / "generation"

    @property
    def is_used(self) -> bool:
        """A trainer has run here."""
        return self.metrics.exists() or bool(sealed_folder.folders(self.trainer_checkpoints))


def fresh_run_id(prefix: str, now: datetime) -> str:
    return f"{prefix}-{now:%Y%m%d-%H%M%S}"


def check_run_id(run_id: str) -> None:
    """Raises UserError: a run id is a folder name and part of a Redis key."""
    if not _RUN_ID.fullmatch(run_id):
        raise UserError(
            f"run id {run_id!r}: use 1 to 64 letters, digits, dots, dashes or underscores,"
            " beginning with a letter or digit"
        )


def create_next(runs_dir: Path, run_id: str, settings: RunSettings) -> RunFolder:
    """As `create`, in a folder that was not there: of two runs of the same second the second one is -2.

    Raises UserError and EnvironmentFault as `create` does.
    """
    check_run_id(run_id)
    for number in itertools.count(1):
        name = run_id if number == 1 else f"{run_id}-{number}"
        try:
            (runs_dir / name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:
            pass  # `create` says what is wrong
        break
    return create(runs_dir, name, settings)


def create(runs_dir: Path, run_id: str, settings: RunSettings, *, again: bool = False) -> RunFolder:
    """A new folder with config.toml. Raises UserError if it was used, EnvironmentFault if not writable.

    With `again` a run that ended before its first checkpoint may be started anew in its folder.
    """
    check_run_id(run_id)
    run = RunFolder(runs_dir / run_id)
    if run.is_used and not again:
        raise UserError(
            f"{run.path} holds a run already: choose another --run-id,"
            f" or go on with `trainer-node resume {run.path}`"
        )
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        run.config.write_text(dump_settings(settings), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(
            f"{run.path}: cannot write there ({error.strerror}); choose another --runs-dir"
        ) from None
    return run


def open_existing(path: Path) -> tuple[RunFolder, RunSettings]:
    """Raises UserError if there is no run, EnvironmentFault if it cannot be written."""
    run = RunFolder(path.resolve())
    if not run.config.is_file():
        raise UserError(f"{path}: no config.toml there; give the folder of a run, e.g. runs/<run_id>")
    check_run_id(run.run_id)
    if not os.access(run.path, os.W_OK):
        raise EnvironmentFault(f"{run.path}: is read-only; make it writable or copy the run elsewhere")
    return run, load_settings(file=run.config)


def last_generation(run: RunFolder) -> int:
    """The highest generation that a trainer of this run was given; 0 before the first, or where it cannot be
    read: then checkpoints and server have to tell.
    """
    try:
        return int(run.generation.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def remember_generation(run: RunFolder, generation: int) -> None:
    """A new server knows no old generations, and a start may end before its first checkpoint: without this
    its ids would come again, and readers would take new entries for old ones. Raises EnvironmentFault.
    """
    temporary = run.generation.with_suffix(".tmp")
    try:
        temporary.write_text(f"{generation}\n", encoding="ascii")
        temporary.replace(run.generation)
    except OSError as error:
        raise EnvironmentFault(f"{run.generation}: cannot be written: {error.strerror}") from None


def newest_checkpoint(run: RunFolder, *, with_predictor: bool) -> tuple[Path, list[str]]:
    """The newest checkpoint that verifies, and why newer ones were passed over.

    With `with_predictor`, one that the predictor also has is preferred: otherwise the predictor
    would start from nothing. Raises CheckpointError if none is whole.
    """
    reasons: list[str] = []
    whole: list[Path] = []
    for folder in sealed_folder.folders(run.trainer_checkpoints):
        try:
            sealed_folder.verify(folder)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        if not with_predictor or _verifies(run.predictor_checkpoints / folder.name):
            return folder, reasons
        whole.append(folder)
        reasons.append(f"{folder.name}: the predictor has no state for it")
    if whole:
        return whole[0], [r for r in reasons if not r.startswith(whole[0].name)]
    detail = f" ({'; '.join(reasons)})" if reasons else ""
    raise CheckpointError(
        f"{run.path}: no checkpoint to go on from{detail}; start anew with `trainer-node up`"
    )


def _verifies(folder: Path) -> bool:
    try:
        sealed_folder.verify(folder)
    except CheckpointError:
        return False
    return True
