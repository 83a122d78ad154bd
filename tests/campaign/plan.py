"""What a campaign does to a run, as data: a seed gives an endless list of faults. Pure.

    for fault in faults(seed=7): ...

A fault begins when the trainer has published `after_steps` steps since the run recovered from the
one before: counted in steps, a plan means the same on a fast, a slow and a frozen machine. Every
row of RULES comes once in a round, in shuffled order. Touches no process, server or clock.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

TRAINER, PREDICTOR, MONITOR = NODES = ("trainer", "predictor", "monitor")
SERVER = "server"
ALL = "all"  # a fault of the link that every node feels

SINGLE, SENTINEL = "single", "sentinel"  # what stands behind the nodes: one server, or a watched pair
FEWEST_STEPS, MOST_STEPS = 24, 72  # of training between a recovery and the next fault: 1 to 3 cycles


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """One row of the table: a kind of fault, whom it hits, how long and how hard."""

    kind: str
    target: str
    seconds: tuple[float, float] = (0.0, 0.0)  # lasts for a time from this range; 0 = at once
    amount: tuple[float, float] = (0.0, 0.0)  # unit: see AMOUNTS
    scene: str = SINGLE
    is_quick: bool = False  # part of the short form


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    number: int  # from 1, in the order of the plan
    kind: str
    target: str
    after_steps: int  # trained since the run recovered from the fault before
    seconds: float
    amount: float


AMOUNTS = {
    "delay": "seconds added to every reply",
    "drop_replies": "share of requests that are executed and never answered",
    "throttle": "bytes per second in each direction",
    "corrupt": "share of replies with a flipped byte",
    "move_clock": "seconds that the wall clock of the target jumps",
}

RULES: tuple[Rule, ...] = (
    Rule(kind="kill", target=TRAINER, is_quick=True),
    Rule(kind="kill", target=PREDICTOR, is_quick=True),
    Rule(kind="kill", target=MONITOR, is_quick=True),
    Rule(kind="freeze", target=TRAINER, seconds=(0.5, 3.0)),
    Rule(kind="freeze", target=PREDICTOR, seconds=(0.5, 4.0), is_quick=True),
    Rule(kind="freeze", target=MONITOR, seconds=(0.5, 3.0)),
    Rule(kind="freeze", target=SERVER, seconds=(0.5, 8.0)),
    Rule(kind="restart_with_data", target=SERVER, is_quick=True),
    Rule(kind="restart_without_data", target=SERVER, is_quick=True),
    Rule(kind="flush", target=SERVER, is_quick=True),
    Rule(kind="fill_memory", target=SERVER, seconds=(0.5, 3.0), is_quick=True),
    Rule(kind="delay", target=ALL, seconds=(1.0, 3.0), amount=(0.01, 0.3)),
    Rule(kind="drop_replies", target=ALL, seconds=(2.0, 6.0), amount=(0.1, 0.1), is_quick=True),
    Rule(kind="cut", target=ALL, is_quick=True),
    Rule(kind="refuse", target=ALL, seconds=(0.5, 6.0)),
    Rule(kind="throttle", target=ALL, seconds=(1.0, 3.0), amount=(20_000.0, 200_000.0)),
    Rule(kind="corrupt", target=ALL, seconds=(1.0, 4.0), amount=(0.02, 0.1), is_quick=True),
    Rule(kind="move_clock", target=TRAINER, amount=(-7200.0, 7200.0)),
    Rule(kind="move_clock", target=PREDICTOR, amount=(-7200.0, 7200.0)),
    Rule(kind="move_clock", target=MONITOR, amount=(-7200.0, 7200.0)),
    Rule(kind="second_trainer", target=TRAINER, is_quick=True),
    Rule(kind="sleeping_trainer", target=TRAINER),
    Rule(kind="kill_all", target=ALL),
    Rule(kind="fail_over", target=SERVER, scene=SENTINEL),
    Rule(kind="kill", target=TRAINER, scene=SENTINEL),
    Rule(kind="kill", target=PREDICTOR, scene=SENTINEL),
)


def rules_of(scene: str, *, quick: bool) -> tuple[Rule, ...]:
    return tuple(rule for rule in RULES if rule.scene == scene and (rule.is_quick or not quick))


def faults(seed: int, rules: Sequence[Rule]) -> Iterator[Fault]:
    """Endless; the same seed and rules give the same faults. Raises ValueError without rules."""
    if not rules:
        raise ValueError("a plan needs at least one rule")
    rng = random.Random(seed)
    number = 0
    while True:
        for rule in rng.sample(list(rules), len(rules)):
            number += 1
            yield Fault(
                number=number,
                kind=rule.kind,
                target=rule.target,
                after_steps=rng.randint(FEWEST_STEPS, MOST_STEPS),
                seconds=round(rng.uniform(*rule.seconds), 2),
                amount=round(rng.uniform(*rule.amount), 3),
            )
