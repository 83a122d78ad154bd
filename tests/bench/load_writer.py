"""A trainer without a network, for the load benchmark: writes at a set rate through the real one's parts.

    python -m tests.bench.load_writer --runs a,b --rate 10 --seconds 60 < server-url

The outbox, the inbox (which trims what its readers have saved) and the heartbeats are the trainer's own; the
numbers in the observations are invented. Every window ends in a decision point, of which an outcome is told,
answered or not.
Prints a JSON line a second and one at the end. One process may write several runs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, replace

from common.bus import Bus
from common.clock import SystemClock
from common.heartbeat import Heartbeats, NodeStatus
from common.messages import PhaseDecision, RunEnded, Verdict
from common.open_bus import open_bus
from common.outbox import Outbox
from common.publisher import Publisher
from common.streams import TRAINER
from tests.common.message_samples import sample
from tests.predictor.scripted import observed, outcome, point, small_settings, started
from trainer_node.inbox import Inbox

CAPACITY = 20_000  # as trainer_node.connection.OUTBOX_ENTRIES
TICK_SECONDS = 0.02
FLUSH_SECONDS = 120.0
SILENT_SECONDS = 10.0


@dataclass
class Writer:
    """One run. `put_due` hands over what is due by now and never waits."""

    bus: Bus
    reading: Bus
    run_id: str
    rate: float  # observations a second
    window_steps: int
    steps: int  # that the run is said to have
    policy: str
    clock: SystemClock = field(default_factory=SystemClock)
    step: int = 0
    points: int = 0
    outcomes: int = 0
    answered: int = 0  # decision points whose answer was there at the next step

    def __post_init__(self) -> None:
        self.stop = threading.Event()
        generation = self.bus.next_generation(TRAINER, at_least=1)
        self.generation = generation
        publisher = Publisher(
            self.bus, writer=TRAINER, generation=generation, clock=self.clock, rng=random.Random()
        )
        self.outbox = Outbox(publisher, capacity=CAPACITY)
        self.inbox = Inbox(
            self.reading,
            generation=generation,
            silent_seconds=SILENT_SECONDS,
            stop=self.stop,
            clock=self.clock,
            rng=random.Random(),
        )
        settings = small_settings(
            'trainer.decision_mode="live"',
            f"trainer.steps={self.steps}",
            f"trainer.window_steps={self.window_steps}",
            f'predictor.policy="{self.policy}"',
        )
        self.outbox.put(replace(started(settings, generation=generation), run_id=self.run_id))
        self.beats = Heartbeats(
            self.outbox,
            node=TRAINER,
            generation=generation,
            seconds=0.5,
            status=self._status,
            clock=self.clock,
        )
        self._plain = [observed(step) for step in range(1, 200)]
        self._settled = outcome(sample(PhaseDecision), Verdict.REST, 0)
        self._asked_step = 0
        self._begun_seconds = self.clock.monotonic()

    def put_due(self) -> None:
        due = int((self.clock.monotonic() - self._begun_seconds) * self.rate)
        while self.step < due:
            self._take()

    def _take(self) -> None:
        if self._asked_step:
            self._settle()
        self.step += 1
        is_asking = self.step % self.window_steps == 0
        where = point(self.step // self.window_steps) if is_asking else None
        like = self._plain[self.step % len(self._plain)]
        message = type(like)(
            step=self.step,
            attempt=0,
            phase=like.phase,
            features=like.features,
            gradient_norms=like.gradient_norms,
            decision_point=where,
        )
        self.outbox.put(message)
        if is_asking:
            self.points += 1
            self._asked_step = self.step

    def _settle(self) -> None:
        """At the next step, as in `live`: what is not there by then is late."""
        decision = self.inbox.wait_decision(step=self._asked_step, attempt=0, seconds=0.0)
        self._asked_step = 0
        self.answered += decision is not None
        self.outbox.put(replace(self._settled, decision_id=f"{self.step}.0", base_step=self.step))
        self.outcomes += 1

    def _status(self) -> NodeStatus:
        return NodeStatus(state="running", step=self.step)

    def told(self) -> dict[str, object]:
        counted = asdict(self.outbox.counters())
        mine = {name: getattr(self, name) for name in ("run_id", "step", "points", "outcomes", "answered")}
        return {**counted, **mine, "stale": self.inbox.stale, "trims": self.inbox.trims}

    def end(self) -> dict[str, object]:
        self.outbox.put(RunEnded(step=self.step, reason="finished"))
        self.beats.close()
        flushed = self.outbox.flush(FLUSH_SECONDS)
        told = self.told()
        self.stop.set()
        self.inbox.close()
        self.outbox.close(1.0)
        return {**told, "flushed": flushed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--window-steps", type=int, default=32)
    parser.add_argument("--policy", default="learned")
    options = parser.parse_args()
    url = sys.stdin.readline().strip()  # not on the command line: it holds the password
    steps = max(1000, round(options.rate * options.seconds * 10))
    writers = [
        Writer(
            bus=open_bus(url, run),
            reading=open_bus(url, run),
            run_id=run,
            rate=options.rate,
            window_steps=options.window_steps,
            steps=steps,
            policy=options.policy,
        )
        for run in options.runs.split(",")
    ]
    until_seconds, tell_seconds = time.monotonic() + options.seconds, 0.0
    while time.monotonic() < until_seconds:
        for writer in writers:
            writer.put_due()
        if time.monotonic() >= tell_seconds:
            tell_seconds = time.monotonic() + 1.0
            print(json.dumps([writer.told() for writer in writers]), flush=True)
        time.sleep(TICK_SECONDS)
    print(json.dumps({"end": [writer.end() for writer in writers]}), flush=True)


if __name__ == "__main__":
    main()
