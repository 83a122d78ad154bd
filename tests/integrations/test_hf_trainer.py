"""Laws of HybridCallback in a Hugging Face Trainer, with a tiny Llama that really trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="pip install 'hybrid-predict-trainer[transformers]'")
pytest.importorskip("accelerate", reason="pip install 'hybrid-predict-trainer[transformers]'")

from transformers import Trainer, TrainerCallback, TrainingArguments

from common.errors import CheckpointError, UserError
from tests.integrations import tiny_models as tiny
from tests.trainer import own
from trainer_node.fingerprint import fingerprint
from trainer_node.groups import parameter_groups
from trainer_node.hybrid import Hybrid
from trainer_node.integrations.hf_trainer import HybridCallback, decay_start_step
from trainer_node.integrations.state_file import read_state, write_state

STEPS = 40


def trainer_of(folder: Path, model: nn.Module, *callbacks: HybridCallback, **changed: Any) -> Trainer:
    arguments = {
        "max_steps": STEPS,
        "per_device_train_batch_size": tiny.BATCH,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        **changed,
    }
    held_out = torch.utils.data.Subset(tiny.Counting(), range(3990, 4000))
    return Trainer(
        model,
        TrainingArguments(str(folder / "out"), **arguments),
        train_dataset=tiny.Counting(),
        eval_dataset=held_out,
        callbacks=list(callbacks),
    )


def trained(folder: Path, settings: tuple[str, ...] | None, **changed: Any) -> dict[str, torch.Tensor]:
    """Weights after a run; without `settings` there is no callback."""
    resume = changed.pop("resume", None)
    options = changed.pop("options", {})
    model = tiny.llama()
    callbacks = [] if settings is None else [HybridCallback(**tiny.options(folder, settings, **options))]
    trainer_of(folder, model, *callbacks, **changed).train(resume_from_checkpoint=resume)
    return tiny.weights_of(model)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 10},
        {"bf16": True, "lr_scheduler_type": "linear", "warmup_steps": 5},
    ],
    ids=["plain", "accumulation and evaluation", "autocast and decay"],
)
def test_a_callback_that_tries_no_jump_is_the_trainer_bit_for_bit(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    plain = trained(tmp_path, None, **changed)
    watched = trained(tmp_path, tiny.QUICK, **changed)
    assert tiny.same(watched, plain)
    assert "accepted" not in tiny.verdicts(tmp_path)
    assert tiny.said(tmp_path, "RunEnded")[0]["step"] == STEPS


def test_jumps_are_accepted_and_weights_differ(tmp_path: Path) -> None:
    plain = trained(tmp_path, None)
    jumped = trained(tmp_path, tiny.FIXED)
    assert "accepted" in tiny.verdicts(tmp_path)
    assert not tiny.same(jumped, plain)


class Looking(TrainerCallback):
    """Somebody else's look at the model within a step is no part of that step."""

    def on_pre_optimizer_step(self, *_: Any, **seen: Any) -> None:
        with torch.no_grad():
            item = tiny.Counting()[0]
            seen["model"](**{name: tokens[None] for name, tokens in item.items()})


