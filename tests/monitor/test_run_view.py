"""The fold of a run's messages, and the dict that people see."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import features
from common import messages as m
from monitor_node.node import new_view
from monitor_node.run_view import RunView
from monitor_node.snapshot import as_dict, plain
from tests.monitor import fake_run as fake

V = m.Verdict


def fold(*messages: m.Message, view: RunView | None = None, start_seconds: float = 0.0) -> RunView:
    """Messages one second apart; sent and received at the same time."""
    view = view or new_view("run")
    for second, message in enumerate(messages):
        at_seconds = start_seconds + second
        view.fold(message, sent_unix_seconds=at_seconds, at_seconds=at_seconds)
    return view


def shown(view: RunView, now_seconds: float = 0.0) -> dict[str, Any]:
    return json.loads(json.dumps(as_dict(view, now_seconds=now_seconds), allow_nan=False))


def test_a_whole_run_shows_its_step_loss_phase_and_counts() -> None:
    view = new_view("run")
    for said in fake.fake_run("run", steps=600):
        view.fold(said.message, sent_unix_seconds=1e9 + said.at_seconds, at_seconds=said.at_seconds)
    page = shown(view, now_seconds=said.at_seconds)
    assert page["run"]["status"] == "running"
    assert page["progress"]["step"] == view.curves.train.points()[-1][0] >= 600
    assert page["progress"]["total_steps"] == 1000
    assert page["progress"]["loss"] == pytest.approx(2.0, abs=0.7)
    counters = page["counters"]
    assert counters["proposals"] == sum(counters[verdict.value] for verdict in V) - counters["rest"] > 10
    assert counters["refused"] > 0
    assert page["marks"]["train"] == [[333, "NaN"]]
    assert page["series"]["held_out"][0][0] == 50
    assert {segment[2] for segment in page["series"]["phases"]} == {"warmup", "full", "correct"}
    assert page["progress"]["units_per_second"] == pytest.approx(2048 / fake.STEP_SECONDS, rel=0.35)
    assert page["progress"]["eta_seconds"] == pytest.approx(400 * fake.STEP_SECONDS, rel=0.5)


@pytest.mark.parametrize(
    ("messages", "now_seconds", "status"),
    [
        ([], 0.0, "starting"),
        ([fake.started(), fake.heartbeat(state="starting")], 1.0, "starting"),
        ([fake.started(), fake.heartbeat(step=1), fake.observation(1, 2.0)], 2.0, "running"),
        ([fake.started(), fake.heartbeat(step=1), fake.observation(1, 2.0)], 9.0, "crashed"),
        ([fake.observation(1, 2.0), fake.heartbeat(step=1, state="stopping")], 2.0, "stopping"),
        ([fake.observation(1, 2.0), fake.heartbeat(step=1, state="stopping")], 9.0, "crashed"),
        ([fake.heartbeat(step=1), m.RunEnded(step=9, reason="finished")], 99.0, "finished"),
        ([m.RunEnded(step=9, reason="stopped"), fake.started(), fake.heartbeat()], 3.0, "starting"),
    ],
)
def test_the_status_says_what_the_trainer_is_doing(
    messages: list[m.Message], now_seconds: float, status: str
) -> None:
    assert shown(fold(*messages), now_seconds)["run"]["status"] == status


def test_a_trainer_that_beats_without_a_step_is_shown_as_stalled() -> None:
    beats = [fake.heartbeat(step=5)] * 200
    page = shown(fold(fake.observation(5, 2.0), *beats), 200.0)
    assert page["run"]["status"] == "stalled"
    assert page["progress"]["eta_seconds"] is None


def test_a_refused_jump_takes_its_steps_off_the_curves_and_counts_them_as_lost() -> None:
    steps = [fake.observation(step, 3.0) for step in range(1, 17)]
    tried = [fake.observation(step, 9.0, phase=m.Phase.CORRECT) for step in range(17, 33)]
    view = fold(*steps, fake.decision(16, 10), *tried, fake.outcome(16, V.REFUSED))
    page = shown(view)
    assert page["progress"]["step"] == 16
    assert page["series"]["train"][-1] == [16, 3.0]
    assert page["series"]["phases"] == [[1, 16, "full"]]
    assert page["progress"]["lost_steps"] == 16
    assert page["series"]["jumps"] == [[16, "refused", 10]]
    assert page["progress"]["virtual_steps"] == 0


@pytest.mark.parametrize(
    ("verdict", "lost_steps"), [(V.FAILED, 16), (V.ABORTED, 16), (V.REFUSED, 0), (V.ACCEPTED, 0)]
)
def test_steps_are_undone_where_the_trainer_says_so_and_nowhere_else(verdict: V, lost_steps: int) -> None:
    """Memory that runs out at the judgement undoes the steps of a FAILED jump; without the guard a REFUSED
    one stays (trainer_node/jump.py)."""
    made = fake.outcome(16, verdict, 5)
    outcome = replace(made, probation_steps=16, lost_steps=lost_steps, attempt=int(lost_steps > 0))
    view = fold(fake.started(), *[fake.observation(step, 2.0) for step in range(1, 33)], outcome)
    assert view.step == view.curves.train.points()[-1][0] == (16 if lost_steps else 32)
    assert view.lost_steps == lost_steps


@pytest.mark.parametrize(
    ("verdict", "attempt", "lost_steps", "step", "train"),
    [(V.ACCEPTED, 2, 12, 32, (16, 2.0)), (V.REFUSED, 1, 16, 28, (28, 3.0))],
)
def test_beside_a_twin_the_run_stands_where_the_better_one_ended(
    verdict: V, attempt: int, lost_steps: int, step: int, train: tuple[int, float]
) -> None:
    """The twin's steps stay on the curve if it goes on; those of a trial that is kept were cut off before."""
    steps = [fake.observation(step, 2.0) for step in range(1, 17)]
    tried = [fake.observation(step, 9.0, phase=m.Phase.CORRECT) for step in range(17, 33)]
    twin = [replace(fake.observation(step, 3.0, phase=m.Phase.CORRECT), attempt=1) for step in range(17, 29)]
    made = replace(fake.outcome(16, verdict, 0), probation_steps=16, lost_steps=lost_steps, attempt=attempt)
    asked = fake.decision(16, 0, loss=9.0)
    view = fold(fake.started(), *steps, asked, *tried, *twin, made)
    assert (view.step, view.lost_steps, view.curves.train.points()[-1]) == (step, lost_steps, train)
    next_step = replace(fake.observation(step + 1, 9.0), attempt=attempt)
    assert "prediction_error" not in fold(next_step, view=view).divergence.kinds  # not held against the twin


