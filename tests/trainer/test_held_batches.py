"""Laws of what is held of a batch, so that a jump is judged on the same one before and after."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from trainer_node import held_batches
from trainer_node.held_batches import HeldBatches, bound_now, loss_in

batch = torch.zeros(2)  # as a script at module level has it


def test_a_closure_over_a_loop_variable_keeps_the_batch_of_its_step() -> None:
    def step_closures() -> list:
        closures = []
        for number in range(3):
            inputs = torch.full((2,), float(number))
            closures.append(bound_now(lambda: inputs.sum()))  # noqa: B023
        return closures

    assert [float(closure()) for closure in step_closures()] == [0.0, 2.0, 4.0]


def test_a_closure_over_a_global_keeps_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "batch", torch.ones(2))
    bound = bound_now(lambda: batch.sum())
    nested = bound_now(lambda: (lambda: batch.sum())())
    monkeypatch.setitem(globals(), "batch", torch.full((2,), 9.0))
    assert (float(bound()), float(nested())) == (2.0, 2.0)


def test_a_buffer_that_the_loader_overwrites_is_copied() -> None:
    buffer = {"x": torch.ones(2)}
    bound, given = bound_now(lambda: buffer["x"].sum()), bound_now(partial(torch.sum, buffer["x"]))
    buffer["x"].fill_(5.0)
    assert (float(bound()), float(given())) == (2.0, 2.0)


def test_parameters_are_never_copied() -> None:
    weight = nn.Parameter(torch.ones(2))
    bound = bound_now(lambda: weight.sum())
    with torch.no_grad():
        weight.fill_(3.0)
    assert bound().item() == 6.0


def test_a_whole_data_set_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_batches, "MAX_COPIED_BYTES", 8)
    data, index = torch.arange(4.0), torch.tensor([1])
    bound = bound_now(lambda: data[index].sum())
    index.fill_(3)
    data.add_(1.0)
    assert float(bound()) == 2.0  # the copied index, the live data


def test_the_first_batches_are_held_and_no_more() -> None:
    held = HeldBatches(nn.Linear(1, 1), torch.device("cpu"), count=2, given=None)
    for number in range(5):
        assert held.is_ready is (number >= 2)
        held.offer(partial(torch.tensor, float(number)))
    assert held.loss() == 0.5


def test_a_given_guard_replaces_holding() -> None:
    held = HeldBatches(nn.Linear(1, 1), torch.device("cpu"), count=1, given=lambda: torch.tensor(7.0))
    assert held.is_ready
    held.offer(lambda: torch.tensor(1.0))
    assert (held.loss(), held.saved()) == (7.0, [])


def test_autocast_of_the_step_is_that_of_the_check() -> None:
    model = nn.Linear(4, 4)
    held = HeldBatches(model, torch.device("cpu"), count=1, given=None)
    kinds = []

    def compute() -> torch.Tensor:
        output = model(torch.ones(1, 4))
        kinds.append(output.dtype)
        return output.float().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        held.offer(compute)
    held.loss()
    assert kinds == [torch.bfloat16]


def test_an_error_in_a_check_leaves_modes_and_random_state() -> None:
    model = nn.Sequential(nn.Dropout(0.5))
    held = HeldBatches(model, torch.device("cpu"), count=1, given=None)

    def fail() -> torch.Tensor:
        torch.rand(3)
        raise ValueError("no such batch")

    held.offer(fail)
    random = torch.get_rng_state()
    with pytest.raises(ValueError, match="no such batch"):
        held.loss()
    assert model.training
    assert model[0].training
    assert torch.equal(torch.get_rng_state(), random)


def test_the_loss_is_found_in_what_models_give() -> None:
    loss = torch.tensor(1.0)
    assert loss_in(loss) is loss
    assert loss_in({"loss": loss, "logits": torch.zeros(3)}) is loss
    assert loss_in(type("Output", (), {"loss": loss})()) is loss
    assert loss_in((1, 2)) is None
    held = HeldBatches(nn.Linear(1, 1), torch.device("cpu"), count=1, given=lambda: "words")
    with pytest.raises(TypeError, match="gave str: it must give a tensor"):
        held.loss()
