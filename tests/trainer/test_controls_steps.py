"""The noise scale of steps of one piece, Adam's moments under another batch: applied, restored, resumed."""

from __future__ import annotations

import pytest
import torch

from common import sealed_folder
from common.features import INDEX
from common.messages import Controls, Observation, Verdict
from tests.trainer.test_controls_kept import BATCHES, KILLED_AT, kept
from tests.trainer.test_controls_loop import (
    DROPOUT,
    FIRST,
    SECOND,
    all_bits,
    judged,
    of_controls,
    run,
    saves_at_once,
    script,
    undisturbed,
    verdicts,
)
from tests.trainer.test_loop import plain_weights
from tests.trainer.tiny import same_bits, weights_of
from trainer_node import real_step
from trainer_node.controls import betas_of
from trainer_node.optim.moments import follow_batch

__all__ = ["judged", "saves_at_once"]  # fixtures
ADAMW = "trainer.optimizer.name=adamw"
BETAS = "trainer.controls.batch_betas=true"
KNOWN = INDEX["has_noise_scale"]


def test_with_a_control_on_the_noise_scale_is_known_and_the_run_is_the_same_up_to_rounding() -> None:
    """From step 128 on."""
    _, links = run(lambda _: None, "trainer.steps=140")
    known = {o.step for o in links.of(Observation) if o.features[KNOWN]}
    assert known == set(range(128, 141))
    for ours, theirs in zip(undisturbed(), plain_weights(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert not same_bits(undisturbed(), plain_weights())


def test_with_all_controls_off_no_step_is_taken_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_step, "halved", lambda _: pytest.fail("a step was taken in halves"))
    loop, links = run(lambda _: None, on=())
    assert same_bits(weights_of(loop), plain_weights())
    assert not any(o.features[KNOWN] for o in links.of(Observation))


def test_steps_of_two_pieces_are_not_cut_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    halved = real_step.halved
    monkeypatch.setattr(real_step, "halved", lambda pieces: counts.append(len(pieces)) or halved(pieces))
    two, _ = run(lambda _: None, "trainer.batch.accumulation=2", "trainer.steps=24")
    one, _ = run(lambda _: None, "trainer.batch.accumulation=2", "trainer.steps=24", on=())
    assert set(counts) == {2}
    assert same_bits(weights_of(two), weights_of(one))


def moments(loop) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What Adam divides: both moments without their start at zero, of each parameter."""
    found = []
    for optimizer in loop.optimizers:
        for group in optimizer.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                steps = float(state["step"])
                pair = state["exp_avg"] / (1 - beta1**steps), state["exp_avg_sq"] / (1 - beta2**steps)
                found.append(pair)
    return found


@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 16.0])
def test_another_batch_alone_turns_no_step_and_keeps_the_memory_in_tokens(factor: float) -> None:
    loop, _ = run(lambda _: None, ADAMW, BETAS, "trainer.steps=20")
    before = moments(loop)
    wanted = betas_of(Controls(batch_factor=factor), loop.settings)
    optimizer = loop.settings.optimizer
    assert wanted == (optimizer.beta1**factor, optimizer.beta2**factor)
    for _ in range(2):  # as it shall stand: once more changes nothing
        follow_batch(loop.optimizers, wanted, steps=20 / factor)
        for (m1, v1), (m2, v2) in zip(before, moments(loop), strict=True):
            assert torch.allclose(m1, m2, rtol=1e-5, atol=0.0)
            assert torch.allclose(v1, v2, rtol=1e-5, atol=0.0)


def test_adams_steps_are_the_clock_in_batches_of_the_one_in_force(judged) -> None:
    judged(Verdict.ACCEPTED)
    wanted = {FIRST: Controls(batch_factor=2.0), SECOND: Controls(batch_factor=0.5)}
    loop, links = run(script(wanted), ADAMW, BETAS, "trainer.controls.batch_change=4")
    assert verdicts(links) == [Verdict.ACCEPTED] * 2
    assert loop.progress.clock == 60
    for optimizer in loop.optimizers:
        assert {float(state["step"]) for state in optimizer.state.values()} == {120.0}
        assert {group["betas"] for group in optimizer.param_groups} == {(0.9**0.5, loop_beta2(loop) ** 0.5)}
    told = links.of(Observation)
    assert told[FIRST].features[INDEX["beta1"]] == pytest.approx(loop.settings.optimizer.beta1**2)


def loop_beta2(loop) -> float:
    return loop.settings.optimizer.beta2


def test_betas_that_were_tried_and_refused_leave_no_bit_behind(judged) -> None:
    judged(Verdict.REFUSED)

    def ask(observation: Observation):
        wanted = Controls(batch_factor=0.5 if observation.step == FIRST else 2.0)
        is_asked = observation.step in (FIRST, SECOND) and observation.attempt < 2
        return of_controls(observation, wanted) if is_asked else None

    loop, links = run(ask, ADAMW, BETAS, DROPOUT)
    plain, _ = run(lambda _: None, ADAMW, BETAS, DROPOUT)
    assert verdicts(links) == [Verdict.REFUSED] * 2
    assert same_bits(all_bits(plain), all_bits(loop))


def test_the_switch_for_betas_alone_changes_no_bit() -> None:
    """Nor does it count as a control: nothing is proposed for it."""
    loop, _ = run(lambda _: None, ADAMW, on=(BETAS,))
    assert same_bits(weights_of(loop), plain_weights(ADAMW))
    with_controls, _ = run(lambda _: None, ADAMW, BETAS)
    without, _ = run(lambda _: None, ADAMW)
    assert same_bits(all_bits(with_controls), all_bits(without))


@pytest.mark.parametrize("name", ["muon", "sgd"])
def test_other_optimizers_keep_what_they_have(name: str, judged) -> None:
    judged(Verdict.ACCEPTED)
    optimizer = f"trainer.optimizer.name={name}"
    answer = script({FIRST: Controls(batch_factor=2.0)})
    loop, _ = run(answer, optimizer, BETAS)
    assert loop.progress.controls.batch_factor == 2.0
    for one in loop.optimizers:
        if not isinstance(one, torch.optim.Adam):
            configured = loop.settings.optimizer
            momentum = configured.muon_momentum if name == "muon" else configured.beta1
            assert {group["momentum"] for group in one.param_groups} == {momentum}


def test_a_resume_with_other_betas_is_the_unbroken_run(judged, tmp_path) -> None:
    judged(Verdict.ACCEPTED)
    whole = kept(tmp_path / "whole", BATCHES, ADAMW, BETAS)
    for when in ("on probation", "behind a larger batch"):
        root = tmp_path / when.replace(" ", "-")
        assert kept(root, BATCHES, ADAMW, BETAS, kill=KILLED_AT[when]).was_killed
        again = kept(root, BATCHES, ADAMW, BETAS, resume=sealed_folder.folders(root)[0])
        assert same_bits(all_bits(whole), all_bits(again))
