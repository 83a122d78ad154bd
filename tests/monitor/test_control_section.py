"""Controls as people see them: status, page, metrics, terminal; a run without them looks as it did."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import features
from common import messages as m
from monitor_node.feed import as_json
from monitor_node.prometheus import SnapshotCollector, exposition
from monitor_node.run_reader import new_view
from monitor_node.snapshot import as_dict
from monitor_node.top_screen import screen
from tests.common.message_samples import values
from tests.monitor import fake_controls as fake
from tests.monitor import fake_run

V = m.Verdict
BEFORE_CONTROLS = {
    "train", "held_out", "forecast", "memory", "phases", "jumps", "seconds", "units", "holders",
    "order_marks", "proposals", "pace",
}  # fmt: skip


def view_of(*messages: m.Message) -> Any:
    view = new_view("run")
    for second, message in enumerate(messages):
        view.fold(message, sent_unix_seconds=float(second), at_seconds=float(second))
    return view


def page_of(*messages: m.Message) -> dict[str, Any]:
    snapshot = as_dict(view_of(*messages), now_seconds=float(len(messages)))
    return json.loads(json.dumps(snapshot, allow_nan=False))


def metrics_of(page: dict[str, Any]) -> dict[str, float]:
    body, _ = exposition(SnapshotCollector(lambda: page), "")
    lines = [line.rsplit(" ", 1) for line in body.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines if name.startswith("hpt_")}


def top_of(page: dict[str, Any]) -> str:
    return "\n".join(line.plain for line in screen(page, 120, 30).renderables)


def told_run(steps: int = 800, **more: Any) -> dict[str, Any]:
    view, at_seconds = new_view("run"), 0.0
    for _, message, at_seconds in fake.fake_controls(steps=steps):
        view.fold(message, sent_unix_seconds=1e9 + at_seconds, at_seconds=at_seconds)
    return json.loads(json.dumps(as_dict(view, now_seconds=at_seconds), allow_nan=False))


def test_a_run_without_controls_looks_as_it_did() -> None:
    """Its trainer tells of rate, batch and noise scale as well: none of that is shown."""
    plain, telling = new_view("run"), new_view("run")
    for said in fake_run.fake_run("run", steps=300):
        message = said.message
        plain.fold(message, sent_unix_seconds=said.at_seconds, at_seconds=said.at_seconds)
        if isinstance(message, m.Observation):
            told = dict(zip(features.NAMES, message.features, strict=True))
            told |= {"has_noise_scale": 1.0, "log10_noise_scale_over_batch": 0.5, "context_share": 1.0}
            message = replace(message, features=tuple(told.values()))
        telling.fold(message, sent_unix_seconds=said.at_seconds, at_seconds=said.at_seconds)
    page = as_dict(plain, now_seconds=30.0)
    assert as_dict(telling, now_seconds=30.0) == page
    assert "controls" not in page
    assert set(page["series"]) == BEFORE_CONTROLS
    assert not [name for name in metrics_of(page) if "factor" in name or "noise" in name or "context" in name]
    assert "Controls" not in top_of(page)


def test_what_is_switched_on_is_said_before_anything_was_tried() -> None:
    page = page_of(fake.started(rate=True, read_out=True), *[fake.observation(step) for step in (1, 2)])
    assert page["controls"]["switches"] == ["rate", "read_out"]
    assert page["controls"]["words"] == (
        "The predictor may change rate, read-out. In force: everything as configured. None was tried so far."
    )
    assert page["series"]["control_trials"] == []
    assert page["run"]["words"].startswith("No jumps: ") or "Plain training" not in page["run"]["words"]


def test_the_trial_that_is_under_way_is_named_and_counts_as_in_force() -> None:
    asked = fake.decision(16, m.Controls(batch_factor=2.0))
    probation = [fake.observation(step, batch=2.0, phase=m.Phase.CORRECT) for step in (17, 18)]
    page = page_of(fake.started(batch=True), fake.observation(16), asked, *probation)
    assert page["controls"]["on_trial"] == "batch ×2"
    assert page["controls"]["batch_factor"] == 2.0
    late = [fake.observation(step, batch=2.0, phase=m.Phase.CORRECT) for step in range(17, 48)]
    assert page_of(fake.started(batch=True), fake.observation(16), asked, *late)["controls"]["on_trial"]
    not_begun = page_of(fake.started(batch=True), fake.observation(16), asked, fake.observation(17))
    assert not_begun["controls"]["on_trial"] is None
    after = page_of(
        fake.started(batch=True), fake.observation(16), asked, *probation, fake.outcome(16, V.ACCEPTED),
        fake.observation(33, batch=2.0),
    )  # fmt: skip
    assert after["controls"]["on_trial"] is None


def test_a_whole_run_shows_every_control_with_its_reason() -> None:
    page = told_run()
    controls, series = page["controls"], page["series"]
    assert "In force: rate ×2, batch ×4. 6 of 7 trials kept (16 steps undone)." in controls["words"]
    assert series["controls"] == [
        [1, 1.0, 1.0, 256], [97, 1.0, 1.0, 64], [193, 2.0, 1.0, 64], [385, 2.0, 2.0, 64],
        [481, 2.0, 2.0, 128], [641, 2.0, 4.0, 128], [721, 2.0, 4.0, 256],
    ]  # fmt: skip
    assert [row[:3] for row in series["control_trials"]][2:4] == [
        [288, "rate ×2 (now ×4)", "refused"],
        [384, "batch ×2", "accepted"],
    ]
    why = series["control_trials"][3][3]
    assert why.startswith("batch ×2: noise scale 3.1× batch, +12 % progress per second forecast, +")
    assert why.endswith("% seen; kept")
    assert [row["step"] for row in controls["trials"]] == [row[0] for row in series["control_trials"]][::-1]
    assert controls["noise_scale_over_batch"] == series["noise_scale"][-1][1]
    assert "Controls  The predictor may change rate, batch, context. In force: rate ×2" in top_of(page)


def test_a_narrow_terminal_shows_what_is_in_force_and_what_became_of_trials() -> None:
    lines = [line.plain for line in screen(told_run(), 80, 24).renderables]
    shown = " ".join(line.strip() for line in lines)
    assert "In force: rate ×2, batch ×4. 6 of 7 trials kept (16 steps undone)." in shown
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24


def test_what_prediction_saves_is_not_told_of_steps_that_are_not_alike() -> None:
    view = new_view("run")
    for said in fake_run.fake_run("run", steps=300):
        view.fold(said.message, sent_unix_seconds=said.at_seconds, at_seconds=said.at_seconds)
    assert as_dict(view, now_seconds=30.0)["pace"]["saved_share"] is not None
    view.curves.controls.observed(301, fake.observation(301, batch=2.0).features)
    page = as_dict(view, now_seconds=30.0)
    assert page["pace"]["saved_share"] is None
    assert "other controls" in page["pace"]["because"]
    assert "Prediction saves" not in page["run"]["words"]
    assert "Prediction costs" not in page["run"]["words"]
    assert "Whether they pay shows beside a run without them." in page["run"]["words"]


def test_the_metrics_say_how_the_controls_stand() -> None:
    told = metrics_of(told_run())
    assert (told["hpt_rate_factor"], told["hpt_batch_factor"], told["hpt_context_tokens"]) == (2.0, 4.0, 256)
    assert told["hpt_noise_scale_ratio"] > 0.0
    no_text = metrics_of(page_of(fake_run.started(), fake.observation(1, rate=0.5)))
    assert no_text["hpt_rate_factor"] == 0.5


def test_a_run_with_a_larger_batch_ends_after_fewer_steps() -> None:
    """Its clock is its data: half of 1,000 nominal steps are left, and each step takes two."""
    page = page_of(
        fake.started(steps=1000, batch=True),
        *(fake.observation(step, batch=2.0, progress=0.5) for step in (400, 401)),
    )
    assert page["progress"]["total_steps"] == 401 + 250


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(
            values(m.Controls),
            st.sampled_from(V),
            values(m.Outcome),
            st.lists(st.floats(), min_size=8, max_size=8),
        ),
        max_size=6,
    )
)
def test_no_controls_of_any_value_break_page_metrics_or_terminal(rows: list[Any]) -> None:
    said: list[m.Message] = [fake.started(rate=True)]
    for number, (controls, verdict, outcome, told) in enumerate(rows):
        asked = fake.decision(16 * number, controls)
        whole = fake.observation(16 * number).features
        observed = replace(fake.observation(16 * number), features=(*whole[:-8], *told))
        said += [observed, asked, replace(outcome, decision_id=asked.decision_id, verdict=verdict)]
    page = page_of(*said)
    as_json(page)
    metrics_of(page)
    top_of(page)
    assert all(math.isfinite(part) for row in page["series"]["controls"] for part in row[:3])
