"""The learning rate as a pure function of the step: a factor in [0, 1] of the peak rate.

Step 0 is the first step, and with smaller batches (controls) a step lies between two. Warm-up is linear and
its last step has the full rate: (step + 1) / warmup.
After it, by name, down to `final_share` at the last step:

    constant   1 (final_share is not used)
    cosine     half a cosine
    linear     a line
    one-cycle  half a cosine, and the warm-up is one too, from 1/25: the form of Smith & Topin 2018 that
               torch.optim.lr_scheduler.OneCycleLR has. The momentum is not cycled
    wsd        1, then a line over the last `decay_share` of all steps (Hu et al. 2024, MiniCPM;
               a line instead of their exponential: Haegele et al. 2024)

The last step is `total_steps - 1`; asked beyond it, the factor stays there.
"""

import math

from common.settings import ScheduleSettings

ONE_CYCLE_START = 1 / 25  # of the peak rate, at step 0: the default of torch, which follows fastai


def rate_factor(step: float, total_steps: int, schedule: ScheduleSettings) -> float:
    """Share of the peak rate at `step`, counted from 0."""
    if step < schedule.warmup_steps:
        return _rise(step, schedule)
    if schedule.name == "constant":
        return 1.0
    start = decay_start_step(total_steps, schedule)
    # The step at `start` still has the full rate, the last one has final_share.
    progress = min(1.0, max(0, step - start) / max(1, total_steps - 1 - start))
    if schedule.name in ("cosine", "one-cycle"):
        progress = _half_cosine(progress)
    return 1.0 + (schedule.final_share - 1.0) * progress


def decay_start_step(total_steps: int, schedule: ScheduleSettings) -> int:
    """The first step from which the rate falls; `total_steps` if it never does."""
    if schedule.name == "constant":
        return total_steps
    if schedule.name == "wsd":
        decay_steps = round(schedule.decay_share * total_steps)
        return max(schedule.warmup_steps, total_steps - 1 - decay_steps)
    if schedule.name == "one-cycle":
        return max(0, schedule.warmup_steps - 1)  # the last step of the rise is the peak
    return schedule.warmup_steps


def _rise(step: float, schedule: ScheduleSettings) -> float:
    if schedule.name != "one-cycle":
        return min(1.0, (step + 1) / schedule.warmup_steps)
    last = schedule.warmup_steps - 1
    share = min(1.0, step / last) if last else 1.0
    return ONE_CYCLE_START + (1.0 - ONE_CYCLE_START) * _half_cosine(share)


def _half_cosine(progress: float) -> float:
    """From 0 to 1, level at both ends."""
    return (1.0 - math.cos(math.pi * progress)) / 2
