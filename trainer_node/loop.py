"""The phase loop. Only this process touches weights; everybody else proposes or objects.

    while steps are left:
        decision point   -> ask, check, jump or go on
        judgement point  -> keep or restore
        otherwise        -> one real step, observed

Knows no bus, no Redis, no files: `links` answers, `emit` tells, `housekeeping` keeps. The same loop
without predictor is a plain training loop, bit for bit (tests/trainer/test_loop.py).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from common.messages import (
    APPLIED_VERDICTS,
    Message,
    Outcome,
    Phase,
    PhaseDecision,
    Verdict,
)
from common.schedule import rate_factor
from common.settings import TrainerSettings
from trainer_node import ledger as purposes
from trainer_node import phases
from trainer_node.basis import Basis
from trainer_node.correct import correct_jump
from trainer_node.delta import forecaster_of
from trainer_node.featurize import note_outcome
from trainer_node.groups import ParameterGroup
from trainer_node.jump import abort_jump, finish_jump, start_jump
from trainer_node.ledger import TRAIN_PASSES, Ledger
from trainer_node.links import DecisionSource
from trainer_node.observer import Observer
from trainer_node.optim.build import set_rates
from trainer_node.progress import (
    Progress,
    before_jump,
    first_progress,
    needs_averages,
    outcome_without_jump,
    phase_rules,
    position_of,
    step_facts,
)
from trainer_node.snapshot import TensorStore
from trainer_node.step import autocast, mean_loss, train_step
from trainer_node.tasks import Task
from trainer_node.trial import Jump, JumpTools, jump_tools


class Loop:
    def __init__(
        self,
        task: Task,
        optimizers: Sequence[torch.optim.Optimizer],
        groups: list[ParameterGroup],
        settings: TrainerSettings,
        *,
        basis: Basis | None,
        store: TensorStore | None,
        links: DecisionSource,
        emit: Callable[[Message], None],
        housekeeping: Callable[[Loop], None],
        ledger: Ledger,
        generation: int,
    ) -> None:
        self.task, self.optimizers, self.groups, self.settings = task, optimizers, groups, settings
        self.basis, self.links, self.emit, self.ledger = basis, links, emit, ledger
        self.generation = generation
        self.rules = phase_rules(settings)
        self.progress = first_progress(self.rules)
        self.stop_requested = False
        self._housekeeping = housekeeping
        self._context = partial(autocast, task.device, settings.precision)
        self._observer = Observer(
            optimizers, settings, basis=basis, ledger=ledger, emit=lambda message: self.emit(message)
        )
        self._jump_tools = None
        if basis is not None and store is not None:
            self._jump_tools = jump_tools(
                settings,
                basis=basis,
                optimizers=optimizers,
                store=store,
                guard_loss=self.guard_loss,
                ledger=ledger,
            )
        self._jump: Jump | None = None
        self._undo: Progress | None = None
        self._step_wall_seconds: deque[float] = deque(maxlen=16)

    # ---- the loop, on one screen -------------------------------------------------------------

    def run(self) -> None:
        """Until `steps` real steps are kept or a stop is requested."""
        with self._observer.probe, ExitStack() as at_the_end:
            if self._jump_tools is not None:
                at_the_end.callback(self._jump_tools.store.close)
            while not self._is_finished():
                phase = self.progress.phase
                if phase.is_decision_point:
                    self._decide()
                elif phase.is_judgement_point:
                    self._settle(finish_jump(self.tools, self.on_probation))
                else:
                    self._real_step()
                    if self.is_calm:
                        self._housekeeping(self)
                if self.stop_requested:
                    self._come_to_rest()
                    return

    def _is_finished(self) -> bool:
        return self.progress.step >= self.settings.steps and self._jump is None

    @property
    def is_calm(self) -> bool:
        """No jump is on probation and no decision is due: the state is complete and may be saved."""
        return self._jump is None and not self.progress.phase.is_decision_point

    def settle_observations(self) -> None:
        """Wait for the numbers of all steps taken: before the state is saved."""
        self._observer.tell(self.progress, wait=True)

    def _come_to_rest(self) -> None:
        """To a state that may be saved: out of probation by a restore, past a decision point."""
        if self._jump is not None:
            self._settle(abort_jump(self.tools, self._jump))
        elif self.progress.phase.is_decision_point:
            self._go_on(outcome_without_jump(self.progress, None, Verdict.MISSING, 0.0))

    # ---- a real step -------------------------------------------------------------------------

    def _real_step(self) -> None:
        progress, settings = self.progress, self.settings
        factor = rate_factor(progress.step, settings.steps, settings.schedule)
        set_rates(self.optimizers, factor)
        self._observer.probe.keeps_averages = needs_averages(progress, settings)
        count = settings.batch.accumulation
        passes = TRAIN_PASSES * count
        with self.ledger.span(purposes.STEPS, passes=passes) as span:
            first = progress.step * count
            with self.ledger.span(purposes.DATA) as data_span:
                batches = [self.task.train.batch(first + i) for i in range(count)]
            tensors = train_step(
                self.task.model,
                self.task.loss,
                batches,
                self.optimizers,
                self.groups,
                clip_norm=settings.optimizer.clip_norm,
                context=self._context,
                after_backward=self._correction(),
            )
        self._step_wall_seconds.append(span.wall_seconds)
        if self._jump is not None:
            self._jump.step_seconds.append(span.seconds)
            self._jump.step_passes += passes
        facts = partial(
            step_facts,
            progress.phase,
            self.task,
            settings,
            step=progress.step + 1,
            rate_factor=factor,
            step_seconds=span.seconds,
            data_seconds=data_span.seconds,
        )
        progress.step += 1
        before = progress.phase
        progress.phase = phases.after_step(before, self.rules)
        if before.phase is Phase.WARMUP and progress.phase.phase is Phase.FULL:
            self._begin_window()
        losses = self._observer.observe(progress, tensors, facts, wall_seconds=span.wall_seconds)
        if self._jump is not None:
            self._jump.losses += losses

    def _correction(self) -> Callable[[], None] | None:
        """What the step that comes now does between backward and update."""
        jump = self._jump
        return partial(correct_jump, self.tools, jump) if jump and jump.is_to_be_corrected else None

    def _begin_window(self) -> None:
        if self.basis is not None:
            self.basis.averages.begin_window()

    # ---- decisions ---------------------------------------------------------------------------

    def _decide(self) -> None:
        """At a decision point: ask, check, and jump or go on with a window."""
        if self.basis is None:
            self.progress.phase = phases.after_decision(self.progress.phase, None, self.rules)
            return
        progress = self.progress
        with self.ledger.span(purposes.WAITING) as waiting:
            decision = self.links.wait_decision(
                step=progress.step, attempt=progress.attempt, seconds=self._patience_seconds()
            )
        verdict = phases.objection(
            decision,
            position=position_of(
                progress, self.generation, self._observer.fingerprint, self.basis.num_groups
            ),
            state=progress.phase,
            rules=self.rules,
            veto=self.links.veto(),
        )
        if decision is None or verdict is not None:
            outcome = outcome_without_jump(progress, decision, verdict or Verdict.MISSING, waiting.seconds)
            asked_steps = decision.next_window_steps if decision and verdict is Verdict.REST else 0
            self._go_on(outcome, asked_steps)
        else:
            self._take(decision, waiting.seconds)

    def _take(self, decision: PhaseDecision, waiting_seconds: float) -> None:
        """A decision without objection: onto probation, or on with a window if it is over at once."""
        progress = self.progress
        try:
            forecaster = forecaster_of(self.tools.basis, decision)
        except ValueError:
            malformed = outcome_without_jump(progress, decision, Verdict.MALFORMED, waiting_seconds)
            self._go_on(malformed, decision.next_window_steps)
            return
        self._undo = progress.copy()
        jump = start_jump(self.tools, decision, before_jump(progress, waiting_seconds), forecaster)
        if isinstance(jump, Outcome):
            self._undo = None
            self._go_on(jump, decision.next_window_steps)
        else:
            self._jump = jump
            progress.phase = phases.after_decision(
                progress.phase,
                decision.decision_id,
                self.rules,
                next_window_steps=decision.next_window_steps,
            )

    def _go_on(self, outcome: Outcome, next_window_steps: int = 0) -> None:
        """Past a decision point, into a window."""
        self._after_outcome(outcome)
        self.progress.phase = phases.after_decision(
            self.progress.phase, None, self.rules, next_window_steps=next_window_steps
        )
        self._begin_window()

    def _settle(self, outcome: Outcome) -> None:
        """The end of a probation, whatever the verdict."""
        undo, jump, judged_phase = self._undo, self.on_probation, self.progress.phase
        self._jump, self._undo = None, None
        if outcome.verdict is not Verdict.ACCEPTED and jump.snapshot is not None:
            assert undo is not None
            self._observer.probe.forget()
            self.progress = self.progress.after_restore(undo, outcome.attempt)
        self.progress.phase = phases.after_judgement(judged_phase, self.rules)
        self._after_outcome(outcome)
        self._begin_window()

    def _after_outcome(self, outcome: Outcome) -> None:
        self.ledger.note(outcome)
        if outcome.verdict in APPLIED_VERDICTS:
            note_outcome(
                self.progress.features,
                outcome,
                window_steps=self.settings.window_steps,
                step_passes=TRAIN_PASSES * self.settings.batch.accumulation,
            )
        self.emit(outcome)

    # ---- small answers -----------------------------------------------------------------------

    @property
    def tools(self) -> JumpTools:
        assert self._jump_tools is not None, "a jump needs its tools"
        return self._jump_tools

    @property
    def on_probation(self) -> Jump:
        assert self._jump is not None, "no jump is on probation"
        return self._jump

    def guard_loss(self) -> float:
        count = self.settings.verify.guard_batches
        batches = [self.task.train.guard(i) for i in range(count)]
        return mean_loss(self.task.model, self.task.loss, batches, context=self._context)

    def _patience_seconds(self) -> float | None:
        if self.settings.decision_mode == "lockstep":
            return None
        return self.settings.decision_wait_share * statistics.median(self._step_wall_seconds or [0.0])
