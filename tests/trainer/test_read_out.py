"""Laws of the read-out: evaluating an average changes no bit of training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import sealed_folder
from common.errors import SettingsError
from common.messages import Evaluation, Observation, Outcome
from tests.trainer.small_job import bits
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings, weights_of
from trainer_node import checkpoint
from trainer_node.assembly import prepare_task
from trainer_node.checkpoint import Checkpoints
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop
from trainer_node.read_out import weights_that_count

AVERAGE = ("trainer.read_out=average", "trainer.basis.average_share=0.3")


def run(
    root: Path, *overrides: str, resume: Path | None = None, stop_at: int = 0
) -> tuple[Loop, Housekeeping]:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.3))
    checkpoints = Checkpoints(root, keep=9, on_failure=pytest.fail)
    housekeeping = Housekeeping(links.emit, checkpoints)

    def between(loop: Loop) -> None:
        housekeeping(loop)
        loop.stop_requested = 0 < stop_at <= loop.progress.step

    loop = tiny_loop(links, tiny_settings(*overrides), housekeeping=between)
    if resume is None:
        housekeeping.begin(loop)
    else:
        housekeeping.load(checkpoint.load(resume, loop))
    loop.run()
    loop.links = links
    if stop_at:
        checkpoints.close()
    return loop, housekeeping


def raw(loop: Loop) -> list[bytes]:
    return [bits(w) for w in weights_of(loop)]


def test_training_is_the_same_to_the_last_bit_whatever_is_read_out(tmp_path: Path) -> None:
    plain, _ = run(tmp_path / "weights", "trainer.basis.average_share=0.3")
    averaged, _ = run(tmp_path / "average", *AVERAGE)
    assert raw(plain) == raw(averaged)
    for kind in (Observation, Outcome):
        assert repr(plain.links.of(kind)) == repr(averaged.links.of(kind))
    extra = averaged.ledger.passes["verification"] - plain.ledger.passes["verification"]
    assert extra == 2 * len(averaged.links.of(Evaluation))


@pytest.mark.parametrize("prefers_average", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_guard_batches_decide_and_afterwards_every_bit_is_as_before(
    prefers_average: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = tiny_loop(ScriptedLinks(), tiny_settings(*AVERAGE, f"trainer.basis.dtype={dtype}"))
    loop.run()
    before, state = raw(loop), {n: bits(t) for n, t in loop.basis.tensors().items()}
    losses = iter([2.0, 1.0 if prefers_average else 2.0])
    monkeypatch.setattr(loop, "guard_loss", lambda: next(losses))
    wanted = [p.detach() + loop.basis.averages.pull_back(i) for i, p in enumerate(loop.basis.parameters)]
    with weights_that_count(loop) as is_average:
        assert is_average is prefers_average
        if prefers_average:
            assert [bits(p) for p in loop.basis.parameters] == [bits(w) for w in wanted]
        assert (raw(loop) != before) is prefers_average
    assert raw(loop) == before
    assert {n: bits(t) for n, t in loop.basis.tensors().items()} == state


def test_an_error_during_the_evaluation_puts_the_weights_back() -> None:
    loop = tiny_loop(ScriptedLinks(), tiny_settings(*AVERAGE))
    loop.run()
    before = raw(loop)
    losses = iter([2.0, 1.0])
    loop.guard_loss = lambda: next(losses)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt), weights_that_count(loop):
        raise KeyboardInterrupt
    assert raw(loop) == before


def test_the_finished_model_keeps_the_average_and_its_last_checkpoint_both(tmp_path: Path) -> None:
    loop, housekeeping = run(tmp_path, *AVERAGE)
    trained = raw(loop)
    losses = iter([2.0, 1.0])
    loop.guard_loss = lambda: next(losses)  # type: ignore[method-assign]
    housekeeping.end(loop, emergency=False)
    assert raw(loop) != trained
    newest = sealed_folder.folders(tmp_path)[0]
    saved = load_file(newest / "model.safetensors")
    names = [name for name, _ in loop.task.model.named_parameters()]
    assert [bits(saved[name]) for name in names] == trained
    model = prepare_task(loop.settings).model
    checkpoint.load_weights(newest, model)
    assert [bits(p) for p in model.parameters()] == raw(loop)
    assert loop.links.of(Evaluation)[-1].loss == housekeeping.last_loss


def test_a_stopped_run_resumes_to_the_same_last_bit_with_an_average_that_grows(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", *AVERAGE)
    run(tmp_path / "parts", *AVERAGE, stop_at=33)
    resumed, _ = run(tmp_path / "parts", *AVERAGE, resume=sealed_folder.folders(tmp_path / "parts")[0])
    assert raw(resumed) == raw(whole)
    for name, tensor in whole.basis.tensors().items():
        assert torch.equal(tensor, resumed.basis.tensors()[name]), name


def test_an_average_that_nobody_keeps_is_a_mistake_in_the_settings() -> None:
    settings = tiny_settings("trainer.read_out=average", "predictor.enabled=false")
    with pytest.raises(SettingsError, match="averaged weights") as error:
        tiny_loop(ScriptedLinks(), settings)
    assert "\n" not in str(error.value)
