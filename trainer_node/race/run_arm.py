"""One run of one arm, from initial weights to a RunResult.

Arms that are not ours are a plain loop over step.train_step; ours go through the phase loop, in lockstep with
a predictor in the same process. All have the same initial weights, batches, seed, schedule and clipping.
Chooses nothing (plan.py) and keeps nothing (results.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from common import features
from common.clock import Clock, SystemClock
from common.config import dump_settings
from common.messages import Message
from common.schedule import rate_factor
from common.settings import RunSettings, TrainerSettings
from trainer_node import ledger as purposes
from trainer_node.assembly import build_loop, choose_device, prepare_task, run_started
from trainer_node.groups import parameter_groups
from trainer_node.ledger import CHECK_PASSES, TRAIN_PASSES
from trainer_node.loop import Loop
from trainer_node.optim.build import set_rates
from trainer_node.race.arms import Arm, arm_named, knobs_of, run_settings
from trainer_node.race.batch_size import SAME, Scale, scale_of
from trainer_node.race.in_process import (
    InProcessPredictor,
    PredictorCore,
    PredictorFactory,
    installed_predictor,
)
from trainer_node.race.machine import clock_for, forget_peak, machine, peak_bytes
from trainer_node.race.optimizers import METHODS, Method, MethodInput
from trainer_node.race.options import code_fingerprint
from trainer_node.race.referee import Referee, Spent
from trainer_node.race.run_result import PhaseSpan, RunKey, RunResult
from trainer_node.race.together import ThreadClock, run_together
from trainer_node.race.trace import Trace
from trainer_node.race.workers import RunOrder
from trainer_node.read_out import weights_that_count
from trainer_node.step import autocast, train_step
from trainer_node.tasks import Task

CURVE_SHARES = {"constant": 0.025, "decayed": 0.1}  # of the planned steps, between two readings
FINITE_CHECK_STEPS = 16


def run_arm(
    key: RunKey,
    base: RunSettings,
    *,
    data: str | None = "",
    eval_every_steps: int | None = None,
    predictor_state: str | Path | None = "",
    clock: Clock | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> RunResult:
    """Make the run that `key` names from the settings of its task.

    Raises SettingsError, DataError, EnvironmentFault. A loss that is no longer finite is no error: the
    run ends, diverged.
    """
    arm = arm_named(key.arm)
    settings = run_settings(
        arm,
        base,
        key.config,
        steps=key.planned_steps,
        seed=key.seed,
        data=data or "",
        state=str(predictor_state or ""),
    )
    scale = scale_of(settings.trainer.batch, base.trainer.batch)
    task = prepare_task(settings.trainer)
    if scale.passes != 1.0:  # held-out batches of another size would be other data
        uncut = replace(settings.trainer, batch=base.trainer.batch, verify=base.trainer.verify)
        task = replace(task, validation=prepare_task(uncut).validation)
    return run_task(
        key,
        settings,
        task,
        eval_every_steps=eval_every_steps,
        scale=scale,
        clock=clock,
        after_step=after_step,
    )


def run_arms_together(orders: Sequence[RunOrder]) -> list[RunResult]:
    """Timed runs of one seed, taking turns; one after the other where a run is not one thread on a CPU."""

    def run(
        order: RunOrder, after_step: Callable[[], None] = lambda: None, clock: Clock | None = None
    ) -> RunResult:
        return run_arm(
            order.key,
            order.base,
            eval_every_steps=order.eval_every_steps,
            predictor_state=order.predictor_state,
            clock=clock,
            after_step=after_step,
        )

    trainer = orders[0].base.trainer
    if trainer.threads != 1 or choose_device(trainer).type != "cpu":
        return [run(order) for order in orders]
    return run_together([partial(run, order, clock=ThreadClock()) for order in orders])


def run_task(
    key: RunKey,
    settings: RunSettings,
    task: Task,
    *,
    eval_every_steps: int | None = None,
    scale: Scale = SAME,
    predictor: PredictorFactory = installed_predictor,
    clock: Clock | None = None,
    span_clock: Clock | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> RunResult:
    """The same with a task that is ready; `scale` is the worth of its steps in those of the task's batch.
    A core's clock is slow to ask within a step (lab log, 2026-11-22): there `span_clock` (wall) is asked."""
    arm, clock = arm_named(key.arm), clock or clock_for(settings, task)
    share, steps = CURVE_SHARES[arm.rule], settings.trainer.steps
    every_steps = max(1.0, eval_every_steps / scale.steps if eval_every_steps else round(share * steps))
    referee = Referee(
        task, settings.trainer, clock, every_steps=every_steps, scale=scale, after_step=after_step
    )
    forget_peak(task.device)
    if arm.is_ours:
        result = _run_ours(key, settings, task, referee, predictor(), span_clock or SystemClock())
    else:
        result = _run_plain(key, arm, settings, task, referee)
    return replace(result, code=code_fingerprint())


# ---- arms that are not ours ------------------------------------------------------------------


