"""The figures of an audit, from audited jumps: pure arithmetic. audit.json holds

    schema, task, date, machine, command, seeds
    anatomy      [{point, direction, size, now, plus20, plus50, plus200, at_end, step_norms, n}]: held-out
                 loss minus the twin's, nats, medians over the seeds; null beyond the end (anatomy.py)
    verdicts     {kept, refused, ruined, false_accepts, false_refusals, judged_plus200,
                 false_accepts_plus200, false_refusals_plus200}: counts; false is what the held-out loss
                 of both roads says LATER_STEPS (`_plus200`: LATEST_STEPS) after the judgement
    gains        {kept_median, undone_median}: nats at that later reading; above zero = the jump was good
    cosines      {median, n}: of the delta with what the twin's real steps did over the horizon
    calibration  {n, coverage_80, spreads_rms, error_median}: the trainer's no-jump forecast of the guard
                 loss at the judgement against the twin's, the errors in nats or in stated spreads;
                 {refusals, refusal_forecast, refusal_share, refusal_brier}: the predictor's probability
    jumps        one object per jump: AuditedJump

Every float is finite or null.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.messages import Verdict

LATER_STEPS, LATEST_STEPS = 50, 200  # after the judgement
NORMAL_80 = 1.2816  # standard deviations on either side that hold 80 % of a normal distribution
KEPT = Verdict.ACCEPTED.value


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedJump:
    """One jump and its twin. Gains are held-out loss of the twin minus of the jumped run, nats."""

    seed: int
    step: int
    arm: str
    horizon_steps: int
    verdict: str
    gain_judged: float  # at the judgement; NaN where the jump was undone before it
    gain_later: float  # LATER_STEPS after it, or at the end of the run
    gain_latest: float  # LATEST_STEPS after it; NaN beyond the end of the run
    cosine: float
    guard_forecast: float  # of the trainer, without the jump, at the judgement
    guard_spread: float
    guard_twin: float
    refusal_forecast: float  # of the predictor; NaN without a forecast

    @property
    def was_kept(self) -> bool:
        return self.verdict == KEPT


def verdict_counts(jumps: Sequence[AuditedJump]) -> dict[str, int]:
    kept, undone = _parted(jumps)
    latest = [jump for jump in jumps if math.isfinite(jump.gain_latest)]
    return {
        "kept": len(kept),
        "refused": sum(jump.verdict == Verdict.REFUSED.value for jump in undone),
        "ruined": sum(jump.verdict == Verdict.RUINED.value for jump in undone),
        "false_accepts": sum(jump.gain_later < 0 for jump in kept),
        "false_refusals": sum(jump.gain_later > 0 for jump in undone),
        "judged_plus200": len(latest),
        "false_accepts_plus200": sum(jump.was_kept and jump.gain_latest < 0 for jump in latest),
        "false_refusals_plus200": sum(not jump.was_kept and jump.gain_latest > 0 for jump in latest),
    }


def gains_of(jumps: Sequence[AuditedJump]) -> dict[str, float | None]:
    kept, undone = _parted(jumps)
    return {
        "kept_median": _median([jump.gain_later for jump in kept]),
        "undone_median": _median([jump.gain_later for jump in undone]),
    }


def cosines_of(jumps: Sequence[AuditedJump]) -> dict[str, Any]:
    known = [jump.cosine for jump in jumps if math.isfinite(jump.cosine)]
    return {"median": _median(known), "n": len(known)}


def calibration_of(jumps: Sequence[AuditedJump]) -> dict[str, Any]:
    judged = [
        (jump.guard_twin - jump.guard_forecast, jump.guard_spread)
        for jump in jumps
        if math.isfinite(jump.guard_twin - jump.guard_forecast) and 0 < jump.guard_spread < math.inf
    ]
    inside = [abs(error) <= NORMAL_80 * spread for error, spread in judged]
    claimed = [jump for jump in jumps if math.isfinite(jump.refusal_forecast)]
    return {
        "n": len(judged),
        "coverage_80": _mean([float(one) for one in inside]),
        "spreads_rms": _root(_mean([(error / spread) ** 2 for error, spread in judged])),
        "error_median": _median([error for error, _ in judged]),
        "refusals": len(claimed),
        "refusal_forecast": _mean([jump.refusal_forecast for jump in claimed]),
        "refusal_share": _mean([float(not jump.was_kept) for jump in claimed]),
        "refusal_brier": _mean([(jump.refusal_forecast - (not jump.was_kept)) ** 2 for jump in claimed]),
    }


def plain(jump: AuditedJump) -> dict[str, Any]:
    """JSON-able: what is not finite is null."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(jump).items()
    }


def audit_lines(values: dict[str, Any]) -> list[str]:
    """The table for people."""
    verdicts, gains, cosines = values["verdicts"], values["gains"], values["cosines"]
    calibration = values["calibration"]
    undone = verdicts["refused"] + verdicts["ruined"]
    lines = [
        f"audit of {values['task']}, seeds {', '.join(map(str, values['seeds']))}; losses in nats",
        f"kept    {verdicts['kept']:4} jumps, of which {verdicts['false_accepts']} were worse than the"
        f" twin {LATER_STEPS} steps later; median gain {_nats(gains['kept_median'])}",
        f"undone  {undone:4} jumps, of which {verdicts['false_refusals']} would have been better;"
        f" median gain {_nats(gains['undone_median'])}",
        f"cosine of delta and real displacement over the horizon: {_number(cosines['median'])}"
        f" (median of {cosines['n']})",
        f"no-jump forecast: 80 % interval held {_share(calibration['coverage_80'])}"
        f" of {calibration['n']}; errors {_number(calibration['spreads_rms'])} spreads r.m.s.",
        "",
        f"{'point':13}{'direction':12}{'size':22}{'now':>9}{'+20':>9}{'+50':>9}{'+200':>9}{'at end':>9}",
    ]
    for row in values["anatomy"]:
        figures = (row[name] for name in ("now", "plus20", "plus50", "plus200", "at_end"))
        cells = "".join(f"{_nats(figure):>9}" for figure in figures)
        lines.append(f"{row['point']:13}{row['direction']:12}{row['size']:22}{cells}")
    return lines


def _parted(jumps: Sequence[AuditedJump]) -> tuple[list[AuditedJump], list[AuditedJump]]:
    return [jump for jump in jumps if jump.was_kept], [jump for jump in jumps if not jump.was_kept]


def _median(values: Sequence[float]) -> float | None:
    """None for none, or where it is infinite: a jump that ended its run counts as that."""
    known = [value for value in values if not math.isnan(value)]
    median = statistics.median(known) if known else math.nan
    return median if math.isfinite(median) else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _root(value: float | None) -> float | None:
    return None if value is None else math.sqrt(value)


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
