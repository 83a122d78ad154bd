"""What a person sees of a race in the terminal: one progress bar, or plain lines; and the lists of names.

Fed with the runs as they end. The time left is a guess: how many lengths a search visits is not known
before it ends. The result of the race is the report's affair.
"""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common.config import load_settings
from trainer_node.race.arm_table import ARMS, GROUPS
from trainer_node.race.rules import RULES
from trainer_node.race.run_result import RunKey
from trainer_node.race.tasks import NEEDS_DATA, TASKS
from trainer_node.race.waves import Wave

_LINE_SECONDS = 10.0
_PHASES = {"earlier": "earlier runs", "tune": "tuning", "target": "target", "race": "race", "time": "timing"}
_MEANINGS = {
    "python": "a small GPT on the source of Python's own library",
    "text": "the same on a text of yours",
    "deep": "a deeper, narrower GPT",
    "digits": "a CNN on scikit-learn's digits",
    "regression": "an MLP on a synthetic teacher",
    "large-batch": "the small GPT with a large batch: little gradient noise",
    "gpt2-small": "GPT-2 small on a text of yours, on a GPU",
}


class RaceDisplay:
    """Counts what this session has run; runs of earlier sessions were there already."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._phase, self._runs, self._steps, self._ahead = "tune", 0, 0, 0
        self._started = self._last_line_seconds = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            refresh_per_second=2,
        )
        self._task = self._bar.add_task("", total=1, numbers="")
        if self._console.is_terminal:
            self._bar.start()

    def begin(self, wave: Wave, steps_ahead: int) -> None:
        """`steps_ahead`: planned steps of all runs still to come, this wave included."""
        if wave.phase != self._phase or not self._runs:
            self._phase = wave.phase
            if not self._console.is_terminal:
                self.say(f"{_PHASES[wave.phase]}: {len(wave.keys)} runs")
        self._ahead = self._steps + steps_ahead
        self._draw()

    def ended(self, key: RunKey) -> None:
        self._runs += 1
        self._steps += key.planned_steps
        self._draw()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)

    def numbers(self) -> str:
        """The part of the line that changes, e.g. for tests."""
        minutes = max(1e-9, time.monotonic() - self._started) / 60
        left = self._ahead - self._steps
        eta = f"about {left * minutes / self._steps:.0f} min left" if self._steps else "time left unknown"
        return f"{self._runs} runs, {self._runs / minutes:.1f} a minute, {eta}"

    def close(self) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def _draw(self) -> None:
        if self._console.is_terminal:
            self._bar.update(
                self._task,
                description=f"{_PHASES[self._phase]:<12}",
                completed=self._steps,
                total=max(1, self._ahead),
                numbers=self.numbers(),
            )
        elif time.monotonic() - self._last_line_seconds > _LINE_SECONDS:
            self._last_line_seconds = time.monotonic()
            self.say(f"{_PHASES[self._phase]}: {self.numbers()}")


def list_lines() -> list[str]:
    """Tasks, rules and arms with their meaning, for `race --list`."""
    lines = ["tasks"]
    for task in TASKS:
        trainer = load_settings(preset=f"race-{task}").trainer
        needs = "; needs --data" if task in NEEDS_DATA else ""
        lines.append(f"  {task:<16} {_MEANINGS[task]} ({trainer.steps} steps{needs})")
    lines += ["", "rules"]
    width = max(map(len, ARMS))
    for rule in RULES.values():
        result = " or ".join(rule.headlines)
        lines.append(f"  {rule.name:<{width}} {rule.meaning}")
        lines.append(
            f"  {'':<{width}} the result is that of {result}, against {' or '.join(rule.plain_arms)}"
        )
    lines += ["", "arms"]
    for arm in ARMS.values():
        wraps = f" (around {arm.wraps})" if arm.wraps else ""
        lines.append(f"  {arm.name:<{width}} {arm.meaning}{wraps}")
    lines += ["", "groups of arms"]
    lines += [f"  {name:<{width}} {', '.join(members)}" for name, members in GROUPS.items()]
    return lines
