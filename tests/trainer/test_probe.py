import dataclasses
from functools import partial

import pytest
import torch

from common.features import INDEX, NAMES
from common.messages import DecisionPoint
from tests.trainer.small_job import small_job
from tests.trainer.test_featurize import FACTS, facts_at
from trainer_node.featurize import FeatureState
from trainer_node.probe import Pending, Probe
from trainer_node.step import StepTensors, train_step

POINT = DecisionPoint(
    window=1, fingerprint="", gram=(), parameter_norms=(), displacement_norms=(), happened=(),
    unexplained_share=(),
)  # fmt: skip


def tensors_of(loss=2.0, clip=0.5, norms=(3.0, 4.0)):
    return StepTensors(torch.tensor(loss), torch.tensor(norms), torch.tensor(clip))


def bare_step(job):
    """A real step that leaves the averages to hooks."""
    tensors = train_step(
        job.model, job.loss_of, [job.batch(job.steps_done)], job.optimizers, job.groups, clip_norm=1.0
    )
    job.steps_done += 1
    return tensors


def hooks_of(job):
    return [
        hooks
        for optimizer in job.optimizers
        for hooks in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
        if hooks
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_hooks_are_gone_after_the_exit(optimizer):
    job = small_job(optimizer=optimizer)
    with Probe(job.optimizers, job.basis.averages):
        assert len(hooks_of(job)) == 2
    assert hooks_of(job) == []


def test_the_hooks_are_gone_after_a_failure_and_the_failure_goes_on():
    job = small_job()
    with pytest.raises(KeyError), Probe(job.optimizers, job.basis.averages):
        raise KeyError
    assert hooks_of(job) == []


def test_without_averages_nothing_is_hooked():
    job = small_job()
    with Probe(job.optimizers, None):
        assert hooks_of(job) == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_observing_changes_no_bit_of_training(optimizer, dtype):
    states = []
    for is_observed in (True, False):
        job = small_job(optimizer=optimizer, dtype=dtype)
        probe, state = Probe(job.optimizers, job.basis.averages), FeatureState()
        for _ in range(6):
            if is_observed:
                with probe:
                    probe.record(bare_step(job), lambda: FACTS, 0)
                probe.collect(state, wait=False)
            else:
                bare_step(job)
        states.append({name: raw for name, raw in job.state().items() if not name.startswith("basis.")})
    assert states[0] == states[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_hooks_keep_the_averages_as_one_call_before_and_after_each_step_does(optimizer):
    hooked, by_hand = small_job(optimizer=optimizer, dtype="bf16"), None
    with Probe(hooked.optimizers, hooked.basis.averages):
        for _ in range(4):
            bare_step(hooked)
    state = hooked.state()
    by_hand = small_job(optimizer=optimizer, dtype="bf16")
    for _ in range(4):
        by_hand.step()
    assert state == by_hand.state()


def test_an_observation_carries_the_numbers_of_its_step():
    probe, state = Probe([], None), FeatureState()
    probe.record(tensors_of(), partial(facts_at, 7), 3)
    (observation,) = probe.collect(state, wait=True)
    assert (observation.step, observation.attempt, observation.phase) == (7, 3, FACTS.phase)
    assert observation.gradient_norms == (3.0, 4.0)
    assert len(observation.features) == len(NAMES)
    assert observation.features[INDEX["loss"]] == 2.0
    assert observation.features[INDEX["clip_scale"]] == 0.5
    assert 10 ** observation.features[INDEX["log10_grad_norm"]] == pytest.approx(5.0)
    assert observation.decision_point is None


def test_the_norm_of_a_part_of_the_batch_travels_with_the_others_and_is_none_of_them():
    told = []
    for measured in ({}, {"small_norm": torch.tensor(7.0), "small_share": 0.25}):
        probe, state = Probe([], None), FeatureState()
        for step in range(40):
            probe.record(dataclasses.replace(tensors_of(), **measured), partial(facts_at, step + 1), 0)
        assert len({len(pending.numbers) for pending in probe._pending}) == 1  # they travel together
        told.append(probe.collect(state, wait=True)[-1])
    without, observation = told
    assert observation.gradient_norms == without.gradient_norms == (3.0, 4.0)
    first_control = INDEX["has_noise_scale"]
    assert observation.features[:first_control] == without.features[:first_control]
    # |G|^2 = (25 - 49 / 4) / (3 / 4) = 17, tr(S) = (49 - 25) / 3 = 8 batches: appendix A.1 by hand.
    assert 10 ** observation.features[INDEX["log10_noise_scale_over_batch"]] == pytest.approx(8 / 17)
    assert without.features[first_control] == 0.0


def test_observations_come_in_order_and_the_decision_point_goes_with_the_newest():
    probe, state = Probe([], None), FeatureState()
    for step in (1, 2, 3):
        probe.record(tensors_of(loss=float(step)), partial(facts_at, step), 0)
    observations = probe.collect(state, wait=True, decision_point=POINT)
    assert [o.step for o in observations] == [1, 2, 3]
    assert [o.features[0] for o in observations] == [1.0, 2.0, 3.0]
    assert [o.decision_point for o in observations] == [None, None, POINT]
    assert probe.collect(state, wait=True, decision_point=POINT) == []


def test_what_a_later_step_does_to_its_tensors_does_not_change_a_recorded_one():
    probe, tensors = Probe([], None), tensors_of()
    probe.record(tensors, partial(facts_at, 1), 0)
    tensors.loss.fill_(99.0)
    tensors.gradient_norms_G.fill_(99.0)
    (observation,) = probe.collect(FeatureState(), wait=True)
    assert observation.features[0] == 2.0
    assert observation.gradient_norms == (3.0, 4.0)


class FakeEvent:
    def __init__(self, *, has_arrived):
        self.has_arrived, self.awaited = has_arrived, 0

    def query(self):
        return self.has_arrived

    def synchronize(self):
        self.awaited += 1


def under_way(probe, step, *, has_arrived):
    event = FakeEvent(has_arrived=has_arrived)
    probe._pending.append(Pending(partial(facts_at, step), 0, torch.tensor([1.0, 1.0, 2.0]), event))
    return event


def test_numbers_under_way_are_not_waited_for_unless_asked():
    probe, state = Probe([], None), FeatureState()
    events = [under_way(probe, step, has_arrived=step < 2) for step in (1, 2, 3)]
    assert [o.step for o in probe.collect(state, wait=False, decision_point=POINT)] == [1]
    assert [event.awaited for event in events[1:]] == [0, 0]
    assert probe.collect(state, wait=False) == []
    observations = probe.collect(state, wait=True, decision_point=POINT)
    assert [(o.step, o.decision_point) for o in observations] == [(2, None), (3, POINT)]
    assert [event.awaited for event in events] == [1, 1, 1]


def test_a_decision_point_is_never_attached_without_waiting():
    probe = Probe([], None)
    probe.record(tensors_of(), partial(facts_at, 1), 0)
    (observation,) = probe.collect(FeatureState(), wait=False, decision_point=POINT)
    assert observation.decision_point is None


def test_undone_steps_are_forgotten_and_leave_no_trace_in_the_features():
    probe, state = Probe([], None), FeatureState()
    probe.record(tensors_of(), partial(facts_at, 1), 0)
    before = state.to_json()
    probe.forget()
    assert probe.collect(state, wait=True) == []
    assert repr(state.to_json()) == repr(before)
