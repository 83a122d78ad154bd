"""Settings: what a user writes is checked to the last key, and every error names the cure."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import dump_settings, load_settings, preset_names, setting_rows, settings_from_toml
from common.errors import SettingsError
from common.settings import RunSettings

BAD_OVERRIDES = {
    "trainer.step=5": "unknown key trainer.step; did you mean trainer.steps?",
    "trainer.modle.width=8": "unknown key trainer.modle; did you mean trainer.model?",
    "traner.steps=5": "unknown key traner; did you mean trainer?",
    "trainer.steps": "write it as table.key=value",
    "steps=5": "write it as table.key=value",
    "trainer.steps=-5": "trainer.steps = -5: must be at least 1",
    "trainer.steps=0": "must be at least 1",
    "trainer.steps=99999999999999999": "must be at most",
    "trainer.steps=5.5": "must be of type int",
    "trainer.steps=true": "must be of type int",
    "trainer.steps=many": "must be of type int",
    "trainer.optimizer.rate=nan": "must be finite",
    "trainer.optimizer.rate=-1": "must be at least 0",
    "trainer.optimizer.name=adam": "must be one of adamw, adamw8bit, lion, muon, sgd",
    "trainer.model.heads=3": "must divide trainer.model.width",
    "trainer.schedule.warmup_steps=100000": "lower it or train longer",
    "trainer.optimizer=5": "trainer.optimizer is a table",
    "trainer.steps.x=5": "steps is not a table",
    "predictor.horizon_steps=5": "must be a list",
    "predictor.horizon_steps=[]": "set predictor.enabled = false",
    "predictor.horizon_steps=[0]": "must be at least 1",
    "monitor.silent_seconds=0.3": "must be above monitor.heartbeat_seconds",
    "monitor.device=gpu": "write auto, cpu, cuda or fake:SCRIPT",
    "monitor.device=cuda:1": "write auto, cpu, cuda or fake:SCRIPT",
    "monitor.http=nonsense": "write it as HOST:PORT",
    "monitor.http=127.0.0.1:99999": "write it as HOST:PORT",
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_setting_is_one_line_that_names_the_cure(override: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(preset="nano", overrides=[override])
    assert BAD_OVERRIDES[override] in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(("kind", "low", "high"), [("share", "0.8", "0.9"), ("bytes", "5", "9")])
def test_a_cleanup_above_the_emergency_is_refused_and_one_of_them_alone_is_not(
    kind: str, low: str, high: str
) -> None:
    cleanup, emergency = f"monitor.cleanup_{kind}", f"monitor.emergency_{kind}"
    with pytest.raises(SettingsError, match=f"must be below {emergency}"):
        load_settings(preset="nano", overrides=[f"{cleanup}={high}", f"{emergency}={low}"])
    load_settings(preset="nano", overrides=[f"{cleanup}={low}", f"{emergency}={high}"])
    load_settings(preset="nano", overrides=[f"{cleanup}={high}"])
    load_settings(preset="nano", overrides=[f"{emergency}={low}"])


def test_a_first_jump_without_enough_losses_to_judge_it_is_refused_at_once() -> None:
    short = ["trainer.statistics_steps=4", "trainer.window_steps=3"]
    with pytest.raises(SettingsError, match="must be at least 8"):
        load_settings(preset="nano", overrides=short)
    load_settings(preset="nano", overrides=["trainer.statistics_steps=4", "trainer.window_steps=4"])


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_being_written_and_read(name: str) -> None:
    settings = load_settings(preset=name)
    assert settings_from_toml(dump_settings(settings)) == settings


@given(
    steps=st.integers(1, 10**6),
    rate=st.floats(0, 10, allow_nan=False),
    path=st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    horizons=st.lists(st.integers(1, 10_000), min_size=1, max_size=5),
)
def test_any_valid_settings_survive_being_written_and_read(
    steps: int, rate: float, path: str, horizons: list[int]
) -> None:
    base = RunSettings()
    schedule = dataclasses.replace(base.trainer.schedule, warmup_steps=0)
    optimizer = dataclasses.replace(base.trainer.optimizer, rate=rate)
    data = dataclasses.replace(base.trainer.data, path=path)
    trainer = dataclasses.replace(
        base.trainer, steps=steps, schedule=schedule, optimizer=optimizer, data=data
    )
    predictor = dataclasses.replace(base.predictor, horizon_steps=tuple(horizons))
    settings = dataclasses.replace(base, trainer=trainer, predictor=predictor)
    assert settings_from_toml(dump_settings(settings)) == settings


def test_set_beats_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[trainer]\nsteps = 70\nseed = 9\n[trainer.basis]\ndtype = 'bf16'\n")
    settings = load_settings(file=file, overrides=["trainer.steps=80", "predictor.enabled=false"])
    trainer = settings.trainer
    assert (trainer.steps, trainer.seed, trainer.basis.dtype) == (80, 9, "bf16")
    assert trainer.window_steps == RunSettings().trainer.window_steps
    assert settings.predictor.enabled is False


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[trainer\nsteps = 1", "not valid TOML"),
        (b"\xff\xfe", "cannot be read"),
        (b"[trainer]\nstepz = 1", "did you mean trainer.steps?"),
        (b"[other]\nx = 1", "unknown key other"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as error:
        load_settings(file=file)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_an_unknown_preset_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such file; `trainer-node presets`"):
        load_settings(file=tmp_path / "none.toml")
    with pytest.raises(SettingsError, match=r"unknown preset 'nanp'; did you mean nano\?"):
        load_settings(preset="nanp")
    with pytest.raises(SettingsError, match="not both"):
        load_settings(preset="nano", file=tmp_path / "none.toml")


def test_every_setting_is_explained_once() -> None:
    rows = setting_rows()
    keys = [key for key, _, _ in rows]
    assert len(keys) == len(set(keys))
    assert all(meaning for _, _, meaning in rows)
    written = tomllib.loads(dump_settings(RunSettings()))

    def leaves(table: dict, path: str = "") -> list[str]:
        found = []
        for name, value in table.items():
            found += leaves(value, f"{path}{name}.") if isinstance(value, dict) else [path + name]
        return found

    assert sorted(keys) == sorted(leaves(written))
