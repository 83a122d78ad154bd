"""Laws of the state-space model: what may move what, and that seeing nothing new is imagining."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from predictor_node import rssm as rssm_module
from predictor_node.rssm import UNIFORM_SHARE, Batch, Latent, Rssm, Sizes

SIZES = Sizes(
    features=6, actions=8, directions=3, hidden=24, codes=4, classes=5, embedding=12, member_width=8
)
T, B = 16, 3


@pytest.fixture
def rssm() -> Rssm:
    return Rssm(SIZES, seed=4)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def batch_of(generator: torch.Generator) -> Batch:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(T, B, *shape, generator=generator)

    return Batch(
        features=drawn(SIZES.features),
        actions=drawn(SIZES.actions),
        going_on=torch.ones(T, B, 1),
        loss=drawn().double(),
        reference=drawn().double(),
        scale=torch.ones(T, B, dtype=torch.float64),
        drift=drawn(SIZES.directions),
        refused=(drawn() > 0.0).float(),
        bags=torch.ones(T, B, SIZES.members),
    )


def noise_of(generator: torch.Generator) -> Tensor:
    return torch.empty(T, B, SIZES.code).exponential_(generator=generator)


def seen(rssm: Rssm, batch: Batch, latent: Latent, noise: Tensor | None = None) -> tuple[Latent, Tensor]:
    acted = rssm.acted(batch.actions, batch.going_on)
    return rssm.observe(latent, acted, rssm.evidence(batch.features), batch.going_on, noise)


def some_latent(generator: torch.Generator, scale: float) -> Latent:
    return Latent(
        scale * torch.randn(B, SIZES.hidden, generator=generator),
        scale * torch.rand(B, SIZES.code, generator=generator),
    )


def moved(rssm: Rssm, loss: Tensor) -> set[str]:
    """Names of the parts that a loss trains."""
    rssm.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name.split(".")[0]
        for name, p in rssm.named_parameters()
        if p.grad is not None and bool((p.grad != 0.0).any())
    }


@pytest.mark.parametrize(("part", "learner", "other"), [
    ("dynamics", "prior", "posterior"), ("representation", "posterior", "prior"),
])  # fmt: skip
def test_each_side_of_the_kl_balance_moves_its_own_network_and_leaves_the_other_alone(
    rssm: Rssm,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    learner: str,
    other: str,
) -> None:
    """On one tick: over several, the prior's own loss also reaches older posteriors through the memory."""
    monkeypatch.setattr(rssm_module, "FREE_NATS", 0.0)
    one_tick = Batch(*(field[:1] for field in batch_of(generator)))
    touched = moved(rssm, rssm.loss(one_tick, noise_of(generator)[:1])[part])
    assert f"{learner}_out" in touched
    assert not {f"{other}_in", f"{other}_out", "decode_in", "head_end", "head_weight"} & touched


def test_below_the_free_nats_the_divergence_moves_nothing(
    rssm: Rssm, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rssm_module, "FREE_NATS", 1e3)
    parts = rssm.loss(batch_of(generator), noise_of(generator))
    assert moved(rssm, parts["dynamics"]) == set()
    assert float(parts["dynamics"].detach()) == 1e3


def test_no_class_is_less_likely_than_the_uniform_share_however_sure_the_network_is(
    rssm: Rssm, generator: torch.Generator
) -> None:
    chances = rssm._probabilities(1e4 * torch.randn(50, SIZES.code, generator=generator))
    assert float(chances.min()) == pytest.approx(UNIFORM_SHARE / SIZES.classes)
    per_code = chances.unflatten(-1, (SIZES.classes, SIZES.codes)).sum(-2)
    torch.testing.assert_close(per_code, torch.ones(50, SIZES.codes))


