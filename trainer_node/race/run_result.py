"""What one run of a race leaves behind: a line of results.jsonl. Data only; everything else reads it.

A run is identified by task, arm, configuration, planned length and seed; equal identities are never run
twice. Seconds leave out evaluation: it is the referee's time, not the runner's, in every arm alike.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

RESULT_SCHEMA = 1
TIME = "time"  # purpose of a run that is made to be timed


@dataclass(frozen=True, kw_only=True, slots=True)
class RunKey:
    """Which run: common random numbers mean that `seed` fixes initial weights and batches in every arm."""

    task: str
    arm: str
    config: tuple[tuple[str, Any], ...]  # sorted (setting, value): what was tuned, and nothing else
    planned_steps: int  # of the task's batch: with another batch the run takes in the same tokens
    seed: int
    purpose: str  # "tune", "target", "race", "time", "audit"

    @property
    def config_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def identity(self) -> str:
        """Key of results.jsonl. A tuning run may serve in the race, so the purpose is not part of it; only a
        run made to be timed is made for that alone."""
        known = f"{self.task}/{self.arm}/{self.config_hash}/{self.planned_steps}/{self.seed}"
        return known + ("/time" if self.purpose == TIME else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvePoint:
    """A held-out reading. All costs are cumulative and leave out evaluation."""

    steps: int  # kept, of the task's batch: the tokens that a run has learned from, whatever its batch
    passes: float  # forward-equivalents of a micro-batch of the task: step 3, check 1; undone steps included
    backward_passes: float  # micro-batches (of the task's size) whose backward ran, undone ones included
    trainer_seconds: float  # wall, or of the core where one thread has it alone (run_arm.py)
    predictor_seconds: float  # the same, learning included; 0 for arms without predictor
    loss: float  # held-out, of the weights as they are
    read_loss: float  # held-out, of what the arm would hand out if it ended here (averaged, ...)
    real_steps: int | None = None  # kept, whatever their batch; None = `steps` of them

    @property
    def kept_steps(self) -> int:
        return self.steps if self.real_steps is None else self.real_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseSpan:
    """For the timeline of phases."""

    phase: str
    first_step: int
    last_step: int
    verdict: str  # of the jump that a "predict" span stands for; "" otherwise


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    key: RunKey
    curve: tuple[CurvePoint, ...]  # rising steps; the last one is the end of the run
    diverged: bool  # non-finite loss: the run was ended and counts as a miss
    peak_bytes: int  # resident memory of the worker
    verdicts: tuple[tuple[str, int], ...]  # outcomes by verdict, sorted
    cosines: tuple[float, ...]  # delta against the displacement of the probation, one per judged jump
    forecasts: tuple[tuple[float, float, float], ...]  # (forecast without jump, spread, happened) per point
    phases: tuple[PhaseSpan, ...]
    machine: str  # processor, cores, threads used, torch version
    code: str = ""  # fingerprint of the code that made it; "" = not known

    @property
    def final(self) -> CurvePoint:
        return self.curve[-1]


def to_json_line(result: RunResult) -> str:
    return json.dumps({"schema": RESULT_SCHEMA, **dataclasses.asdict(result)}, sort_keys=True)


def from_json_line(line: str) -> RunResult:
    """Raises ValueError for a line of another schema or a torn one."""
    values = json.loads(line)
    if not isinstance(values, dict) or values.pop("schema", None) != RESULT_SCHEMA:
        raise ValueError("not a result of this schema")
    try:
        key = values["key"]
        key["config"] = tuple((name, _tupled(value)) for name, value in key["config"])
        return RunResult(
            **{
                **values,
                "key": RunKey(**key),
                "curve": tuple(CurvePoint(**point) for point in values["curve"]),
                "phases": tuple(PhaseSpan(**span) for span in values["phases"]),
                "verdicts": tuple((name, count) for name, count in values["verdicts"]),
                "cosines": tuple(values["cosines"]),
                "forecasts": tuple(tuple(forecast) for forecast in values["forecasts"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a result: {error}") from None


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
