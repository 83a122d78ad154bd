"""How large messages get, and what a decision point costs: bounds that real ones keep, for any model."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path

import pytest

from common import features, message_bounds
from common.bus import Entry, EntryId
from common.codec import encode
from common.config import load_settings, settings_from_toml
from common.message_bounds import RECORD_BYTES, MessageBounds, decision_cost
from common.message_bounds import message_bounds as bounds_of
from common.messages import (
    Controls,
    DecisionPoint,
    Forecast,
    Observation,
    Outcome,
    Phase,
    PhaseDecision,
    RunStarted,
    Verdict,
)
from common.recording import messages_of, read_recording
from common.stream_records import fields_of
from common.streams import DECISIONS, HISTORY
from tests.trainer.memory_scene import Scene, gpt_settings
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks
from trainer_node import ledger, weight_forecast
from trainer_node.dry_run import run_plan

RECORDING = Path(__file__).parent.parent / "fixtures" / "digits-lockstep.hpt"
SIZES = {
    "1M": (4, 128, 1024),
    "124M": (12, 768, 50304),
    "350M": (24, 1024, 50304),
    "1B": (24, 1792, 50304),
}


def sizes_of(name: str) -> MessageBounds:
    layers, width, vocabulary = SIZES[name]
    shapes = (f"layers={layers}", f"width={width}", "heads=4", f"vocabulary_size={vocabulary}")
    settings = load_settings(preset="nano", overrides=[f"trainer.model.{shape}" for shape in shapes])
    return run_plan(settings).messages


def test_what_is_said_of_a_step_and_of_a_decision_does_not_grow_with_the_model() -> None:
    found = {name: sizes_of(name) for name in SIZES}
    assert len({(b.observation, b.decision_point, b.decision) for b in found.values()}) == 1
    assert found["1B"].run_started > found["1M"].run_started  # it names every parameter, once a run


def test_the_messages_of_a_recorded_run_keep_their_bounds() -> None:
    recording = read_recording(RECORDING)
    history = messages_of(recording, HISTORY)
    started = next(m for m in history if isinstance(m, RunStarted))
    bounds = bounds_of(started.groups, settings_from_toml(started.settings_toml))
    seen: Counter[type] = Counter()
    for message in [*history, *messages_of(recording, DECISIONS)]:
        size = len(encode(message)) + RECORD_BYTES
        match message:
            case Observation(decision_point=None):
                assert size <= bounds.observation
            case Observation():
                assert size <= bounds.observation + bounds.decision_point
            case PhaseDecision():
                assert size <= bounds.decision
            case RunStarted():
                assert size <= bounds.run_started
        seen[type(message)] += 1
    assert min(seen[kind] for kind in (Observation, PhaseDecision, RunStarted)) > 0


@pytest.mark.parametrize("preset", ["digits", "gpt2-small"])
@pytest.mark.parametrize("history", [0, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_messages_of_a_model_keep_the_bounds(preset: str, history: int, seed: int) -> None:
    settings = load_settings(preset=preset, overrides=[f"trainer.basis.history_snapshots={history}"])
    plan, draw = run_plan(settings), random.Random(seed)
    num_groups, bounds = len(plan.groups), plan.messages

    def some(count: int) -> tuple[float, ...]:
        return tuple(draw.choice([0.0, math.nan, draw.gauss(0, 1e9)]) for _ in range(count))

    def number() -> int:
        return draw.randrange(1 << draw.randrange(1, 64))

    point = DecisionPoint(
        window=number(), fingerprint="0123456789abcdef", gram=some(16 * num_groups),
        parameter_norms=some(num_groups), displacement_norms=some(num_groups), happened=some(4 * num_groups),
        unexplained_share=some(num_groups), window_steps=number(),
        weights=bytes(4 * num_groups * settings.trainer.basis.history_sample) if history else b"",
    )  # fmt: skip
    observation = Observation(
        step=number(), attempt=number(), phase=draw.choice(list(Phase)), features=some(len(features.NAMES)),
        gradient_norms=some(num_groups), decision_point=point,
    )  # fmt: skip
    decision = PhaseDecision(
        decision_id=f"{number()}.{number()}", phase=draw.choice(list(Phase)), horizon_steps=number(),
        num_groups=num_groups, num_directions=4, coefficients=some(4 * num_groups),
        controls=Controls(
            rate_factor=draw.random(), batch_factor=draw.random(), context_tokens=number(),
            decay_start=number(), decay_steps=number(), read_out=draw.choice(["", "weights", "average"]),
        ),
        forecast=Forecast(loss=1.0, loss_without=2.0, spread=0.1), base_generation=number(),
        base_step=number(), base_attempt=number(), base_fingerprint="0123456789abcdef",
        valid_until_step=number(), reason="head:25, the best of 7 arms here", arm="head:25", chunks=8,
        next_window_steps=number(), forecaster=bytes(weight_forecast.MAX_BYTES) if history else b"",
    )  # fmt: skip
    assert len(encode(observation)) + RECORD_BYTES <= bounds.observation + bounds.decision_point
    assert len(encode(decision)) + RECORD_BYTES <= bounds.decision


def test_a_trial_of_controls_with_the_longest_reason_keeps_the_bound() -> None:
    plan, number, count = run_plan(load_settings(preset="digits")), (1 << 63) - 1, message_bounds.WIDE
    decision = PhaseDecision(
        decision_id=f"{number}.{number}", phase=Phase.PREDICT, horizon_steps=number, num_groups=number,
        num_directions=number, coefficients=(0.0,) * (4 * len(plan.groups)),
        controls=Controls(context_tokens=count, decay_start=count, decay_steps=count, read_out="average"),
        forecast=Forecast(loss=1.0, loss_without=2.0, spread=0.1), base_generation=number, base_step=number,
        base_attempt=number, base_fingerprint="0123456789abcdef", valid_until_step=number,
        reason="÷" * message_bounds.REASON_CHARACTERS, arm="a" * message_bounds.ARM_CHARACTERS, chunks=number,
        next_window_steps=number,
    )  # fmt: skip
    assert len(encode(decision)) + RECORD_BYTES <= plan.messages.decision


@pytest.mark.parametrize("history", [0, 4])
def test_the_bounds_are_not_loose(history: int) -> None:
    """A real decision point takes at least 95 % of its bound."""
    links = ScriptedLinks()
    settings = gpt_settings(f"trainer.basis.history_snapshots={history}", "trainer.steps=20")
    scene = Scene(settings, links=links, is_counted=False).run()
    groups = [group.spec() for group in scene.loop.groups]
    bounds = bounds_of(groups, settings)
    newest = [o for o in links.of(Observation) if o.decision_point][-1]
    size = len(encode(newest)) + RECORD_BYTES
    whole = bounds.observation + bounds.decision_point
    assert 0.95 * whole < size <= whole


def test_a_record_adds_no_more_than_stated() -> None:
    body = b"b" * 1000
    for kind in ("Observation", "PhaseDecision", "RunStarted"):
        entry = Entry("history", EntryId(1 << 40, 1 << 40), kind, body, 1763700000.1234567)
        record = sum(len(name) + len(value) for name, value in fields_of(entry).items())
        assert record + len(str(entry.id)) - len(body) <= RECORD_BYTES


def test_what_the_bounds_assume_is_what_the_trainer_does() -> None:
    assert message_bounds.MAX_FORECASTER_BYTES == weight_forecast.MAX_BYTES
    assert ledger.CHECK_PASSES == message_bounds.CHECK_PASSES
    assert ledger.TRAIN_PASSES == message_bounds.STEP_PASSES


@pytest.mark.parametrize(
    ("drift", "verdict"), [(0.1, Verdict.ACCEPTED), (-3.0, None), (1e30, Verdict.RUINED)]
)
def test_a_jump_costs_the_passes_that_were_planned(drift: float, verdict: Verdict | None) -> None:
    more = ("trainer.verify.guard_batches=2", "trainer.batch.accumulation=2", "trainer.steps=32")
    settings = gpt_settings(*more, *(["trainer.verify.tolerance=100.0"] if drift == 0.1 else []))
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=drift))
    Scene(settings, links=links, is_counted=False).run()
    outcomes = [o for o in links.of(Outcome) if verdict is None or o.verdict is verdict]
    cost = decision_cost(settings)
    planned = {
        Verdict.ACCEPTED: cost.kept, Verdict.REFUSED: cost.refused, Verdict.RUINED: cost.ruined,
    }  # fmt: skip
    assert outcomes
    assert all(o.passes == planned[o.verdict] for o in outcomes if o.verdict in planned)
    assert {o.verdict for o in outcomes} & ({verdict} if verdict else {Verdict.REFUSED, Verdict.RUINED})


def test_a_decision_to_rest_costs_no_pass() -> None:
    links = ScriptedLinks()
    settings = gpt_settings("trainer.steps=20")
    scene = Scene(settings, links=links, is_counted=False).run()
    assert any(o.decision_point for o in links.of(Observation))
    assert scene.loop.ledger.passes.get(ledger.CHECKS, 0.0) == decision_cost(settings).rest == 0.0


def test_without_the_guard_nothing_is_checked() -> None:
    cost = decision_cost(gpt_settings("trainer.verify.enabled=false"))
    assert (cost.kept, cost.refused, cost.ruined) == (0.0, 0.0, 0.0)
