"""What a run planned to hold, shown beside what it holds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from common import messages as m
from common.config import dump_settings, load_settings
from common.memory_plan import Site, plan_memory
from common.settings import RunSettings
from monitor_node.node import new_view
from monitor_node.run_view import RunView
from monitor_node.snapshot import as_dict
from tests.monitor import fake_run as fake

GROUPS = (
    m.GroupSpec(name="head", parameters=(m.ParameterSpec(name="w", shape=(64, 32), dtype="float32"),)),
    m.GroupSpec(name="mlp", parameters=(m.ParameterSpec(name="up", shape=(128, 32), dtype="bfloat16"),)),
)


def settings_for(device: str) -> RunSettings:
    return load_settings(preset="nano", overrides=[f"trainer.device={device}"])


def begun(settings: RunSettings, groups: tuple[m.GroupSpec, ...] = GROUPS) -> RunView:
    view = new_view("run")
    start = replace(fake.started(), groups=groups, settings_toml=dump_settings(settings))
    view.fold(start, sent_unix_seconds=1.0, at_seconds=1.0)
    return view


def planned(view: RunView) -> Any:
    shown = json.loads(json.dumps(as_dict(view, now_seconds=2.0), allow_nan=False))
    return shown["memory"]["planned"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_is_shown_with_the_start_before_any_reading(device: str) -> None:
    settings = settings_for(device)
    plan = plan_memory(GROUPS, settings, Site(is_gpu=device == "cuda"))
    assert planned(begun(settings)) == [
        {"name": h.name, "num_bytes": h.num_bytes, "place": h.place} for h in plan.holders
    ]


def test_before_a_start_and_on_a_device_that_is_not_known_there_is_no_plan() -> None:
    assert planned(new_view("run")) is None
    assert planned(begun(settings_for("auto"))) is None


@pytest.mark.parametrize(("source", "parked"), [("nvml", "host"), ("rss", "disk")])
def test_a_reading_says_on_which_device_a_run_of_auto_is(source: str, parked: str) -> None:
    view = begun(settings_for("auto"))
    sample = m.VramSample(
        source=source, device="d", used_bytes=1, total_bytes=9, trainer_bytes=1, unknown_reason=""
    )
    view.fold(sample, sent_unix_seconds=2.0, at_seconds=2.0)
    (place,) = {holder["place"] for holder in planned(view) if holder["name"] == "snapshot"}
    assert place == parked


@pytest.mark.parametrize("shape", [(-5, 7), (1 << 62, 1 << 62), (1 << 62,) * 5000])
def test_shapes_that_no_model_has_give_no_plan_and_do_no_harm(shape: tuple[int, ...]) -> None:
    odd = m.GroupSpec(name="head", parameters=(m.ParameterSpec(name="w", shape=shape, dtype="x999"),))
    assert planned(begun(settings_for("cpu"), (odd,))) is None