def test_the_loss_of_a_step_is_that_of_all_its_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch of 8 and two micro-batches of 4 are the same step, so the same loss is seen."""
    seen: list[float] = []
    after_step = Hybrid.after_step

    def note(hybrid: Hybrid, loss: torch.Tensor) -> bool:
        seen.append(float(loss))
        return after_step(hybrid, loss)

    monkeypatch.setattr(Hybrid, "after_step", note)
    for folder, sizes in ((tmp_path / "a", (4, 2)), (tmp_path / "b", (8, 1))):
        callback = HybridCallback(**tiny.options(folder, tiny.QUICK))
        batch = {"per_device_train_batch_size": sizes[0], "gradient_accumulation_steps": sizes[1]}
        trainer = trainer_of(folder, tiny.llama(attention_dropout=0.0), callback, **batch, max_steps=3)
        if folder.name == "a":
            trainer.add_callback(Looking())
        trainer.train()
    assert len(seen) == 6
    assert seen[:3] == pytest.approx(seen[3:], rel=1e-5)


def test_a_resumed_training_is_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 34, "max_steps": 60}
    whole = trained(tmp_path / "a", tiny.FIXED, **saving, options={"run_id": "mine"})
    broken = HybridCallback(**tiny.options(tmp_path / "b", tiny.FIXED, run_id="mine"))
    trainer = trainer_of(tmp_path / "b", tiny.llama(), broken, **saving)
    stop_after(trainer, 34)
    trainer.train()
    assert (tmp_path / "b" / "out" / "checkpoint-34" / "hybrid.safetensors").is_file()
    resumed = trained(tmp_path / "b", tiny.FIXED, **saving, resume=True)  # the run's name is in the state
    assert {line["base_step"] > 34 for line in tiny.said(tmp_path / "b", "Outcome")} == {True, False}
    assert [path.name for path in (tmp_path / "b" / "runs").iterdir()] == ["mine"]
    assert tiny.same(resumed, whole)


def stop_after(trainer: Trainer, steps: int) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step >= steps

    trainer.add_callback(Stop())


class Misled(HybridCallback):
    """All its jumps are bad: whoever looks before the verdict sees weights that vanish."""

    def on_train_begin(self, *given: Any, **seen: Any) -> None:
        super().on_train_begin(*given, **seen)
        assert self.hybrid is not None
        own.Tampering(self.hybrid, -3.0)


def test_weights_are_judged_before_they_are_saved(tmp_path: Path) -> None:
    """Every fifth step falls into probations, and weights and state of a checkpoint are of one moment."""
    saving = {"save_strategy": "steps", "save_steps": 5, "eval_strategy": "steps", "eval_steps": 20}
    model = tiny.llama()
    trainer_of(tmp_path, model, Misled(**tiny.options(tmp_path, tiny.FIXED)), **saving).train()
    for step in range(5, STEPS + 1, 5):
        folder = tmp_path / "out" / f"checkpoint-{step}"
        state = read_state(folder / "hybrid.safetensors")
        assert state["hybrid"]["progress"]["phase"]["phase"] != "correct"
        groups = parameter_groups(type(model).from_pretrained(folder))
        saved = fingerprint(parameter for group in groups for parameter in group.parameters)
        assert saved == state["hybrid"]["weights"]
    assert len(tiny.said(tmp_path, "Evaluation")) == 2
    assert "refused" in tiny.verdicts(tmp_path)


def test_the_best_weights_that_are_loaded_at_the_end_stay(tmp_path: Path) -> None:
    """The run ends on probation: a verdict after they are loaded would put the former ones in their place."""
    model = tiny.llama()
    saving = {"save_strategy": "steps", "save_steps": 20, "eval_strategy": "steps", "eval_steps": 20}
    callback = Misled(**tiny.options(tmp_path, tiny.FIXED))
    trainer = trainer_of(tmp_path, model, callback, **saving, load_best_model_at_end=True)
    stop_after(trainer, 28)
    trainer.train()
    assert "refused" in tiny.verdicts(tmp_path)
    best = type(model).from_pretrained(trainer.state.best_model_checkpoint)
    assert tiny.same(tiny.weights_of(model), tiny.weights_of(best))


def test_after_the_end_no_hook_remains_even_if_training_raised(tmp_path: Path) -> None:
    model = tiny.llama()
    before = tiny.hooks_of(model)
    callback = HybridCallback(**tiny.options(tmp_path, tiny.QUICK))
    trainer = trainer_of(tmp_path, model, callback, max_steps=20)
    trainer.train()
    assert tiny.hooks_of(model) == before
    assert tiny.hooks_of_optimizer(trainer.optimizer.optimizer) == 0
    assert callback.hybrid is None

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a disk is full")

    callback.on_log = fail
    trainer = trainer_of(tmp_path, model, callback, max_steps=20, logging_strategy="steps", logging_steps=10)
    with pytest.raises(RuntimeError, match="a disk is full"):
        trainer.train()
    callback.close()
    assert tiny.hooks_of(model) == before
    assert tiny.hooks_of_optimizer(trainer.optimizer.optimizer) == 0


def test_a_checkpoint_without_a_state_begins_prediction_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10, "max_steps": 20}
    trained(tmp_path, None, **saving)
    folder = tmp_path / "out" / "checkpoint-10"
    trained(tmp_path, tiny.QUICK, **saving, resume=str(folder))
    assert "no hybrid.safetensors in" in capsys.readouterr().err
    write_state(
        folder / "hybrid.safetensors", {"hybrid": {"version": 9}, "run_id": "a", "runs_dir": str(tmp_path)}
    )
    with pytest.raises(CheckpointError, match="not a state of Hybrid"):
        trained(tmp_path, tiny.QUICK, **saving, resume=str(folder), options={"resume_from": folder})


def test_a_state_comes_back_from_its_file_to_the_bit_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    shared = torch.tensor([0.1, float("nan")])
    state = {"a": [shared, shared[:1], {"b": 0.1, "c": None}], "d": torch.tensor([1 << 40])}
    write_state(tmp_path / "x.safetensors", state)
    found = read_state(tmp_path / "x.safetensors")
    assert torch.equal(found["a"][0].view(torch.int32), shared.view(torch.int32))
    assert torch.equal(found["a"][1], shared[:1])
    assert (found["a"][2], found["d"].item()) == ({"b": 0.1, "c": None}, 1 << 40)
    whole = (tmp_path / "x.safetensors").read_bytes()
    for damaged in (b"", whole[:40], whole[:-4], b"\x80\x04" + whole):
        (tmp_path / "x.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no state of prediction"):
            read_state(tmp_path / "x.safetensors")


def test_a_loss_that_the_model_does_not_return_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    callback = HybridCallback(**tiny.options(tmp_path, tiny.QUICK))
    trainer = trainer_of(tmp_path, tiny.llama(), callback, label_smoothing_factor=0.1)
    with pytest.raises(UserError, match="label_smoothing_factor"):
        trainer.train()
    callback.close()


@pytest.mark.parametrize(
    ("schedule", "options", "start"),
    [
        ("constant", {}, None),
        ("linear", {}, 80),
        ("cosine", {}, 80),
        ("warmup_stable_decay", {"num_decay_steps": 30}, 70),
    ],
)
def test_the_tail_of_the_rate_is_where_the_schedule_has_it(
    schedule: str, options: dict[str, int], start: int | None
) -> None:
    assert decay_start_step(schedule, 100, options) == start
