"""Laws of HybridCallback in a Lightning Trainer, with a tiny network that really trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("lightning", reason="pip install 'hybrid-predict-trainer[lightning]'")

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from common.errors import UserError
from common.messages import Message, Observation
from tests.integrations import tiny_models as tiny
from tests.trainer import own
from trainer_node.hybrid import Hybrid
from trainer_node.integrations.lightning_callback import HybridCallback

BATCHES, EPOCHS = 16, 4
STEPS = BATCHES * EPOCHS
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's advice on workers and loggers
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Regression(pl.LightningModule):
    """Batch norm, so that statistics of layers are there. No dropout: Lightning saves no random state."""

    def __init__(self, *, is_automatic: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
        self.automatic_optimization = is_automatic
        self.logged: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = own.loss_of(self.body, (batch[0], batch[1]))
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", own.loss_of(self.body, (batch[0], batch[1])))

    def on_train_epoch_end(self) -> None:
        self.logged.append(float(self.trainer.callback_metrics["loss"]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 40, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    folder: Path,
    settings: tuple[str, ...] | None,
    *others: pl.Callback,
    resume: Path | None = None,
    **changed: Any,
) -> Regression:
    """Without `settings` there is no HybridCallback."""
    options = changed.pop("options", {})
    model = changed.pop("model", None) or Regression()
    callbacks = [] if settings is None else [HybridCallback(**tiny.options(folder, settings, **options))]
    trainer = pl.Trainer(
        **{
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(other, ModelCheckpoint) for other in others),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            "default_root_dir": folder,
            **changed,
        },
        callbacks=[*others, *callbacks],
    )
    data = [list(own.batches(count)) for count in (BATCHES, 2)]
    trainer.fit(model, *(DataLoader(part, batch_size=None) for part in data), ckpt_path=resume)
    return model


def weights(model: Regression) -> dict[str, Tensor]:
    return tiny.weights_of(model.body)


@pytest.mark.parametrize(
    "changed",
    [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}],
    ids=["plain", "accumulation, clipping, autocast"],
)
def test_a_callback_that_tries_no_jump_is_the_trainer_bit_for_bit(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    plain = fit(tmp_path, None, **changed)
    watched = fit(tmp_path, tiny.QUICK, **changed)
    assert tiny.same(weights(watched), weights(plain))
    assert watched.logged == plain.logged
    assert "accepted" not in tiny.verdicts(tmp_path)
    steps = -(-BATCHES // changed.get("accumulate_grad_batches", 1)) * EPOCHS
    assert tiny.said(tmp_path, "RunEnded")[0]["step"] == steps
    assert len(tiny.said(tmp_path, "Evaluation")) == EPOCHS


def test_jumps_are_accepted_and_weights_differ(tmp_path: Path) -> None:
    plain = fit(tmp_path, None)
    jumped = fit(tmp_path, tiny.FIXED)
    assert "accepted" in tiny.verdicts(tmp_path)
    assert not tiny.same(weights(jumped), weights(plain))


def test_the_loss_and_the_gradients_of_a_step_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning goes backward inside the optimizer's step: before it there are those of the step before."""
    seen: list[float] = []
    heard: list[list[Message]] = []
    after_step = Hybrid.after_step

    def note(hybrid: Hybrid, loss: Tensor) -> bool:
        heard.extend([] if seen else [own.heard(hybrid)])
        seen.append(float(loss))
        return after_step(hybrid, loss)

    monkeypatch.setattr(Hybrid, "after_step", note)
    fit(tmp_path, tiny.QUICK, max_epochs=1)
    model = Regression()
    optimizer = model.configure_optimizers()["optimizer"]
    losses, norms = [], []
    for batch in own.batches(BATCHES):
        loss = own.loss_of(model.body, batch)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        norms.append(float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()))  # type: ignore[union-attr]
        optimizer.step()
    assert seen == losses
    told = [sum(n * n for n in m.gradient_norms) ** 0.5 for m in heard[0] if isinstance(m, Observation)]
    assert told == pytest.approx(norms, rel=1e-5)


def test_a_resumed_fit_is_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    """From the end of an epoch: where it is so without us too."""

    def saving(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, filename="{epoch}", every_n_epochs=1, save_top_k=-1)

    whole = fit(tmp_path / "whole", tiny.FIXED, saving("a"), options={"run_id": "mine"})
    fit(
        tmp_path / "broken",
        tiny.FIXED,
        saving("b"),
        options={"run_id": "mine"},
        max_epochs=2,
        max_steps=STEPS,
    )
    last = tmp_path / "b" / "epoch=1.ckpt"
    resumed = fit(tmp_path / "broken", tiny.FIXED, saving("b"), resume=last)
    outcomes = tiny.said(tmp_path / "broken", "Outcome")
    assert {line["base_step"] > STEPS // 2 for line in outcomes} == {True, False}
    assert [path.name for path in (tmp_path / "broken" / "runs").iterdir()] == ["mine"]
    assert tiny.same(weights(resumed), weights(whole))


@pytest.mark.parametrize("only_weights", [False, True])
def test_weights_are_judged_before_they_are_saved(tmp_path: Path, *, only_weights: bool) -> None:
    class Judged(ModelCheckpoint):
        """Looks whether a jump is on probation once a file is written."""

        calm: list[bool] = []  # noqa: RUF012  one test, one list

        def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
            super()._save_checkpoint(trainer, filepath)
            hybrid = next(c for c in trainer.callbacks if isinstance(c, HybridCallback)).hybrid
            self.calm.append(hybrid.loop._jump is None)

    Judged.calm = []
    saving = Judged(tmp_path / "c", every_n_train_steps=3, save_top_k=-1, save_weights_only=only_weights)
    fit(tmp_path, tiny.FIXED, saving)
    assert Judged.calm == [True] * (STEPS // 3)
    assert tiny.verdicts(tmp_path) & {"accepted", "refused"}


def test_after_the_end_no_hook_remains_even_if_training_raised(tmp_path: Path) -> None:
    class Failing(Regression):
        def on_train_epoch_end(self) -> None:
            raise RuntimeError("a disk is full")

    model = Regression()
    fit(tmp_path, tiny.QUICK, model=model, max_epochs=1)
    assert tiny.hooks_of(model) == 0
    assert tiny.hooks_of_optimizer(model.optimizers().optimizer) == 0
    assert "log" not in vars(model)
    model = Failing()
    with pytest.raises(RuntimeError, match="a disk is full"):
        fit(tmp_path, tiny.QUICK, model=model, max_epochs=1)
    assert tiny.hooks_of(model) == 0
    assert tiny.hooks_of_optimizer(model.optimizers().optimizer) == 0


def test_manual_optimization_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="use Hybrid in training_step"):
        fit(tmp_path, tiny.QUICK, model=Regression(is_automatic=False))
