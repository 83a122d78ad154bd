"""Prediction in a Lightning Trainer: `Trainer(callbacks=[HybridCallback()])`, with automatic optimization.

Owns its part of Lightning's checkpoints; owns no step, no schedule and no data. docs/lightning.md says in
which order hooks and checkpoints come.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from common.errors import UserError
from trainer_node.held_batches import loss_in
from trainer_node.hybrid import PLANNED_STEPS, Hybrid
from trainer_node.integrations.watched_steps import SEVERAL_PROCESSES, WatchedSteps, checked_state, missing

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise missing("lightning", "lightning") from error

MANUAL = "automatic_optimization = False: the loop is yours, so use Hybrid in training_step (docs/library.md)"


class HybridCallback(Callback):
    def __init__(
        self,
        *,
        loss: Callable[[LightningModule, Any], Any] | None = None,
        evaluation: str = "val_loss",
        **options: Any,
    ) -> None:
        """`options` are those of Hybrid; `steps` are the Trainer's where it knows them.

        loss: of a batch that is looked at again, to judge a jump. Default: `training_step`, with its logging
            muted. Give it where training_step keeps something else, such as a running metric.
        evaluation: the name under which validation logs its loss.
        """
        self.options = options
        self._loss, self._evaluation = loss, evaluation
        self._steps: WatchedSteps | None = None
        self._module: LightningModule | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._saving_hook: torch.utils.hooks.RemovableHandle | None = None

    @property
    def hybrid(self) -> Hybrid | None:
        """While it trains."""
        return self._steps.hybrid if self._steps else None

    # ---- from the beginning to the end of fit() ------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises UserError where it cannot work."""
        if stage == "fit" and not pl_module.automatic_optimization:
            raise UserError(MANUAL)
        if stage == "fit" and trainer.world_size > 1:
            raise UserError(SEVERAL_PROCESSES)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights and optimizer are loaded. Raises UserError, CheckpointError, BusError."""
        planned = trainer.estimated_stepping_batches
        options = {"steps": int(planned) if math.isfinite(planned) else PLANNED_STEPS, **self.options}
        self._steps = WatchedSteps(pl_module, trainer.optimizers[0], options, resumed=self._loaded)
        self._loaded, self._module = None, pl_module
        # ModelCheckpoint(save_weights_only=True) asks no callback for anything.
        self._saving_hook = pl_module.register_state_dict_pre_hook(lambda *_: self._judge())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open until `teardown`: the last checkpoint may be saved in this very hook of another callback."""
        if self._steps is not None:
            self._steps.end()
            self._judge()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self._saving_hook is not None:
            self._saving_hook.remove()
        steps, self._steps = self._steps, None
        self._saving_hook, self._module = None, None
        if steps is not None:
            steps.close()

    # ---- a step --------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._steps is not None:
            self._steps.hold(partial(self._loss_of, batch, batch_idx))
            self._steps.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, loss = self._steps, loss_in(outputs)
        if steps is None or loss is None:  # training_step gave None: there was no step
            return
        steps.note_loss(loss * trainer.accumulate_grad_batches)  # Lightning has divided it
        if steps.update_is_taken(are_shares=False):
            steps.end()
        trainer.should_stop |= steps.hybrid.stop_requested

    def _loss_of(self, batch: Any, batch_idx: int) -> Any:
        """In evaluation mode and without gradients, as Lightning would compute it."""
        module = self._module
        assert module is not None, "only while it trains"
        with module.trainer.precision_plugin.train_step_context(), _muted(module):
            if self._loss is not None:
                return self._loss(module, batch)
            takes_index = "batch_idx" in inspect.signature(module.training_step).parameters
            return module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)

    # ---- between two steps ---------------------------------------------------------------------

    def _judge(self) -> None:
        """Weights that are evaluated or saved have been judged."""
        if self._steps is not None and not self._steps.is_open:
            self._steps.hybrid.judge()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get(self._evaluation)
        if self._steps is not None and not trainer.sanity_checking and found is not None:
            self._steps.hybrid.note_evaluation(float(found))

    def state_dict(self) -> dict[str, Any]:
        """For Lightning's checkpoint: weights and optimizer are in it as they are after this."""
        return self._steps.state_dict() if self._steps is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Before the optimizer is loaded: kept until `on_train_start`. Raises CheckpointError."""
        self._loaded = checked_state(state_dict)


@contextmanager
def _muted(module: LightningModule) -> Iterator[None]:
    """What is logged in here is nobody's metric."""
    for name in ("log", "log_dict"):
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            delattr(module, name)
