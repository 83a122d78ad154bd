"""The cycle of one run: windows, decision points, jumps on probation, their verdicts. Takes no real step.

    before a step  advance()     -> decision point: ask, check, jump or go on; judgement point: keep or undo
    the step       expect_step() -> somebody takes it
    after a step   note_step()   -> counted, observed, told

loop.py drives it with steps of its own, own_loop.py with those of other people's loops. Knows no bus, no
Redis, no files: `links` answers, `emit` tells. Only here, in correct.py and in optimizers do weights move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from common.messages import APPLIED_VERDICTS, MemoryAction, Message, Outcome, Phase, PhaseDecision, Verdict
from common.settings import TrainerSettings
from trainer_node import phases
from trainer_node.basis import Basis
from trainer_node.before_jump import before_jump, outcome_without_jump
from trainer_node.control_twin import begin_twin, end_ruined_trial, finish_twin, has_twin, place_after
from trainer_node.correct import correct_jump
from trainer_node.decision import ask, trial_steps_of
from trainer_node.delta import forecaster_of
from trainer_node.first_weights import FirstWeights
from trainer_node.groups import ParameterGroup
from trainer_node.jump import abort_jump, fail_jump, finish_jump, start_jump
from trainer_node.ledger import Ledger
from trainer_node.leg_mean import LegMean
from trainer_node.links import DecisionSource
from trainer_node.memory_orders import begin_prediction
from trainer_node.memory_report import INTERVAL, Report, tell_shortage
from trainer_node.memory_state import MemoryState
from trainer_node.observer import Observer
from trainer_node.out_of_memory import OutOfMemory
from trainer_node.prediction import Prediction, PredictionParts
from trainer_node.progress import Progress, facts_later, first_progress, is_over, phase_rules
from trainer_node.step_taken import StepAccount, StepTaken
from trainer_node.tasks import Task
from trainer_node.trial import Jump, JumpTools, jump_tools


class Cycle:
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
        ledger: Ledger,
        generation: int,
        memory: MemoryState,
        steps: StepAccount,
        guard_loss: Callable[[], float],
        report: Report,
        kept_with_weights: Callable[[], Sequence[Tensor]] = tuple,
        restores_random: bool = True,
    ) -> None:
        """`kept_with_weights` names what else a refused jump sets back (statistics of layers).

        Without `restores_random` torch's random state goes on over a restore: the batches do too.
        """
        self.task, self.optimizers, self.groups, self.settings = task, optimizers, groups, settings
        self.links, self.emit, self.ledger, self.generation = links, emit, ledger, generation
        self.memory, self.guard_loss, self.report = memory, guard_loss, report
        self.rules = phase_rules(settings)
        self.progress = first_progress(self.rules)
        self.first_weights = FirstWeights(settings, self.progress)
        self.stop_requested = False
        self._steps = steps
        self._tell = partial(tell_shortage, self, report)
        self._observer = Observer(
            optimizers, settings, ledger=ledger, memory=memory, emit=lambda message: self.emit(message)
        )
        self._jump: Jump | None = None
        make_tools = partial(
            jump_tools,
            settings,
            optimizers=optimizers,
            guard_loss=guard_loss,
            ledger=ledger,
            kept_with_weights=kept_with_weights,
            restores_random=restores_random,
            on_out_of_memory=partial(self._tell, what_was_done="the jump was undone"),
        )
        self.prediction = Prediction(parts, make_tools, self._observer, settings, memory)
        if self.prediction.is_possible:
            begin_prediction(self)

    # ---- around a real step ------------------------------------------------------------------

    def advance(self) -> bool:
        """Pass a decision or judgement point, if the run stands at one. False: a real step is due."""
        phase = self.progress.phase
        if phase.is_decision_point:
            self._decide()
        elif phase.is_judgement_point:
            self._judge()
        else:
            return False
        return True

    def expect_step(self) -> None:
        self.first_weights.take(self.prediction.tools, self.progress)
        self._observer.expect_step(self.progress)

    def note_step(self, taken: StepTaken) -> OutOfMemory | None:
        """A step was taken. What it returns has torn the basis: `retreat` from it."""
        progress = self.progress
        shortage = self._jump.took_step(taken.seconds, taken.passes) if self._jump is not None else None
        facts = facts_later(progress, taken, self.task, self.settings)
        progress.count(taken)
        before = progress.phase
        progress.phase = phases.after_step(before, self.rules)
        if before.phase is Phase.WARMUP and progress.phase.phase is Phase.FULL:
            self._begin_window()
            self.report(self, "full")
        losses = self._observer.observe(progress, taken.tensors, facts, wall_seconds=taken.wall_seconds)
        if self._jump is not None:
            self._jump.losses += losses
            ruined = end_ruined_trial(self.tools, self._jump, taken.tensors.loss)
            if ruined is not None:
                self._settle(ruined)
        self.report(self, INTERVAL)
        return self._observer.probe.shortage or shortage

    def correction(self) -> Callable[[], None] | None:
        """What the step that comes now does between backward and update."""
        jump = self._jump
        return partial(correct_jump, self.tools, jump) if jump and jump.is_to_be_corrected else None

    @property
    def is_calm(self) -> bool:
        """No jump is on probation and no decision is due: the state is complete and may be saved."""
        return self._jump is None and not self.progress.phase.is_decision_point

    def prepare_checkpoint(self) -> None:
        """Its resume would be from there, not from a return: there is none from here on."""
        self.first_weights.drop()
        self.settle_observations()

    def settle_observations(self) -> None:
        """Wait for the numbers of all steps taken: before the state is saved."""
        self._observer.tell(self.progress, wait=True)

    def come_to_rest(self) -> None:
        """To a state that may be saved: out of probation by a restore, past a decision point."""
        if self._jump is not None:
            self._settle(abort_jump(self.tools, self._jump))
        elif self.progress.phase.is_decision_point:
            self._go_on(outcome_without_jump(self.progress, None, Verdict.MISSING, 0.0))

    def _begin_window(self) -> None:
        if self.basis is not None:
            self.basis.averages.begin_window()

    # ---- decisions ---------------------------------------------------------------------------

    def _decide(self) -> None:
        """At a decision point: ask, check, and jump or go on with a window."""
        progress = self.progress
        can_propose = self._observer.can_propose(progress)
        self.first_weights.look(self.prediction.tools, progress if can_propose else None)
        if not can_propose:
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
        progress, asked = self.progress, decision.next_window_steps
        try:
            forecaster = forecaster_of(self.tools.basis, decision)
        except ValueError:
            malformed = outcome_without_jump(progress, decision, Verdict.MALFORMED, waiting_seconds)
            self._go_on(malformed, asked)
            return
        undo, before = progress.copy(), before_jump(progress, waiting_seconds, decision.controls)
        jump = start_jump(self.tools, decision, before, forecaster)
        if isinstance(jump, Outcome):
            self._go_on(jump, asked)
        else:
            self._jump, jump.undo = jump, undo
            steps = trial_steps_of(decision, progress.controls, self.settings)
            jump.mean = LegMean(self.tools.basis.parameters, steps) if has_twin(jump) else None
            progress.controls = decision.controls or progress.controls
            self.report(self, "predict")  # now that there is a snapshot
            progress.phase = phases.after_decision(
                progress.phase, decision.decision_id, self.rules, next_window_steps=asked, trial_steps=steps
            )
            if self.first_weights.are_wanted_by(jump):
                self.progress, failed = self.first_weights.begin(self.tools, jump, progress)
                if failed is not None:
                    self._settle(failed)

    def _go_on(self, outcome: Outcome, next_window_steps: int = 0) -> None:
        """Past a decision point, into a window."""
        self._after_outcome(outcome)
        self.progress.phase = phases.after_decision(
            self.progress.phase, None, self.rules, next_window_steps=next_window_steps
        )
        self._begin_window()

    def _judge(self) -> None:
        """The end of a probation; of a trial that has a twin, the beginning or the end of that."""
        jump, tried = self.on_probation, self.progress
        if jump.is_return:
            self._settle(self.first_weights.finish(self.tools, jump))
        elif jump.twin is not None:
            self._settle(finish_twin(self.tools, jump))
        elif not has_twin(jump):
            self._settle(finish_jump(self.tools, jump))
        elif outcome := begin_twin(self.tools, jump, tried, self.settings):
            self._settle(outcome)
        else:
            self._go_back_to(jump.before_it.copy(), jump.outcome.attempt)
            self.progress.phase = phases.before_twin(tried.phase, jump.twin_steps)

    def _go_back_to(self, former: Progress, attempt: int) -> None:
        self._observer.probe.forget()
        self.progress = self.progress.after_restore(former, attempt)

    def _settle(self, outcome: Outcome) -> None:
        """The end of a probation, whatever the verdict."""
        jump, judged_phase = self.on_probation, self.progress.phase
        self._jump = None
        former = place_after(jump, outcome.verdict)
        if former is not None:
            self._go_back_to(former, outcome.attempt)
        self.progress.phase = phases.after_judgement(judged_phase, self.rules)
        self._after_outcome(outcome, lost_passes=jump.lost_passes)
        self._begin_window()
        self.report(self, "full")

    def _after_outcome(self, outcome: Outcome, *, lost_passes: float = 0.0) -> None:
        """`lost_passes`: forward-equivalents of the steps that were undone."""
        self.ledger.note(outcome)
        if outcome.verdict in APPLIED_VERDICTS:
            self.progress.note(outcome, window_steps=self.settings.window_steps, lost_passes=lost_passes)
        self.emit(outcome)

    # ---- where memory runs out ---------------------------------------------------------------

    def retreat(self, shortage: OutOfMemory) -> None:
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
    def is_over(self) -> bool:
        """All real steps of the run are taken; a jump may yet be on probation."""
        return is_over(self.progress, self.settings)

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
