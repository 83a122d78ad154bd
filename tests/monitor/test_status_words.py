"""The line on top: each sentence only where it is known, and true."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common import messages as m
from common.config import dump_settings, parse_settings
from monitor_node.node import new_view
from monitor_node.pace import Pace
from monitor_node.run_view import RunView
from monitor_node.snapshot import as_dict
from monitor_node.verdict import ago, percent, saving
from tests.monitor import fake_run as fake
from tests.monitor.test_pace import jump

GIB = 1 << 30


def words(*said: m.Message | tuple[float, m.Message], now_seconds: float = 0.0) -> str:
    """Of messages, each at second 0 or at the second beside it."""
    view = new_view("run")
    for item in said:
        at, message = item if isinstance(item, tuple) else (0.0, item)
        view.fold(message, sent_unix_seconds=1e9 + at, at_seconds=at)
    view.watch.silent_seconds = 1e9
    return as_dict(view, now_seconds=now_seconds)["run"]["words"]


RUNNING = (fake.started(steps=1200), fake.heartbeat(step=400), fake.observation(400, 2.0))


def test_the_line_says_it_all() -> None:
    line = words(
        *RUNNING,
        fake.account(0, total_seconds=1.0),
        fake.outcome(50, m.Verdict.REST, 0),
        jump(100, gain=0.5, horizon_steps=50),
        fake.account(400, total_seconds=42.0, steps=40.0, verification=1.0),
        fake.checkpoint(350),
        *((float(s), fake.sample(int((9.8 + 0.01 * (s % 3)) * GIB))) for s in range(0, 120, 2)),
        now_seconds=120.0,
    )
    assert line == (
        "Running: step 400 of 1,200. Prediction saves 8.9 % at equal loss."
        " Memory steady at 9.8 of 16.0 GiB. Checkpoint 2 min ago."
    )


def test_what_is_not_known_is_not_said() -> None:
    assert words(*RUNNING) == "Running: step 400 of 1,200."
    assert "Memory" not in words(*RUNNING, fake.sample(None))
    assert words(fake.observation(3, 2.0), fake.sample(GIB, total_bytes=None)).endswith("Memory at 1.0 GiB.")


def test_prediction_that_costs_says_so() -> None:
    costs = (
        fake.account(0, total_seconds=0.0),
        fake.account(400, total_seconds=41.2, steps=40.0, waiting=1.2),
    )
    assert "Prediction costs 3.0 % at equal loss." in words(*RUNNING, *costs)


def test_a_run_without_prediction_has_no_word_on_it() -> None:
    toml = dump_settings(parse_settings({"predictor": {"enabled": False}}))
    accounts = (fake.account(0, total_seconds=0.0), fake.account(400, total_seconds=40.0, steps=40.0))
    started = replace(fake.started(), settings_toml=toml)
    assert "rediction" not in words(started, *RUNNING[1:], *accounts)


@given(st.floats(0.01, 100.0), st.floats(0.01, 100.0))
def test_the_words_agree_with_the_numbers(progress: float, plain: float) -> None:
    pace = Pace(
        progress_per_second=progress,
        plain_progress_per_second=plain,
        kept_steps=100,
        lost_steps=0,
        worth_steps=0.0,
        virtual_steps=0,
        cost_share=0.0,
    )
    line = saving(pace)
    assert ("saves" in line) == (pace.saved_share >= 0.005) or "neither" in line
    assert not ("costs" in line.split() and "neither" not in line and progress > plain)
    assert "0.0 %" not in line


def test_memory_that_moves_is_not_called_steady() -> None:
    rising = ((float(s), fake.sample(int((6 + 0.02 * s) * GIB))) for s in range(0, 100, 2))
    assert "Memory at 8.0 of 16.0 GiB." in words(*RUNNING, *rising)
    assert "steady" not in words(*RUNNING, fake.sample(6 * GIB))  # one reading says nothing


def test_memory_that_will_be_full_says_when() -> None:
    rising = [(float(s), fake.sample(int((3 + s / 100) * GIB))) for s in range(0, 600, 5)]
    line = words(*RUNNING, *rising, now_seconds=600.0)
    assert "Memory rising, at 8.9 of 16.0 GiB: emergency in about " in line


def test_memory_above_its_thresholds_says_the_level() -> None:
    assert words(*RUNNING, fake.sample(12 * GIB)).endswith("Memory at 12.0 of 16.0 GiB, level cleanup.")


def test_the_end_of_a_run_tells_neither_memory_nor_checkpoint() -> None:
    line = words(*RUNNING, fake.sample(GIB), fake.checkpoint(350), m.RunEnded(step=1200, reason="finished"))
    assert line == "Ended at step 1,200 of 1,200 (finished)."


def test_a_trainer_that_fell_silent_tells_how_old_its_checkpoint_is() -> None:
    view = new_view("run")
    for message in (*RUNNING, fake.sample(GIB), fake.checkpoint(350, emergency=True)):
        view.fold(message, sent_unix_seconds=1e9, at_seconds=0.0)
    line = as_dict(view, now_seconds=40.0)["run"]["words"]
    assert "fell silent at step 400" in line
    assert line.endswith("continues the run. Emergency checkpoint 40 s ago.")


def test_a_veto_is_the_last_word() -> None:
    veto = m.PhaseVeto(veto_id="1", active=True, reason="memory is full", valid_seconds=9.0)
    assert words(*RUNNING, veto).endswith("Prediction is vetoed: memory is full.")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "10 s"),
        (14, "10 s"),
        (99, "90 s"),
        (120, "2 min"),
        (5900, "98 min"),
        (7200, "2 h"),
        (3e5, "3 days"),
    ],
)
def test_ages_are_coarse(seconds: float, text: str) -> None:
    assert ago(seconds) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.11, "11 %"), (0.0996, "10 %"), (0.031, "3.1 %"), (1.0, "100 %")]
)
def test_shares_are_short(share: float, text: str) -> None:
    assert percent(share) == text


def view_of(*messages: m.Message) -> RunView:
    view = new_view("run")
    for message in messages:
        view.fold(message, sent_unix_seconds=1e9, at_seconds=0.0)
    return view


@pytest.mark.parametrize("sent", [float("nan"), float("inf"), -1.0, 1e300])
def test_an_envelope_without_a_time_breaks_nothing(sent: float) -> None:
    view = view_of(fake.started())
    for message in (fake.observation(1, 2.0), fake.sample(GIB), fake.report(1, {"weights": 5})):
        view.fold(message, sent_unix_seconds=sent, at_seconds=1.0)
    series = as_dict(view, now_seconds=1.0)["series"]
    assert series["seconds"] == [[1, 1e9]]
    assert series["holders"][0][0] == series["memory"][0][0] == 10**9
