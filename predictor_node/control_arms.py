"""The controls that may be tried here and now, each with what it is forecast to bring and why. Pure.

    rate:/4, rate:/2    of need: signs of ruin, a spike that the trainer rolled back; from the first weights,
                        where the run has learned nothing and they are held (trainer_node/first_weights.py)
    rate:x4, rate:x2    of free will: climb while the loss falls visibly, by the most that is allowed, as a
                        large step shows in few steps what a small one hides in noise. Stops at the first
                        that is refused; half of it is tried when the run is twice as long, the whole when
                        it is four times as long
    rate:/4, rate:/2    of free will: as a climb, only after one was refused

                        Rate and batch are judged beside a real run without the change, by averaged weights
                        (trainer_node/control_twin.py): by the last weights of some steps a lower rate looks
                        better than it is (the short-horizon bias, Wu et al. 2018, arXiv 1803.02021)
    batch:x2, batch:/2  batch_law.py, where it forecasts MIN_GAIN
    context:shorter     once, early: a quarter of the context, for the first half of the run
    context:longer      the next longer divisor when its time has come
    decay:now           wsd, second half: an early tail, of a fifth of the whole at least and of half of what
                        is left, where the steps that it saves would bring less than a two-hundredth of the
                        loss even if it fell two deviations faster than over all the steps that are remembered
                        (TAIL_WINDOWS at least). Most runs are too short or too noisy to show that. A forecast
                        by the curve of the newest 48 steps was wrong 20-fold, and no tail can be taken back:
                        over a probation it always looks good
    read_out:average    in the second half: the guard batches decide at the end

Everything here has passed control_rules.breach. Knows no bandit and no budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from common.control_rules import breach, schedule_of, trial_steps
from common.messages import Controls
from common.schedule import decay_start_step
from common.settings import RunSettings
from predictor_node.batch_law import StepTime, gain_of
from predictor_node.evidence import Evidence, has_learned, is_early, ruin_words
from predictor_node.forecast import LossCurve

RATE_UP = {"rate:x4": 4.0, "rate:x2": 2.0}  # the larger first
RATE_DOWN = {"rate:/4": 0.25, "rate:/2": 0.5}
BATCH = {"batch:x2": 2.0, "batch:/2": 0.5}
SHORTER, LONGER, DECAY, AVERAGE = "context:shorter", "context:longer", "decay:now", "read_out:average"
NAMES = (*RATE_UP, *RATE_DOWN, *BATCH, SHORTER, LONGER, DECAY, AVERAGE)

MIN_GAIN = 0.05  # of progress per second: below that a trial is not worth its checks
CLIMB_GAIN = 0.2  # forecast of the first rate:x2; well below the best rate progress goes with it. Guess
VISIBLE = -3.0  # deviations: at a point in forty noise alone shows two
CLIMB_SHARE = 0.6  # of the steps before the tail, in which the rate may rise
SHORT_GAIN = 0.1  # forecast of a quarter of the context. Guess, untested
SHORT_SHARE, FULL_SHARE = 0.1, 0.5  # of the steps before the tail: latest start, whole context again
TAIL_FROM = 0.5  # of the steps before the configured tail: no earlier one begins before
TAIL_OF_RUN = 0.25  # length of an early tail over what was run: a fifth of the whole (Haegele et al. 2024)
TAIL_WINDOWS = 10  # under the present controls, before one is offered
TAIL_OF_LEFT = 0.5  # a run never loses more than half of the steps that it still has
TAIL_SAVES = 0.05  # of the run, at least
TAIL_WORTH = 0.005  # of the loss: what going on must bring; a tail itself brings ten times as much (lab-log)


@dataclass(frozen=True, slots=True)
class Candidate:
    arm: str
    controls: Controls
    gain: float  # forecast, of progress per second, as a share
    why: str
    is_forced: bool = False  # not a matter of taste: no bandit is asked
    is_exempt: bool = False  # a run in ruin: no budget is asked


@dataclass(frozen=True, kw_only=True)
class Situation:
    settings: RunSettings
    now: Controls
    clock: float  # nominal step
    evidence: Evidence
    curve: LossCurve | None
    time: StepTime | None
    step: int
    has_average: bool = False
    fastest_fall: float = math.inf  # nats per step, over all that is remembered (evidence.py)
    seen_steps: int = 0  # under the present controls
    is_lowered: bool = False  # the rate: by the newest change, or below its schedule
    rolled_back: bool = False  # the trainer went back to a checkpoint since the last decision
    climb_gain: float = math.nan  # seen with the newest kept climb
    not_before: Mapping[str, float] = field(default_factory=dict)  # kind of arm -> nominal step

    @property
    def tail_start(self) -> float:
        """Nominal step at which the rate begins to fall for good."""
        steps, schedule = schedule_of(self.now, self.settings.trainer)
        return (
            CLIMB_SHARE * steps
            if schedule.name in ("cosine", "linear")
            else decay_start_step(steps, schedule)
        )

    def may_try(self, kind: str) -> bool:
        return self.clock >= self.not_before.get(kind, 0.0)


def urgent(here: Situation) -> Candidate | None:
    """What cannot wait: the run is being ruined."""
    if not here.settings.trainer.controls.rate:
        return None
    total_steps = here.settings.trainer.steps
    early = is_early(here.clock, total_steps)
    why = ruin_words(here.evidence, is_early=early, is_lowered=here.is_lowered)
    if here.rolled_back and not why:
        return _lower(here, "the trainer rolled back a spike", (0.25, 0.5) if early else (0.5,))
    return _lower(here, why, (0.25, 0.5)) if why else None


def due(here: Situation) -> Candidate | None:
    """A context that must grow by now: the run must end with its own."""
    longer = _longer_context(here) if here.may_try("context") else None
    return longer if longer is not None and not breached(here, longer.controls) else None


def candidates(here: Situation) -> list[Candidate]:
    """What may be tried of free will, in a fixed order."""
    found = [
        *_climbs(here),
        *_descents(here),
        *_batches(here),
        *_shorter_context(here),
        *_tail(here),
        *_average(here),
    ]
    return [candidate for candidate in found if not breached(here, candidate.controls)]


def breached(here: Situation, wanted: Controls) -> str:
    """What is wrong with a change here; a run that ends before it is judged included."""
    trainer = here.settings.trainer
    steps = trial_steps(wanted, here.now, trainer)
    if schedule_of(wanted, trainer)[0] - here.clock < steps * wanted.batch_factor:
        return "too few steps left for a trial"
    return breach(wanted, now=here.now, settings=trainer, clock=here.clock)


def _lower(here: Situation, why: str, factors: tuple[float, ...]) -> Candidate | None:
    for arm, factor in RATE_DOWN.items():
        wanted = replace(here.now, rate_factor=here.now.rate_factor * factor)
        if factor in factors and not breached(here, wanted):
            return Candidate(arm, wanted, 0.0, why, is_forced=True, is_exempt=True)
    return None


def _climbs(here: Situation) -> Iterator[Candidate]:
    if not _may_move_rate(here, "rate:up") or here.evidence.significance > VISIBLE:
        return
    last = here.climb_gain
    gain = min(1.0, max(MIN_GAIN, last / 2.0)) if math.isfinite(last) else CLIMB_GAIN
    why = "tried again" if "rate:up" in here.not_before else "a higher rate was not tried yet"
    if math.isfinite(last):
        why = f"the last climb brought {100.0 * last:+.0f} %"
    yield from _largest(here, RATE_UP, gain, why)


def _descents(here: Situation) -> Iterator[Candidate]:
    """Only where a climb was refused: one of the two is in vain, and a trial costs much. That noise hides the
    fall is no objection: it is what a rate that is too high does."""
    if "rate:up" not in here.not_before or not _may_move_rate(here, "rate:down"):
        return
    yield from _largest(here, {"rate:/2": 0.5}, MIN_GAIN, "a higher rate was no better")


def _may_move_rate(here: Situation, kind: str) -> bool:
    """Not beside noise alone: of a run that has learned nothing some steps tell nothing."""
    is_early = here.clock <= CLIMB_SHARE * here.tail_start
    is_on = here.settings.trainer.controls.rate and here.may_try(kind)
    return is_on and is_early and has_learned(here.evidence)


def _largest(here: Situation, factors: Mapping[str, float], gain: float, why: str) -> Iterator[Candidate]:
    """The largest change that may be tried, alone."""
    for arm, factor in factors.items():
        wanted = replace(here.now, rate_factor=here.now.rate_factor * factor)
        if here.may_try(arm) and not breached(here, wanted):
            yield Candidate(arm, wanted, gain, why)
            return


def _batches(here: Situation) -> Iterator[Candidate]:
    scale = here.evidence.noise_scale
    if not here.settings.trainer.controls.batch or here.time is None or not math.isfinite(scale):
        return
    now = here.now.batch_factor
    for arm, factor in BATCH.items():
        gain = gain_of(here.time, noise_scale=scale, now=now, then=now * factor)
        if gain > MIN_GAIN and here.may_try(arm) and here.clock < here.tail_start:
            wanted = replace(here.now, batch_factor=now * factor)
            if _cuts_shared_batches(here, wanted):
                continue
            yield Candidate(arm, wanted, min(1.0, gain), f"noise scale {scale / now:.2g}× batch")


def _cuts_shared_batches(here: Situation, wanted: Controls) -> bool:
    """Several ranks share a micro-batch: it cannot be cut."""
    trainer = here.settings.trainer
    whole = float(wanted.batch_factor * trainer.batch.accumulation).is_integer()
    return trainer.parallel.kind != "none" and not whole


def context_levels(here: Situation) -> list[int]:
    """Divisors of the context from the first short one up to the whole."""
    whole = here.settings.trainer.model.context_tokens
    least = max(-(-whole // 4), here.settings.trainer.controls.context_low_tokens)
    return [tokens for tokens in range(least, whole + 1) if whole % tokens == 0]


def _shorter_context(here: Situation) -> Iterator[Candidate]:
    trainer = here.settings.trainer
    is_on = trainer.controls.context and trainer.task == "language"
    if not is_on or here.now.context_tokens or not here.may_try("context"):
        return
    levels = context_levels(here)
    if len(levels) > 1 and here.clock <= SHORT_SHARE * here.tail_start:
        wanted = replace(here.now, context_tokens=levels[0])
        yield Candidate(SHORTER, wanted, SHORT_GAIN, f"early: {levels[0]} of {levels[-1]} tokens of context")


def _longer_context(here: Situation) -> Candidate | None:
    now = here.now.context_tokens
    if not now:
        return None
    levels = context_levels(here)
    shorter = sum(tokens <= now for tokens in levels)  # how many growths are behind, plus one
    growths, full_clock = max(1, len(levels) - 1), FULL_SHARE * here.tail_start
    if shorter < len(levels) and here.clock < full_clock * shorter / growths:
        return None
    longer = levels[shorter] if shorter < len(levels) - 1 else 0
    wanted = replace(here.now, context_tokens=longer)
    why = f"its time in the curriculum: step {here.clock:.0f} of {here.tail_start:.0f} before the tail"
    return Candidate(LONGER, wanted, 0.0, why, is_forced=True, is_exempt=True)


def _tail(here: Situation) -> Iterator[Candidate]:
    """An early end: the steps until the configured tail bring little, by all that is remembered."""
    trainer = here.settings.trainer
    is_on = trainer.controls.decay and trainer.schedule.name == "wsd"
    if not is_on or here.now.decay_steps or not here.may_try(DECAY):
        return
    left_steps, start = trainer.steps - here.clock, math.floor(here.clock) + 1
    length = math.ceil(max(TAIL_OF_RUN * here.clock, TAIL_OF_LEFT * left_steps))
    saved = trainer.steps - (start + length)
    is_early = (
        here.clock < TAIL_FROM * here.tail_start or here.seen_steps < TAIL_WINDOWS * trainer.window_steps
    )
    is_short = saved < TAIL_SAVES * trainer.steps or min(saved, length) < trainer.probation_steps
    if is_early or is_short or here.clock >= here.tail_start:
        return
    most_nats = here.fastest_fall * saved / here.now.batch_factor
    if most_nats < TAIL_WORTH * abs(here.evidence.level):
        wanted = replace(here.now, decay_start=start, decay_steps=length)
        why = f"{saved} steps more would bring {most_nats:.2g} nats at most"
        yield Candidate(DECAY, wanted, min(1.0, saved / max(1.0, here.clock)), why)


def _average(here: Situation) -> Iterator[Candidate]:
    trainer = here.settings.trainer
    is_on = trainer.controls.read_out and here.has_average and trainer.read_out != "average"
    if is_on and not here.now.read_out and here.clock > 0.5 * trainer.steps and here.may_try(AVERAGE):
        wanted = replace(here.now, read_out="average")
        yield Candidate(AVERAGE, wanted, MIN_GAIN, "the guard batches decide at the end")
