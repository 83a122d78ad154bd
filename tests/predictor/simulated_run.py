"""A known dynamical system in the shape of a training run: a damped oscillator that jumps kick.

    velocity += -STIFFNESS * position - FRICTION * velocity, and a jump adds its drift coefficient
    loss = 2 + position + noise

The features show loss, position and velocity; the others are noise or constant. Big kicks are refused.
"""

from __future__ import annotations

import math

import numpy as np

from predictor_node.episodes import NUM_ACTIONS, Tick

STIFFNESS, FRICTION, NOISE = 0.15, 0.25, 0.01
NUM_FEATURES, NUM_DIRECTIONS = 16, 3
LEVEL = 2.0
DRIFT = 3  # position of the drift coefficient in an action


def jump(kick: float) -> np.ndarray:
    action = np.zeros(NUM_ACTIONS, dtype=np.float32)
    action[0], action[DRIFT] = 1.0, kick
    return action


class Oscillator:
    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.position, self.velocity = 0.0, 0.0
        self._ticks, self._kick = 0, 0.0

    def move(self, kick: float) -> float:
        """One tick; returns the loss without noise."""
        self.velocity += kick - STIFFNESS * self.position - FRICTION * self.velocity
        self.position += self.velocity
        return LEVEL + self.position

    def tick(self, kick: float = 0.0) -> Tick:
        loss = self.move(kick) + NOISE * float(self._rng.normal())
        features = np.zeros(NUM_FEATURES, dtype=np.float32)
        features[:3] = loss, self.position, self.velocity
        features[3:8] = self._rng.normal(size=5)
        self._kick = kick or self._kick
        window_ended = self._ticks % 4 == 3
        self._ticks += 1
        return Tick(
            features=features,
            loss=loss,
            action=jump(kick) if kick else np.zeros(NUM_ACTIONS, dtype=np.float32),
            is_first=self._ticks == 1,
            drift_coefficients=np.array([self._kick, 0.5, -self._kick]) if window_ended else None,
            refused=float(self._kick > 0.5) if window_ended else math.nan,
        )

    def run(self, ticks: int) -> list[Tick]:
        """A kick in [0, 1] about every eighth tick."""
        return [
            self.tick(float(self._rng.uniform(0.1, 1.0)) if self._rng.random() < 0.125 else 0.0)
            for _ in range(ticks)
        ]
