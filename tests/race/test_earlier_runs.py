"""Rule "fitted": the recording of an earlier run is all that its predictor saw; seeds are never shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.bus import EntryId
from common.config import load_settings
from common.errors import EnvironmentFault
from common.messages import Message, Observation, Outcome, PhaseDecision
from common.recording import messages_of, read_recording
from common.recording_writer import RecordingWriter
from common.streams import DECISIONS, HISTORY
from tests.common.message_samples import sample
from tests.race.fake_race import run_fake
from trainer_node.race import earlier_runs
from trainer_node.race.options import RaceOptions
from trainer_node.race.plan import TUNING_SEED, RacePlan, chosen_arms
from trainer_node.race.race import race
from trainer_node.race.run_result import RunResult
from trainer_node.race.workers import RunOrder

PLAN = RacePlan(
    task="digits",
    rule="fitted",
    base=load_settings(preset="digits"),
    arms=chosen_arms("fitted", ()),
    seeds=tuple(range(1000)),
    trials=1,
)


class Answering:
    def handle(self, message: Message, entry_id: EntryId) -> list[Message]:
        return [sample(PhaseDecision)] if isinstance(message, Outcome) else []


def test_a_recording_holds_what_the_predictor_saw_and_said(tmp_path: Path) -> None:
    path = tmp_path / "run.hpt"
    writer = RecordingWriter(path, run_id="earlier", created_unix_seconds=0.0)
    recorded = earlier_runs.RecordedPredictor(Answering(), writer)
    seen = [sample(Observation), sample(Outcome), sample(Observation), sample(Outcome)]
    said = [recorded.handle(message, EntryId(1, n)) for n, message in enumerate(seen, start=1)]
    writer.seal()
    recording = read_recording(path)
    assert messages_of(recording, HISTORY) == seen
    assert messages_of(recording, DECISIONS) == [answer for answers in said for answer in answers]
    assert said == [[], [sample(PhaseDecision)]] * 2


def test_earlier_runs_have_seeds_that_neither_tuning_nor_the_race_has(tmp_path: Path) -> None:
    orders = earlier_runs.earlier_orders(PLAN, 4, tmp_path)
    seeds = {order.key.seed for order in orders}
    assert len(seeds) == len({order.recording for order in orders}) == 4
    assert not seeds & {*PLAN.seeds, TUNING_SEED}


def run_noting_state(order: RunOrder) -> RunResult:
    """Leaves one file per run in the race's folder: made from which state."""
    if order.recording is not None:
        order.recording.write_bytes(b"recording")
    else:
        state = order.predictor_state
        (Path.cwd() / f"{order.key.arm}.state").write_text(state.read_text() if state else "cold")
    return run_fake(order)


def test_only_our_arms_start_from_the_fitted_state_and_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(recordings: list[Path], out: Path) -> None:
        out.write_text(f"fitted on {len([path.read_bytes() for path in recordings])}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(earlier_runs, "installed_fit", lambda: fit)
    monkeypatch.setattr("trainer_node.race.plots.draw_all", lambda out_dir, figures: {})
    out = tmp_path / "out"
    options = RaceOptions(task="digits", quick=True, workers=1, out=out, fitted_on=3, today="2026-11-21")
    assert race(options, runner=run_noting_state) == 0
    states = {path.stem: path.read_text() for path in tmp_path.glob("*.state")}
    assert states == {"adamw-decay": "cold", "ours-fixed": "fitted on 3", "ours": "fitted on 3"}
    assert '"in_distribution": [\n' in (out / "report.json").read_text()


def test_without_a_predictor_to_fit_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier_runs, "entry_points", lambda **_: ())
    with pytest.raises(EnvironmentFault, match="--fitted-on needs a predictor that can be fitted"):
        race(RaceOptions(task="digits", quick=True, out=tmp_path / "out", fitted_on=2))
    assert list(tmp_path.iterdir()) == []
