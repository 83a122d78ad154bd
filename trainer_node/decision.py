"""Asks for the decision at a decision point and says what is wrong with it, if anything. Changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.control_rules import trial_steps
from common.messages import Alert, Controls, PhaseDecision, Verdict
from common.settings import TrainerSettings
from common.streams import TRAINER
from trainer_node import ledger as purposes
from trainer_node import phases
from trainer_node.controls import objection_to, steps_left
from trainer_node.progress import position_of

if TYPE_CHECKING:
    from trainer_node.cycle import Cycle


def ask(
    loop: Cycle, fingerprint: str, step_seconds: float
) -> tuple[PhaseDecision | None, Verdict | None, float]:
    """The decision, the objection to it (None = it may be taken) and the seconds waited, for messages.

    `fingerprint` is of the weights now, `step_seconds` what a step takes: a share of it is waited at most, in
    lockstep as long as there is a predictor.
    """
    progress, settings = loop.progress, loop.settings
    assert loop.basis is not None, "without directions there is nothing to ask"
    is_lockstep = settings.decision_mode == "lockstep"
    with loop.ledger.span(purposes.WAITING) as waiting:
        decision = loop.links.wait_decision(
            step=progress.step,
            attempt=progress.attempt,
            seconds=None if is_lockstep else settings.decision_wait_share * step_seconds,
        )
    breach, wanted = _controls_wanted(loop, decision)
    position = position_of(
        progress,
        loop.generation,
        fingerprint,
        loop.basis.num_groups,
        steps_left=steps_left(wanted, settings, progress.clock),
        trial_steps=trial_steps_of(decision, progress.controls, settings),
    )
    verdict = phases.objection(
        decision,
        position=position,
        state=progress.phase,
        rules=loop.rules,
        veto=loop.links.veto(),
        breach=breach,
    )
    if breach and verdict is Verdict.MALFORMED:
        text = f"controls were not changed: {breach}"
        loop.emit(
            Alert(node=TRAINER, severity="warning", kind="controls_refused", text=text, step=progress.step)
        )
    return decision, verdict, waiting.seconds


def trial_steps_of(decision: PhaseDecision | None, now: Controls, settings: TrainerSettings) -> int:
    """Real steps until it is judged; 0 = the probation as configured. A jump's forecast is for that, whatever
    else it changes."""
    if decision is None or decision.controls is None or not phases.is_of_controls(decision):
        return 0
    return trial_steps(decision.controls, now, settings)


def _controls_wanted(loop: Cycle, decision: PhaseDecision | None) -> tuple[str, Controls]:
    """What is wrong with those of the decision, and those that would be in force if it were taken."""
    progress, settings = loop.progress, loop.settings
    wanted, breach = progress.controls, ""
    if decision is not None and decision.controls is not None:
        ranks = loop.task.split.ranks
        breach = objection_to(
            decision.controls, progress.controls, settings, clock=progress.clock, num_ranks=ranks.size
        )
        wanted = progress.controls if breach else decision.controls
    return breach, wanted
