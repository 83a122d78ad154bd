"""What a person sees in the terminal while a run goes on: one progress bar, or plain lines.

Fed with the messages the loop sends; draws at its own pace, never from the loop's time budget
beyond storing a few numbers. Without a terminal it prints a line every few seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common.features import INDEX
from common.messages import Alert, Evaluation, Message, Observation, Outcome, Verdict

_LINE_SECONDS = 10.0
_RATE_WINDOW_STEPS = 50
_LOSS, _PROGRESS, _UNITS = INDEX["loss_ema_16"], INDEX["progress"], INDEX["log10_units_per_step"]


class Display:
    def __init__(
        self,
        *,
        total_steps: int,
        first_step: int,
        units_per_step: int,
        unit: str,
        console: Console | None = None,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._units_per_step, self._unit, self._total_steps = units_per_step, unit, total_steps
        self._step, self._phase, self._loss, self._held_out = first_step, "warmup", float("nan"), float("nan")
        self._accepted = self._refused = self._virtual_steps = 0
        self._times: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self._real_steps = 0
        self._newest: tuple[int, float, float] | None = None  # step, progress, share of the run in this step
        self._last_line_seconds = time.monotonic()
        self._is_narrow = self._console.width < 112
        bar = () if self._is_narrow else (BarColumn(bar_width=20),)
        self._bar = Progress(
            TextColumn("{task.description}"),
            *bar,
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            refresh_per_second=2,
            transient=False,
        )
        self._task = self._bar.add_task("warmup ", total=total_steps, completed=first_step, numbers="loss -")
        if self._console.is_terminal:
            self._bar.start()

    def start_from(self, verdicts: Mapping[Verdict, int], virtual_steps: int, held_out: float) -> None:
        """What a resumed run brings along."""
        self._accepted = verdicts.get(Verdict.ACCEPTED, 0)
        self._refused = verdicts.get(Verdict.REFUSED, 0) + verdicts.get(Verdict.RUINED, 0)
        self._virtual_steps, self._held_out = virtual_steps, held_out

    def put(self, message: Message) -> None:
        match message:
            case Observation():
                self._step, self._phase = message.step, message.phase.value
                self._loss = message.features[_LOSS]
                self._note_batch(message.features[_PROGRESS], message.features[_UNITS])
                self._real_steps += 1
                self._times = [*self._times[-_RATE_WINDOW_STEPS:], (time.monotonic(), self._real_steps)]
                self._draw()
            case Outcome():
                self._accepted += message.verdict is Verdict.ACCEPTED
                self._refused += message.verdict in (Verdict.REFUSED, Verdict.RUINED)
                if message.verdict is Verdict.ACCEPTED:
                    self._virtual_steps += message.horizon_steps
                elif message.lost_steps:
                    self._step = message.base_step
            case Evaluation():
                self._held_out = message.loss
            case Alert():
                self._console.print(f"{message.severity}: {message.text}", markup=False, soft_wrap=True)

    def _note_batch(self, progress: float, log10_units: float) -> None:
        """A batch that was changed changes the number of steps, and what is in one.

        The rest of the run is counted in steps as the newest two were: the average since the start would
        include steps of other batches. A tail that is chosen moves `progress` once: two steps differ.
        """
        if not (0.0 < progress < math.inf and math.isfinite(log10_units)):
            return
        self._units_per_step = round(10**log10_units)
        former_step, former_progress, former_share = self._newest or (self._step, progress, math.nan)
        step_share = progress - former_progress if self._step == former_step + 1 else math.nan
        if self._newest is None:
            self._total_steps = round(self._step / progress)
        elif step_share > 0.0 and math.isclose(step_share, former_share, rel_tol=1e-6):
            self._total_steps = round(self._step + (1.0 - progress) / step_share)
        self._newest = self._step, progress, step_share

    def numbers(self) -> str:
        """The part of the line that changes, e.g. for tests."""
        (first_time, first_count), (last_time, last_count) = self._times[0], self._times[-1]
        rate = (last_count - first_count) / max(1e-9, last_time - first_time)
        left = self._total_steps - self._step
        eta = f"{int(left / rate) // 60}:{int(left / rate) % 60:02d}" if rate > 0 else "-"
        share = self._virtual_steps / max(1, self._virtual_steps + self._step)
        held_out = "/" if self._is_narrow else " held-out "
        return (
            f"loss {self._loss:.3f}{held_out}{self._held_out:.3f}"
            f" {rate * self._units_per_step:,.0f} {self._unit}/s ETA {eta}"
            f" virtual {share:.0%} ✓{self._accepted} ✗{self._refused}"
        )

    def _draw(self) -> None:
        if self._console.is_terminal:
            self._bar.update(
                self._task,
                completed=self._step,
                total=self._total_steps,
                description=f"{self._phase:<7}",
                numbers=self.numbers(),
            )
        elif time.monotonic() - self._last_line_seconds > _LINE_SECONDS:
            self._last_line_seconds = time.monotonic()
            self._console.print(
                f"step {self._step}/{self._total_steps} {self._phase:<7} {self.numbers()}",
                markup=False,
                soft_wrap=True,
            )

    def close(self) -> None:
        if self._console.is_terminal:
            self._draw()
            self._bar.stop()
