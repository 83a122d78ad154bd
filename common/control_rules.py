"""What each control means and how far it may go: pure, and one answer for predictor, trainer and page.

    rate_factor     times the rate of the schedule; with it goes what the batch asks for (batch_rule)
    batch_factor    a power of two times the configured batch: more micro-batches are accumulated, or a part
                    of one is taken. The schedule's clock is the tokens: a run ends after the same number
    context_tokens  the same tokens in the same order, cut into windows that are so much shorter
    decay_start     with wsd: where the tail of the rate begins, in nominal steps (of the configured batch)
    decay_steps     its length: the run ends at its end, never after the configured one
    read_out        which weights are evaluated and handed out

A control whose switch is off is where the settings have it, always. Moves nothing itself.
"""

from __future__ import annotations

import math
from dataclasses import replace

from common.control_settings import ControlSettings
from common.messages import Controls
from common.schedule import decay_start_step
from common.settings import ScheduleSettings, TrainerSettings

NEUTRAL = Controls()
SWITCH_OF = {
    "rate_factor": "rate",
    "batch_factor": "batch",
    "context_tokens": "context",
    "decay_start": "decay",
    "decay_steps": "decay",
    "read_out": "read_out",
}
_SLACK = 1.0 + 1e-9  # of a product of powers


def any_on(controls: ControlSettings) -> bool:
    return controls.rate or controls.batch or controls.context or controls.decay or controls.read_out


def breach(wanted: Controls, *, now: Controls, settings: TrainerSettings, clock: float) -> str:
    """What is wrong with going from `now` to `wanted` at nominal step `clock`, in words; "" = nothing."""
    allowed = settings.controls
    for name, switch in SWITCH_OF.items():
        if getattr(wanted, name) != getattr(NEUTRAL, name) and not getattr(allowed, switch):
            return f"{name} = {getattr(wanted, name)!r:.40}: trainer.controls.{switch} is off"
    return (
        _factor_breach("rate_factor", wanted.rate_factor, now.rate_factor, _rate_range(allowed))
        or _factor_breach("batch_factor", wanted.batch_factor, now.batch_factor, _batch_range(allowed))
        or _batch_breach(wanted.batch_factor, settings)
        or _context_breach(wanted.context_tokens, settings)
        or _decay_breach(wanted, now, settings, clock)
        or ("" if wanted.read_out in ("", "weights", "average") else f"read_out = {wanted.read_out!r:.40}")
    )


def still_allowed(controls: Controls, settings: TrainerSettings) -> Controls:
    """What stays of controls when a run goes on with other settings: a switch that is off means NEUTRAL, and
    a tail that is none any more under this schedule and these steps is as configured."""
    off = {
        name: getattr(NEUTRAL, name)
        for name, switch in SWITCH_OF.items()
        if not getattr(settings.controls, switch)
    }
    kept = replace(controls, **off)
    return replace(kept, decay_start=0, decay_steps=0) if tail_breach(kept, settings) else kept


def rate_factor_of(controls: Controls, rule: str) -> float:
    """By which the scheduled rate is multiplied: the control's own factor and what the batch asks for.

    sqrt: Malladi et al. 2022 (arXiv 2205.10287) for Adam; linear: Goyal et al. 2017 (1706.02677) for SGD.
    """
    power = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}[rule]
    return controls.rate_factor * math.pow(controls.batch_factor, power)


def is_beside_twin(wanted: Controls, now: Controls) -> bool:
    """Whether a trial of `wanted` is judged beside a real run without it (trainer_node/control_twin.py).

    Where only rate and batch change: losses of other contexts do not compare, and over some steps an early
    tail always looks good.
    """
    alike = replace(now, rate_factor=wanted.rate_factor, batch_factor=wanted.batch_factor)
    return wanted == alike != now


def trial_steps(wanted: Controls, now: Controls, settings: TrainerSettings) -> int:
    """Real steps after which `wanted` is judged. Beside a twin they are more than a jump's: averaged over too
    few steps a lower rate still looks better than it is (docs/lab-log.md, 2026-11-22)."""
    return settings.controls.trial_steps if is_beside_twin(wanted, now) else settings.probation_steps


def schedule_of(controls: Controls, settings: TrainerSettings) -> tuple[int, ScheduleSettings]:
    """(nominal steps of the run, its schedule): those of the settings but for a tail that was chosen."""
    schedule = settings.schedule
    if not controls.decay_steps:
        return settings.steps, schedule
    steps = controls.decay_start + controls.decay_steps
    return steps, replace(schedule, decay_share=controls.decay_steps / steps)


