"""The methods around the base optimizer against slow, obvious twins."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from common.config import load_settings
from common.errors import EnvironmentFault
from common.schedule import rate_factor
from common.settings import TrainerSettings
from trainer_node.groups import parameter_groups
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.race.optimizers import METHODS, EmaNesterov, Method, MethodInput, Snoo
from trainer_node.step import train_step

CPU = torch.device("cpu")
STEPS = 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mlp(inputs)))


def settings(*overrides: str) -> TrainerSettings:
    return load_settings(
        preset="race-regression",
        overrides=[f"trainer.steps={STEPS}", "trainer.schedule.warmup_steps=4", *overrides],
    ).trainer


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 6, generator=random)
    return inputs, inputs[:, :3].sin()


class Run:
    """Net and optimizers taking steps; `advance` is one ordinary step, without any method."""

    def __init__(self, options: TrainerSettings) -> None:
        torch.manual_seed(3)
        self.options, self.model = options, Net()
        self.optimizers = build_optimizers(self.model, options.optimizer, CPU)
        self.groups = parameter_groups(self.model)

    def loss_of(self, item: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (self.model(item[0]) - item[1]).square().mean()

    def advance(self, step: int, optimizers: list[torch.optim.Optimizer] | None = None) -> None:
        chosen = self.optimizers if optimizers is None else optimizers
        set_rates(chosen, rate_factor(step, STEPS, self.options.schedule))
        train_step(self.model, self.loss_of, [batch(step)], chosen, self.groups, clip_norm=0.5)

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    @torch.no_grad()
    def put(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.model.parameters(), values, strict=True):
            parameter.copy_(value)


def method_run(name: str, options: TrainerSettings, **knobs: float) -> tuple[Run, Method]:
    run = Run(options)
    method = METHODS[name](MethodInput(model=run.model, device=CPU, settings=options, knobs=knobs))
    return run, method


def take_steps(run: Run, method: Method, steps: int = STEPS) -> None:
    for step in range(steps):
        method.before_step(step)
        run.advance(step, method.optimizers)
        method.after_step(step)


def assert_close(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_snoo_is_nesterov_on_the_displacement_of_k_steps() -> None:
    options, rate, momentum, inner = settings(), 0.7, 0.5, 5
    run, method = method_run("snoo", options, inner_steps=inner, outer_rate=rate, outer_momentum=momentum)
    take_steps(run, method)
    twin = Run(options)
    slow = twin.weights()
    velocity = [torch.zeros_like(w) for w in slow]
    for step in range(STEPS):
        twin.advance(step)
        if step % inner == inner - 1:
            for i, fast in enumerate(twin.weights()):
                pseudo_gradient = slow[i] - fast
                velocity[i] = momentum * velocity[i] + pseudo_gradient
                slow[i] = slow[i] - rate * (pseudo_gradient + momentum * velocity[i])
            twin.put(slow)
    assert_close(run.weights(), twin.weights())


def test_snoo_with_rate_one_and_no_momentum_is_the_base_optimizer() -> None:
    run, method = method_run("snoo", settings(), inner_steps=3, outer_rate=1.0, outer_momentum=0.0)
    assert isinstance(method, Snoo)
    take_steps(run, method)
    twin = Run(settings())
    for step in range(STEPS):
        twin.advance(step)
    assert_close(run.weights(), twin.weights())


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_ema_nesterov_takes_the_gradient_at_the_pushed_point_and_steps_from_the_weights(
    schedule: str,
) -> None:
    options = settings(f"trainer.schedule.name='{schedule}'")
    run, method = method_run("ema-nesterov", options, push_steps=6.0, push_average_steps=4.0)
    assert isinstance(method, EmaNesterov)
    take_steps(run, method)
    twin = Run(options)
    average = [torch.zeros_like(w) for w in twin.weights()]
    for step in range(STEPS):
        here = twin.weights()
        push = method.push_at(step)
        twin.put([w + push * e for w, e in zip(here, average, strict=True)])
        ahead = twin.loss_of(batch(step))
        gradients = torch.autograd.grad(ahead, list(twin.model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        twin.put(here)
        for parameter, gradient in zip(twin.model.parameters(), gradients, strict=True):
            parameter.grad = gradient * min(1.0, 0.5 / (float(norm) + 1e-6))
        set_rates(twin.optimizers, rate_factor(step, STEPS, options.schedule))
        for optimizer in twin.optimizers:
            optimizer.step()
        for e, before, after in zip(average, here, twin.weights(), strict=True):
            e += (after - before - e) / 4.0
    assert_close(run.weights(), twin.weights())


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear"])
def test_ema_nesterov_does_not_push_in_warm_up_nor_in_the_tail_and_scales_with_the_rate(
    schedule: str,
) -> None:
    options = settings(f"trainer.schedule.name='{schedule}'")
    _, method = method_run("ema-nesterov", options, push_steps=6.0, push_average_steps=4.0)
    assert isinstance(method, EmaNesterov)
    pushes = [method.push_at(step) for step in range(STEPS)]
    assert pushes[:4] == [0.0] * 4
    assert pushes[-2:] == [0.0] * 2
    factors = [rate_factor(step, STEPS, options.schedule) for step in range(STEPS)]
    pushed = [(push, factor) for push, factor in zip(pushes, factors, strict=True) if push]
    assert len(pushed) > STEPS // 3
    assert all(push == 6.0 * factor for push, factor in pushed)


def test_ema_nesterov_without_a_push_is_the_base_optimizer_bit_for_bit() -> None:
    run, method = method_run("ema-nesterov", settings(), push_steps=0.0, push_average_steps=4.0)
    take_steps(run, method)
    twin = Run(settings())
    for step in range(STEPS):
        twin.advance(step)
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), twin.weights(), strict=True))


def test_lookahead_keeps_schedule_and_clipping_and_goes_part_of_the_way_back() -> None:
    options = settings()
    run, method = method_run("lookahead", options, inner_steps=5, slow_share=0.3)
    take_steps(run, method)
    twin = Run(options)
    slow = twin.weights()
    for step in range(STEPS):
        twin.advance(step)
        if step % 5 == 4:
            slow = [s + 0.3 * (w - s) for s, w in zip(slow, twin.weights(), strict=True)]
            twin.put(slow)
    assert_close(run.weights(), twin.weights())


def test_averaged_weights_are_the_exponential_average_of_the_weights_after_each_step() -> None:
    options = settings()
    run, method = method_run("ema", options, average_share=0.25)
    twin, average = Run(options), None
    for step in range(STEPS):
        method.before_step(step)
        run.advance(step, method.optimizers)
        method.after_step(step)
        twin.advance(step)
        weights = twin.weights()
        average = average or weights
        average = [a + (w - a) / (0.25 * STEPS) for a, w in zip(average, weights, strict=True)]
    with method.read_out():
        assert_close(run.weights(), average)
    assert all(torch.equal(a, b) for a, b in zip(run.weights(), twin.weights(), strict=True))


def test_schedule_free_with_our_warm_up_is_the_library_with_its_own() -> None:
    import schedulefree

    options = settings("trainer.schedule.name='constant'")
    run, method = method_run("schedule-free", options)
    take_steps(run, method)
    twin = Run(options)
    decayed, plain = ([p for p in twin.model.parameters() if (p.ndim > 1) == wanted] for wanted in (1, 0))
    optimizer = schedulefree.AdamWScheduleFree(
        [{"params": decayed, "weight_decay": options.optimizer.weight_decay}, {"params": plain}],
        lr=options.optimizer.rate,
        betas=(options.optimizer.beta1, options.optimizer.beta2),
        warmup_steps=4,
    )
    optimizer.train()
    for step in range(STEPS):
        train_step(twin.model, twin.loss_of, [batch(step)], [optimizer], twin.groups, clip_norm=0.5)
    assert_close(run.weights(), twin.weights())
    optimizer.eval()
    with method.read_out():
        assert_close(run.weights(), twin.weights())


def all_knobs() -> dict[str, float]:
    return {
        "average_share": 0.25, "inner_steps": 5, "slow_share": 0.5, "outer_rate": 0.7,
        "outer_momentum": 0.5, "push_steps": 5.0, "push_average_steps": 4.0,
    }  # fmt: skip


@pytest.mark.parametrize("name", list(METHODS))
def test_reading_in_the_middle_changes_no_later_step(name: str) -> None:
    def final(*, reads: bool) -> list[torch.Tensor]:
        run, method = method_run(name, settings(), **all_knobs())
        for step in range(STEPS):
            if reads:
                before = run.weights()
                with method.read_out():
                    lent = run.weights()
                assert all(torch.equal(a, b) for a, b in zip(before, run.weights(), strict=True))
                lends_others = any(not torch.equal(a, b) for a, b in zip(before, lent, strict=True))
                assert lends_others == (method.has_read_out and step > 1) or step < 2
            method.before_step(step)
            run.advance(step, method.optimizers)
            method.after_step(step)
        return run.weights()

    left, right = final(reads=True), final(reads=False)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_missing_library_is_one_line_that_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "schedulefree", None)
    with pytest.raises(EnvironmentFault, match=r"hybrid-predict-trainer\[race\]") as caught:
        method_run("schedule-free", copy.copy(settings()))
    assert "\n" not in str(caught.value)
