"""What is done between real steps when no jump is on probation: evaluate, save, go back, obey the monitor.

Runs on held-out data and on disk, and on weights only to put a former state back (rollback.py). Its own
state (when is what due, which checkpoint is best) travels in the checkpoint.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from common.messages import (
    Alert,
    CheckpointRequest,
    Evaluation,
    HealthSample,
    Message,
    Metric,
    Order,
    OrderDone,
    StopRequest,
)
from common.sealed_folder import folder_name
from common.streams import TRAINER
from trainer_node import ledger as purposes
from trainer_node.before_jump import full_step_seconds
from trainer_node.checkpoint_clock import FIRST_STEPS, CheckpointClock, interval_steps
from trainer_node.controls import most_steps
from trainer_node.ledger import Ledger
from trainer_node.loop import Loop
from trainer_node.memory_orders import Done, carry_out
from trainer_node.memory_report import ORDER, held_bytes, tell_shortage
from trainer_node.out_of_memory import OutOfMemory, attempt, release
from trainer_node.output_entropy import OutputEntropy, measure_output
from trainer_node.read_out import copy_of_parameters, put_parameters, weights_that_count
from trainer_node.rollback import SpikeWatch
from trainer_node.shared_checkpoints import AnyCheckpoints
from trainer_node.spikes import CHECK_STEPS
from trainer_node.step import autocast

ACCOUNT_SECONDS = 5.0  # between two accounts of where the time went
_T = TypeVar("_T")
LOST_STEPS = 8  # successive non-finite losses; a single one may pass


class Housekeeping:
    def __init__(self, emit: Callable[[Message], None], checkpoints: AnyCheckpoints | None) -> None:
        self._emit, self._checkpoints = emit, checkpoints
        self._told_lost = False
        self._next_evaluation_step = 0
        self._next_checkpoint_step = 0
        self._clock = CheckpointClock()
        self._next_account_seconds = 0.0
        self._spikes = SpikeWatch(emit, checkpoints)
        self.first_loss = math.nan
        self.last_loss = math.nan
        self.best_loss = math.inf

    @property
    def fault(self) -> str:
        """Why the run was stopped from here, for people; "" = it was not."""
        return self._spikes.fault

    def begin(self, loop: Loop) -> None:
        """Before the first step of a fresh run: the first held-out loss."""
        self._next_evaluation_step = loop.settings.evaluate_every_steps
        self._next_checkpoint_step = self._checkpoint_steps(loop)
        self.evaluate(loop)

    def __call__(self, loop: Loop) -> None:
        if self._is_checkpoint_due(loop) or self._spikes.is_due(loop):
            former = self._spikes.look(loop, settle=self._is_checkpoint_due(loop))
            if former is not None:
                self.load(former)
                self._told_lost = False
        step = loop.progress.step
        if step >= self._next_evaluation_step and not loop.is_over:
            self._next_evaluation_step = step + loop.settings.evaluate_every_steps
            self.evaluate(loop)
        if self._is_checkpoint_due(loop):
            is_sound = self._spikes.is_sound(loop) and not loop.first_weights.may_help(loop.progress)
            self._next_checkpoint_step = step + (self._checkpoint_steps(loop) if is_sound else CHECK_STEPS)
            if is_sound:
                self.save(loop)
        self._watch_for_divergence(loop)
        if loop.ledger.total_seconds >= self._next_account_seconds:
            self._tell(loop, ())
        for order in loop.links.take_orders():
            self._obey(loop, order)

    def _is_checkpoint_due(self, loop: Loop) -> bool:
        return self._next_checkpoint_step <= loop.progress.step and not loop.is_over

    def _checkpoint_steps(self, loop: Loop) -> int:
        """Until the next checkpoint. In lockstep as configured: what is sent must not depend on time."""
        settings, cost_seconds = loop.settings, self._clock.cost_seconds
        hours = settings.checkpoint.hours_between_failures
        if hours == 0.0 or settings.decision_mode == "lockstep":
            return settings.checkpoint.every_steps or most_steps(settings)
        if cost_seconds is None:
            return settings.checkpoint.every_steps or FIRST_STEPS
        steps = interval_steps(cost_seconds, 3600.0 * hours, step_seconds=full_step_seconds(loop.progress))
        return int(loop.task.split.ranks.broadcast(str(steps).encode()))  # each has clocks of its own

    def end(self, loop: Loop, *, emergency: bool) -> None:
        """The last held-out loss (unless in a hurry) and the last checkpoint; the model keeps what counts."""
        averaged = None if emergency else self._if_there_is_room(loop, partial(self._last_reading, loop))
        self.save(loop, emergency=emergency, read_out=averaged)
        if averaged is not None:
            put_parameters(loop.task.model, averaged)
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _last_reading(self, loop: Loop) -> dict[str, Tensor] | None:
        """The averaged weights, if they are those that count."""
        with weights_that_count(loop) as is_average:
            self._if_there_is_room(loop, partial(self._measure, loop))
            return copy_of_parameters(loop.task.model) if is_average else None

    def evaluate(self, loop: Loop) -> None:
        """The held-out loss of the weights that count."""

        def measure() -> None:
            with weights_that_count(loop):
                self._measure(loop)

        self._if_there_is_room(loop, measure)

    def _if_there_is_room(self, loop: Loop, work: Callable[[], _T]) -> _T | None:
        """Left out where there is no memory for it: training goes on, and the loss before stands."""
        result = attempt(work)
        if not isinstance(result, OutOfMemory):
            return result
        release(loop.task.model.parameters())
        tell_shortage(loop, loop.report, result, "this evaluation was left out")
        return None

    def _measure(self, loop: Loop) -> None:
        task = loop.task
        with loop.ledger.span(purposes.EVALUATION):
            batches = list(task.validation)
            context = partial(autocast, task.device, loop.settings.precision)
            loss = loop.mean_loss(task.loss, batches)
            accuracy = loop.mean_loss(task.accuracy, batches) if task.accuracy is not None else None
            output = measure_output(
                task,
                batches[0],
                context,
                max_items=loop.memory.piece_size(loop.settings.batch),
                is_compiled=loop.settings.compile,
            )
        self.first_loss = loss if math.isnan(self.first_loss) else self.first_loss
        self.last_loss = loss
        self._emit(
            Evaluation(
                step=loop.progress.step,
                virtual_steps=loop.ledger.virtual_steps,
                loss=loss,
                accuracy=accuracy,
                train_seconds=loop.ledger.total_seconds,
            )
        )
        self._tell(loop, self._metrics(loop, output))

    def _tell(self, loop: Loop, metrics: tuple[Metric, ...]) -> None:
        """These and where the time went."""
        self._next_account_seconds = loop.ledger.total_seconds + ACCOUNT_SECONDS
        account = time_account(loop.ledger, loop.generation)
        self._emit(HealthSample(node=TRAINER, step=loop.progress.step, metrics=(*metrics, *account)))

    def _metrics(self, loop: Loop, output: OutputEntropy | None) -> tuple[Metric, ...]:
        """For monitor_node/health.py. What is not known is None, what does not apply is left out."""
        checkpoints, found = self._checkpoints, []
        if output is not None:
            found += [
                Metric(name="output_entropy", value=output.entropy, unit="nats"),
                Metric(name="output_cross_entropy", value=output.cross_entropy, unit="nats"),
                Metric(name="output_information", value=output.information, unit="nats"),
            ]
        if checkpoints is not None:
            found += [
                Metric(name="checkpoint_bytes", value=checkpoints.newest_bytes, unit="bytes"),
                Metric(name="disk_free_bytes", value=checkpoints.free_bytes, unit="bytes"),
                Metric(name="checkpoint_seconds", value=self._clock.cost_seconds, unit="s"),
                Metric(name="next_checkpoint_step", value=self._next_checkpoint_step, unit="step"),
            ]
        return (*found, Metric(name="skipped_steps", value=loop.progress.skipped_steps, unit="steps"))

    def save(
        self,
        loop: Loop,
        *,
        emergency: bool = False,
        read_out: Mapping[str, Tensor] | None = None,
        is_awaited: bool = False,
    ) -> bool:
        """Whether there is a checkpoint of this state now, or, unless `is_awaited`, will be.

        If not, an alert says why, now or when it is known.
        """
        if self._checkpoints is None:
            return False
        with loop.ledger.span(purposes.CHECKPOINTS) as saving:
            self._checkpoints.wait()  # it may yet take the name of the best one back
            loop.prepare_checkpoint()
            former_best = self._checkpoints.best_name
            if self.last_loss < self.best_loss:
                # Before it is saved: it must know of itself when the run is resumed from it.
                self._checkpoints.best_name = folder_name(
                    loop.progress.step, loop.generation, emergency=emergency
                )
            self.best_loss = min(self.best_loss, self.last_loss)
            written = self._checkpoints.save(loop, self.to_json(), emergency=emergency, read_out=read_out)
            if written is not None and is_awaited:
                self._checkpoints.wait()
                written = None if self._checkpoints.last_failed else written
            if written is not None:
                self._emit(written)
            else:
                self._checkpoints.best_name = former_best
        if not (emergency or is_awaited):
            self._clock.measured(saving.wall_seconds)
        return written is not None

    def _watch_for_divergence(self, loop: Loop) -> None:
        """Say once that the run is lost. The best checkpoint is kept, whatever comes after it."""
        newest = list(loop.progress.recent_losses)[-LOST_STEPS:]
        if self._told_lost or len(newest) < LOST_STEPS or any(map(math.isfinite, newest)):
            return
        self._told_lost = True
        best = self._checkpoints.best_name if self._checkpoints else ""
        kept = f"; {best} is the best checkpoint" if best else ""
        text = f"the loss has not been finite for {LOST_STEPS} steps: stop, lower the learning rate{kept}"
        self._emit(Alert(node=TRAINER, severity="error", kind="diverged", text=text, step=loop.progress.step))

    def _obey(self, loop: Loop, order: Order) -> None:
        before = held_bytes(loop.task.device)
        if isinstance(order, CheckpointRequest):
            saved = self.save(loop, emergency=order.emergency, is_awaited=True)
            what = "checkpoint" if saved else "no checkpoint could be saved"
            result = Done(saved, f"{what} at step {loop.progress.step}: {order.reason}")
        elif isinstance(order, StopRequest):
            loop.stop_requested = True
            result = Done(True, f"stops at step {loop.progress.step}: {order.reason}")
        else:
            result = carry_out(loop, order.action, undo=order.undo)
        order_id = order.request_id if isinstance(order, CheckpointRequest | StopRequest) else order.order_id
        self._emit(
            OrderDone(
                order_id=order_id,
                done=result.done,
                bytes_before=before,
                bytes_after=held_bytes(loop.task.device),
                detail=result.detail,
            )
        )
        loop.report(loop, ORDER)

    def to_json(self) -> dict[str, Any]:
        return {
            "next_evaluation_step": self._next_evaluation_step,
            "next_checkpoint_step": self._next_checkpoint_step,
            "next_look_step": self._spikes.next_look_step,
            "checkpoint_cost_seconds": self._clock.cost_seconds,
            "first_loss": self.first_loss,
            "last_loss": self.last_loss,
            "best_loss": self.best_loss,
            "best_name": self._checkpoints.best_name if self._checkpoints else "",
        }

    def load(self, values: dict[str, Any]) -> None:
        self._next_evaluation_step = int(values["next_evaluation_step"])
        self._next_checkpoint_step = int(values["next_checkpoint_step"])
        self._spikes.next_look_step = int(values.get("next_look_step", 0))
        self._clock.cost_seconds = values.get("checkpoint_cost_seconds")
        self.first_loss, self.last_loss = float(values["first_loss"]), float(values["last_loss"])
        self.best_loss = float(values["best_loss"])
        if self._checkpoints is not None:
            # After a rollback it may have been removed meanwhile: it was newer than the one gone back to.
            there = {folder.name for folder in self._checkpoints.saved_until(sys.maxsize)}
            best_name = str(values["best_name"])
            self._checkpoints.best_name = best_name if best_name in there else ""


def time_account(ledger: Ledger, generation: int) -> tuple[Metric, ...]:
    """Wall seconds by purpose since the run began, over all its processes: for monitor_node/timing.py."""
    seconds = {**ledger.wall_seconds, "total": ledger.total_seconds}
    return (
        *(Metric(name=f"wall_seconds_{name}", value=value, unit="s") for name, value in seconds.items()),
        Metric(name="lost_steps", value=ledger.lost_steps, unit="steps"),
        Metric(name="generation", value=generation, unit="1"),
    )