def context_of(controls: Controls, settings: TrainerSettings) -> int:
    return controls.context_tokens or settings.model.context_tokens


def words(before: Controls, after: Controls) -> str:
    """ "rate ×2, batch ×2 (now ×4)": what changes, for people; "" if nothing does."""
    said = [
        _factor_words("rate", before.rate_factor, after.rate_factor),
        _factor_words("batch", before.batch_factor, after.batch_factor),
        _plain_words("context", before.context_tokens, after.context_tokens),
        _decay_words(before, after),
        _plain_words("read-out", before.read_out, after.read_out),
    ]
    return ", ".join(filter(None, said))


def _plain_words(name: str, before: str | int, after: str | int) -> str:
    return f"{name} {after or 'as configured'}" if after != before else ""


def _factor_words(name: str, before: float, after: float) -> str:
    if after == before:
        return ""
    change = after / before
    step = f"{name} ×{change:.3g}" if change > 1.0 else f"{name} ÷{1.0 / change:.3g}"
    return step if math.isclose(after, change) else f"{step} (now ×{after:.3g})"


def _decay_words(before: Controls, after: Controls) -> str:
    if (after.decay_start, after.decay_steps) == (before.decay_start, before.decay_steps):
        return ""
    if not after.decay_steps:
        return "decay as configured"
    return f"decay from step {after.decay_start} over {after.decay_steps}"


def _rate_range(allowed: ControlSettings) -> tuple[float, float, float]:
    return allowed.rate_low, allowed.rate_high, allowed.rate_change


def _batch_range(allowed: ControlSettings) -> tuple[float, float, float]:
    return allowed.batch_low, allowed.batch_high, allowed.batch_change


def _factor_breach(name: str, wanted: float, now: float, bounds: tuple[float, float, float]) -> str:
    low, high, change = bounds
    if not math.isfinite(wanted) or not low / _SLACK <= wanted <= high * _SLACK:
        return f"{name} = {wanted:g} is not in [{low:g}, {high:g}]"
    if max(wanted / now, now / wanted) > change * _SLACK:
        return f"{name} from {now:g} to {wanted:g} is more than ×{change:g} at once"
    return ""


def _batch_breach(factor: float, settings: TrainerSettings) -> str:
    """Micro-batches stay whole, or a single one is cut into equal parts."""
    batch = settings.batch
    if not math.log2(factor).is_integer():
        return f"batch_factor = {factor:g} is no power of two"
    items = batch.sequences * batch.accumulation * factor
    if items < 1 or not float(items).is_integer():
        return f"batch_factor = {factor:g} cuts a batch of {batch.sequences * batch.accumulation} unevenly"
    return ""


def _context_breach(context_tokens: int, settings: TrainerSettings) -> str:
    whole = settings.model.context_tokens
    if context_tokens == 0:
        return ""
    if settings.task != "language":
        return f"context_tokens = {context_tokens}: task {settings.task} has no context"
    if not settings.controls.context_low_tokens <= context_tokens <= whole or whole % context_tokens:
        return f"context_tokens = {context_tokens} must divide {whole} and be at least " + str(
            settings.controls.context_low_tokens
        )
    return ""


def tail_breach(controls: Controls, settings: TrainerSettings) -> str:
    """What is wrong with the tail itself, wherever the run stands; "" = nothing, or none is chosen."""
    start, steps = controls.decay_start, controls.decay_steps
    if (start, steps) == (0, 0):
        return ""
    if settings.schedule.name != "wsd":
        return f"decay_start needs the wsd schedule, not {settings.schedule.name}"
    if steps < 1 or start < settings.schedule.warmup_steps:
        return f"decay from {start} over {steps} steps is no tail behind the warm-up"
    if start + steps > settings.steps:
        return f"a tail that ends after the {settings.steps} steps of the run"
    return ""


def _decay_breach(wanted: Controls, now: Controls, settings: TrainerSettings, clock: float) -> str:
    tail = (wanted.decay_start, wanted.decay_steps)
    if tail == (now.decay_start, now.decay_steps):
        return ""
    wrong = tail_breach(wanted, settings)
    if wrong:
        return wrong
    if tail != (0, 0) and wanted.decay_start < clock:
        return f"decay from {wanted.decay_start} does not lie ahead of {clock:g}"
    # Of the tail that is chosen, or else of the settings': moved once it has begun, the rate would jump.
    # (decay_start_step is the last one at the full rate.)
    if clock > 1 + min(decay_start_step(*schedule_of(tails, settings)) for tails in (now, wanted)):
        return "the decay has begun: it cannot be moved any more"
    return ""
