"""The phase loop of our own trainer: the cycle, driven by real steps on the batches of a task.

    while steps are left:
        decision point   -> ask, check, jump or go on       (cycle.py)
        judgement point  -> keep or restore                 (cycle.py)
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

from common.messages import Message
from common.settings import TrainerSettings
from trainer_node.cycle import Cycle
from trainer_node.data import Batch
from trainer_node.groups import ParameterGroup
from trainer_node.ledger import Ledger
from trainer_node.links import DecisionSource
from trainer_node.memory_orders import make_room
from trainer_node.memory_report import Report, tell_shortage
from trainer_node.memory_state import MemoryState
from trainer_node.out_of_memory import MemoryExhausted, Picture, TornUpdate
from trainer_node.prediction import PredictionParts
from trainer_node.progress import plan_of
from trainer_node.real_step import RealSteps
from trainer_node.tasks import Task


class Loop(Cycle):
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
        self._housekeeping = housekeeping
        memory = MemoryState()
        self._real_steps = RealSteps(
            task,
            optimizers,
            groups,
            settings,
            ledger=ledger,
            memory=memory,
            picture=picture,
            make_room=partial(make_room, self),
            tell=partial(tell_shortage, self, report),
        )
        super().__init__(
            task,
            optimizers,
            groups,
            settings,
            parts=parts,
            links=links,
            emit=emit,
            ledger=ledger,
            generation=generation,
            memory=memory,
            steps=self._real_steps,
            guard_loss=self._guard_loss,
            report=report,
        )

    def run(self) -> None:
        """Until the schedule's clock is at its end or a stop is requested.

        Raises MemoryExhausted in a state that may be saved, TornUpdate in one that may not.
        """
        with self._observer.probe, ExitStack() as at_the_end:
            at_the_end.callback(self.prediction.close_store)
            at_the_end.callback(self.first_weights.drop)
            try:
                self._run()
            except MemoryExhausted:
                self.come_to_rest()
                raise

    def _run(self) -> None:
        while not self._is_finished():
            if not self.advance():
                self._real_step()
                if self.is_calm:
                    self._housekeeping(self)
            if self.stop_requested:
                self.come_to_rest()
                return

    def _is_finished(self) -> bool:
        return self.is_over and self._jump is None

    def _real_step(self) -> None:
        self.expect_step()
        plan = plan_of(self.progress, self.settings)
        try:
            shortage = self.note_step(self._real_steps.take(plan, self.correction()))
        except (MemoryExhausted, TornUpdate) as error:
            if self._jump is None or self._jump.snapshot is None:
                raise
            shortage = error.shortage
        if shortage is not None:
            self.retreat(shortage)

    def _guard_loss(self) -> float:
        count = self.settings.verify.guard_batches
        return self.mean_loss(self.task.loss, [self.task.train.guard(i) for i in range(count)])

    def mean_loss(self, loss_of: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> float:
        """In evaluation mode and in pieces that fit into memory. Raises MemoryExhausted."""
        return self._real_steps.mean_loss(loss_of, batches)
