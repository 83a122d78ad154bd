"""Rule "fitted": earlier runs of the same job with other seeds, recorded, and a predictor fitted on them.

The fitting itself is the predictor's: entry point FIT of the group that also names the predictor,
called as fit(recordings, out). Knows nothing of arms and targets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from common import codec
from common.bus import Entry, EntryId
from common.errors import EnvironmentFault
from common.messages import Message, PhaseDecision
from common.recording_writer import RecordingWriter
from common.streams import DECISIONS, HISTORY
from trainer_node.race.arms import ARMS
from trainer_node.race.in_process import GROUP, PredictorCore, installed_predictor
from trainer_node.race.plan import EARLIER_SEEDS, RacePlan
from trainer_node.race.run_result import RunKey, RunResult
from trainer_node.race.space import trial_config
from trainer_node.race.workers import RunOrder

FIT = "fit"
RECORDED_ARM = "ours-aggressive"  # its jumps are lessons

Fit = Callable[[Sequence[Path], Path], object]


def installed_fit() -> Fit:
    """Raises EnvironmentFault where none is installed."""
    for entry_point in entry_points(group=GROUP, name=FIT):
        fit: Fit = entry_point.load()
        return fit
    raise EnvironmentFault(
        f"--fitted-on needs a predictor that can be fitted: no entry point '{FIT}' of {GROUP} is installed;"
        " run `pip install -e .` (or install the package) once more"
    )


def earlier_orders(plan: RacePlan, count: int, folder: Path) -> list[RunOrder]:
    """The runs to be made before fitting: the task's preset with seeds that the race never uses."""
    arm = ARMS[RECORDED_ARM]
    inner = trial_config(ARMS[arm.wraps], plan.base, 0)
    config = trial_config(arm, plan.base, 0, inner)
    keys = [
        RunKey(
            task=plan.task,
            arm=RECORDED_ARM,
            config=config,
            planned_steps=plan.base_steps,
            seed=EARLIER_SEEDS + number,
            purpose="earlier",
        )
        for number in range(count)
    ]
    return [
        RunOrder(
            key=key,
            base=plan.base,
            eval_every_steps=plan.base_steps,
            recording=folder / f"seed-{key.seed}.hpt",
        )
        for key in keys
    ]


def make_recorded_run(order: RunOrder) -> RunResult:
    """One earlier run. Its recording appears under its name when it is whole. Called in a worker."""
    from trainer_node.assembly import prepare_task
    from trainer_node.race.arms import run_settings
    from trainer_node.race.run_arm import run_task

    key, path = order.key, order.recording
    assert path is not None
    settings = run_settings(ARMS[key.arm], order.base, key.config, steps=key.planned_steps, seed=key.seed)
    unfinished = path.with_suffix(".unfinished")
    unfinished.unlink(missing_ok=True)
    writer = RecordingWriter(unfinished, run_id=f"earlier-{key.seed}", created_unix_seconds=0.0)
    try:
        result = run_task(
            key,
            settings,
            prepare_task(settings.trainer),
            eval_every_steps=order.eval_every_steps,
            predictor=lambda: RecordedPredictor(installed_predictor(), writer),
        )
        writer.seal()
    finally:
        writer.close()
    os.replace(unfinished, path)
    return result


class RecordedPredictor:
    """A predictor whose history and decisions are written down. Changes nothing of what it says."""

    def __init__(self, predictor: PredictorCore, writer: RecordingWriter) -> None:
        self._predictor, self._writer = predictor, writer
        self._decisions = 0

    def handle(self, message: Message, entry_id: EntryId) -> list[Message]:
        self._writer.append(_entry(HISTORY, entry_id, message))
        answers = self._predictor.handle(message, entry_id)
        for answer in answers:
            if isinstance(answer, PhaseDecision):
                self._decisions += 1
                self._writer.append(_entry(DECISIONS, EntryId(1, self._decisions), answer))
        return answers


def _entry(stream: str, entry_id: EntryId, message: Message) -> Entry:
    return Entry(stream, entry_id, type(message).__name__, codec.encode(message), 0.0)
