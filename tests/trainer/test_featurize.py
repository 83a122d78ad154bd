import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.features import INDEX, NAMES
from common.messages import DIRECTIONS, DecisionPoint, Phase, Verdict
from tests.references import slow_features
from trainer_node.featurize import FeatureState, StepFacts, featurize, note_outcome, note_window
from trainer_node.jump import blank_outcome
from trainer_node.window_statistics import LONG

FACTS = StepFacts(
    phase=Phase.FULL,
    phase_steps_done=2,
    phase_steps=8,
    step=1,
    total_steps=500,
    rate=0.01,
    peak_rate=0.02,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    warmup_steps=40,
    decay_start_step=90,
    units_per_step=2048,
    epoch=0.25,
    micro_batches=2,
    context=128,
    step_seconds=0.5,
    data_seconds=0.125,
)


def facts_at(step, **changes):
    return dataclasses.replace(FACTS, step=step, **changes)


def history_of(count, *, seed=0):
    """(facts, loss, gradient norm, clip scale, norm of a part of the batch, its share) of steps in a row."""
    random = np.random.default_rng(seed)
    phases = [Phase.WARMUP, Phase.FULL, Phase.CORRECT]
    return [
        (
            facts_at(
                step,
                phase=phases[step // 40 % 3],
                phase_steps_done=step % 8 + 1,
                step_seconds=float(random.uniform(0.1, 0.9)),
                epoch=step / 40,
                rate_factor=2.0 ** (step // 30),
                batch_factor=2.0 ** (step // 50 - 1),
                context_share=0.5 ** (step // 70),
            ),
            float(5 - step / 50 + random.normal() / 5),
            norm := float(random.lognormal()),
            float(min(1.0, random.uniform(0.5, 1.5))),
            norm * float(random.uniform(1.0, 1.5)),
            (0.25, 0.5, math.nan)[step % 3],
        )
        for step in range(1, count + 1)
    ]


def push(state, row):
    facts, loss, norm, clip, *part = row
    small_norm, share = part or (math.nan, math.nan)
    return featurize(
        state,
        facts,
        loss=loss,
        gradient_norm=norm,
        clip_scale=clip,
        small_norm=small_norm,
        small_share=share,
    )


def quiet(step, **changes):
    return (facts_at(step), *{"loss": 2.0, "norm": 1.0, "clip": 1.0, **changes}.values())


def applied(verdict=Verdict.ACCEPTED, **changes):
    known = {
        "loss_before": 3.2, "loss_after": 3.4, "loss_end": 3.0, "loss_forecast": 3.1, "loss_spread": 0.05,
        "delta_norm": 0.75, "delta_cosine": -0.5, "probation_steps": 8, "passes": 3.0, "horizon_steps": 12,
    }  # fmt: skip
    outcome = blank_outcome("5.0", verdict, step=5, attempt=2)
    return dataclasses.replace(outcome, **{**known, **changes})


def note(state, outcome):
    note_outcome(state, outcome, window_steps=8, lost_passes=6.0 * outcome.lost_steps)


def test_there_are_72_features_in_the_order_of_their_names():
    values = push(FeatureState(), history_of(1)[0])
    assert len(NAMES) == len(set(NAMES)) == len(values) == 72
    assert all(type(value) is float for value in values)
    assert values[INDEX["rate"]] == 0.01
    assert values[INDEX["micro_batches"]] == 2.0


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 63, 64, 65, 130])
def test_features_equal_plain_statistics(count):
    state = FeatureState(parameter_norm=20.0, displacement_norm=0.3, average_distance=1.5)
    history = history_of(count)
    for row in history[:-1]:
        push(state, row)
    note(state, applied(Verdict.REFUSED, lost_steps=4, passes=2.0 + 24.0))
    note(state, applied())
    twin = slow_features(
        history,
        jump={
            "parameter_norm": 20.0, "displacement_norm": 0.3, "check_passes": 2.0 + 3.0, "lost_passes": 24.0,
            "all_passes": 6.0 * count + 26.0 + 3.0, "jump_step": 5 if count > 4 else 0,
            "accepted": [0.0, 1.0], "horizon_windows": 1.5, "gain_spreads": 2.0, "delta_norm": 0.75,
            "virtual_steps": 12, "cosine": -0.5, "guard_loss": 3.0, "attempts": 2, "average_distance": 1.5,
        },
    )  # fmt: skip
    if count <= 4:
        state.jump_step = 0  # a jump lies before the step that is described
    found = dict(zip(NAMES, push(state, history[-1]), strict=True))
    assert found.keys() == twin.keys()
    for name, value in twin.items():
        assert found[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


FINITE = st.floats(-1e30, 1e30)
NORM = st.floats(0, 1e30)
STEP = st.tuples(FINITE, NORM, st.floats(0, 1), st.floats(0, 1e6), NORM, st.floats(0, 1))


@settings(deadline=None, max_examples=150)
@given(st.lists(STEP, min_size=1, max_size=70), NORM, NORM, NORM)
def test_finite_steps_give_finite_features(steps, parameter_norm, displacement_norm, average_distance):
    state = FeatureState(
        parameter_norm=parameter_norm,
        displacement_norm=displacement_norm,
        average_distance=average_distance,
    )
    for index, (loss, norm, clip, seconds, small_norm, share) in enumerate(steps):
        facts = facts_at(index + 1, step_seconds=seconds, data_seconds=seconds / 2)
        values = push(state, (facts, loss, norm, clip, small_norm, share))
        assert all(math.isfinite(value) for value in values)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_outcome_makes_a_feature_non_finite(data):
    number = st.floats(width=32)  # NaN and infinity included
    known = ("loss_before", "loss_after", "loss_end", "loss_forecast", "loss_spread", "delta_cosine")
    outcome = applied(
        data.draw(st.sampled_from([Verdict.ACCEPTED, Verdict.REFUSED, Verdict.RUINED, Verdict.ABORTED])),
        **{name: data.draw(number) for name in known},
        delta_norm=data.draw(number.map(abs)),
    )
    # A kept jump has finite losses: judge() saw to it.
    if outcome.verdict is Verdict.ACCEPTED and not math.isfinite(outcome.loss_end):
        outcome = dataclasses.replace(outcome, loss_end=1.0)
    state = FeatureState(parameter_norm=1e-3)
    note(state, outcome)
    values = dict(zip(NAMES, push(state, quiet(6)), strict=True))
    assert {name for name, value in values.items() if not math.isfinite(value)} == set()


@pytest.mark.parametrize("split", [1, 10, 63, 64, 100])
def test_a_restart_from_json_continues_identically(split):
    straight, history = FeatureState(), history_of(130)
    for row in history[:split]:
        push(straight, row)
    note(straight, applied(base_step=split))
    restarted = FeatureState.from_json(json.loads(json.dumps(straight.to_json())))
    for row in history[split:]:
        assert push(restarted, row) == push(straight, row)
    assert restarted.to_json() == straight.to_json()


def test_a_fresh_state_survives_json_too():
    again = FeatureState.from_json(json.loads(json.dumps(FeatureState().to_json())))
    row = history_of(1)[0]
    assert push(again, row) == push(FeatureState(), row)


@pytest.mark.parametrize("rotten", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["loss", "norm"])
@pytest.mark.parametrize("before", [0, 3])
def test_a_non_finite_number_is_told_without_a_warning_and_forgotten_after_64_steps(rotten, place, before):
    state = FeatureState()
    for step in range(before):
        push(state, quiet(step + 1))
    told = dict(zip(NAMES, push(state, quiet(before + 1, **{place: rotten})), strict=True))
    value = told["loss" if place == "loss" else "log10_grad_norm"]
    assert value == rotten or (math.isnan(rotten) and math.isnan(value))
    for step in range(LONG):
        values = push(state, quiet(before + 2 + step))
    values = dict(zip(NAMES, values, strict=True))
    assert {name for name, value in values.items() if not math.isfinite(value)} == set()


def test_what_cannot_be_known_yet_is_zero_and_says_so():
    values = dict(zip(NAMES, push(FeatureState(), quiet(1)), strict=True))
    for name in ("has_jump", "steps_since_jump_log10", "accepted_share_8", "last_accepted", "has_guard_loss"):
        assert values[name] == 0.0
    for name in ("guard_loss", "loss_over_guard", "last_delta_cosine", "d_loss", "loss_slope_16"):
        assert values[name] == 0.0
    for name in ("has_noise_scale", "log10_noise_scale_over_batch", "has_average"):
        assert values[name] == 0.0
    for name in ("distance_to_average_over_norm", "progress_per_second"):
        assert values[name] == 0.0


def test_controls_as_configured_are_neutral():
    values = dict(zip(NAMES, push(FeatureState(), quiet(1)), strict=True))
    found = [values[name] for name in ("log2_rate_factor", "log2_batch_factor", "context_share")]
    assert found == [0.0, 0.0, 1.0]


def window_end(pull_back_squares, **changes):
    """Of groups whose pull-backs have these squared norms; all other products are 9."""
    num = len(DIRECTIONS)
    gram_GKK = np.full((len(pull_back_squares), num, num), 9.0)
    gram_GKK[:, DIRECTIONS.index("pull_back"), DIRECTIONS.index("pull_back")] = pull_back_squares
    known = {
        "window": 1, "fingerprint": "", "gram": tuple(gram_GKK.reshape(-1).tolist()),
        "parameter_norms": (6.0, 8.0, 0.0), "displacement_norms": (3.0, 0.0, 4.0), "happened": (),
        "unexplained_share": (),
    }  # fmt: skip
    return DecisionPoint(**{**known, **changes})


def test_the_end_of_a_window_says_how_far_the_weights_are_from_their_average():
    state = FeatureState()
    note_window(state, window_end([4.0, 5.0, 16.0]))
    assert (state.parameter_norm, state.displacement_norm, state.average_distance) == (10.0, 5.0, 5.0)
    values = dict(zip(NAMES, push(state, quiet(1)), strict=True))
    assert values["has_average"] == 1.0
    assert values["distance_to_average_over_norm"] == 0.5


@pytest.mark.parametrize("rotten", [math.nan, math.inf])
def test_a_distance_that_is_not_finite_is_unknown_and_not_zero(rotten):
    state = FeatureState()
    note_window(state, window_end([4.0, rotten, 16.0]))
    values = dict(zip(NAMES, push(state, quiet(1)), strict=True))
    assert (values["has_average"], values["distance_to_average_over_norm"]) == (0.0, 0.0)
    note_window(state, window_end([4.0, 5.0, 16.0]))
    assert push(state, quiet(2))[INDEX["has_average"]] == 1.0


def test_a_state_of_before_there_were_controls_is_read_as_one_that_knows_nothing_of_them():
    state = FeatureState()
    for row in history_of(40):
        push(state, row)
    values = {k: v for k, v in state.to_json().items() if k not in ("noise", "average_distance")}
    again = FeatureState.from_json(json.loads(json.dumps(values)))
    assert again.losses == state.losses
    told = dict(zip(NAMES, push(again, quiet(41)), strict=True))
    assert (told["has_noise_scale"], told["has_average"]) == (0.0, 0.0)


def test_exactly_one_phase_is_marked():
    for phase in (Phase.WARMUP, Phase.FULL, Phase.CORRECT):
        row = (facts_at(1, phase=phase), 2.0, 1.0, 1.0)
        values = dict(zip(NAMES, push(FeatureState(), row), strict=True))
        marked = [name for name in ("is_warmup", "is_full", "is_correct") if values[name]]
        assert marked == [f"is_{phase.value}"]
        assert (values["window_progress"] > 0) == (phase is Phase.FULL)


def test_the_shares_of_the_last_eight_jumps_forget_older_ones():
    state = FeatureState()
    for verdict in [Verdict.REFUSED] * 5 + [Verdict.ACCEPTED] * 6:
        note(state, applied(verdict))
    values = dict(zip(NAMES, push(state, quiet(9)), strict=True))
    assert values["accepted_share_8"] == 6 / 8
    assert values["virtual_share_of_run"] == 6 * 12 / (6 * 12 + 9)


def test_a_refused_jump_leaves_the_loss_of_before_as_guard_loss():
    state = FeatureState()
    note(state, applied(Verdict.REFUSED))
    assert state.guard_loss == 3.2
    note(state, applied())
    assert state.guard_loss == 3.0


def test_a_copy_does_not_follow_its_original():
    state = FeatureState()
    push(state, quiet(1))
    copy = state.copy()
    before = copy.to_json()
    push(state, quiet(2, loss=1.0))
    note(state, applied())
    assert copy.to_json() == before


def test_the_state_does_not_grow_beyond_64_steps():
    state = FeatureState()
    for row in history_of(LONG + 5):
        push(state, row)
    assert [len(r.values) for r in (state.losses, state.norms, state.clips, state.seconds)] == [LONG] * 4
