"""What is told of a run is a matter of its steps, not of the moment at which it is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.codec import encode
from common.messages import Observation, Phase, PhaseDecision
from tests.trainer.test_loop import proposal, twice_bad
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node import observer
from trainer_node.loop import Loop


def told(monkeypatch: pytest.MonkeyPatch, together_steps: int, *overrides: str) -> ScriptedLinks:
    for name in ("TOLD_TOGETHER", "TOLD_PLAINLY"):
        monkeypatch.setattr(observer, name, (together_steps, 60.0))
    links = ScriptedLinks(twice_bad)
    tiny_loop(links, tiny_settings(*overrides)).run()
    return links


def test_what_is_told_does_not_depend_on_how_many_steps_are_told_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one_by_one = told(monkeypatch, 1)
    assert len(one_by_one.of(Observation)) > 60, "no step was undone: the interesting case is missing"
    for together_steps in (3, 8, 1000):
        links = told(monkeypatch, together_steps)
        assert [encode(m) for m in links.said] == [encode(m) for m in one_by_one.said]


def test_nor_where_nothing_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = "predictor.enabled=false"
    one_by_one, together = told(monkeypatch, 1, plain), told(monkeypatch, 1000, plain)
    assert [encode(m) for m in together.said] == [encode(m) for m in one_by_one.said]
    assert len(together.of(Observation)) == tiny_settings().trainer.steps


@pytest.mark.parametrize("read_out", ["weights", "average"])
def test_where_no_decision_is_to_come_no_average_is_kept_unless_it_is_handed_out(read_out: str) -> None:
    settings = tiny_settings(
        "trainer.window_steps=20", "trainer.basis.average_every_steps=1", f"trainer.read_out={read_out}"
    )
    kept = []

    def rest_for_good(observation: Observation) -> PhaseDecision:
        return replace(proposal(observation), phase=Phase.FULL, horizon_steps=0, next_window_steps=1000)

    def look(loop: Loop) -> None:
        assert loop.basis is not None
        kept.append(loop.basis.averages.tensors()["memory"][0].item())

    tiny_loop(ScriptedLinks(rest_for_good), settings, housekeeping=look).run()
    first_decision = 28  # statistics 8, window 20
    assert kept[-1] == (settings.trainer.steps if read_out == "average" else first_decision)


@pytest.mark.parametrize(("after_seconds", "most_untold"), [(0.0, 0), (3600.0, 7)])
def test_slow_steps_are_told_at_once_and_quick_ones_eight_at_a_time(
    monkeypatch: pytest.MonkeyPatch, after_seconds: float, most_untold: int
) -> None:
    monkeypatch.setattr(observer, "TOLD_TOGETHER", (8, after_seconds))
    links, untold = ScriptedLinks(), []
    settings = tiny_settings("trainer.window_steps=20", "trainer.statistics_steps=20")

    def count(loop: object) -> None:
        untold.append(loop.progress.step - len(links.of(Observation)))  # type: ignore[attr-defined]

    tiny_loop(links, settings, housekeeping=count).run()
    assert max(untold) == most_untold
    assert len(links.of(Observation)) == settings.trainer.steps
