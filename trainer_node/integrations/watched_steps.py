"""One Hybrid around the steps of a framework that takes them itself and tells of them by hooks.

Owns the step that is open and the losses of its micro-batches. Knows no framework, and keeps the run's name
with the state, so that a resumed run finds what its predictor has learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import CheckpointError, UserError
from trainer_node.hybrid import Hybrid

SEVERAL_PROCESSES = "HybridCallback watches one process: for several GPUs see docs/several-gpus.md"


class WatchedSteps:
    """`begin`, a `note_loss` per micro-batch, `update_is_taken`, `end`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        options: Mapping[str, Any],
        *,
        resumed: Mapping[str, Any] | None,
    ) -> None:
        """`options` are those of Hybrid, `resumed` is what `state_dict` gave: its run goes on.

        Raises UserError, CheckpointError; then nothing is left running.
        """
        place = {} if resumed is None else {key: resumed[key] for key in ("run_id", "runs_dir")}
        self.hybrid = Hybrid(model, optimizer, **{**place, **options})
        self._open = ExitStack()
        self._losses: list[Tensor] = []
        self.is_open = False
        try:
            if resumed is not None:
                self.hybrid.load_state_dict(resumed["hybrid"])
        except BaseException:
            self.hybrid.close()
            raise

    def begin(self) -> None:
        """A step begins, unless one has: weights may be others afterwards."""
        if not self.is_open:
            self._open.enter_context(self.hybrid.probe())
            self._losses, self.is_open = [], True

    def note_loss(self, loss: Tensor) -> None:
        """Of one micro-batch, () or what is to be averaged. Waits for no device."""
        self._losses.append(loss.detach().float().mean())

    def hold(self, loss_of: Callable[[], Any]) -> None:
        """A batch to judge jumps with; kept if there are too few."""
        self.hybrid.hold(loss_of)

    def update_is_taken(self, *, are_shares: bool) -> bool:
        """The optimizer may have moved. The step's loss: the mean of its micro-batches, or the sum of shares.

        False if it did not move: a micro-batch of several, or a skipped update.
        """
        losses = torch.stack(self._losses)
        return self.hybrid.after_step(losses.sum() if are_shares else losses.mean())

    @property
    def has_loss(self) -> bool:
        return bool(self._losses)

    def end(self) -> None:
        """The step is over, or given up."""
        self.is_open = False
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        """Between two steps; a jump on probation is judged first, so weights may be restored."""
        self.hybrid.rest()
        folder = self.hybrid.run_folder
        if folder is None:
            return {}
        return {"run_id": folder.name, "runs_dir": str(folder.parent), "hybrid": self.hybrid.state_dict()}

    def close(self) -> None:
        try:
            self.end()
        finally:
            self.hybrid.close()


def checked_state(saved: object) -> Mapping[str, Any] | None:
    """What `state_dict` gave; None for that of a run without prediction. Raises CheckpointError."""
    if not saved:
        return None
    if not isinstance(saved, Mapping) or not {"run_id", "runs_dir", "hybrid"} <= saved.keys():
        raise CheckpointError("not a state of HybridCallback: give the one that its own checkpoint holds")
    return saved


def missing(package: str, extra: str) -> UserError:
    """The error of a framework that is not installed."""
    return UserError(f"{package} is not installed: pip install 'hybrid-predict-trainer[{extra}]'")
