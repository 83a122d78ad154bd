"""Three lines in your own loop: prediction for any model, optimizer and framework.

    hybrid = Hybrid(model, optimizer)                             # starts server, predictor, monitor, page
    for batch in loader:
        loss = hybrid.step(lambda: loss_fn(model(batch)))         # in the place of zero_grad, backward, step
    hybrid.close()

A loop that owns its backward pass (AMP, accumulation, schedulers, a framework):

        with hybrid.probe():
            loss = loss_fn(model(batch)); loss.backward(); optimizer.step(); optimizer.zero_grad()
            hybrid.after_step(loss)

Owns no data, no schedule, no checkpoints: docs/library.md says what a refused jump sets back, what goes on.
Without a predictor's proposals every bit is that of the plain loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from common.clock import SystemClock
from common.errors import CheckpointError, UserError
from common.messages import CheckpointWritten, Evaluation
from common.sealed_folder import folder_name
from trainer_node.controls import check_own_loop
from trainer_node.fingerprint import fingerprint
from trainer_node.held_batches import HeldBatches, LossOf
from trainer_node.ledger import Ledger
from trainer_node.memory_state import MemoryState
from trainer_node.own_loop import OwnLoop, plain_step
from trainer_node.own_model import check_own, own_task, statistics_of_layers, trained_groups, unwrapped
from trainer_node.own_nodes import OwnNodes, nodes_for, own_settings
from trainer_node.own_state import read_state, state_of
from trainer_node.own_steps import OwnSteps

PLANNED_STEPS = 10_000


class Hybrid:
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        redis: str | None = "embedded://",
        steps: int = PLANNED_STEPS,
        decay_start_step: int | None = None,
        guard: LossOf | None = None,
        units_per_step: int = 1,
        run_id: str = "",
        runs_dir: str | Path = "runs",
        settings: Sequence[str] = (),
    ) -> None:
        """Watch and speed up the training of `model` by `optimizer` (or several).

        redis: "embedded://" starts a private server, predictor and monitor with its page, as processes;
            "memory://" a predictor in this process, in lockstep: reproducible, no page; an address
            (redis://, rediss://, unix://) is a server whose predictor and monitor serve `run_id`; None is
            off: a plain loop.
        steps: optimizer steps planned; `decay_start_step`: the one from which the rate decays. Prediction
            rests in the tail, where there is little to gain.
        guard: computes the mean loss of batches you hold back from training; it judges jumps. Default: the
            first batches that `step` sees.
        units_per_step: tokens or examples in a step: how much the predictor may learn is a share of the work.
        settings: lines as for `trainer-node up --set`, e.g. "predictor.temper=aggressive".

        Raises UserError for a mistake, before anything is written; BusError where no server answers.
        """
        optimizers = [unwrapped(o) for o in (optimizer if isinstance(optimizer, Sequence) else [optimizer])]
        check_own(model, optimizers, steps)
        self._nodes: OwnNodes | None = None
        self.loop: OwnLoop | None = None
        self._model, self._optimizers = model, optimizers
        if redis is None:
            return
        run_settings = own_settings(
            optimizers, settings, steps, decay_start_step, is_counted=redis == "memory://"
        )
        check_own_loop(run_settings.trainer)
        self._guard = HeldBatches(
            model,
            next(model.parameters()).device,
            count=run_settings.trainer.verify.guard_batches,
            given=guard,
        )
        self._nodes = nodes_for(redis, run_settings, run_id=run_id, runs_dir=Path(runs_dir))
        try:
            self.loop = self._make_loop(self._nodes, units_per_step)
        except BaseException:
            self._nodes.close(0, "stopped")
            raise
        self._has_begun, self._resumed_from = False, ""

    def _make_loop(self, nodes: OwnNodes, units_per_step: int) -> OwnLoop:
        trainer = nodes.settings.trainer
        task = own_task(self._model, units_per_step=units_per_step)
        groups = trained_groups(self._model, self._optimizers)
        ledger = Ledger(SystemClock(), counted=trainer.decision_mode == "lockstep")
        steps = OwnSteps(task, self._optimizers, groups, trainer, ledger)
        return OwnLoop(
            task,
            self._optimizers,
            groups,
            trainer,
            parts=nodes.prediction_parts(groups, self._optimizers, task.device),
            links=nodes.links,
            emit=nodes.emit,
            ledger=ledger,
            generation=nodes.generation,
            steps=steps,
            guard_loss=self._guard.loss,
            report=nodes.report,
            has_guard=lambda: self._guard.is_ready,
            kept_with_weights=partial(statistics_of_layers, self._model),
            restores_random=False,
            memory=MemoryState(),
        )

    # ---- steps -------------------------------------------------------------------------------

    def step(self, loss_of: Callable[..., Tensor], *batch: Any, clip_norm: float = 0.0) -> Tensor:
        """One optimizer step on `loss_of(*batch)`: zero the gradients, forward, backward, clip, update.

        Returns the loss, () and detached. `clip_norm`: by global L2 norm, 0 = off. `loss_of` is called again,
        now and then, to judge a jump; given as a closure, it is kept with what it reads as it is now.
        """
        compute = partial(loss_of, *batch) if batch else loss_of
        if self.loop is None:
            return plain_step(compute, self._optimizers, clip_norm)
        self._begin()
        self._guard.offer(compute)
        self.loop.before_step(looks=False)
        loss = self.loop.take_step(compute, clip_norm=clip_norm)
        self._between_steps()
        return loss

    @contextmanager
    def probe(self, hold: LossOf | None = None) -> Iterator[None]:
        """Around one whole step of a loop of its own, which calls `after_step` inside.

        On entry the weights may be moved or restored. `hold` computes the loss of this step's batch once
        more, to judge jumps with; without it and without a `guard` no jump is tried.
        """
        if self.loop is None:
            yield
            return
        self._begin()
        if hold is not None:
            self.hold(hold)
        self.loop.before_step()
        yield
        self._between_steps()

    def hold(self, loss_of: LossOf) -> None:
        """A batch to judge jumps with, where it is known only inside the step. Kept if there are too few."""
        if self.loop is not None:
            self._guard.offer(loss_of)

    def after_step(self, loss: Tensor) -> bool:
        """The step is taken; `loss` () is its mean loss. Waits for no device.

        False: no optimizer moved since `probe` began (a micro-batch of several, or an update that a
        GradScaler skipped): nothing is counted.
        """
        return True if self.loop is None else self.loop.after_step(loss)

    def _begin(self) -> None:
        if not self._has_begun:
            self._on.begin(self._running, resumed_from=self._resumed_from)
            self._running.enter()
            self._has_begun = True

    def _between_steps(self) -> None:
        self._on.look_after(self._running)
        self._running.obey_orders()

    @property
    def _on(self) -> OwnNodes:
        assert self._nodes is not None, "only where it is on"
        return self._nodes

    @property
    def _running(self) -> OwnLoop:
        assert self.loop is not None, "only where it is on"
        return self.loop

    # ---- what people ask ---------------------------------------------------------------------

    def note_evaluation(self, loss: float, accuracy: float | None = None) -> None:
        """A held-out loss of yours, for the page and metrics.jsonl. The predictor never sees it."""
        if self.loop is not None and self._nodes is not None and self._has_begun:
            ledger = self.loop.ledger
            self._nodes.emit(
                Evaluation(
                    step=self.loop.progress.step,
                    virtual_steps=ledger.virtual_steps,
                    loss=float(loss),
                    accuracy=accuracy,
                    train_seconds=ledger.total_seconds,
                )
            )

    @property
    def run_folder(self) -> Path | None:
        """Metrics, recording, logs and the predictor's states; None when off."""
        return self._nodes.run.path if self._nodes else None

    @property
    def page(self) -> str:
        """The address of the live page; "" where there is none, or not yet."""
        return self._nodes.page if self._nodes else ""

    @property
    def stop_requested(self) -> bool:
        """The page's stop button was pressed: end the loop when it suits you."""
        return self.loop is not None and self.loop.stop_requested

    @property
    def checkpoint_requested(self) -> bool:
        """The monitor asks for a checkpoint, since the last `state_dict`."""
        return self.loop is not None and self.loop.is_checkpoint_wanted

    # ---- saving and leaving ------------------------------------------------------------------

    def judge(self) -> None:
        """Between two steps, before an evaluation: a jump on probation is judged now."""
        if self.loop is not None and self._has_begun:
            self.loop.judge()

    def rest(self) -> None:
        """To a state that may be saved: a jump on probation is judged now, so weights may be restored."""
        if self.loop is not None and self._has_begun:
            self.loop.rest()

    def state_dict(self) -> dict[str, Any]:
        """Save it beside the model's and the optimizers' own, after `rest()`. Tensors, numbers and strings.

        Raises UserError while a jump is on probation.
        """
        if self.loop is None:
            return {}
        if not self.loop.is_calm:
            raise UserError("a jump is on probation: call hybrid.rest() before model and state are saved")
        self.loop.settle_observations()
        self.loop.is_checkpoint_wanted = False
        progress = self.loop.progress
        name = folder_name(progress.step, self.loop.generation)
        weights = fingerprint(p for group in self.loop.groups for p in group.parameters)
        self._on.emit(
            CheckpointWritten(
                name=name, step=progress.step, attempt=progress.attempt, emergency=False, fingerprint=weights
            )
        )
        return {**state_of(self.loop, name, weights), "held": self._guard.saved()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before the first step, when model and optimizers are loaded. Raises CheckpointError, UserError."""
        if self.loop is None or not state:
            return
        if self._has_begun:
            raise UserError("load_state_dict comes before the first step: make a new Hybrid for it")
        weights = fingerprint(p for group in self.loop.groups for p in group.parameters)
        try:
            self._guard.load(state["held"])
            self._resumed_from = read_state(self.loop, state, weights)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"not a state of Hybrid for this model: {error!r}"[:300]) from None

    def close(self) -> None:
        """Rest, tell everybody, end what was started. The model and optimizers have no trace of it."""
        loop, self.loop = self.loop, None
        if loop is None or self._nodes is None:
            return
        try:
            if self._has_begun:
                loop.rest()
        finally:
            loop.leave()
            finished = loop.progress.step >= loop.settings.steps
            self._nodes.close(loop.progress.step, "finished" if finished else "stopped")

    def __enter__(self) -> Hybrid:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
