"""The controls of a run for people: which switches are on, how they stand, every trial in words. Pure.

Says nothing at all of a run in which no control is switched on and none was ever proposed.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from common.control_checks import switched_on
from common.control_rules import NEUTRAL, any_on, schedule_of
from common.control_settings import ControlSettings
from common.messages import APPLIED_VERDICTS, Controls, Outcome, Phase, Verdict
from common.trial_seen import is_kept, seen_words, share_words
from monitor_node.control_book import ControlBook
from monitor_node.control_trials import Trial, change_words
from monitor_node.run_view import RunView

_ROWS = 12  # of the table; the chart has all
_ROUNDING = 1e-6  # of a share times the steps
_BECAME = {
    Verdict.ACCEPTED: "kept",
    Verdict.REFUSED: "set back: worse than without it",
    Verdict.RUINED: "set back at once: the loss was beyond the ruin bound",
    Verdict.ABORTED: "set back: the run was stopped on trial",
    Verdict.MISSING: "not taken: it came too late",
    Verdict.STALE: "not taken: it came too late",
    Verdict.USED: "not taken: it was taken before",
    Verdict.VETOED: "not taken: the monitor vetoes",
    Verdict.MALFORMED: "not taken: outside of its bounds",
    Verdict.FAILED: "set back or not taken: no room for it",
}


def is_shown(view: RunView) -> bool:
    return view.curves.controls.is_used or any_on(_switches(view))


def controls_section(view: RunView) -> dict[str, Any]:
    """How everything stands, in words and as numbers, and the newest trials, newest first."""
    book = view.curves.controls
    stands, trials = book.in_force, book.trials
    on_trial = _on_trial(view)
    noise = book.noise.points()
    return {
        "switches": switched_on(_switches(view)),
        "words": _words(view, stands, trials, on_trial),
        "rate_factor": stands.rate_factor,
        "batch_factor": stands.batch_factor,
        "context_tokens": _context_tokens(view, book.context_share, stands),
        "decay_start": stands.decay_start or None,
        "decay_steps": stands.decay_steps or None,
        "read_out": stands.read_out or None,
        "on_trial": on_trial,
        "noise_scale_over_batch": noise[-1][1] if noise else None,
        "trials": [_row(trial) for trial in reversed(trials[-_ROWS:])],
    }


def control_series(view: RunView) -> dict[str, list[Any]]:
    """controls: (first step, rate factor, batch factor, context in tokens or None), one row a change.
    control_trials: (base step, change, verdict, why, whether it is kept).
    noise_scale: (step, noise scale / batch).
    """
    book = view.curves.controls
    return {
        "controls": [
            (step, rate, batch, _context_tokens(view, share, NEUTRAL))
            for step, rate, batch, share in book.changes
        ],
        "control_trials": [
            (
                trial.outcome.base_step,
                trial.change,
                trial.outcome.verdict.value,
                trial_words(trial),
                is_kept(trial.outcome),
            )
            for trial in book.trials
        ],
        "noise_scale": book.noise.points(),
    }


def expected_steps(view: RunView) -> int | None:
    """Real steps of the whole run, if the controls stay as they are; None while the settings are not known.

    The clock of a run is its data: with twice the batch it ends after half the steps.
    """
    if not view.has_settings:
        return None
    total_steps, book = view.settings.trainer.steps, view.curves.controls
    if not book.is_used or book.done_share is None:
        return total_steps
    stands = book.in_force
    nominal_steps, _ = schedule_of(stands, view.settings.trainer)
    return view.step + math.ceil(nominal_steps * (1.0 - book.done_share) / stands.batch_factor - _ROUNDING)


def trial_words(trial: Trial) -> str:
    """ "batch ×2: noise scale 3.1× batch, +12 % progress per second forecast, +10 ± 4 % seen; kept"."""
    told = ": ".join(filter(None, (trial.change, _reason(trial))))
    became = _became(trial.outcome)
    return "; ".join((", ".join(filter(None, (told, _seen(trial)))), became))


def _seen(trial: Trial) -> str:
    return seen_words(trial.seen, trial.outcome, beside_twin=trial.is_beside_twin)


def _row(trial: Trial) -> dict[str, Any]:
    outcome = trial.outcome
    return {
        "decision_id": outcome.decision_id,
        "step": outcome.base_step,
        "change": trial.change,
        "verdict": outcome.verdict.value,
        "became": _became(outcome),
        "is_kept": is_kept(outcome),
        "reason": _reason(trial) or None,
        "seen": share_words(trial.seen) if trial.seen else None,
        "seen_share": trial.seen.share if trial.seen else None,
        "seen_spread": trial.seen.spread if trial.seen else None,
        "loss_end": outcome.loss_end,
        "loss_forecast": outcome.loss_forecast,
        "loss_spread": outcome.loss_spread,
        "lost_steps": outcome.lost_steps,
        "words": trial_words(trial),
    }


def _became(outcome: Outcome) -> str:
    if outcome.verdict is Verdict.REFUSED and is_kept(outcome):
        return "kept: its loss was not finite, but without the guard nothing is undone"
    return _BECAME.get(outcome.verdict, outcome.verdict.value)


def _reason(trial: Trial) -> str:
    """Without the change, which a reason may begin with."""
    return trial.asked.reason.removeprefix(trial.change).removeprefix(": ")


def _words(view: RunView, stands: Controls, trials: list[Trial], on_trial: str | None) -> str:
    on = [name.replace("_", "-") for name in switched_on(_switches(view))]
    said = ["The predictor may change " + ", ".join(on) if on else "No control is switched on now"]
    if view.has_settings and not view.settings.predictor.enabled:
        said.append("prediction is off, so nobody does")
    share = view.curves.controls.context_share
    shown = replace(stands, context_tokens=_context_tokens(view, share, stands) or stands.context_tokens)
    if share == 1.0:
        shown = replace(shown, context_tokens=0)
    moved = change_words(NEUTRAL, shown)
    said.append(f"in force: {moved}" if moved else "in force: everything as configured")
    if on_trial:
        said.append(f"on trial: {on_trial}")
    applied = [trial.outcome for trial in trials if trial.outcome.verdict in APPLIED_VERDICTS]
    if applied:
        kept = sum(map(is_kept, applied))
        lost_steps = sum(outcome.lost_steps for outcome in applied)
        undone = f" ({lost_steps:,} steps undone)" if lost_steps else ""
        said.append(f"{kept} of {len(applied)} trials kept{undone}")
    else:
        said.append("none was tried so far")
    return ". ".join(part[0].upper() + part[1:] for part in said) + "."


def _on_trial(view: RunView) -> str | None:
    book: ControlBook = view.curves.controls
    if view.phase is not Phase.CORRECT:
        return None
    trainer = view.settings.trainer
    asked = book.on_trial(view.step, max(trainer.probation_steps, trainer.controls.trial_steps))
    return (book.change_of(asked) or None) if asked is not None else None


def _context_tokens(view: RunView, share: float | None, stands: Controls) -> int | None:
    """Tokens of a window of text; None for other tasks and while the settings are not known."""
    trainer = view.settings.trainer
    if not view.has_settings or trainer.task != "language":
        return None
    if share is not None:
        return max(1, round(share * trainer.model.context_tokens))
    return stands.context_tokens or trainer.model.context_tokens


def _switches(view: RunView) -> ControlSettings:
    return view.settings.trainer.controls
