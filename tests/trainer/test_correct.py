"""Laws of the residual corrector: on a quadratic it lands on the minimum of the line."""

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import Verdict
from tests.trainer.small_job import whole
from tests.trainer.test_jump import DTYPES, OPTIMIZERS, Trial
from trainer_node.correct import HIGH, LOW, correct_jump, correction_of, slope_along
from trainer_node.jump import finish_jump
from trainer_node.step import train_step


def correction(before, after, slope, share=1.0):
    return correction_of(loss_before=before, loss_after=after, slope_after=slope, share=share)


@settings(deadline=None, max_examples=200)
@given(st.floats(0.6, 1.4), st.floats(0.1, 10), st.floats(-5, 5), st.floats(0, 1))
def test_a_parabola_is_stepped_to_its_minimum(best, curvature, lowest, share):
    def f(t):
        return lowest + curvature * (t - best) ** 2

    found = correction(f(0), f(1), 2 * curvature * (1 - best), share)
    assert found == pytest.approx(share * (best - 1), abs=1e-6)


def test_the_correction_takes_back_no_more_than_the_delta_and_adds_no_more_than_half_of_it():
    assert correction(0.0, 9.0, 10.0) == LOW
    assert correction(1.0, -8.0, -8.9) == HIGH


@pytest.mark.parametrize(
    ("before", "after", "slope"),
    [(2.0, 1.0, -1.0), (2.0, 2.5, 0.4), (2.0, 1.0, math.nan), (math.nan, 1.0, 1.0), (2.0, math.inf, 1.0)],
)
def test_without_a_minimum_or_a_number_nothing_is_corrected(before, after, slope):
    assert correction(before, after, slope) == 0.0


class Bowl:
    """A Trial whose loss is a quadratic of all weights: sum a (w - target)^2 / 2."""

    def __init__(self, share, **options):
        self.trial = Trial(**options)
        self.parameters = self.trial.job.basis.parameters
        random = torch.Generator().manual_seed(3)
        self.curvatures = [0.5 + torch.rand(p.shape, generator=random) for p in self.parameters]
        self.targets = [p.detach() + 0.02 * torch.randn(p.shape, generator=random) for p in self.parameters]
        self.trial.tools = dataclasses.replace(self.trial.tools, guard_loss=lambda: self.loss(None).item())
        self.start = whole(self.parameters)
        self.jump = self.trial.start(
            self.trial.decision(correction_share=share), first_loss=1e9, loss_noise=1.0
        )
        self.jumped = whole(self.parameters)

    def loss(self, _):
        parts = zip(self.parameters, self.curvatures, self.targets, strict=True)
        return sum((a * (p - t) ** 2).sum() / 2 for p, a, t in parts)

    def line_minimum(self):
        """The best multiple of the delta, in float64."""
        delta, a = self.jumped - self.start, whole(self.curvatures)
        return float(delta @ (a * (whole(self.targets) - self.start)) / (delta @ (a * delta)))

    def step(self, rate=0.0):
        job, jump = self.trial.job, self.jump
        for optimizer in job.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        correct = partial(correct_jump, self.trial.tools, jump) if jump.is_to_be_corrected else None
        job.basis.averages.before_step()
        train_step(
            job.model, self.loss, [None], job.optimizers, job.groups, clip_norm=1.0, after_backward=correct
        )  # fmt: skip
        job.basis.averages.after_step()
        jump.step_seconds.append(1.0)


def test_a_full_correction_lands_on_the_minimum_of_the_line():
    bowl = Bowl(1.0)
    best = min(1 + HIGH, max(1 + LOW, bowl.line_minimum()))
    bowl.step()
    outcome = bowl.jump.outcome
    assert outcome.correction == pytest.approx(best - 1, abs=1e-3)
    wanted = bowl.start + best * (bowl.jumped - bowl.start)
    np.testing.assert_allclose(whole(bowl.parameters), wanted, atol=1e-5)
    assert outcome.correction != 0.0


def test_the_slope_is_the_gradient_times_the_delta():
    bowl = Bowl(0.5)
    a, delta = whole(bowl.curvatures), bowl.jumped - bowl.start
    bowl.step()
    wanted = float((a * (bowl.jumped - whole(bowl.targets))) @ delta)
    assert bowl.jump.outcome.slope_after == pytest.approx(wanted, rel=1e-4)


def test_it_acts_once_and_only_when_asked():
    bowl = Bowl(1.0)
    bowl.step()
    first = bowl.jump.outcome.correction
    bowl.step()
    assert bowl.jump.outcome.correction == first
    unasked = Bowl(0.0)
    assert not unasked.jump.is_to_be_corrected
    unasked.step()
    assert unasked.jump.outcome.correction == 0.0
    assert math.isnan(unasked.jump.outcome.slope_after)
    np.testing.assert_array_equal(whole(unasked.parameters), unasked.jumped)


def test_a_weight_without_a_gradient_has_no_slope():
    bowl = Bowl(1.0)
    for parameter in bowl.parameters:
        parameter.grad = None
    assert slope_along(bowl.trial.job.basis, bowl.trial.tools.store) == 0.0


@OPTIMIZERS
@DTYPES
def test_a_refused_jump_with_a_correction_leaves_every_bit_as_it_was(optimizer, dtype):
    trial = Trial(optimizer=optimizer, dtype=dtype, guard=[2.0, 1.9, 2.5])
    before = trial.state()
    jump = trial.start(trial.decision(correction_share=1.0))
    job = trial.job
    job.basis.averages.before_step()
    train_step(
        job.model, job.loss_of, [job.batch(3)], job.optimizers, job.groups, clip_norm=1.0,
        after_backward=lambda: correct_jump(trial.tools, jump),
    )  # fmt: skip
    job.basis.averages.after_step()
    jump.step_seconds.append(1.0)
    assert math.isfinite(jump.outcome.slope_after)
    assert finish_jump(trial.tools, jump).verdict is Verdict.REFUSED
    assert trial.state() == before


def test_the_cosine_is_of_the_steps_without_the_correction():
    bowl = Bowl(1.0)
    bowl.step(rate=0.0)
    assert bowl.jump.outcome.correction != 0.0
    basis = bowl.trial.job.basis
    torch.testing.assert_close(basis.sampled(basis.parameters), bowl.jump.delta.weights_Gm, atol=1e-5, rtol=0)
