"""Moves the weights of a jump, whole or in equal parts, with a forward check after each part.

Says what is wrong at once, if anything; the verdict's consequences are jump.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from torch import Tensor

from common.messages import Verdict
from trainer_node import ledger as purposes
from trainer_node.delta import AppliedDelta, equal_parts, move
from trainer_node.trial import Jump, JumpTools
from trainer_node.verify import is_ruin
from trainer_node.weight_forecast import WeightForecaster


def move_at_once(
    tools: JumpTools, jump: Jump, forecaster: WeightForecaster | None, *, bound: float
) -> Verdict | None:
    """Apply the whole delta and check it. What is wrong with it, or None."""
    loss_after = _move_and_check(tools, jump, partial(tools.move, jump.decision, forecaster), parts=1)
    return _unless_moved(tools, jump) or (Verdict.RUINED if is_ruin(loss_after, bound=bound) else None)


def move_in_parts(
    tools: JumpTools, jump: Jump, deltas: Iterable[tuple[int, Tensor]], *, bound: float, slack: float
) -> Verdict | None:
    """Apply equal parts until the loss is above the best so far by `slack`; that part is taken back.

    Taken back exactly: from the snapshot, with the good parts applied again.
    """
    count = jump.decision.chunks
    with tools.ledger.span(purposes.JUMPS) as expanding:
        part = equal_parts(tools.basis, deltas, count)
    jump.outcome = replace(jump.outcome, jump_seconds=expanding.seconds)
    best = loss_good = jump.outcome.loss_before
    for good_parts in range(count):
        loss_after = _move_and_check(tools, jump, partial(move, tools.basis, part), parts=good_parts + 1)
        if is_ruin(loss_after, bound=bound) or not loss_after <= best + slack:
            break
        loss_good, best = loss_after, min(best, loss_after)
    else:
        return _unless_moved(tools, jump)
    if good_parts == 0:
        return Verdict.RUINED if is_ruin(loss_after, bound=bound) else Verdict.REFUSED
    _back_to(tools, jump, part, good_parts, loss_good)
    return _unless_moved(tools, jump)


def _unless_moved(tools: JumpTools, jump: Jump) -> Verdict | None:
    """A delta that is lost in the rounding of every weight is no jump."""
    still = tools.basis.fingerprint() == jump.decision.base_fingerprint
    return Verdict.MALFORMED if still else None


def _move_and_check(
    tools: JumpTools, jump: Jump, move_part: Callable[[], AppliedDelta], *, parts: int
) -> float:
    """The loss after one more part, the `parts`-th; the jump's account is brought up to date."""
    with tools.ledger.span(purposes.JUMPS) as jumping:
        delta = move_part()
    jump.delta = _times(delta, parts)
    with tools.ledger.span(purposes.CHECKS, passes=tools.check_passes) as check:
        loss_after = tools.guard_loss()
    before = jump.outcome
    jump.outcome = replace(
        before,
        loss_after=loss_after,
        delta_norm=jump.delta.norm,
        chunks_applied=parts,
        passes=before.passes + tools.check_passes,
        jump_seconds=before.jump_seconds + jumping.seconds,
        check_seconds=before.check_seconds + check.seconds,
    )
    return loss_after


def _back_to(
    tools: JumpTools, jump: Jump, part: list[tuple[int, Tensor]], parts: int, loss_after: float
) -> None:
    """Undo the last part: exactly the weights after the first `parts`."""
    assert jump.snapshot is not None, "parts are checked, so there is a snapshot"
    with tools.ledger.span(purposes.SNAPSHOTS) as restoring:
        jump.snapshot.restore()
        for _ in range(parts):
            delta = move(tools.basis, part)
    jump.delta = _times(delta, parts)
    jump.outcome = replace(
        jump.outcome,
        loss_after=loss_after,
        delta_norm=jump.delta.norm,
        chunks_applied=parts,
        horizon_steps=max(1, round(jump.decision.horizon_steps * parts / jump.decision.chunks)),
        restore_seconds=jump.outcome.restore_seconds + restoring.seconds,
    )


def _times(delta: AppliedDelta, parts: int) -> AppliedDelta:
    if parts == 1:
        return delta
    return AppliedDelta(delta.norm * parts, delta.sample_Gm * parts, delta.weights_Gm)