def test_a_rollback_takes_its_steps_off_the_curves() -> None:
    told = [fake.observation(step, 4.0) for step in (1, 2, 3, 4)]
    again = [replace(fake.observation(step, 3.0), attempt=1) for step in (3, 4)]
    assert fold(*told, *again).curves.train.points() == [(1, 4.0), (2, 4.0), (3, 3.0), (4, 3.0)]


def test_an_accepted_jump_counts_virtual_steps_until_a_resume_undoes_it() -> None:
    view = fold(
        fake.started(), fake.observation(100, 2.0), fake.decision(50, 10), fake.outcome(50, V.ACCEPTED)
    )
    fold(fake.decision(80, 15), fake.outcome(80, V.ACCEPTED, 15), fake.observation(100, 2.0), view=view)
    assert shown(view)["progress"]["virtual_steps"] == 25
    assert shown(view)["progress"]["virtual_share"] == 25 / 125
    fold(fake.started(first_step=60, generation=2), view=view)
    page = shown(view)
    assert (page["progress"]["step"], page["progress"]["virtual_steps"]) == (60, 10)
    assert page["series"]["train"] == []


def test_virtual_steps_from_before_a_resume_are_taken_from_the_trainers_word() -> None:
    view = fold(
        fake.started(first_step=60, generation=2), replace(fake.evaluation(61, 2.0), virtual_steps=40)
    )
    assert view.virtual_steps == 40
    fold(fake.started(first_step=20, generation=3), view=view)
    assert view.virtual_steps == 0


def test_a_proposal_shows_forecast_and_outcome_side_by_side() -> None:
    (row,) = shown(fold(fake.decision(16, 10, loss=2.5), fake.outcome(16, V.ACCEPTED)))["proposals"]
    assert (row["predicted_loss"], row["verdict"], row["horizon_steps"]) == (2.5, "accepted", 10)
    assert row["loss_forecast"] == pytest.approx(1.99)
    assert row["loss_end"] == pytest.approx(1.97)
    assert row["cost_seconds"] == pytest.approx(0.09)


