"""The cycle around steps that other people's loops take: it looks before a step and takes note after it.

A restore sets weights, optimizers, averages and statistics of layers back, and nothing else: the loop's own
step counter, schedule, data and random state go on, so the batches of a refused probation are spent. Owns no
batches, no schedule and no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from common.messages import Alert, CheckpointRequest, Message, OrderDone, StopRequest, Verdict
from common.streams import TRAINER
from trainer_node.before_jump import outcome_without_jump
from trainer_node.cycle import Cycle
from trainer_node.jump import finish_jump
from trainer_node.memory_orders import Done, carry_out
from trainer_node.memory_report import ORDER, held_bytes
from trainer_node.own_steps import OwnSteps
from trainer_node.step import StepTensors, update

NO_GUARD = (
    "no jump is tried: nothing judges it; give probe(hold=...) a loss of this batch, or Hybrid(guard=...)"
)


class OwnLoop(Cycle):
    """`before_step`, the loop's own step, `after_step`."""

    def __init__(self, *arguments: Any, steps: OwnSteps, has_guard: Callable[[], bool], **named: Any) -> None:
        super().__init__(*arguments, steps=steps, **named)
        self._own_steps, self._has_guard = steps, has_guard
        self._told: set[str] = set()
        self.is_checkpoint_wanted = False

    def enter(self) -> None:
        """From here on the optimizers are watched."""
        self._observer.probe.__enter__()

    def leave(self) -> None:
        """The optimizers are as they were, and what prediction held is free."""
        self._own_steps.close()
        self._observer.probe.__exit__(None, None, None)
        self.prediction.drop()

    def before_step(self, *, looks: bool = True) -> None:
        """Pass the point that the run stands at: weights may be others afterwards."""
        if self.progress.phase.is_decision_point and not self._has_guard():
            self._tell_once(NO_GUARD)
            self._go_on(outcome_without_jump(self.progress, None, Verdict.MISSING, 0.0))
        else:
            self.advance()
        self.expect_step()
        self._own_steps.begin(looks=looks)

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            step = self.progress.step
            self.emit(Alert(node=TRAINER, severity="warning", kind="no_guard", text=text, step=step))

    def take_step(self, loss_of: Callable[[], Tensor], *, clip_norm: float) -> Tensor:
        """Forward, backward, clip, update. Returns the loss, detached."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of()
        loss.backward()
        correct = self.correction()
        if correct is not None:
            correct()
        tensors = update(loss.detach(), self.optimizers, self.groups, clip_norm=clip_norm)
        self.after_step(loss, tensors)
        return loss.detach()

    def after_step(self, loss: Tensor, tensors: StepTensors | None = None) -> bool:
        """False: no optimizer has moved, so there was no step."""
        taken = self._own_steps.end(loss, tensors)
        if taken is None:
            return False
        shortage = self.note_step(taken)
        if shortage is not None:
            self.retreat(shortage)
        return True

    def rest(self) -> None:
        """Judge a jump on probation now and pass a decision point: to a state that may be saved."""
        self._own_steps.abandon()
        self.settle_observations()
        self.judge()
        self.come_to_rest()

    def judge(self) -> None:
        """A jump on probation is judged now, between two steps. A decision that is due stays due."""
        if self._jump is not None:
            self._own_steps.abandon()
            self.settle_observations()
            self._settle(finish_jump(self.tools, self._jump))

    def obey_orders(self) -> None:
        """Between two steps. What is the loop's own business is noted for it."""
        if not self.is_calm:
            return
        for order in self.links.take_orders():
            before = held_bytes(self.task.device)
            if isinstance(order, CheckpointRequest):
                self.is_checkpoint_wanted = True
                order_id, result = (
                    order.request_id,
                    Done(False, "the loop saves its own checkpoints: it was told"),
                )
            elif isinstance(order, StopRequest):
                self.stop_requested = True
                order_id, result = order.request_id, Done(True, "the loop was told to stop")
            else:
                order_id, result = order.order_id, carry_out(self, order.action, undo=order.undo)
            self.emit(_answer(order_id, result, before, held_bytes(self.task.device)))
            self.report(self, ORDER)


def plain_step(
    loss_of: Callable[[], Tensor], optimizers: Sequence[torch.optim.Optimizer], clip_norm: float
) -> Tensor:
    """The same step without anybody watching."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss = loss_of()
    loss.backward()
    if clip_norm > 0.0:
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def _answer(order_id: str, result: Done, before: int, after: int) -> Message:
    return OrderDone(
        order_id=order_id, done=result.done, bytes_before=before, bytes_after=after, detail=result.detail
    )
