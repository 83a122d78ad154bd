"""Attacks one run after another by a plan and keeps what happened. Knows no command line and prints nothing.

A round is one whole run: faults come one after another, each when the run has recovered from the last and
trained a little; when the trainer has finished, the evidence is gathered and judged.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from common import codec
from tests.campaign.attacks import ATTACKS
from tests.campaign.evidence import gather
from tests.campaign.laws import violations
from tests.campaign.plan import ALL, TRAINER, Fault
from tests.campaign.scene import Scene
from tests.nodes import QUICK

LOSING = frozenset({"restart_without_data", "flush", "fail_over", "corrupt", "kill_all"})
RECOVERY_SECONDS = 60.0
START_SECONDS = 90.0
FINISH_SECONDS = 600.0
LIVE = (*QUICK, "trainer.schedule.name=constant")  # the fixed policy rests while the rate decays
LOCKSTEP = (*LIVE, "trainer.decision_mode=lockstep")


@dataclass(frozen=True, kw_only=True, slots=True)
class Injected:
    fault: Fault
    recovery_seconds: float | None  # None: the run was over before, or it did not recover
    survived: bool
    notes: tuple[str, ...]  # what the attack itself found wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    injected: tuple[Injected, ...]
    violations: tuple[str, ...]
    fired: Counter[str]  # single faults on the links, by kind
    ended_by_themselves: tuple[str, ...]  # nodes that gave up and were started again: "name code"
    starts: dict[str, int]
    steps_published: int
    decisions_applied: int
    held_out_loss: float  # nats, at the end; NaN if the run did not end
    taken_digest: str  # of the decisions that led to the end, whichever start took them
    model_digest: str
    folder: Path


def differs_from_twin(played: Round, twin: Round) -> list[str]:
    """A run that took the decisions of the undisturbed one must have ended in its weights, bit for bit."""
    if played.taken_digest != twin.taken_digest or played.model_digest == twin.model_digest:
        return []
    return ["twin: the decisions are those of the undisturbed run, the weights are not: model.safetensors"]


@dataclass
class RoundPlan:
    folder: Path
    faults: Iterator[Fault]
    steps: int
    kind: str  # plan.SINGLE or plan.SENTINEL
    seed: int
    settings: tuple[str, ...] = LOCKSTEP
    say: Callable[[str], None] = field(default=lambda line: None)


def play_round(round_plan: RoundPlan, max_faults: int) -> Round:
    """One run from start to end, under at most `max_faults` faults."""
    with Scene(
        round_plan.folder,
        round_plan.settings,
        steps=round_plan.steps,
        kind=round_plan.kind,
        seed=round_plan.seed,
    ) as scene:
        injected: list[Injected] = []
        if scene.wait_for(lambda: scene.witness.decisions_applied > 0, START_SECONDS):
            for fault in itertools.islice(round_plan.faults, max_faults):
                if (done := _inject(scene, fault)) is None:
                    break
                injected.append(done)
                round_plan.say(_line(done))
        scene.wait_for(lambda: scene.is_over, FINISH_SECONDS)
        scene.end()
        notes = [f"fault {i.fault.number}, {i.fault.kind}: {note}" for i in injected for note in i.notes]
        lost = any(i.fault.kind in LOSING for i in injected)
        evidence = gather(scene, steps=round_plan.steps, data_was_lost=lost, attack_notes=notes)
        return Round(
            injected=tuple(injected),
            violations=tuple(violations(evidence)),
            fired=sum((proxy.fired_by_kind for proxy in scene.proxies.values()), Counter()),
            ended_by_themselves=tuple(
                f"{node.name} {code}" for node in scene.nodes.values() for code in node.exit_codes
            ),
            starts={node.name: node.starts for node in scene.nodes.values()},
            steps_published=scene.witness.steps_published,
            decisions_applied=scene.witness.decisions_applied,
            held_out_loss=float((evidence.summary or {}).get("val_loss_last", "nan")),
            taken_digest=_digest(codec.encode(replace(d, base_generation=1)) for d in evidence.taken),
            model_digest=_digest([evidence.model]),
            folder=round_plan.folder,
        )


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _inject(scene: Scene, fault: Fault) -> Injected | None:
    """None when the run was over before it was due."""
    due = scene.witness.steps_published + fault.after_steps
    scene.wait_for(lambda: scene.witness.steps_published >= due or scene.is_over, RECOVERY_SECONDS)
    if scene.is_over:
        return None
    generation = scene.witness.generation
    with ATTACKS[fault.kind](scene, fault) as notes:
        scene.idle(fault.seconds)
        scene.witness.look()
        has_recovered = _recovery_of(scene, fault, generation)
        ended = scene.patience_seconds
    recovered = scene.wait_for(lambda: has_recovered() or scene.is_over, RECOVERY_SECONDS)
    took = scene.patience_seconds - ended if recovered and not scene.is_over else None
    found = list(notes)
    if not recovered:
        found.append(f"no recovery within {RECOVERY_SECONDS:.0f} s")
    return Injected(fault=fault, recovery_seconds=took, survived=not found, notes=tuple(found))


def _recovery_of(scene: Scene, fault: Fault, generation: int) -> Callable[[], bool]:
    """For the trainer: the next step that it publishes; for all else: the next decision that is applied at a
    step which had not been reached when the fault ended. A restore may set the run back below that step."""
    witness = scene.witness
    steps, reached = witness.steps_published, (witness.generation, witness.newest_step)
    restarts = fault.kind in ("kill", "kill_all", "second_trainer", "sleeping_trainer")
    if fault.target == TRAINER or (fault.target == ALL and restarts):
        return lambda: witness.steps_published > steps and (not restarts or witness.generation > generation)
    return lambda: witness.applied_at > reached


def _line(injected: Injected) -> str:
    fault, seconds = injected.fault, injected.recovery_seconds
    took = "" if seconds is None else f", recovered in {seconds:.1f} s"
    wrong = "".join(f"; {note}" for note in injected.notes)
    return f"{fault.number:>4}  {fault.kind} of {fault.target}{took}{wrong}"
