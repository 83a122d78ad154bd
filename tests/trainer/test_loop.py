"""Laws of the phase loop, on a real model and real data with scripted decisions."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from common.features import INDEX
from common.messages import (
    Controls,
    Observation,
    Outcome,
    Phase,
    PhaseDecision,
    Verdict,
)
from common.schedule import rate_factor
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node.assembly import prepare_task
from trainer_node.groups import ParameterGroup, parameter_groups
from trainer_node.links import NoDecisions
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.snapshot import optimizer_tensors


def proposal(observation: Observation, drift: float = 1.0, horizon_steps: int = 5) -> PhaseDecision:
    """Go on along the drift by `drift` windows."""
    assert observation.decision_point is not None
    num_groups = len(observation.gradient_norms)
    return PhaseDecision(
        decision_id=f"{observation.step}.{observation.attempt}",
        phase=Phase.PREDICT,
        horizon_steps=horizon_steps,
        num_groups=num_groups,
        num_directions=4,
        coefficients=(0.0, drift, 0.0, 0.0) * num_groups,
        controls=Controls(),
        forecast=None,
        base_generation=1,
        base_step=observation.step,
        base_attempt=observation.attempt,
        base_fingerprint=observation.decision_point.fingerprint,
        valid_until_step=observation.step,
        reason="test",
    )


def twice_bad(observation: Observation) -> PhaseDecision | None:
    """Far back, once the run has learned something: refused after probation, not ruined."""
    is_late = observation.step > 20 and observation.attempt < 2
    return proposal(observation, drift=-3.0) if is_late else None


@cache  # most tests compare with the same run; the weights are only read
def plain_weights(*overrides: str) -> list[torch.Tensor]:
    """A plain training loop, written out: no phases, no bus, no observation."""
    settings = tiny_settings(*overrides).trainer
    task = prepare_task(settings)
    optimizers = build_optimizers(task.model, settings.optimizer, task.device)
    groups = parameter_groups(task.model)
    for step in range(settings.steps):
        set_rates(optimizers, rate_factor(step, settings.steps, settings.schedule))
        for optimizer in optimizers:
            optimizer.zero_grad()
        task.loss(task.train.batch(step)).backward()
        clip_by_hand(groups, settings.optimizer.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach() for p in task.model.parameters()]


def clip_by_hand(groups: list[ParameterGroup], clip_norm: float) -> None:
    """In the order of the groups: a sum in another order differs in the last bit."""
    norm_of = torch.linalg.vector_norm
    norms = [norm_of(torch.stack([norm_of(p.grad) for p in group.parameters])) for group in groups]
    scale = (clip_norm / (norm_of(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
    for group in groups:
        for parameter in group.parameters:
            parameter.grad.mul_(scale)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_prediction_off_is_bit_identical_to_a_plain_loop(optimizer: str) -> None:
    overrides = ("predictor.enabled=false", f"trainer.optimizer.name={optimizer}")
    loop = tiny_loop(ScriptedLinks(), tiny_settings(*overrides))
    loop.run()
    assert same_bits(weights_of(loop), plain_weights(*overrides))


def test_watching_without_proposals_changes_no_bit() -> None:
    watched = tiny_loop(ScriptedLinks(), tiny_settings())
    watched.run()
    assert same_bits(weights_of(watched), plain_weights())


def test_a_loop_without_links_keeps_training() -> None:
    links = ScriptedLinks()
    loop = tiny_loop(links, tiny_settings())
    loop.links = NoDecisions()
    loop.run()
    assert {o.verdict for o in links.of(Outcome)} == {Verdict.MISSING}
    assert loop.progress.step == 60


def test_an_accepted_proposal_moves_weights_and_counts_virtual_steps() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.2))
    loop = tiny_loop(links, tiny_settings("trainer.verify.tolerance=100.0"))
    loop.run()
    outcomes = links.of(Outcome)
    accepted = [o for o in outcomes if o.verdict is Verdict.ACCEPTED]
    assert accepted
    assert all(o.delta_norm > 0 and o.probation_steps == 6 and o.lost_steps == 0 for o in accepted)
    assert all(-1.0 <= o.delta_cosine <= 1.0 for o in accepted)
    assert loop.ledger.virtual_steps == 5 * len(accepted)
    assert not same_bits(weights_of(loop), plain_weights())


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_refused_proposals_leave_the_run_bit_identical_to_one_without(
    optimizer: str, store: str, tmp_path
) -> None:
    """Every jump is refused after probation; what remains is the plain run, to the last bit."""
    overrides = (f"trainer.optimizer.name={optimizer}", f"trainer.checkpoint.snapshot={store}")
    links = ScriptedLinks(answer=twice_bad)
    loop = tiny_loop(
        links,
        tiny_settings(*overrides, "trainer.verify.tolerance=0.0", "trainer.verify.ruin_share=1.0"),
        folder=tmp_path,
    )
    loop.run()
    refused = [o for o in links.of(Outcome) if o.verdict is Verdict.REFUSED]
    assert len(refused) == 2
    assert [o.lost_steps for o in refused] == [6, 6]
    assert loop.ledger.lost_steps == 12
    assert same_bits(weights_of(loop), plain_weights(*overrides))


def test_a_ruinous_proposal_is_restored_at_once_bit_for_bit() -> None:
    before: list[list[torch.Tensor]] = []
    loop = tiny_loop(ScriptedLinks(), tiny_settings())

    def ruin(observation: Observation) -> PhaseDecision | None:
        before.append([*weights_of(loop), *[t.clone() for t in optimizer_tensors(loop.optimizers)]])
        return proposal(observation, drift=1e6) if len(before) == 1 else None

    links = ScriptedLinks(answer=ruin)
    loop.links, loop.emit = links, links.emit
    stop_at_first: list[Outcome] = []

    def watch(message: object) -> None:
        links.emit(message)  # type: ignore[arg-type]
        if isinstance(message, Outcome) and not stop_at_first:
            stop_at_first.append(message)
            after = [*weights_of(loop), *optimizer_tensors(loop.optimizers)]
            assert same_bits(before[0], after)

    loop.emit = watch
    loop.run()
    assert stop_at_first[0].verdict is Verdict.RUINED
    assert stop_at_first[0].lost_steps == 0
    assert same_bits(weights_of(loop), plain_weights())


BAD = {
    "stale step": (lambda d: replace(d, base_step=d.base_step - 1), Verdict.STALE),
    "stale generation": (lambda d: replace(d, base_generation=7), Verdict.STALE),
    "stale weights": (lambda d: replace(d, base_fingerprint="0" * 16), Verdict.STALE),
    "NaN": (lambda d: replace(d, coefficients=(math.nan, *d.coefficients[1:])), Verdict.MALFORMED),
    "inf": (lambda d: replace(d, coefficients=(math.inf, *d.coefficients[1:])), Verdict.MALFORMED),
    "short": (lambda d: replace(d, coefficients=d.coefficients[1:]), Verdict.MALFORMED),
    "other model": (lambda d: replace(d, num_groups=d.num_groups + 1), Verdict.MALFORMED),
    "absurd horizon": (lambda d: replace(d, horizon_steps=10**9), Verdict.MALFORMED),
    "no horizon": (lambda d: replace(d, horizon_steps=0), Verdict.MALFORMED),
    "zero delta": (lambda d: replace(d, coefficients=(0.0,) * len(d.coefficients)), Verdict.MALFORMED),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_decision_never_moves_a_weight(name: str) -> None:
    spoil, verdict = BAD[name]
    links = ScriptedLinks(answer=lambda o: spoil(proposal(o)))
    loop = tiny_loop(links, tiny_settings())
    loop.run()
    assert {o.verdict for o in links.of(Outcome)} - {verdict} <= {Verdict.MALFORMED}
    assert any(o.verdict is verdict for o in links.of(Outcome))
    assert same_bits(weights_of(loop), plain_weights())


def test_a_veto_in_force_forbids_every_jump() -> None:
    links = ScriptedLinks(answer=proposal, reason="memory")
    loop = tiny_loop(links, tiny_settings())
    loop.run()
    assert Verdict.VETOED in {o.verdict for o in links.of(Outcome)}
    assert loop.ledger.applied == 0
    assert same_bits(weights_of(loop), plain_weights())


def test_stopping_during_probation_restores_first() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.2))
    loop = tiny_loop(links, tiny_settings())
    at_point: dict[int, list[torch.Tensor]] = {}

    def watch(message: object) -> None:
        links.emit(message)  # type: ignore[arg-type]
        if isinstance(message, Observation) and message.decision_point:
            at_point[message.step] = weights_of(loop)
        if isinstance(message, Observation) and message.phase is Phase.CORRECT:
            loop.stop_requested = True

    loop.emit = watch
    loop.run()
    outcome = links.of(Outcome)[-1]
    assert outcome.verdict is Verdict.ABORTED
    assert loop.is_calm
    assert loop.progress.step == outcome.base_step
    assert same_bits(weights_of(loop), at_point[outcome.base_step])


def test_observations_tell_every_kept_step_once_and_mark_set_backs() -> None:
    links = ScriptedLinks(answer=twice_bad)
    loop = tiny_loop(links, tiny_settings("trainer.verify.tolerance=0.0", "trainer.verify.ruin_share=1.0"))
    loop.run()
    kept: dict[int, int] = {}
    for observation in links.of(Observation):
        assert observation.attempt >= kept.get(observation.step, 0)
        kept[observation.step] = observation.attempt
    assert sorted(kept) == list(range(1, 61))
    assert max(kept.values()) == 2


def test_equal_runs_send_equal_messages_in_lockstep() -> None:
    runs = []
    for _ in range(2):
        links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.3))
        tiny_loop(links, tiny_settings()).run()
        runs.append([repr(m) for m in links.said])
    assert runs[0] == runs[1]


def test_the_last_probation_is_judged_before_the_run_ends() -> None:
    """A proposal whose probation would pass the end of the run is malformed, one that just fits is judged."""
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1))
    loop = tiny_loop(links, tiny_settings("trainer.steps=20"))  # 8 + 6 = 14: six steps are left
    loop.run()
    assert next(o.verdict for o in links.of(Outcome)) in (Verdict.ACCEPTED, Verdict.REFUSED)
    assert loop.progress.step == 20


def test_a_window_is_as_long_as_its_decision_asks_and_says_so() -> None:
    """By a resting decision, by a jump whatever its verdict, and never by a stale one."""

    def answer(observation: Observation) -> PhaseDecision:
        decision = proposal(observation, drift=0.1)
        rest = replace(decision, phase=Phase.FULL, horizon_steps=0, coefficients=(), next_window_steps=9)
        return {
            14: rest,
            23: replace(decision, next_window_steps=8),
            37: replace(rest, base_step=0, next_window_steps=30),
        }.get(observation.step, replace(rest, next_window_steps=0))

    links = ScriptedLinks(answer=answer)
    loop = tiny_loop(links, tiny_settings("trainer.verify.tolerance=100.0"))
    loop.run()
    points = {o.step: o.decision_point.window_steps for o in links.of(Observation) if o.decision_point}
    assert points == {14: 6, 23: 9, 37: 8, 43: 6, 49: 6, 55: 6}
    shares = [o.features[INDEX["window_progress"]] for o in links.of(Observation) if 14 < o.step <= 23]
    assert shares == [pytest.approx(done / 9) for done in range(1, 10)]


def test_without_the_guard_jumps_are_kept_and_cost_no_pass() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=-2.0))
    loop = tiny_loop(links, tiny_settings("trainer.verify.enabled=false"))
    loop.run()
    outcomes = [o for o in links.of(Outcome) if o.verdict is not Verdict.MALFORMED]
    assert {o.verdict for o in outcomes} == {Verdict.ACCEPTED}
    assert all(o.passes == 0 and o.probation_steps == 6 for o in outcomes)
    assert loop.ledger.passes["verification"] == loop.ledger.wall_seconds["snapshots"] == 0.0
    assert loop.progress.attempt == loop.ledger.lost_steps == 0


def test_without_the_guard_a_lost_run_goes_on_and_says_so() -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=1e30))
    loop = tiny_loop(links, tiny_settings("trainer.verify.enabled=false", "trainer.steps=26"))
    loop.run()
    assert links.of(Outcome)[0].verdict is Verdict.REFUSED
    assert (loop.progress.step, loop.progress.attempt) == (26, 0)


def test_a_forecaster_that_cannot_be_used_is_malformed_and_moves_no_weight() -> None:
    links = ScriptedLinks(answer=lambda o: replace(proposal(o), forecaster=b"not a forecaster"))
    loop = tiny_loop(links, tiny_settings())
    loop.run()
    assert {o.verdict for o in links.of(Outcome)} == {Verdict.MALFORMED}
    assert same_bits(weights_of(loop), plain_weights())


def test_refused_jumps_in_parts_and_with_a_correction_leave_no_trace() -> None:
    def answer(observation: Observation) -> PhaseDecision | None:
        decision = twice_bad(observation)
        return replace(decision, chunks=1 + observation.attempt, correction_share=0.1) if decision else None

    links = ScriptedLinks(answer=answer)
    loop = tiny_loop(links, tiny_settings("trainer.verify.tolerance=0.0", "trainer.verify.ruin_share=1.0"))
    loop.run()
    refused = [o for o in links.of(Outcome) if o.verdict is Verdict.REFUSED]
    assert refused
    assert all(math.isfinite(o.slope_after) for o in refused if o.lost_steps)
    assert any(o.lost_steps for o in refused)
    assert not [o for o in links.of(Outcome) if o.verdict is Verdict.ACCEPTED]
    assert same_bits(weights_of(loop), plain_weights())
