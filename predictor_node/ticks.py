"""Observations of a run -> ticks of the world model: strides, actions, resets, and what is known late.

A tick is the mean over `stride` real steps of one phase, at most; a decision point and the end of a
probation always end one. The action of a jump belongs to the first tick after it. Whether a jump was kept
is known one message after its last step, so a tick waits for the next message before it is given out.
Owns no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from common import features
from common.errors import CheckpointError
from common.messages import Observation, Phase
from predictor_node.episodes import NUM_ACTIONS, Tick

_LOSS = features.INDEX["loss"]
NO_ACTION = (0.0,) * NUM_ACTIONS


class TickMaker:
    def __init__(self, *, stride: int, num_directions: int) -> None:
        """`stride` real steps make a tick, >= 1."""
        self._stride, self._num_directions = stride, num_directions
        self._rows: list[tuple[float, ...]] = []  # features of the steps of the tick under way
        self._action: tuple[float, ...] = NO_ACTION  # of the next tick to begin
        self._is_first = True
        self._phase = ""
        self._attempt = -1
        self._waiting: Tick | None = None  # complete but for the verdict of its jump

    def jumped(self, action: Sequence[float]) -> None:
        """A proposal was made; if the run goes into CORRECT, this is the action that led there."""
        self._action = tuple(float(value) for value in action)

    def observe(self, observation: Observation, *, gap: bool) -> list[Tick]:
        """Ticks that are complete now, oldest first. `gap`: steps before this one never arrived."""
        ticks: list[Tick] = []
        if gap or observation.attempt != self._attempt:
            ticks += self._flush()
            self._is_first, self._attempt = True, observation.attempt
            self._rows = []
        if observation.phase.value != self._phase:
            ticks += self._end_tick()
            if observation.phase is not Phase.CORRECT:
                self._action = NO_ACTION  # the proposal was not applied, or its probation is over
        self._phase = observation.phase.value
        self._rows.append(observation.features)
        if len(self._rows) >= self._stride or observation.decision_point is not None:
            ticks += self._end_tick(self._happened(observation))
        return ticks

    def settled(self, *, refused: bool | None) -> list[Tick]:
        """The verdict on the jump whose probation just ended; None: the proposal led to no probation."""
        self._action = NO_ACTION
        if refused is None:
            return []
        ticks = self._end_tick()
        if self._waiting is not None:
            ticks.append(replace(self._waiting, refused=float(refused)))
            self._waiting = None
        return ticks

    def _end_tick(self, happened_K: np.ndarray | None = None) -> list[Tick]:
        if not self._rows:
            return []
        done = self._flush()
        mean_F = np.asarray(self._rows, dtype=np.float64).mean(axis=0)
        self._waiting = Tick(
            features=mean_F.astype(np.float32),
            loss=float(mean_F[_LOSS]),
            action=np.asarray(self._action, dtype=np.float32),
            is_first=self._is_first,
            drift_coefficients=happened_K,
        )
        self._rows, self._action, self._is_first = [], NO_ACTION, False
        return done

    def _flush(self) -> list[Tick]:
        waiting, self._waiting = self._waiting, None
        return [] if waiting is None else [waiting]

    def _happened(self, observation: Observation) -> np.ndarray | None:
        point = observation.decision_point
        if point is None:
            return None
        table = np.asarray(point.happened, dtype=np.float64)
        if table.size % self._num_directions or not table.any() or not np.isfinite(table).all():
            return None
        return table.reshape(-1, self._num_directions).mean(axis=0)

    def state(self) -> dict[str, object]:
        waiting = self._waiting
        return {
            "rows": [list(row) for row in self._rows],
            "action": list(self._action),
            "is_first": self._is_first,
            "phase": self._phase,
            "attempt": self._attempt,
            "waiting": None if waiting is None else _tick_to_json(waiting),
        }

    def load(self, state: Mapping[str, object]) -> None:
        """Raises CheckpointError."""
        try:
            self._rows = [tuple(row) for row in state["rows"]]  # type: ignore[attr-defined]
            self._action = tuple(state["action"])  # type: ignore[arg-type]
            self._is_first, self._phase = bool(state["is_first"]), str(state["phase"])
            self._attempt = int(state["attempt"])  # type: ignore[call-overload]
            waiting = state["waiting"]
            self._waiting = None if waiting is None else _tick_from_json(waiting)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"damaged ticks: {error!r}") from None


def _tick_to_json(tick: Tick) -> dict[str, object]:
    drift_K = tick.drift_coefficients
    return {
        "features": tick.features.astype(np.float64).tolist(),
        "loss": tick.loss,
        "action": tick.action.astype(np.float64).tolist(),
        "is_first": tick.is_first,
        "drift": None if drift_K is None else drift_K.tolist(),
        "refused": tick.refused,
    }


def _tick_from_json(values: Mapping[str, object]) -> Tick:
    drift = values["drift"]
    refused = float(values["refused"])  # type: ignore[arg-type]
    return Tick(
        features=np.asarray(values["features"], dtype=np.float32),
        loss=float(values["loss"]),  # type: ignore[arg-type]
        action=np.asarray(values["action"], dtype=np.float32),
        is_first=bool(values["is_first"]),
        drift_coefficients=None if drift is None else np.asarray(drift, dtype=np.float64),
        refused=math.nan if refused != refused else refused,
    )