def test_drawn_codes_are_one_hot_come_with_their_probability_and_pass_gradients_through(
    rssm: Rssm, generator: torch.Generator
) -> None:
    logits = torch.randn(1, SIZES.code, generator=generator).expand(4000, -1).clone().requires_grad_()
    chances = rssm._probabilities(logits)
    noise = torch.empty(4000, SIZES.code).exponential_(generator=generator)
    code = rssm.draw(chances, noise)
    shaped = code.detach().unflatten(-1, (SIZES.classes, SIZES.codes))
    torch.testing.assert_close(shaped.amax(-2), torch.ones(4000, SIZES.codes))
    torch.testing.assert_close(shaped.sum(-2), torch.ones(4000, SIZES.codes))
    assert float((code.mean(0) - chances[0]).detach().abs().max()) < 0.04
    weights = torch.randn(SIZES.code, generator=generator)
    drawn_gradient = torch.autograd.grad((code * weights).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(drawn_gradient, torch.autograd.grad((chances * weights).sum(), logits)[0])


def test_nothing_before_a_first_tick_matters_after_it(rssm: Rssm, generator: torch.Generator) -> None:
    batch = batch_of(generator)
    batch.going_on[5, 1] = 0.0
    noise = noise_of(generator)
    one, _ = seen(rssm, batch, some_latent(generator, 0.1), noise)
    changed = batch._replace(features=batch.features.clone(), actions=batch.actions.clone())
    changed.features[:5] += 1.0
    changed.actions[:6] += 1.0  # the action that led to a first tick belongs to what was before
    other, _ = seen(rssm, changed, some_latent(generator, 0.9), noise)
    torch.testing.assert_close(one.hidden[5:, 1], other.hidden[5:, 1], rtol=0.0, atol=0.0)
    assert not torch.allclose(one.hidden[5:, 0], other.hidden[5:, 0])


def test_observing_what_tells_nothing_equals_imagining(rssm: Rssm, generator: torch.Generator) -> None:
    """The posterior is made the prior: same weights, and evidence that is only the prior's bias."""
    with torch.no_grad():
        rssm.posterior_in.copy_(rssm.prior_in.weight)
        rssm.posterior_embed.weight.zero_()
        rssm.posterior_embed.bias.copy_(rssm.prior_in.bias)
        rssm.posterior_out.weight.copy_(rssm.prior_out.weight)
        rssm.posterior_out.bias.copy_(rssm.prior_out.bias)
    batch, start = batch_of(generator), some_latent(generator, 0.5)
    observed, _ = seen(rssm, batch, start)
    imagined = rssm.imagine(start, rssm.act(batch.actions))
    torch.testing.assert_close(observed, imagined, rtol=0.0, atol=1e-6)


def test_seeing_something_differs_from_imagining(rssm: Rssm, generator: torch.Generator) -> None:
    batch, start = batch_of(generator), some_latent(generator, 0.5)
    observed, _ = seen(rssm, batch, start)
    assert not torch.allclose(observed.code, rssm.imagine(start, rssm.act(batch.actions)).code)


class _PlainProduct:
    """The slow twin of SharedProduct: autograd adds up one matrix per tick."""

    def __init__(self, added: Tensor, weight: Tensor) -> None:
        self._added, self._weight = added, weight

    def __call__(self, tick: int, x: Tensor) -> Tensor:
        return self._added[tick] + x @ self._weight


def test_gradients_gathered_over_all_ticks_equal_those_of_plain_autograd(
    rssm: Rssm, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, noise = batch_of(generator), noise_of(generator)
    batch.going_on[7, 0] = 0.0
    rssm.loss(batch, noise)["total"].backward()
    gathered = [p.grad.clone() for p in rssm.parameters()]
    rssm.zero_grad()
    monkeypatch.setattr(rssm_module, "SharedProduct", _PlainProduct)
    rssm.loss(batch, noise)["total"].backward()
    for (name, p), gradient in zip(rssm.named_parameters(), gathered, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_last_tick_of_a_rollout_teaches_the_tick_at_which_it_began(
    rssm: Rssm, generator: torch.Generator
) -> None:
    batch = batch_of(generator)
    batch.features.requires_grad_()
    latents, _ = seen(rssm, batch, rssm.sizes.initial(B), noise_of(generator))
    start = Latent(latents.hidden[3], latents.code[3])
    imagined = rssm.imagine(start, rssm.act(batch.actions[4:12]))
    (gradient,) = torch.autograd.grad(imagined.hidden[-1].sum(), batch.features)
    assert (gradient[3].abs().sum(-1) > 0.0).all()
    assert (gradient[4:] == 0.0).all()


def test_a_member_learns_only_from_its_own_bag(rssm: Rssm, generator: torch.Generator) -> None:
    batch = batch_of(generator)
    batch.bags[:, :, 2] = 0.0
    rssm.loss(batch, noise_of(generator))["total"].backward()
    touched = rssm.head_weight.grad.abs().sum((1, 2)) > 0.0
    assert touched.tolist() == [True, True, False, True, True]


def test_targets_behind_a_new_beginning_or_unknown_are_not_learned(
    rssm: Rssm, generator: torch.Generator
) -> None:
    batch, noise = batch_of(generator), noise_of(generator)
    batch.going_on[4] = 0.0  # cuts the rollout from 3 at its first tick
    batch.going_on[8] = 0.0  # and the one from 7
    batch.loss[:, 0] = float("nan")
    parts = rssm.loss(batch, noise)
    assert [parts[name].item() for name in ("loss_change", "drift", "refusal")] == [0.0, 0.0, 0.0]
    assert parts["features"].item() > 0.0
    assert torch.isfinite(parts["total"])
