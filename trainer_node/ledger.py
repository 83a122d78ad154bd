"""Where the time of a run went: wall seconds and forward-equivalents by purpose, verdicts by kind.

A training step of one micro-batch is 3 forward-equivalents, a check 1 (speedup.md, section 3).
`span` measures a piece of work; what it returns is fit for messages: wall seconds, or in
lockstep the forward-equivalents, so that equal runs send equal bytes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from common.clock import Clock
from common.messages import APPLIED_VERDICTS, Outcome, Verdict

TRAIN_PASSES = 3.0  # per micro-batch: forward 1, backward 2
CHECK_PASSES = 1.0

STEPS, CHECKS, WAITING, SNAPSHOTS, JUMPS = "steps", "verification", "waiting", "snapshots", "jumps"
EVALUATION, CHECKPOINTS, WINDOWS = "evaluation", "checkpoints", "windows"
DATA, CORRECTIONS = "data", "corrections"  # parts of STEPS


class Span:
    """A piece of work under way; its seconds are there once it has ended, also by an exception.

    A class, as a generator's context manager takes 33 us behind a step of training (1.4 us in a loop).
    """

    __slots__ = ("_ledger", "_passes", "_purpose", "_started_seconds", "seconds", "wall_seconds")

    def __init__(self, ledger: Ledger, purpose: str, passes: float) -> None:
        self._ledger, self._purpose, self._passes = ledger, purpose, passes
        self.seconds = 0.0  # for messages
        self.wall_seconds = 0.0

    def __enter__(self) -> Span:
        self._started_seconds = self._ledger.clock.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall_seconds = self._ledger.clock.monotonic() - self._started_seconds
        self.seconds = self._passes if self._ledger.counted else self.wall_seconds
        self._ledger.wall_seconds[self._purpose] += self.wall_seconds
        self._ledger.passes[self._purpose] += self._passes


class Ledger:
    def __init__(self, clock: Clock, *, counted: bool) -> None:
        self.clock = clock
        self.counted = counted
        self._started_seconds = clock.monotonic()
        self._former_seconds = 0.0  # of the processes that this run was resumed from
        self.wall_seconds: defaultdict[str, float] = defaultdict(float)
        self.passes: defaultdict[str, float] = defaultdict(float)
        self.verdicts: Counter[Verdict] = Counter()
        self.virtual_steps = 0
        self.lost_steps = 0
        self.cosines: list[float] = []

    def span(self, purpose: str, *, passes: float = 0.0) -> Span:
        """A context manager: `with ledger.span(...) as span`."""
        return Span(self, purpose, passes)

    def note(self, outcome: Outcome) -> None:
        self.verdicts[outcome.verdict] += 1
        self.lost_steps += outcome.lost_steps
        if outcome.verdict is Verdict.ACCEPTED:
            self.virtual_steps += outcome.horizon_steps
        if outcome.delta_cosine == outcome.delta_cosine:
            self.cosines.append(outcome.delta_cosine)

    @property
    def applied(self) -> int:
        """Proposals that moved weights, whatever became of them."""
        return sum(self.verdicts[verdict] for verdict in APPLIED_VERDICTS)

    def start(self) -> None:
        """The run's own time begins now: data and model are ready."""
        self._started_seconds = self.clock.monotonic()

    @property
    def total_seconds(self) -> float:
        """Wall seconds of the run so far, over all its processes; time between them does not count."""
        return self._former_seconds + self.clock.monotonic() - self._started_seconds

    def to_json(self) -> dict[str, object]:
        return {
            "total_seconds": self.total_seconds,
            "wall_seconds": dict(self.wall_seconds),
            "passes": dict(self.passes),
            "verdicts": {verdict.value: count for verdict, count in self.verdicts.items()},
            "virtual_steps": self.virtual_steps,
            "lost_steps": self.lost_steps,
            "cosines": self.cosines,
        }

    def load(self, values: dict[str, Any]) -> None:
        self._former_seconds = float(values["total_seconds"])
        self.wall_seconds.update(values["wall_seconds"])
        self.passes.update(values["passes"])
        self.verdicts.update({Verdict(name): int(count) for name, count in values["verdicts"].items()})
        self.virtual_steps = int(values["virtual_steps"])
        self.lost_steps = int(values["lost_steps"])
        self.cosines = list(values["cosines"])