@pytest.mark.parametrize("verdict", [v for v in V if v not in m.APPLIED_VERDICTS])
def test_a_decision_that_was_not_applied_is_counted_and_moves_nothing(verdict: V) -> None:
    page = shown(fold(fake.observation(16, 2.0), fake.outcome(16, verdict, 0)))
    assert page["counters"][verdict.value] == 1
    assert page["progress"]["step"] == 16
    assert page["proposals"] == []
    assert page["series"]["forecast"] == []


def test_numbers_that_are_not_finite_are_null_with_a_marker() -> None:
    (row,) = shown(fold(fake.decision(16, 10), fake.outcome(16, V.RUINED)))["proposals"]
    assert (row["loss_after"], row["loss_after_marker"]) == (None, "inf")
    assert (row["loss_end"], row["loss_end_marker"]) == (None, "NaN")
    page = shown(fold(fake.observation(3, math.nan)))
    assert (page["progress"]["loss"], page["progress"]["loss_marker"]) == (None, "NaN")


@settings(max_examples=40)
@given(
    st.recursive(
        st.floats() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_plain_values_are_json(value: Any) -> None:
    json.dumps(plain(value), allow_nan=False)


def test_an_order_shows_its_acknowledgement() -> None:
    order = m.MemoryOrder(order_id="1.1", action=m.MemoryAction.CLEANUP, reason="full")
    done = m.OrderDone(order_id="1.1", done=True, bytes_before=9, bytes_after=4, detail="")
    assert shown(fold(order))["orders"][0]["done"] is False
    row = shown(fold(order, done))["orders"][0]
    assert (row["done"], row["bytes_before"], row["bytes_after"]) == (True, 9, 4)


def test_a_veto_is_shown_until_it_is_lifted() -> None:
    veto = m.PhaseVeto(veto_id="1", active=True, reason="full", valid_seconds=10.0)
    assert "vetoed: full" in shown(fold(veto))["run"]["words"]
    assert shown(fold(veto, replace(veto, active=False)))["run"]["veto"] is None


def test_memory_shows_level_and_thresholds_of_the_run() -> None:
    page = shown(fold(fake.sample(12 << 30)))
    assert page["memory"]["level"] == "cleanup"
    assert page["memory"]["cleanup_bytes"] == 12 << 30
    unknown = shown(fold(fake.sample(12 << 30), fake.sample(None)))["memory"]
    assert (unknown["level"], unknown["used_bytes"], unknown["unknown_reason"]) == ("cleanup", None, "lost")


def test_features_of_another_version_leave_the_loss_unknown_and_say_so() -> None:
    other = replace(fake.started(), feature_version=features.VERSION + 1)
    view = fold(other, fake.observation(1, 2.0), start_seconds=7.0)
    page = shown(view)
    assert page["progress"]["loss"] is None
    (alert,) = page["alerts"]
    assert (alert["kind"], alert["at_unix_seconds"]) == ("feature_version", 7.0)


def test_settings_that_cannot_be_read_are_an_alert_and_the_defaults_hold() -> None:
    page = shown(fold(replace(fake.started(), settings_toml="[trainer]\nstepz = 4")))
    assert page["alerts"][0]["kind"] == "settings_unreadable"
    assert page["progress"]["total_steps"] is None


def test_lost_nodes_and_dead_letters_become_alerts() -> None:
    dead = m.DeadLetter(
        stream="history", entry_id="1-4", kind="Outcome", deliveries=5, error="boom", body=b""
    )
    page = shown(fold(m.NodeLost(node="predictor", silent_seconds=4.0, last_step=7), dead))
    assert [alert["kind"] for alert in page["alerts"]] == ["dead_letter", "node_lost"]
    assert page["counters"]["dead_letters"] == 1


def test_memory_stays_bounded_over_a_long_run() -> None:
    view = fold(fake.started())
    for step in range(1, 20_001):
        view.fold(
            fake.observation(step, 2.0 + step % 7), sent_unix_seconds=float(step), at_seconds=float(step)
        )
        if step % 10 == 0:
            view.fold(fake.decision(step, 5), sent_unix_seconds=float(step), at_seconds=float(step))
            view.fold(fake.outcome(step, V.STALE, 5), sent_unix_seconds=float(step), at_seconds=float(step))
            view.fold(
                fake.account(step, total_seconds=float(step), steps=float(step)),
                sent_unix_seconds=float(step),
                at_seconds=float(step),
            )
            report = fake.report(step, {"weights": 1 << 30, "rest": step})
            view.fold(report, sent_unix_seconds=float(step), at_seconds=float(step))
            view.fold(fake.checkpoint(step), sent_unix_seconds=float(step), at_seconds=float(step))
    page = as_dict(view, now_seconds=0.0)
    most = {"train": 960, "seconds": 480, "units": 480, "holders": 240, "pace": 128, "proposals": 400}
    assert {name: len(page["series"][name]) <= rows for name, rows in most.items()} == dict.fromkeys(
        most, True
    )
    assert len(page["checkpoints"]) == 12
    assert len(json.dumps(page)) < 150_000


def test_a_snapshot_has_every_section_of_the_page_from_the_first_moment() -> None:
    empty = shown(new_view("run"))
    assert {"pace", "timing", "checkpoints", "stream_health", "provenance", "holder_names"} <= set(empty)
    new = {"seconds", "units", "holders", "order_marks", "proposals", "pace"}
    assert {name: empty["series"][name] for name in new} == {name: [] for name in new}
    assert empty["pace"]["saved_share"] is None
    assert empty["provenance"] == dict.fromkeys(("git_commit", "git_diff", "config_toml", "versions"))


def test_a_whole_run_shows_where_its_time_went_and_what_held_memory() -> None:
    view = new_view("run")
    for said in fake.fake_run("run", steps=600):
        view.fold(said.message, sent_unix_seconds=1e9 + said.at_seconds, at_seconds=said.at_seconds)
    page = shown(view, now_seconds=said.at_seconds)
    assert page["timing"]["verdict"] == "compute-bound"
    assert page["pace"]["plain_progress_per_second"] == pytest.approx(1 / fake.STEP_SECONDS, rel=0.05)
    assert [row[0] for row in page["series"]["pace"]] == list(range(50, 601, 50))
    seconds, units = page["series"]["seconds"], page["series"]["units"]
    assert seconds[-1][0] == units[-1][0] == page["progress"]["step"]
    assert units[-1][1] == pytest.approx(2048 * units[-1][0])
    assert [row[1] for row in seconds] == sorted(row[1] for row in seconds)
    holders, names = page["series"]["holders"], page["holder_names"]
    assert (names[0], names[-1]) == ("weights", "rest")
    assert all(len(row[1]) == len(names) for row in holders)
    assert [row["step"] for row in page["checkpoints"]] == list(range(600, 0, -50))
    marks = page["series"]["order_marks"]
    assert {mark[2] for mark in marks} == {"asked", "done"}
    assert len(page["series"]["proposals"]) == len(page["series"]["jumps"]) == page["counters"]["proposals"]


def test_what_a_sample_of_health_leaves_out_stands_as_it_was() -> None:
    whole = m.HealthSample(
        node="trainer", step=5, metrics=(m.Metric(name="output_entropy", value=2.0, unit="nats"),)
    )
    view = fold(whole, fake.account(9, total_seconds=3.0, steps=2.0))
    health = shown(view)["health"]["trainer"]
    assert (health["output_entropy"], health["wall_seconds_steps"]) == (2.0, 2.0)
    assert view.health["trainer"].step == 9


def test_no_names_from_a_stream_make_the_health_grow() -> None:
    view = new_view("run")
    for node in range(10):
        for first in range(0, 1000, 50):
            names = [str(first + n) for n in range(50)]
            metrics = tuple(m.Metric(name=name, value=1.0, unit="1") for name in names)
            fold(m.HealthSample(node=f"node {node}", step=1, metrics=metrics), view=view)
    assert len(view.health) == 3
    assert {len(sample.metrics) for sample in view.health.values()} == {128}


def with_slope(observation: m.Observation, slope: float) -> m.Observation:
    values = list(observation.features)
    values[features.INDEX["loss_slope_64"]] = slope
    return replace(observation, features=tuple(values))


def test_a_jump_is_measured_by_the_steps_before_it_until_a_resume_undoes_it() -> None:
    before = with_slope(fake.observation(16, 3.0), -0.01)
    after = with_slope(fake.observation(32, 3.0, phase=m.Phase.CORRECT), -9.0)
    kept = replace(fake.outcome(16, V.ACCEPTED, 10), loss_before=3.0, loss_end=2.79, probation_steps=16)
    view = fold(fake.started(), before, fake.decision(16, 10), after, kept)
    assert view.worth.before(1000) == (pytest.approx(5.0), 10)
    fold(fake.started(first_step=8, generation=2), view=view)
    assert view.worth.before(1000) == (0.0, 0)
