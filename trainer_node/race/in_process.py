"""A predictor inside the trainer's process: decisions without bus, server or second process.

Which predictor is a matter of installation, not of imports: it is the entry point `default` of the
group GROUP. Feeds it the history stream in order, as the bus would, and times it. Learns nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol

from common.bus import EntryId
from common.clock import Clock
from common.errors import EnvironmentFault
from common.messages import Alert, Message, Order, PhaseDecision, RunStarted
from common.streams import HISTORY, TRAINER, stream_of

GROUP, NAME, IN_FOLDER = "hybrid_predict_trainer.predictors", "default", "folder"


class PredictorCore(Protocol):
    """predictor_node.node.Predictor, seen from here."""

    def handle(self, message: Message, entry_id: EntryId) -> list[Message]: ...


def installed_predictor(folder: Path | None = None) -> PredictorCore:
    """A fresh one, with its states in `folder`, else in memory.

    Raises EnvironmentFault where none is installed.
    """
    for entry_point in entry_points(group=GROUP, name=IN_FOLDER if folder else NAME):
        make = entry_point.load()
        predictor: PredictorCore = make(folder) if folder else make()
        return predictor
    raise EnvironmentFault(
        f"no predictor is installed under {GROUP}: run `pip install -e .` (or install the package) once more"
    )


class InProcessPredictor:
    """The loop's DecisionSource and its `emit` in one. Lockstep: every answer is there at once."""

    def __init__(self, predictor: PredictorCore, clock: Clock) -> None:
        self._predictor, self._clock = predictor, clock
        self._generation, self._sequence = 0, 0
        self._newest: PhaseDecision | None = None
        self.decisions: list[PhaseDecision] = []  # all that it made, in order
        self.alerts: list[Alert] = []
        self.seconds = 0.0  # wall time inside the predictor, learning included

    def emit(self, message: Message) -> None:
        """One message of the trainer. A RunStarted begins the generation that it names."""
        if stream_of(message, TRAINER) != HISTORY:
            return
        if isinstance(message, RunStarted) and message.generation != self._generation:
            self._generation, self._sequence = message.generation, 0
        self._sequence += 1
        started = self._clock.monotonic()
        answers = self._predictor.handle(message, EntryId(self._generation, self._sequence))
        self.seconds += self._clock.monotonic() - started
        for answer in answers:
            if isinstance(answer, PhaseDecision):
                self._newest = answer
                self.decisions.append(answer)
            elif isinstance(answer, Alert):
                self.alerts.append(answer)

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        newest = self._newest
        is_for_this = newest is not None and (newest.base_step, newest.base_attempt) == (step, attempt)
        return newest if is_for_this else None

    def veto(self) -> str | None:
        return None

    def take_orders(self) -> list[Order]:
        return []


PredictorFactory = Callable[[], PredictorCore]