def _run_plain(key: RunKey, arm: Arm, settings: RunSettings, task: Task, referee: Referee) -> RunResult:
    trainer = settings.trainer
    given = MethodInput(
        model=task.model, device=task.device, settings=trainer, knobs=knobs_of(arm, key.config)
    )
    method = METHODS[arm.method](given)
    step, diverged = train_plainly(task, trainer, method, referee)
    return RunResult(
        key=key,
        curve=tuple(referee.curve),
        diverged=diverged,
        peak_bytes=peak_bytes(task.device),
        verdicts=(),
        cosines=(),
        forecasts=(),
        phases=(PhaseSpan(phase="full", first_step=1, last_step=step, verdict=""),),
        machine=machine(),
    )


def train_plainly(
    task: Task, settings: TrainerSettings, method: Method, referee: Referee
) -> tuple[int, bool]:
    """(steps done, whether the loss stopped being finite)."""
    count, groups = settings.batch.accumulation, parameter_groups(task.model)
    context = partial(autocast, task.device, settings.precision)
    read_out = method.read_out if method.has_read_out else None
    loss_sum = torch.zeros((), device=task.device)  # stays non-finite once a loss was; no wait per step

    def read(step: int) -> float:
        spent = Spent(passes=TRAIN_PASSES * count * step, backward_passes=float(count * step))
        return referee.read(step, spent, read_out).loss

    referee.start()
    read(0)
    for step in range(settings.steps):
        set_rates(method.optimizers, rate_factor(step, settings.steps, settings.schedule))
        batches = [task.train.batch(step * count + i) for i in range(count)]
        method.before_step(step)
        tensors = train_step(
            task.model,
            task.loss,
            batches,
            method.optimizers,
            groups,
            clip_norm=settings.optimizer.clip_norm,
            context=context,
        )
        method.after_step(step)
        loss_sum += tensors.loss
        done = step + 1
        is_lost = done % FINITE_CHECK_STEPS == 0 and not math.isfinite(float(loss_sum))
        if is_lost or (referee.is_due(done) and not math.isfinite(read(done))):
            if referee.read_at < done:
                read(done)
            return done, True
    return settings.steps, not math.isfinite(read(settings.steps) + float(loss_sum))


# ---- ours ------------------------------------------------------------------------------------


def _run_ours(
    key: RunKey,
    settings: RunSettings,
    task: Task,
    referee: Referee,
    core: PredictorCore,
    clock: Clock,
) -> RunResult:
    predictor = InProcessPredictor(core, clock)
    trace = Trace()
    run = _OurRun(referee, predictor)

    def emit(message: Message) -> None:
        trace.see(message)
        predictor.emit(message)

    loop = build_loop(
        task,
        settings,
        links=predictor,
        emit=emit,
        housekeeping=run.between_steps,
        clock=clock,
        generation=1,
        snapshot_folder=None,
    )
    referee.start()
    predictor.emit(
        run_started(
            loop,
            run_id=key.identity,
            settings_toml=dump_settings(settings),
            resumed_from="",
            feature_version=features.VERSION,
        )
    )
    run.read(loop)
    loop.run()
    if referee.read_at < loop.progress.clock:
        run.read(loop)
    return RunResult(
        key=key,
        curve=tuple(referee.curve),
        diverged=run.diverged or not math.isfinite(referee.curve[-1].loss),
        peak_bytes=peak_bytes(task.device),
        verdicts=tuple(sorted((verdict.value, n) for verdict, n in loop.ledger.verdicts.items())),
        cosines=tuple(loop.ledger.cosines),
        forecasts=trace.forecasts(predictor.decisions, settings.trainer.probation_steps),
        phases=trace.phases(),
        machine=machine(),
    )


class _OurRun:
    """What is done between the steps of the phase loop."""

    def __init__(self, referee: Referee, predictor: InProcessPredictor) -> None:
        self._referee, self._predictor = referee, predictor
        self.diverged = False
        self._reading_passes = 0.0  # of checks made for readings in the middle of the run

    def between_steps(self, loop: Loop) -> None:
        losses = loop.progress.recent_losses
        if losses and not math.isfinite(losses[-1]):
            self.diverged = loop.stop_requested = True
        elif self._referee.is_due(loop.progress.clock):
            self.read(loop)

    def read(self, loop: Loop) -> None:
        passes, guard_batches = loop.ledger.passes, loop.settings.verify.guard_batches
        averaged = (loop.progress.controls.read_out or loop.settings.read_out) == "average"
        before = sum(passes.values())
        # To choose between weights and average takes two checks: a run that ended here would pay them once.
        choice = 2 * CHECK_PASSES * guard_batches if averaged else 0.0
        spent = Spent(
            passes=before - self._reading_passes + choice,
            backward_passes=passes[purposes.STEPS] / TRAIN_PASSES,
            predictor_seconds=self._predictor.seconds,
        )
        step = loop.progress.step
        self._referee.read(
            loop.progress.clock,
            spent,
            partial(weights_that_count, loop) if averaged else None,
            real_steps=step if step != loop.progress.clock else None,
        )
        self._reading_passes += sum(passes.values()) - before
