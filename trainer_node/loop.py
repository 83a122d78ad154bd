"""The phase loop. Only this process touches weights; everybody else proposes or objects.

    while steps are left:
        decision point   -> ask, check, jump or go on
        judgement point  -> keep or restore
        otherwise        -> one real step, observed

Knows no bus, no Redis, no files: `links` answers, `emit` tells, `housekeeping` keeps. The same loop
without predictor is a plain training loop, bit for bit (tests/trainer/test_loop.py). Memory that runs out
costs a smaller micro-batch, a jump or the prediction, in this order of what is at hand, never a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from common.messages import APPLIED_VERDICTS, MemoryAction, Message, Outcome, Phase, PhaseDecision, Verdict
from common.settings import TrainerSettings
from trainer_node import phases
from trainer_node.basis import Basis
from trainer_node.correct import correct_jump
from trainer_node.data import Batch
from trainer_node.decision import ask
from trainer_node.delta import forecaster_of
from trainer_node.featurize import note_outcome
from trainer_node.groups import ParameterGroup
from trainer_node.jump import abort_jump, fail_jump, finish_jump, start_jump
from trainer_node.ledger import Ledger
from trainer_node.links import DecisionSource
from trainer_node.memory_orders import make_room
from trainer_node.memory_report import INTERVAL, Report, tell_shortage
from trainer_node.memory_state import MemoryState
from trainer_node.observer import Observer
from trainer_node.out_of_memory import MemoryExhausted, OutOfMemory, Picture, TornUpdate
from trainer_node.prediction import Prediction, PredictionParts
from trainer_node.progress import Progress, before_jump, first_progress, outcome_without_jump, phase_rules
from trainer_node.real_step import RealSteps, StepTaken
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
        parts: PredictionParts | None,  # None is plain training
        links: DecisionSource,
        emit: Callable[[Message], None],
        housekeeping: Callable[[Loop], None],
        ledger: Ledger,
        generation: int,
        picture: Picture,
        report: Report,
    ) -> None:
        self.task, self.optimizers, self.groups, self.settings = task, optimizers, groups, settings
        self.links, self.emit, self.ledger, self.generation = links, emit, ledger, generation
        self.rules = phase_rules(settings)
        self.progress = first_progress(self.rules)
        self.memory = MemoryState()
        self.stop_requested = False
        self._housekeeping, self.report = housekeeping, report
        self._tell = partial(tell_shortage, self, report)
        self._steps = RealSteps(
            task,
            optimizers,
            groups,
            settings,
            ledger=ledger,
            memory=self.memory,
            picture=picture,
            make_room=partial(make_room, self),
            tell=self._tell,
        )
        self._observer = Observer(
            optimizers, settings, ledger=ledger, memory=self.memory, emit=lambda message: self.emit(message)
        )
        self._jump: Jump | None = None
        self._undo: Progress | None = None
        make_tools = partial(
            jump_tools,
            settings,
            optimizers=optimizers,
            guard_loss=self.guard_loss,
            ledger=ledger,
            on_out_of_memory=partial(self._tell, what_was_done="the jump was undone"),
        )
        self.prediction = Prediction(parts, make_tools, self._observer, settings, self.memory)
        if self.prediction.is_possible:
            self.prediction.renew(self.progress.phase)

    # ---- the loop, on one screen -------------------------------------------------------------

    def run(self) -> None:
        """Until `steps` real steps are kept or a stop is requested.

        Raises MemoryExhausted in a state that may be saved, TornUpdate in one that may not.
        """
        with self._observer.probe, ExitStack() as at_the_end:
            at_the_end.callback(self.prediction.close_store)
            try:
                self._run()
            except MemoryExhausted:
                self._come_to_rest()
                raise

    def _run(self) -> None:
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
        progress = self.progress
        self._observer.expect_step(progress)
        try:
            taken = self._steps.take(progress.step, progress.data_step, self._correction())
            self._note_step(progress, taken)
            shortage = self._observer.probe.shortage
        except (MemoryExhausted, TornUpdate) as error:
            if self._jump is None or self._jump.snapshot is None:
                raise
            shortage = error.shortage
        if shortage is not None:
            self._retreat(shortage)

    def _note_step(self, progress: Progress, taken: StepTaken) -> None:
        if self._jump is not None:
            self._jump.step_seconds.append(taken.seconds)
            self._jump.step_passes += taken.passes
        facts = partial(self._steps.facts, taken, progress.phase, progress.step + 1, progress.skipped_steps)
        progress.step += 1
        before = progress.phase
        progress.phase = phases.after_step(before, self.rules)
        if before.phase is Phase.WARMUP and progress.phase.phase is Phase.FULL:
            self._begin_window()
            self.report(self, "full")
        losses = self._observer.observe(progress, taken.tensors, facts, wall_seconds=taken.wall_seconds)
        if self._jump is not None:
            self._jump.losses += losses
        self.report(self, INTERVAL)

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
        progress = self.progress
        if not self._observer.can_propose(progress):
            progress.phase = phases.after_decision(progress.phase, None, self.rules)
            self._begin_window()
            return
        usual_seconds = self._steps.typical_wall_seconds
        decision, verdict, waiting_seconds = ask(self, self._observer.fingerprint, usual_seconds)
        if decision is None or verdict is not None:
            outcome = outcome_without_jump(progress, decision, verdict or Verdict.MISSING, waiting_seconds)
            asked_steps = decision.next_window_steps if decision and verdict is Verdict.REST else 0
            self._go_on(outcome, asked_steps)
        else:
            self._take(decision, waiting_seconds)

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
            self.report(self, "predict")  # now that there is a snapshot
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
        self.report(self, "full")

    def _after_outcome(self, outcome: Outcome) -> None:
        self.ledger.note(outcome)
        if outcome.verdict in APPLIED_VERDICTS:
            note_outcome(
                self.progress.features,
                outcome,
                window_steps=self.settings.window_steps,
                step_passes=self._steps.passes,
            )
        self.emit(outcome)

    # ---- where memory runs out ---------------------------------------------------------------

    def _retreat(self, shortage: OutOfMemory) -> None:
        """In a step on probation, or where the directions are kept: back from the jump, at least."""
        is_basis_torn = self._observer.probe.shortage is not None
        if self._jump is not None and self._jump.snapshot is not None:
            self._settle(fail_jump(self.tools, self._jump, shortage))
        elif self._jump is not None:
            self._settle(abort_jump(self.tools, self._jump))
        if is_basis_torn:
            self.prediction.drop()
            self.memory.in_force.add(MemoryAction.PREDICTION_OFF)
            self._tell(shortage, "the directions were given up, prediction is off")

    # ---- small answers -----------------------------------------------------------------------

    @property
    def tools(self) -> JumpTools:
        assert self.prediction.tools is not None, "a jump needs its tools"
        return self.prediction.tools

    @property
    def basis(self) -> Basis | None:
        return self.prediction.basis

    @property
    def on_probation(self) -> Jump:
        assert self._jump is not None, "no jump is on probation"
        return self._jump

    def guard_loss(self) -> float:
        count = self.settings.verify.guard_batches
        return self.mean_loss(self.task.loss, [self.task.train.guard(i) for i in range(count)])

    def mean_loss(self, loss_of: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> float:
        """In evaluation mode and in pieces that fit into memory. Raises MemoryExhausted."""
        return self._steps.mean_loss(loss_of, batches)
