"""Prediction in a Hugging Face Trainer: `Trainer(..., callbacks=[HybridCallback()])`, without a subclass.

A forward hook on the model sees loss and inputs of every micro-batch. Owns `hybrid.safetensors` in the
Trainer's checkpoint folders; owns no step, no schedule and no data. docs/huggingface.md says what is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from trainer_node.held_batches import loss_in
from trainer_node.hybrid import Hybrid
from trainer_node.integrations.state_file import read_state, write_state
from trainer_node.integrations.watched_steps import SEVERAL_PROCESSES, WatchedSteps, checked_state, missing

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise missing("transformers", "transformers") from error

STATE_FILE = "hybrid.safetensors"
NO_LOSS = (
    "no loss in what the model returned: label_smoothing_factor and compute_loss_func compute it outside; "
    "let the model compute it, or use Hybrid in a loop of yours (docs/library.md)"
)
NEVER_DECAYS = frozenset(
    {"constant", "constant_with_warmup", "reduce_lr_on_plateau", "greedy", "inverse_sqrt"}
)
# Schedules that fall from the warm-up to the last step have no kink: from here on the rate is small.
SMOOTH_TAIL_SHARE = 0.8


def decay_start_step(schedule: str, steps: int, options: Mapping[str, Any]) -> int | None:
    """The step from which the rate is in its tail, where prediction rests; None if it never is."""
    if schedule in NEVER_DECAYS:
        return None
    if schedule == "warmup_stable_decay":
        return max(0, steps - int(options.get("num_decay_steps", 0)))
    return round(SMOOTH_TAIL_SHARE * steps)


class HybridCallback(TrainerCallback):
    def __init__(self, *, resume_from: str | Path | None = None, **options: Any) -> None:
        """`options` are those of Hybrid; `steps` and `decay_start_step` are taken from the Trainer.

        resume_from: the checkpoint folder, if it is not the one of that step in `output_dir`.
        """
        self.options = options
        self._resume_from = Path(resume_from) if resume_from else None
        self._steps: WatchedSteps | None = None
        self._model: nn.Module | None = None
        self._forward_hook: torch.utils.hooks.RemovableHandle | None = None
        self._are_shares = False

    @property
    def hybrid(self) -> Hybrid | None:
        """While it trains."""
        return self._steps.hybrid if self._steps else None

    # ---- from the beginning to the end of train() ----------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **seen: Any
    ) -> None:
        """Raises UserError, CheckpointError, BusError: before the first step."""
        self.close()  # of a train() that raised
        if args.world_size > 1 or args.n_gpu > 1:
            raise UserError(SEVERAL_PROCESSES)
        schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        options = {
            "steps": state.max_steps,
            "decay_start_step": decay_start_step(schedule, state.max_steps, args.lr_scheduler_kwargs or {}),
            "units_per_step": args.train_batch_size * args.gradient_accumulation_steps,
            **self.options,
        }
        resumed = checked_state(self._saved(args, state)) if state.global_step else None
        model: nn.Module = seen["model"]
        self._steps = WatchedSteps(model, seen["optimizer"], options, resumed=resumed)
        self._model = model
        self._forward_hook = model.register_forward_hook(self._see, with_kwargs=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        """Also after a train() that raised: the Trainer tells nobody of that."""
        steps, self._steps, self._model = self._steps, None, None
        if self._forward_hook is not None:
            self._forward_hook.remove()
            self._forward_hook = None
        if steps is not None:
            steps.close()

    # ---- a step --------------------------------------------------------------------------------

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._steps is not None:
            self._steps.begin()

    def _see(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """After a forward pass of the model: of training, evaluation, or a look at held batches."""
        steps = self._steps
        if steps is None or not (steps.is_open and module.training and torch.is_grad_enabled()):
            return
        loss = loss_in(output[0] if isinstance(output, tuple) and output else output)
        if loss is None or loss.numel() != 1:
            return
        steps.note_loss(loss)
        # The Trainer asked the model to divide by the items of the whole step: a micro-batch gives its share.
        self._are_shares = named.get("num_items_in_batch") is not None
        batch = {name: value for name, value in named.items() if name != "num_items_in_batch"}
        steps.hold(partial(self._loss_of, given, batch))

    def _loss_of(self, given: tuple[Any, ...], batch: dict[str, Any]) -> Tensor | None:
        assert self._model is not None, "only while it trains"
        output = self._model(*given, **batch)
        return loss_in(output[0] if isinstance(output, tuple) else output)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        steps = self._steps
        if steps is not None:
            if not steps.has_loss:
                raise UserError(NO_LOSS)
            steps.update_is_taken(are_shares=self._are_shares)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        steps = self._steps
        if steps is not None:
            steps.end()
            control.should_training_stop |= steps.hybrid.stop_requested
            control.should_save |= steps.hybrid.checkpoint_requested
            self._before_others_look(control)
        return control

    # ---- between two steps ---------------------------------------------------------------------

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Always called before the end, where the best weights may be loaded over those on probation."""
        if self._steps is not None:
            self._steps.end()
            self._steps.hybrid.judge()
            self._before_others_look(control)

    def _before_others_look(self, control: TrainerControl) -> None:
        """Weights that are evaluated or saved have been judged."""
        if self._steps is not None and control.should_evaluate:
            self._steps.hybrid.judge()
        if self._steps is not None and control.should_save:
            self._steps.hybrid.rest()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **seen: Any
    ) -> None:
        metrics = seen.get("metrics") or {}
        if self._steps is not None and "eval_loss" in metrics:
            self._steps.hybrid.note_evaluation(metrics["eval_loss"], metrics.get("eval_accuracy"))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Beside the Trainer's own files, whole or not at all."""
        folder = _checkpoint_folder(args, state)
        if self._steps is None or args.save_only_model or not folder.is_dir():
            return
        write_state(folder / STATE_FILE, self._steps.state_dict())

    def _saved(self, args: TrainingArguments, state: TrainerState) -> object:
        given = args.resume_from_checkpoint
        named = [self._resume_from, Path(given) if isinstance(given, str) else None]
        folder = next((path for path in named if path), _checkpoint_folder(args, state))
        if not (folder / STATE_FILE).is_file():
            print(f"hybrid: no {STATE_FILE} in {folder}: prediction begins anew", file=sys.stderr, flush=True)
            return None
        return read_state(folder / STATE_FILE)


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
