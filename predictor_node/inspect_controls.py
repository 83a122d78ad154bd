"""The controls of a saved state in words: what is in force, and the newest trials with forecast and seen.

Pure functions of one dict, the `pilot` part of a policy's state (pilot.py). Knows no folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.control_rules import NEUTRAL, words
from common.errors import CheckpointError
from common.messages import Controls

SHOWN_TRIALS = 10
_VERDICTS = {
    "accepted": "kept",
    "refused": "set back",
    "ruined": "set back",
    "aborted": "set back",
    "missing": "too late",
    "stale": "too late",
}


def control_words(pilot: Mapping[str, Any]) -> str:
    """A paragraph for people. Raises CheckpointError on a damaged state."""
    try:
        now = Controls(**pilot["in_force"][-1]["controls"])
        trials = pilot["trials"]
        lines = [f"Controls: {words(NEUTRAL, now) or 'as configured'}", _budget_words(trials["budget"])]
        lines += [_trial_words(trial) for trial in trials["over"][-SHOWN_TRIALS:]]
        if trials["open"]:
            lines.append(f"{trials['open']['base_step']:>8}  on trial   {trials['open']['reason']}")
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"damaged controls in the predictor's state: {error!r}") from None
    return "\n".join(lines)


def _trial_words(trial: Mapping[str, Any]) -> str:
    """Step, verdict, "batch ×2: noise scale 3.1× batch, +12 % progress per second forecast, +10 ± 6 % seen".

    Reason and seen are the words of the page (common/trial_seen.py).
    """
    said = ", ".join(filter(None, (trial["reason"], trial["seen"])))
    return f"{trial['step']:>8}  {_VERDICTS.get(trial['verdict'], trial['verdict']):<9}  {said}"


def _budget_words(budget: Mapping[str, float]) -> str:
    allowance = budget["share"] * max(budget["spent_passes"], budget["planned_passes"])
    return (
        f"Trials may cost {allowance:.0f} forward-equivalents ({budget['share']:.1%} of the run);"
        f" {budget['net_passes']:.0f} are spent."
    )
