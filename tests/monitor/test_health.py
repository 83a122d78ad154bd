"""What the monitor says of a run's health: once as it begins, once as it ends, never what it cannot know."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages as m
from common.streams import HISTORY, MONITOR, PREDICTOR, STREAMS, TRAINER
from monitor_node import health
from monitor_node.health import Facts, HealthState, HealthWatch, certain_fall, facts_of, judged
from monitor_node.liveness import Watch
from monitor_node.run_reader import new_view
from monitor_node.run_view import RunView
from tests.monitor import fake_controls
from tests.monitor import fake_run as fake

GIB = 2**30
CALM = Facts(
    step=500,
    total_steps=1000,
    window_steps=16,
    steps_per_second=10.0,
    still_seconds=1.0,
    stalled_seconds=120.0,
    held_out=tuple((step, 2.0 + 5.0 * math.exp(-step / 300)) for step in range(0, 501, 25)),
    metrics={
        "output_entropy": 2.1,
        "output_cross_entropy": 2.2,
        "output_information": 3.0,
        "disk_free_bytes": 100.0 * GIB,
        "checkpoint_bytes": 1.0 * GIB,
    },
    lag_steps={PREDICTOR: 3, MONITOR: 0},
    queued_entries={TRAINER: 12.0},
    history_entries=20_000,
    is_history_needed=True,
)


def with_metrics(**values: float | None) -> Facts:
    return replace(CALM, metrics={**CALM.metrics, **values})


FLAT = tuple((step, 2.0 + 0.001 * (step % 2)) for step in range(0, 501, 25))
BAD = {
    "stalled": replace(CALM, still_seconds=121.0),
    "plateau": replace(CALM, held_out=FLAT),
    "lagging": replace(CALM, lag_steps={PREDICTOR: 101}),
    "history_full": replace(CALM, history_entries=int(0.95 * STREAMS[HISTORY].fuse_entries)),
    "disk_full": with_metrics(disk_free_bytes=1.9 * GIB),
    "overconfident": with_metrics(output_entropy=1.0),
    "constant_output": with_metrics(output_information=0.1),
}
UNKNOWN = {
    "stalled": replace(CALM, still_seconds=None),
    "plateau": replace(CALM, held_out=()),
    "lagging": replace(CALM, lag_steps={}, queued_entries={}),
    "history_full": replace(CALM, history_entries=None),
    "disk_full": with_metrics(disk_free_bytes=None),
    "overconfident": with_metrics(output_entropy=None),
    "constant_output": with_metrics(output_information=None),
}
LEARNED = HealthState(most_information=3.0)


def test_every_kind_is_tried_here() -> None:
    assert set(BAD) == set(UNKNOWN) == set(health.KINDS)
    assert [f.kind for f in health.findings(CALM, most_information=0.0)] == list(health.KINDS)


def test_a_run_in_good_health_is_not_spoken_of() -> None:
    assert judged(HealthState(), CALM) == (LEARNED, [])


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_is_said_once_as_it_begins_and_once_as_it_ends(kind: str) -> None:
    state, alerts = judged(LEARNED, BAD[kind])
    assert [(a.kind, a.severity != "info") for a in alerts] == [(kind, True)]
    assert all(a.text and "\n" not in a.text and a.node == MONITOR and a.step == 500 for a in alerts)
    assert judged(state, BAD[kind]) == (state, [])
    state, alerts = judged(state, CALM)
    assert [(a.kind, a.severity) for a in alerts] == [(kind, "info")]
    assert judged(state, CALM) == (LEARNED, [])


@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_cannot_be_known_neither_begins_nor_ends_anything(kind: str) -> None:
    assert judged(LEARNED, UNKNOWN[kind]) == (LEARNED, [])
    bad, _ = judged(LEARNED, BAD[kind])
    assert judged(bad, UNKNOWN[kind]) == (bad, [])


@settings(deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(0.0, 400.0)), max_size=40))
def test_alerts_of_a_kind_alternate_and_hysteresis_keeps_it_from_flickering(
    seconds: list[float | None],
) -> None:
    state, said = HealthState(), []
    for still in seconds:
        was_active = bool(state.active)
        state, alerts = judged(state, replace(CALM, still_seconds=still))
        said += [alert.severity for alert in alerts]
        if still is not None and 90 <= still < 120:
            assert bool(state.active) == was_active
        elif still is not None:
            assert bool(state.active) == (still >= 120)
    assert said == [("error", "info")[n % 2] for n in range(len(said))]


# ---- plateau ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    seed=st.integers(0, 10**6),
    power=st.floats(0.3, 1.0),
    floor=st.floats(0.0, 2.0),
    noise=st.floats(0.0, 0.004),
    count=st.integers(1, 51),
)
def test_a_loss_that_follows_a_power_law_is_no_plateau(
    seed: int, power: float, floor: float, noise: float, count: int
) -> None:
    """Unless a fifth of the run brings less than 1.2 %: then it is a matter of taste."""

    def loss_at(step: int) -> float:
        return floor + 5.0 * (1 + max(0, step) / 20) ** -power

    rng = random.Random(seed)
    curve = [(20 * n, loss_at(20 * n) * (1 + noise * rng.gauss(0, 1))) for n in range(count)]
    fall = certain_fall(tuple(curve), stretch_steps=200.0)
    step = curve[-1][0]
    if fall is not None and 1 - loss_at(step) / loss_at(step - 200) > 0.012:
        assert fall > health.PLATEAU_FALL


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 3e-4), st.floats(0.0, 0.02))
def test_a_loss_that_stands_or_rises_is_a_plateau(seed: int, noise: float, rise: float) -> None:
    rng = random.Random(seed)
    losses = [2.0 * (1 + rise * n / 40 + noise * rng.gauss(0, 1)) for n in range(40)]
    facts = replace(CALM, held_out=tuple((25 * n, loss) for n, loss in enumerate(losses)))
    assert judged(LEARNED, facts)[0].active == {"plateau"}


def test_noise_that_hides_the_trend_makes_no_plateau() -> None:
    rng = random.Random(0)
    points = tuple((25 * n, 2.0 * (1 + 0.2 * rng.gauss(0, 1))) for n in range(20))
    fall = certain_fall(points, stretch_steps=200.0)
    assert fall is not None
    assert fall > health.PLATEAU_FALL


@settings(deadline=None)
@given(st.integers(9, 40), st.floats(-0.3, 0.3))
def test_the_fall_of_a_straight_line_is_that_of_the_line(count: int, share: float) -> None:
    """Over the newest stretch, which leaves the first point out, as a share of the mean there."""
    points = tuple((n, 1.0 - share * n / (count - 1)) for n in range(count))
    fall, mean = share * (count - 2) / (count - 1), 1.0 - share * count / (2 * (count - 1))
    assert certain_fall(points, stretch_steps=count - 1.0) == pytest.approx(fall / mean, abs=1e-6)


def test_losses_that_are_not_finite_are_left_out_of_the_trend() -> None:
    rotten = (*FLAT[:5], (110, math.nan), *FLAT[5:], (510, math.inf))
    assert certain_fall(rotten, stretch_steps=200.0) == certain_fall(FLAT, stretch_steps=200.0)


# ---- lag, disk, collapse ---------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "speed"), [(101, 0.1), (101, 2000.0), (31, 1.0)])
def test_a_lag_counts_in_windows_and_in_seconds_of_training(steps: int, speed: float) -> None:
    """A slow run is seconds behind by a step, a fast one hundreds of steps by a heartbeat."""
    facts = replace(CALM, lag_steps={PREDICTOR: steps}, steps_per_second=speed)
    assert judged(LEARNED, facts)[1] == [] if speed != 0.1 else judged(LEARNED, facts)[1] != []


def test_messages_that_wait_for_the_server_are_a_lag_and_name_the_node() -> None:
    (alert,) = judged(LEARNED, replace(CALM, queued_entries={TRAINER: 2001.0}))[1]
    assert alert.kind == "lagging"
    assert "trainer" in alert.text


def test_a_history_that_nobody_needs_may_fill_up() -> None:
    assert judged(LEARNED, replace(BAD["history_full"], is_history_needed=False))[1] == []


@settings(deadline=None)
@given(st.floats(0.0, 1e15), st.floats(1.0, 1e12))
def test_the_disk_is_full_exactly_when_two_checkpoints_do_not_fit(free: float, size: float) -> None:
    state, _ = judged(LEARNED, with_metrics(disk_free_bytes=free, checkpoint_bytes=size))
    assert state.active == ({"disk_full"} if free <= 2 * size else set())


@settings(deadline=None)
@given(st.floats(1e-3, 12.0), st.floats(0.9, 1.3))
def test_a_calibrated_output_is_never_overconfident(cross_entropy: float, share: float) -> None:
    facts = with_metrics(output_entropy=share * cross_entropy, output_cross_entropy=cross_entropy)
    assert judged(LEARNED, facts)[1] == []


def test_a_nearly_perfect_classifier_is_not_overconfident() -> None:
    """Its cross entropy comes from one image in a hundred; half a nat is what counts."""
    assert judged(LEARNED, with_metrics(output_entropy=0.001, output_cross_entropy=0.05))[1] == []


@settings(deadline=None)
@given(st.floats(0.0, 0.09))
def test_an_output_that_never_told_anything_has_not_collapsed(information: float) -> None:
    """A fresh model says the same of everything."""
    state, alerts = judged(HealthState(), with_metrics(output_information=information))
    assert alerts == []
    assert state.most_information == information


def test_a_collapse_is_measured_against_the_best_there_was() -> None:
    state = HealthState()
    for information in (0.0, 1.0, 3.0, 2.0):
        state, alerts = judged(state, with_metrics(output_information=information))
        assert alerts == []
    assert judged(state, with_metrics(output_information=0.149))[0].active == {"constant_output"}
    assert judged(state, with_metrics(output_information=0.151))[0].active == set()


# ---- from the view of a run ------------------------------------------------------------------------


def followed(steps: int = 600) -> tuple[RunView, float]:
    view = RunView(run_id="fake", watch=Watch(silent_seconds=3.0, stalled_seconds=60.0))
    at_seconds = 0.0
    for said in itertools.chain(fake.fake_run(steps=steps)):
        at_seconds = said.at_seconds
        view.fold(said.message, sent_unix_seconds=1e9 + at_seconds, at_seconds=at_seconds)
    return view, at_seconds


def beats(view: RunView, at_seconds: float, **steps: int) -> None:
    for node, step in steps.items():
        view.fold(fake.heartbeat(node, step), sent_unix_seconds=1e9 + at_seconds, at_seconds=at_seconds)


def test_a_made_up_run_is_in_good_health_until_its_trainer_stands_still() -> None:
    view, now = followed()
    watch, said = HealthWatch(), []
    for second in range(100):
        beats(view, now + second, trainer=view.step, predictor=view.step)
        said += watch.changes(view, now + second)
    assert [alert.kind for alert in said] == ["stalled"]
    beats(view, now + 100, trainer=view.step + 1)
    view.fold(fake.observation(view.step + 1, 2.0), sent_unix_seconds=1e9 + now, at_seconds=now + 100)
    assert [(a.kind, a.severity) for a in watch.changes(view, now + 100)] == [("stalled", "info")]


def test_a_predictor_that_is_left_behind_is_named() -> None:
    view, now = followed()
    beats(view, now, trainer=view.step + 400, predictor=view.step)
    facts = facts_of(view, now_seconds=now)
    assert facts is not None
    assert facts.lag_steps == {PREDICTOR: 400, MONITOR: 400}
    assert [alert.kind for alert in judged(HealthState(), facts)[1]] == ["lagging"]


def test_a_dead_node_does_not_lag_and_a_dead_trainer_does_not_stall() -> None:
    view, now = followed()
    beats(view, now, trainer=view.step + 400, predictor=view.step)
    beats(view, now + 50, trainer=view.step + 400)
    facts = facts_of(view, now_seconds=now + 50)
    assert facts is not None
    assert PREDICTOR not in facts.lag_steps
    late = facts_of(view, now_seconds=now + 500)
    assert late is not None
    assert (late.still_seconds, late.lag_steps) == (None, {})


def test_a_second_monitor_does_not_repeat_what_the_first_has_said() -> None:
    view, now = followed()
    sample = m.HealthSample(
        node=TRAINER,
        step=view.step,
        metrics=tuple(
            m.Metric(name=name, value=value, unit="bytes")
            for name, value in (("disk_free_bytes", 1.0), ("checkpoint_bytes", 1e9))
        ),
    )
    view.fold(sample, sent_unix_seconds=1e9, at_seconds=now)
    (alert,) = HealthWatch().changes(view, now)
    assert (alert.kind, alert.severity) == ("disk_full", "error")
    view.fold(alert, sent_unix_seconds=1e9, at_seconds=now)
    second = HealthWatch()
    assert second.changes(view, now) == []
    better = replace(
        sample, metrics=(m.Metric(name="disk_free_bytes", value=1e12, unit="bytes"), sample.metrics[1])
    )
    view.fold(better, sent_unix_seconds=1e9, at_seconds=now)
    assert second.changes(view, now + 0.5) == []  # at most one look a second
    assert [a.severity for a in second.changes(view, now + 1.0)] == ["info"]


def test_a_stretch_of_the_run_is_of_the_steps_that_it_takes_with_these_controls() -> None:
    """With four times the batch a run of 1,000 nominal steps ends after a quarter of them."""
    view, facts = new_view("run"), []
    said = [fake_controls.started(steps=1000, batch=True), fake.heartbeat()]
    for message in (*said, *(fake_controls.observation(n, batch=4.0, progress=n / 250) for n in (1, 2))):
        view.fold(message, sent_unix_seconds=1e9, at_seconds=0.0)
        facts.append(facts_of(view, now_seconds=0.0))
    assert [known.total_steps for known in facts if known is not None] == [1000, 1000, 250, 250]


def test_of_a_run_that_is_over_nothing_more_is_said() -> None:
    view, now = followed()
    view.fold(m.RunEnded(step=view.step, reason="finished"), sent_unix_seconds=1e9, at_seconds=now)
    assert HealthWatch().changes(view, now + 1e6) == []
