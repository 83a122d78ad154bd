"""What is known of a run at a decision point: the losses that a verdict goes by, the outcome without a jump.

Reads how far the run is (progress.py) and changes nothing.
"""

from __future__ import annotations

import itertools
import math
import statistics

from common.messages import Controls, Outcome, PhaseDecision, Verdict
from trainer_node.phases import MAX_ID_CHARACTERS
from trainer_node.progress import Progress
from trainer_node.trial import Before, blank_outcome


def before_jump(progress: Progress, waiting_seconds: float, wanted: Controls | None = None) -> Before:
    """`wanted` are the controls of the proposal, None = as they stand."""
    losses = list(progress.recent_losses)
    changes = [later - earlier for earlier, later in itertools.pairwise(losses)]
    changes = [change for change in changes if math.isfinite(change)]  # pstdev raises on others
    batch_factor = (wanted or progress.controls).batch_factor
    return Before(
        attempt=progress.attempt,
        recent_losses=losses,
        first_loss=progress.features.first_loss,
        # Noise of a single loss from successive differences: a trend does not inflate it.
        loss_noise=statistics.pstdev(changes) / math.sqrt(2) if len(changes) > 1 else 0.0,
        waiting_seconds=waiting_seconds,
        full_step_seconds=full_step_seconds(progress),
        guard=progress.guard,
        clock=progress.clock,
        controls=progress.controls,
        batch_factor=batch_factor,
        batch_change=batch_factor / progress.controls.batch_factor,
    )


def outcome_without_jump(
    progress: Progress, decision: PhaseDecision | None, verdict: Verdict, waiting_seconds: float
) -> Outcome:
    """Of a decision point that the run passed as it was."""
    return blank_outcome(
        decision.decision_id[:MAX_ID_CHARACTERS] if decision else f"{progress.step}.{progress.attempt}",
        verdict,
        step=progress.step,
        attempt=progress.attempt,
        horizon_steps=decision.horizon_steps if decision else 0,
        waiting_seconds=waiting_seconds,
        full_step_seconds=full_step_seconds(progress),
    )


def full_step_seconds(progress: Progress) -> float:
    """What an ordinary step costs now, in the unit of messages."""
    return float(statistics.median(progress.features.seconds.values or [0.0]))
