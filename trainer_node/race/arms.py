"""The settings of one run of one arm: the task's, the arm's own, the tuned ones and the batch that was drawn.

What arms there are: arm_table.py. Ranges of tuning: space.py. The methods themselves: optimizers.py.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from common.config import dump_settings, parse_settings
from common.errors import SettingsError
from common.settings import RunSettings
from trainer_node.race.arm_table import ARMS, GROUPS, KNOB, Arm, Pairs
from trainer_node.race.batch_size import batch_factor, resized, steps_of

__all__ = ["ARMS", "KNOB", "Arm", "Pairs", "arm_named", "knobs_of", "run_settings", "with_settings"]

_NO_PREDICTOR: Pairs = (("predictor.enabled", False),)


def arm_named(name: str) -> Arm:
    """Raises SettingsError with the nearest name."""
    if name not in ARMS:
        close = difflib.get_close_matches(name, [*ARMS, *GROUPS], n=1, cutoff=0.5)
        hint = f": did you mean {close[0]}?" if close else ";"
        raise SettingsError(f"unknown arm '{name}'{hint} `trainer-node race --list` shows all")
    return ARMS[name]


def run_settings(
    arm: Arm, base: RunSettings, config: Pairs, *, steps: int, seed: int, data: str = "", state: str = ""
) -> RunSettings:
    """The task's settings, then the arm's own, then the tuned ones. Raises SettingsError.

    `steps` are of the task's batch: with another batch the run takes in the same tokens. Warm-up keeps its
    length where the run is not too short for it: runs of different length then begin alike.
    """
    factor = batch_factor(config)
    base = replace(base, trainer=resized(base.trainer, factor))
    steps = steps_of(steps, factor)
    warmup_steps = min(base.trainer.schedule.warmup_steps, max(1, steps // 4))
    forced: Pairs = (
        ("trainer.steps", steps),
        ("trainer.seed", seed),
        ("trainer.schedule.warmup_steps", warmup_steps),
        ("trainer.optimizer.name", arm.base_optimizer),
        ("trainer.decision_mode", "lockstep"),
    )
    own = arm.settings if arm.is_ours else (*_NO_PREDICTOR, *arm.settings)
    given = (("trainer.data.path", data),) if data else ()
    learned = (("predictor.state", state),) if state and arm.is_ours else ()
    return with_settings(base, (*forced, *own, *given, *learned, *config))


def knobs_of(arm: Arm, config: Pairs) -> dict[str, Any]:
    """The method's knobs without their prefix. Raises SettingsError for a knob that the arm lacks."""
    known = dict(arm.knobs)
    chosen = {key: value for key, value in config if key.startswith(KNOB)}
    for key in chosen:
        if key not in known:
            raise SettingsError(f"arm {arm.name} has no knob {key}; it has: {', '.join(known) or 'none'}")
    return {key.removeprefix(KNOB): value for key, value in {**known, **chosen}.items()}


def with_settings(base: RunSettings, changes: Iterable[tuple[str, Any]]) -> RunSettings:
    """`base` with some settings changed; knobs of arms are passed over. Raises SettingsError."""
    values = tomllib.loads(dump_settings(base))
    for key, value in changes:
        if key.startswith(KNOB):
            continue
        *path, last = key.split(".")
        table: Any = values
        for part in path:
            table = table.setdefault(part, {})
        table[last] = list(value) if isinstance(value, tuple) else value
    return parse_settings(values)
