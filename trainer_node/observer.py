"""Turns the steps of the loop into observations and closes its windows.

Owns the probe and what is known of the newest decision point; the loop owns progress, phases and
jumps and hands its progress in with every call, since a restore replaces it. Short steps are told several
at a time: making an observation took 130 us between two steps of 15 ms and 60 us in a row of eight, as the
step evicts what it needs from the caches. What is told does not depend on when.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from common.messages import DecisionPoint, Observation
from common.settings import TrainerSettings
from trainer_node import ledger as purposes
from trainer_node.basis import Basis
from trainer_node.featurize import StepFacts, note_window
from trainer_node.ledger import Ledger
from trainer_node.memory_state import MemoryState
from trainer_node.out_of_memory import OutOfMemory, attempt
from trainer_node.probe import Probe
from trainer_node.progress import Progress, is_over, needs_averages
from trainer_node.step import StepTensors

TOLD_TOGETHER = 8, 0.1  # steps, seconds: whichever comes first
TOLD_PLAINLY = 64, 0.5  # without directions nobody decides on what is told: it is for people


class Observer:
    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: TrainerSettings,
        *,
        ledger: Ledger,
        memory: MemoryState,
        emit: Callable[[Observation], None],
    ) -> None:
        self.probe = Probe(optimizers, None)
        self.fingerprint = ""  # of the weights at the newest decision point
        self._basis: Basis | None = None
        self._ledger, self._memory, self._emit = ledger, memory, emit
        self._settings = settings
        self._is_lockstep = settings.decision_mode == "lockstep"
        self._window_steps = settings.window_steps
        self._untold_steps, self._untold_seconds = 0, 0.0

    def watch(self, basis: Basis | None) -> None:
        """Also what its averages are now: they may be others than before."""
        self._basis = basis
        self.probe.watch(basis.averages if basis else None)

    def can_propose(self, progress: Progress) -> bool:
        """Whether the window that has ended can be the base of a proposal: all of it was watched."""
        return self._basis is not None and progress.phase.windows >= self._memory.proposals_from_window

    def expect_step(self, progress: Progress) -> None:
        """A step is to be taken from where `progress` stands."""
        self.probe.keeps_averages = needs_averages(progress, self._settings)

    def observe(
        self, progress: Progress, tensors: StepTensors, facts: Callable[[], StepFacts], *, wall_seconds: float
    ) -> list[float]:
        """A step of `wall_seconds` was taken and `progress` stands after it.

        Returns the losses of the steps that are told now, nats.
        """
        at_point = progress.phase.is_decision_point and self.can_propose(progress)
        # The end of a window changes what features say: steps before it are told first.
        losses = self.tell(progress, wait=True) if at_point else []
        self.probe.record(tensors, facts, progress.attempt)
        self._untold_steps += 1
        self._untold_seconds += wall_seconds
        most_steps, longest_seconds = TOLD_PLAINLY if self._basis is None else TOLD_TOGETHER
        is_due = self._untold_steps >= most_steps or self._untold_seconds >= longest_seconds
        if at_point or progress.phase.is_judgement_point or is_over(progress, self._settings):
            return losses + self.tell(progress, wait=True, decision_point=self._point(progress, at_point))
        return losses + (self.tell(progress, wait=self._is_lockstep) if is_due else [])

    def _point(self, progress: Progress, at_point: bool) -> DecisionPoint | None:
        basis = self._basis
        if not at_point or basis is None:
            return None
        with self._ledger.span(purposes.WINDOWS):
            point = attempt(partial(self._close_window, basis, progress))
        if isinstance(point, OutOfMemory):
            self.probe.shortage = point  # the basis is torn
            return None
        return point

    def tell(
        self, progress: Progress, *, wait: bool, decision_point: DecisionPoint | None = None
    ) -> list[float]:
        """Send what has arrived, with `wait` all that is under way; returns the losses, nats."""
        losses = []
        self._untold_steps, self._untold_seconds = 0, 0.0
        for observation in self.probe.collect(progress.features, wait=wait, decision_point=decision_point):
            losses.append(observation.features[0])
            self._emit(observation)
        progress.recent_losses.extend(losses)
        return losses

    def _close_window(self, basis: Basis, progress: Progress) -> DecisionPoint:
        self.fingerprint = basis.fingerprint()
        point = basis.close_window(window=progress.phase.windows, fingerprint=self.fingerprint)
        note_window(progress.features, point)
        return replace(point, window_steps=progress.phase.window_steps or self._window_steps)
