"""Laws of the momentum direction: each optimizer against a slow twin, and against its own next step."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from common.settings import OptimizerSettings
from tests.trainer.references_optim import (
    slow_adam_8bit_direction,
    slow_adam_direction,
    slow_lion_direction,
    slow_muon_direction,
    slow_sgd_direction,
)
from tests.trainer.small_job import bits
from tests.trainer.small_optim import CPU, EVERY_OPTIMIZER, by_name, routed, run_steps, tiny_gpt
from trainer_node.optim import directions
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.optim.directions import add_direction_rule, knows_momentum, momentum_directions
from trainer_node.optim.state import optimizer_tensors


def test_direction_is_zero_before_the_first_step():
    model = tiny_gpt()
    directions = dict(momentum_directions(build_optimizers(model, OptimizerSettings(), CPU)))
    assert set(directions) == set(model.parameters())
    assert all(not d.any() and d.shape == p.shape for p, d in directions.items())


def test_adamw_direction_equals_the_slow_twin():
    gradients = [0.3, -0.1, 0.25, 0.7]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], lr=0.02, betas=(0.8, 0.9))
    for gradient in gradients:
        weight.grad = torch.tensor([gradient])
        optimizer.step()
    ((_, direction),) = momentum_directions([optimizer])
    twin = slow_adam_direction(gradients, rate=0.02, beta1=0.8, beta2=0.9)
    assert direction.item() == pytest.approx(twin, rel=1e-5)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_muon_direction_equals_the_slow_twin_up_to_bfloat16(shape, scaling):
    random = np.random.default_rng(0)
    gradients = [random.normal(size=shape) for _ in range(4)]
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([weight], lr=0.1, momentum=0.9, adjust_lr_fn=scaling)
    for gradient in gradients:
        weight.grad = torch.from_numpy(gradient).float()
        optimizer.step()
    ((_, direction),) = momentum_directions([optimizer])
    twin = torch.from_numpy(slow_muon_direction(gradients, rate=0.1, momentum=0.9, scaling=scaling)).float()
    # bfloat16 has 8 bits and five quintic iterations amplify: 3 % of the norm was measured, 5 % allowed.
    assert (direction - twin).norm() < 0.05 * twin.norm()


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_direction_equals_the_slow_twin(nesterov):
    gradients = [torch.tensor([0.5]), torch.tensor([-0.2]), torch.tensor([0.1])]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.7, nesterov=nesterov)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    ((_, direction),) = momentum_directions([optimizer])
    torch.testing.assert_close(direction, slow_sgd_direction(gradients, rate=0.1, momentum=0.7))


def test_plain_sgd_has_a_zero_direction():
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    ((_, direction),) = momentum_directions([optimizer])
    assert not direction.any()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_direction_is_the_step_just_taken(name):
    model = tiny_gpt()
    optimizers = build_optimizers(model, OptimizerSettings(name=name, weight_decay=0.0), CPU)
    set_rates(optimizers, 0.5)
    run_steps(model.parameters(), optimizers, 3)
    before = {p: p.detach().clone() for p in model.parameters()}
    run_steps(model.parameters(), optimizers, 1)
    directions = dict(momentum_directions(optimizers))
    for parameter in routed(optimizers, torch.optim.AdamW):
        torch.testing.assert_close(
            parameter.detach() - before[parameter], directions[parameter], rtol=1e-3, atol=1e-6
        )


def test_muon_direction_is_the_step_for_a_gradient_equal_to_the_momentum():
    model = tiny_gpt()
    optimizers = build_optimizers(model, OptimizerSettings(name="muon", weight_decay=0.1), CPU)
    run_steps(model.parameters(), optimizers, 3)
    directions = dict(momentum_directions(optimizers))
    (muon,) = (o for o in optimizers if isinstance(o, torch.optim.Muon))
    (group,) = muon.param_groups
    wanted = {}
    for parameter in group["params"]:
        parameter.grad = muon.state[parameter]["momentum_buffer"].clone()
        decayed = parameter.detach() * (1 - group["lr"] * group["weight_decay"])
        wanted[parameter] = decayed + directions[parameter]
    muon.step()
    for parameter, expected in wanted.items():
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_asking_for_directions_changes_no_bit_of_state_or_weights(name, dtype):
    model = tiny_gpt().to(dtype)
    optimizers = build_optimizers(model, OptimizerSettings(name=name), CPU)
    run_steps(model.parameters(), optimizers, 2)
    states = [bits(t) for t in optimizer_tensors(optimizers)]
    weights = copy.deepcopy(model.state_dict())
    first = dict(momentum_directions(optimizers))
    second = dict(momentum_directions(optimizers))
    assert all(torch.equal(first[p], second[p]) and first[p].dtype == dtype for p in first)
    assert [bits(t) for t in optimizer_tensors(optimizers)] == states
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


SHAPES = [(64, 64), (70, 71), (2, 3)]  # bitsandbytes keeps 8 bits from 4096 weights on, in blocks of 256


def after_steps(name, *, dtype=torch.float32, count=4, **options):
    """Parameters and their one optimizer after `count` steps, without decay."""
    torch.manual_seed(0)
    model = nn.ParameterList(nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES)
    optimizers = build_optimizers(model, OptimizerSettings(name=name, weight_decay=0.0, **options), CPU)
    set_rates(optimizers, 0.5)
    run_steps(list(model), optimizers, count)
    return list(model), optimizers[0]


@pytest.mark.parametrize("name", by_name("lion"))
def test_lion_direction_equals_the_slow_twin(name):
    gradients = [0.3, -0.1, 0.25, -2.0]
    weights = nn.Parameter(torch.zeros(1, 1))
    (optimizer,) = build_optimizers(
        nn.ParameterList([weights]), OptimizerSettings(name=name, rate=0.02, beta1=0.5, beta2=0.9), CPU
    )
    for gradient in gradients:
        weights.grad = torch.tensor([[gradient]])
        optimizer.step()
        ((_, direction),) = momentum_directions([optimizer])
        seen = gradients[: gradients.index(gradient) + 1]
        assert direction.item() == pytest.approx(slow_lion_direction(seen, rate=0.02, beta2=0.9))


@pytest.mark.parametrize("name", by_name("adamw8bit"))
def test_8bit_adam_direction_equals_the_slow_twin_block_by_block(name):
    parameters, optimizer = after_steps(name, beta1=0.8, beta2=0.9)
    found = dict(momentum_directions([optimizer]))
    (group,) = optimizer.param_groups
    for parameter in parameters:
        twin = slow_adam_8bit_direction(
            optimizer.state[parameter], rate=group["lr"], beta1=0.8, beta2=0.9, eps=group["eps"]
        )
        np.testing.assert_allclose(found[parameter].reshape(-1), twin, rtol=2e-5)
    assert {optimizer.state[p]["state1"].dtype for p in parameters} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("name", by_name("adamw8bit", "lion"))
def test_direction_is_the_step_for_a_gradient_equal_to_the_momentum(name):
    """Read out of the step itself: with which gradient does the optimizer leave its momentum as it is?"""
    parameters, optimizer = after_steps(name)
    found = dict(momentum_directions([optimizer]))
    before = {p: p.detach().clone() for p in parameters}
    for parameter in parameters:
        state = optimizer.state[parameter]
        stored = state["exp_avg"] if name == "lion" else directions._dequantised(state, "1")
        parameter.grad = stored.clone()
    optimizer.step()
    for parameter in parameters:
        step = parameter.detach() - before[parameter]
        torch.testing.assert_close(found[parameter], step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", by_name("adamw8bit"))
def test_a_second_moment_that_8_bits_store_as_zero_makes_no_huge_step(name):
    """A GPU stores as zero what is less than 10^-7 of its block's largest; the CPU's code rounds it up."""
    parameters, optimizer = after_steps(name)
    state = optimizer.state[parameters[0]]
    assert state["qmap2"][0] == 0.0
    state["state2"].zero_()
    (_, direction), *_ = momentum_directions([optimizer])
    assert 0.0 < direction.abs().max() < 10 * optimizer.param_groups[0]["lr"]


def used_adagrad(shape=(3, 2)):
    torch.manual_seed(0)
    weights = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.Adagrad([weights], lr=0.1)
    run_steps([weights], [optimizer], 2)
    return weights, optimizer


def test_an_unknown_optimizer_has_a_zero_direction_and_is_known_to_be_unknown():
    weights, optimizer = used_adagrad()
    assert not knows_momentum(optimizer)
    assert knows_momentum(torch.optim.AdamW([weights]))
    ((parameter, direction),) = momentum_directions([optimizer])
    assert parameter is weights
    assert direction.shape == weights.shape
    assert not direction.any()


def test_a_taught_rule_gives_the_direction_of_its_kind_and_of_subclasses(monkeypatch):
    monkeypatch.setattr(directions, "_RULES", dict(directions._RULES))

    class OwnAdagrad(torch.optim.Adagrad):
        pass

    weights, optimizer = used_adagrad()
    optimizer.__class__ = OwnAdagrad
    add_direction_rule(torch.optim.Adagrad, lambda p, state, group: -group["lr"] * state["sum"].sqrt())
    assert knows_momentum(optimizer)
    ((_, direction),) = momentum_directions([optimizer])
    assert torch.equal(direction, -0.1 * optimizer.state[weights]["sum"].sqrt())


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's AcceleratedOptimizer: an Optimizer by class, with all it has in `.optimizer`."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self, closure=None):
        self.optimizer.step(closure)


def test_a_wrapped_optimizer_has_the_direction_of_the_one_inside_whatever_patched_its_step():
    _, bare = after_steps("sgd")
    wanted = [bits(d) for _, d in momentum_directions([bare])]
    twice = Wrapper(Wrapper(bare))
    torch.optim.lr_scheduler.LambdaLR(bare, lambda step: 1.0)  # patches `step`
    assert knows_momentum(twice)
    assert [bits(d) for _, d in momentum_directions([twice])] == wanted
    assert any(any(d) for d in wanted)
