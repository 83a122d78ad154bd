"""A run that a test tells the divergence fold step by step, and a healthy loss curve."""

from __future__ import annotations

import math
import random

from common.messages import Phase
from monitor_node.divergence import DivergenceState, Level, Signal, observed


class Watched:
    """A run that is told step by step."""

    def __init__(self, *, seed: int = 0) -> None:
        self.state = DivergenceState()
        self.step = 0
        self.signals: list[tuple[int, Signal]] = []
        self.random = random.Random(seed)

    def take(self, loss: float, norm: float | None = None, *, phase: Phase = Phase.FULL) -> list[Signal]:
        self.step += 1
        if norm is None:
            norm = math.exp(self.random.gauss(0.0, 0.3))
        self.state, found = observed(self.state, step=self.step, phase=phase, loss=loss, gradient_norm=norm)
        self.signals += [(self.step, signal) for signal in found]
        return list(found)

    def healthy(self, steps: int, noise: float = 0.05) -> None:
        for _ in range(steps):
            self.take(curve(self.step) + self.random.gauss(0.0, noise))

    def of(self, kind: str, level: Level) -> list[int]:
        return [step for step, s in self.signals if s.kind == kind and s.level >= level]

    @property
    def warnings(self) -> int:
        return sum(signal.level >= Level.WARNING for _, signal in self.signals)


def curve(step: int) -> float:
    return 1.8 + 6.0 * (step + 5) ** -0.35
