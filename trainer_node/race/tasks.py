"""The tasks of a race: each is one preset `race-<task>`. Loads settings, builds nothing, runs nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from common.config import load_settings
from common.errors import SettingsError
from common.settings import RunSettings
from trainer_node.race.arms import with_settings

CPU_TASKS = ("python", "text", "deep", "digits", "regression", "large-batch")
GPU_TASKS = ("gpt2-small",)
TASKS = (*CPU_TASKS, *GPU_TASKS)
NEEDS_DATA = frozenset({"text", "gpt2-small"})


def race_settings(task: str, data: str = "", overrides: Iterable[str] = ()) -> RunSettings:
    """Settings of a race task; `overrides` as for `--set`. Raises SettingsError.

    `data` is a file, folder or repository of text; the tasks of NEEDS_DATA have none of their own.
    """
    if task not in TASKS:
        close = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingsError(f"unknown race task '{task}'{hint}; tasks: {', '.join(TASKS)}")
    settings = load_settings(preset=f"race-{task}", overrides=overrides)
    if data:
        if settings.trainer.task != "language":
            raise SettingsError(f"race task {task} brings its own data: leave out --data")
        settings = with_settings(settings, [("trainer.data.path", data)])
    if task in NEEDS_DATA and not settings.trainer.data.path:
        raise SettingsError(f"race task {task} needs text of yours: add --data FILE")
    return settings
