"""Turns the steps of the loop into observations and closes its windows.

Owns the probe and what is known of the newest decision point; the loop owns progress, phases and
jumps and hands its progress in with every call, since a restore replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from common.messages import DecisionPoint, Observation
from common.settings import TrainerSettings
from trainer_node import ledger as purposes
from trainer_node.basis import Basis
from trainer_node.featurize import StepFacts
from trainer_node.fingerprint import fingerprint
from trainer_node.ledger import Ledger
from trainer_node.probe import Probe
from trainer_node.progress import Progress
from trainer_node.step import StepTensors


class Observer:
    def __init__(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        settings: TrainerSettings,
        *,
        basis: Basis | None,
        ledger: Ledger,
        emit: Callable[[Observation], None],
    ) -> None:
        self.probe = Probe(optimizers, basis.averages if basis else None)
        self.fingerprint = ""  # of the weights at the newest decision point
        self._basis, self._ledger, self._emit = basis, ledger, emit
        self._is_lockstep = settings.decision_mode == "lockstep"
        self._window_steps = settings.window_steps

    def observe(self, progress: Progress, tensors: StepTensors, facts: StepFacts) -> list[float]:
        """A step was taken and `progress` stands after it. Losses of the steps that are told now, nats."""
        self.probe.record(tensors, facts, progress.attempt)
        point = None
        at_point = progress.phase.is_decision_point
        if at_point and self._basis is not None:
            with self._ledger.span(purposes.WINDOWS):
                point = self._close_window(self._basis, progress)
        # In lockstep what is in a message must not depend on when a copy arrived.
        wait = at_point or progress.phase.is_judgement_point or self._is_lockstep
        return self.tell(progress, wait=wait, decision_point=point)

    def tell(
        self, progress: Progress, *, wait: bool, decision_point: DecisionPoint | None = None
    ) -> list[float]:
        """Send what has arrived, with `wait` all that is under way; returns the losses, nats."""
        losses = []
        for observation in self.probe.collect(progress.features, wait=wait, decision_point=decision_point):
            losses.append(observation.features[0])
            self._emit(observation)
        progress.recent_losses.extend(losses)
        return losses

    def _close_window(self, basis: Basis, progress: Progress) -> DecisionPoint:
        self.fingerprint = fingerprint(basis.parameters)
        point = basis.close_window(window=progress.phase.windows, fingerprint=self.fingerprint)
        features = progress.features
        features.parameter_norm = math.sqrt(sum(n * n for n in point.parameter_norms))
        features.displacement_norm = math.sqrt(sum(n * n for n in point.displacement_norms))
        return replace(point, window_steps=progress.phase.window_steps or self._window_steps)
