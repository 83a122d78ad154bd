"""A control that is switched on and could never act is refused before anything begins, with its cure."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import parse_settings
from common.control_checks import plan_words, usable
from common.errors import SettingsError


def settings_of(controls: dict[str, Any], *, predictor: dict[str, Any] | None = None, **trainer: Any) -> Any:
    return parse_settings({"trainer": {"controls": controls, **trainer}, "predictor": predictor or {}})


ALL_BUT_TEXT = {"rate": True, "batch": True, "read_out": True}


@pytest.mark.parametrize(
    ("controls", "trainer"),
    [
        ({}, {}),
        (ALL_BUT_TEXT, {"task": "digits"}),
        (ALL_BUT_TEXT | {"decay": True, "context": True}, {"schedule": {"name": "wsd"}}),
    ],
)
def test_controls_that_can_act_pass_as_they_are(controls: dict[str, Any], trainer: dict[str, Any]) -> None:
    settings = settings_of(controls, **trainer)
    assert usable(settings) is settings


def test_without_controls_a_run_without_predictor_passes() -> None:
    settings = settings_of({}, predictor={"enabled": False})
    assert usable(settings) is settings


@pytest.mark.parametrize(
    ("controls", "trainer", "predictor", "cure"),
    [
        ({"rate": True}, {}, {"enabled": False}, "predictor.enabled = true"),
        ({"context": True}, {"task": "digits"}, {}, "task digits has no context"),
        (
            {"context": True, "context_low_tokens": 64},
            {"model": {"context_tokens": 64}},
            {},
            "lower trainer.controls.context_low_tokens",
        ),
        ({"decay": True}, {"schedule": {"name": "cosine"}}, {}, 'trainer.schedule.name = "wsd"'),
        ({"read_out": True}, {"read_out": "average"}, {}, "leave one of them off"),
    ],
)
def test_a_switch_that_would_do_nothing_is_refused_in_one_line_that_names_the_cure(
    controls: dict[str, Any], trainer: dict[str, Any], predictor: dict[str, Any], cure: str
) -> None:
    with pytest.raises(SettingsError) as refusal:
        usable(settings_of(controls, predictor=predictor, **trainer))
    assert cure in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_a_run_will_do_is_said_in_one_line() -> None:
    short = {"steps": 100}
    assert plan_words(settings_of({}, predictor={"policy": "fixed"})) == ""
    assert plan_words(settings_of({}, **short)).startswith("plain training, observed: a run of 100 steps")
    on = plan_words(settings_of({"rate": True, "read_out": True}, **short))
    share = "trials may cost 10.0% of the run"
    assert on.startswith(f"the predictor may change rate, read-out: {share}; no jumps")
