"""The anatomy of a jump: nothing done differs in nothing, and the run that is dissected never notices."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from common.settings import RunSettings
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node.loop import Loop
from trainer_node.race.anatomy import Candidate, Point, candidate, dissect_run, points_of, table_of


def test_a_road_with_a_zero_change_is_the_twin_at_every_reading() -> None:
    found = dissect_run(
        tiny_settings(),
        seed=0,
        candidates=[candidate("drift", 0.0, "zero")],
        points=[Point(name="early", step=20), Point(name="late", step=40)],
        to_the_end=True,
    )
    assert [one.point for one in found] == ["early", "late", "end"]
    for one in found:
        figures = [one.now, one.plus20, one.plus50, one.plus200, one.at_end]
        assert all(figure == 0.0 or math.isnan(figure) for figure in figures)
    assert found[0].plus20 == 0.0
    assert found[0].at_end == 0.0
    assert math.isnan(found[0].plus200)
    assert math.isnan(found[1].plus50)


def test_a_dissected_run_ends_bit_for_bit_as_a_plain_one() -> None:
    loops: list[Loop] = []
    plain = tiny_loop(ScriptedLinks(), tiny_settings())
    plain.run()
    dissect_run(
        tiny_settings(),
        seed=0,
        candidates=[candidate("momentum", 3.0, "x"), candidate("pull_back", 1.0, "x")],
        points=[Point(name="early", step=20)],
        seen=loops.append,
    )
    assert same_bits(weights_of(loops[0]), weights_of(plain))


def test_twice_the_size_is_twice_the_delta_and_the_random_control_has_its_norm() -> None:
    found = dissect_run(
        tiny_settings(),
        seed=0,
        candidates=[candidate("drift", 1.0, "1"), candidate("drift", 2.0, "2"), random_twin(2.0)],
        points=[Point(name="early", step=20)],
    )
    one, two, random = found[:3]
    assert two.step_norms == pytest.approx(2 * one.step_norms, rel=1e-3)
    assert random.step_norms == pytest.approx(two.step_norms, rel=0.2)  # the norm is of all weights
    assert random.now != two.now


def random_twin(windows: float) -> Candidate:
    return replace(candidate("drift", windows, "random"), direction="random", is_random=True)


def test_points_are_in_the_stable_phase_and_at_the_start_of_the_decay() -> None:
    settings: RunSettings = tiny_settings("trainer.steps=1000")
    points = points_of(settings.trainer)
    assert [point.step for point in points] == [206, 404, 601, 799]
    constant = tiny_settings("trainer.schedule.name=constant")
    assert len(points_of(constant.trainer)) == 3


def test_a_lost_jump_and_the_end_of_the_run_are_null_and_a_lost_run_does_not_hide_the_others() -> None:
    found = dissect_run(
        tiny_settings(), seed=0, candidates=[candidate("drift", 1.0, "1")], points=[Point(name="p", step=20)]
    )[0]
    rows = table_of([replace(found, now=math.inf), replace(found, now=1.0), replace(found, now=2.0)])
    assert (rows[0]["now"], rows[0]["n"]) == (2.0, 3)
    assert rows[0]["plus200"] is None
    assert table_of([replace(found, now=math.inf)])[0]["now"] is None
