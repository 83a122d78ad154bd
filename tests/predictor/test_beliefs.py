"""What the pilot takes to be in force is what the trainer trains with, whatever it was told or missed."""

from __future__ import annotations

import dataclasses

import pytest

from common import features
from common.control_rules import NEUTRAL, breach, still_allowed
from common.messages import Controls, Observation, Outcome, Phase, Verdict
from common.settings import TrainerSettings
from predictor_node.controls_in_force import told_by
from predictor_node.node import Predictor
from predictor_node.state import MemoryStore
from tests.predictor.controlled_run import ControlledTrainer, World, controlled_settings
from tests.predictor.scripted import Log, point
from tests.predictor.test_pilot import BATCH, DECAY, LIVE, NO_JUMPS, RATE, Flight, fly, in_force, of

GROWING = World(noise_scale=16.0, fixed_seconds=12.0)


def seen_at(step: int, **told: float) -> Observation:
    values = [0.0] * len(features.NAMES)
    for name, value in told.items():
        values[features.INDEX[name]] = value
    return Observation(
        step=step,
        attempt=0,
        phase=Phase.FULL,
        features=tuple(values),
        gradient_norms=(),
        decision_point=point(1),
    )


def going_on(flight: Flight, trainer: ControlledTrainer, *, until_step: int) -> Flight:
    """The same run with a new predictor that finds the states of the former one."""
    predictor = Predictor(flight.store)
    log = Log(predictor.handle)
    trainer.run(log.publish, until_step=until_step)
    return Flight(trainer, log, predictor, flight.store)


@pytest.mark.parametrize("off", [RATE, BATCH])
def test_a_control_whose_switch_was_turned_off_at_a_resume_is_neutral_and_the_others_go_on(off: str) -> None:
    other = BATCH if off == RATE else RATE
    world = dataclasses.replace(GROWING, best_rate=8.0)
    rich = "trainer.steps=8000"
    both = fly(RATE, BATCH, LIVE, rich, world=world, until_step=300, verdict=of(Verdict.ACCEPTED))
    name = max(both.trainer.checkpoints)
    assert both.trainer.checkpoints[name].controls.rate_factor > 1.0
    assert both.trainer.checkpoints[name].controls.batch_factor > 1.0
    settings = controlled_settings(*NO_JUMPS, other, LIVE, rich)
    resumed = both.trainer.resumed(name, generation=2, settings=settings)
    step, clock = resumed.step, resumed.clock
    after = going_on(both, resumed, until_step=1200)
    assert in_force(after) == after.trainer.controls
    stays, gone = ("rate_factor", "batch_factor") if other == RATE else ("batch_factor", "rate_factor")
    assert getattr(after.trainer.controls, stays) > 1.0
    assert getattr(after.trainer.controls, gone) == 1.0
    changes = after.pilot["in_force"]
    assert next(change["clock"] for change in changes if change["base_step"] == step) == clock


def test_a_trial_that_was_passed_over_to_catch_up_is_seen_in_the_steps_behind_it() -> None:
    flight = fly(BATCH, LIVE, world=GROWING, until_step=120, verdict=of(Verdict.ACCEPTED))
    assert flight.trainer.controls.batch_factor > 1.0
    late = Predictor(MemoryStore())
    for entry_id, message in flight.log.entries:
        is_step = isinstance(message, Observation)
        if is_step and (message.phase is Phase.CORRECT or message.decision_point is not None):
            late.pass_over(entry_id)
        else:
            late.handle(message, entry_id)
    found = dataclasses.replace(flight, predictor=late)
    assert in_force(found) == flight.trainer.controls
    newest = found.pilot["in_force"][-1]
    assert newest["clock"] + (flight.trainer.step - newest["base_step"]) * newest["controls"][
        "batch_factor"
    ] == (flight.trainer.clock)


def test_without_the_guard_a_refused_change_stays_and_is_known_to_stay() -> None:
    flight = fly(
        "trainer.controls.read_out=true",
        "trainer.verify.enabled=false",
        "predictor.control_share=1.0",
        verdict=of(Verdict.REFUSED),
    )
    assert flight.trainer.controls == Controls(read_out="average")
    assert in_force(flight) == flight.trainer.controls
    assert flight.arms == ["read_out:average"]


def test_a_tail_whose_verdict_never_arrived_is_told_by_the_progress() -> None:
    predictor = Predictor(MemoryStore())
    log, lost = Log(predictor.handle), []

    def deaf(message: object) -> object:
        if isinstance(message, Outcome) and message.verdict is Verdict.ACCEPTED:
            lost.append(message)
            return None
        return log.publish(message)  # type: ignore[arg-type]

    settings = controlled_settings(*NO_JUMPS, DECAY, "trainer.steps=2000")
    trainer = ControlledTrainer(settings, World(loss_noise=0.001), verdict=of(Verdict.ACCEPTED))  # type: ignore
    trainer.run(deaf)  # type: ignore[arg-type]
    assert [decision.arm for decision in trainer.proposals] == ["decay:now"]
    assert lost
    assert in_force(Flight(trainer, log, predictor, MemoryStore())) == trainer.controls


@pytest.mark.parametrize(
    ("believed", "told", "clock"),
    [
        (Controls(), {"progress": 0.5}, 500.0),
        (Controls(), {"progress": 0.5, "log2_batch_factor": 1.0}, 500.0),
        (Controls(decay_start=500, decay_steps=100), {"progress": 0.5}, 300.0),
        (Controls(), {}, 300.0),
    ],
)
def test_the_clock_is_told_by_the_progress_of_the_schedule_in_force(
    believed: Controls, told: dict[str, float], clock: float
) -> None:
    settings = controlled_settings(DECAY, BATCH).trainer
    assert told_by(seen_at(300, **told), settings, believed).clock_at(300) == clock


@pytest.mark.parametrize("step", [1, 7, 333, 999])
def test_of_a_run_that_never_moved_the_clock_is_the_step(step: int) -> None:
    settings = controlled_settings(DECAY, BATCH).trainer
    assert told_by(seen_at(step, progress=step / settings.steps), settings, NEUTRAL).clock_at(step) == step


def decayed(*overrides: str) -> TrainerSettings:
    return controlled_settings(DECAY, *overrides).trainer


@pytest.mark.parametrize(
    "settings",
    [
        decayed("trainer.steps=700"),
        decayed('trainer.schedule.name="cosine"'),
        decayed("trainer.schedule.warmup_steps=650"),
        controlled_settings().trainer,
    ],
)
def test_a_tail_that_does_not_fit_the_settings_of_today_is_as_configured(settings: TrainerSettings) -> None:
    tail = Controls(decay_start=600, decay_steps=200)
    assert still_allowed(tail, settings) == NEUTRAL
    assert still_allowed(tail, decayed()) == tail
    assert breach(tail, now=NEUTRAL, settings=decayed(), clock=500.0) == ""
    assert "ahead" in breach(tail, now=NEUTRAL, settings=decayed(), clock=601.0)


def test_an_objection_to_a_text_from_the_stream_stays_short_and_printable() -> None:
    wanted = Controls(read_out="\x1b[2J" * 60_000)
    for settings in (controlled_settings(), controlled_settings("trainer.controls.read_out=true")):
        said = breach(wanted, now=NEUTRAL, settings=settings.trainer, clock=0.0)
        assert len(said) < 120
        assert said.isprintable()
