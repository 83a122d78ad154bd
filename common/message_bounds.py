"""How large the messages of a run can get, and what a decision point costs: upper bounds, before it begins.

Both depend on the number of groups and on settings, never on the number of weights: that is the claim which
tests/trainer/test_message_bounds.py holds for models from 1M to 1B parameters. A bound is the size of a real
message whose every number takes its widest form. Holds for what our own nodes say; a foreign predictor may
send up to the codec's limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common import features
from common.codec import encode
from common.config import dump_settings
from common.control_rules import any_on
from common.errors import SettingsError
from common.messages import (
    DIRECTIONS,
    Controls,
    DecisionPoint,
    Forecast,
    GroupSpec,
    Message,
    Observation,
    Phase,
    PhaseDecision,
    RunStarted,
)
from common.settings import BasisSettings, RunSettings

RECORD_BYTES = 72  # kind, time, checksum and field names around a body (common/stream_records.py), and the id
PAYLOAD_HEAD_BYTES = 3  # by which the length of bytes may take more than that of none
MAX_FORECASTER_BYTES = 128 << 10  # trainer_node/weight_forecast.py takes no more
MAX_SAMPLE_BYTES = 200 << 10  # of a message's 256 KiB (common/codec.py); the rest of a point takes a few
MAX_CHUNKS = 64
REASON_CHARACTERS, ARM_CHARACTERS = 160, 40
FINGERPRINT = "f" * 16
WIDE = 1 << 63  # an int that msgpack writes in nine bytes, as every float
CHECK_PASSES, STEP_PASSES = 1.0, 3.0  # forward-equivalents of a micro-batch: forward; forward and backward


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageBounds:
    """Bytes on the stream, record included."""

    observation: int  # of an ordinary step
    decision_point: int  # what an observation that ends a window carries on top
    decision: int
    run_started: int  # once a run; the one message that grows with the number of parameter tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionCost:
    """Forward-equivalents of one decision point; a step of one micro-batch is 3."""

    rest: float  # a window is closed in one pass over the basis: no forward pass
    ruined: float  # a jump that is taken back at once
    kept: float  # a jump that survives its probation, whose steps count as training
    refused: float  # the same, and its probation is undone
    step: float  # one ordinary step


def message_bounds(groups: Sequence[GroupSpec], settings: RunSettings) -> MessageBounds:
    """Raises BodyTooLarge where a run could not even say which parameters it has."""
    basis = settings.trainer.basis
    ordinary = _widest_observation(len(groups))
    sampled_bytes = 4 * len(groups) * basis.history_sample if basis.history_snapshots else 0
    at_point = _size(replace(ordinary, decision_point=_widest_point(len(groups)))) - _size(ordinary)
    decision_bytes = _size(_widest_decision(len(groups)))
    if basis.history_snapshots:
        at_point += sampled_bytes + PAYLOAD_HEAD_BYTES
        decision_bytes += MAX_FORECASTER_BYTES + PAYLOAD_HEAD_BYTES
    return MessageBounds(
        observation=_size(ordinary),
        decision_point=at_point,
        decision=decision_bytes,
        run_started=_size(_started(groups, settings)),
    )


def check_history_fits(settings: BasisSettings, num_groups: int) -> None:
    """Raises SettingsError for a past of the weights that holds nothing, or that no message can carry."""
    if settings.history_snapshots == 1:
        raise SettingsError("basis.history_snapshots = 1 holds no displacement; set 0, or 2 and more")
    limit = MAX_SAMPLE_BYTES // (4 * max(1, num_groups))
    if settings.history_snapshots and settings.history_sample > limit:
        raise SettingsError(
            f"basis.history_sample = {settings.history_sample} does not fit into a message with {num_groups}"
            f" groups; the largest is {limit}"
        )


def decision_cost(settings: RunSettings) -> DecisionCost:
    """Without the guard (verify.enabled = false) nothing is checked and nothing undone."""
    trainer = settings.trainer
    step = STEP_PASSES * trainer.batch.accumulation
    if not settings.predictor.enabled or not trainer.verify.enabled:
        return DecisionCost(rest=0.0, ruined=0.0, kept=0.0, refused=0.0, step=step)
    check = CHECK_PASSES * trainer.verify.guard_batches
    chunks = _most_chunks(settings)
    kept = (2 + chunks) * check  # before the jump, after each part, after the probation
    longest_steps = max(trainer.probation_steps, trainer.controls.trial_steps * any_on(trainer.controls))
    refused = kept + longest_steps * step
    return DecisionCost(rest=0.0, ruined=(1 + chunks) * check, kept=kept, refused=refused, step=step)


def _most_chunks(settings: RunSettings) -> int:
    return MAX_CHUNKS if settings.predictor.chunk_steps else 1


def _size(message: Message) -> int:
    return len(encode(message)) + RECORD_BYTES


def _widest_observation(num_groups: int) -> Observation:
    return Observation(
        step=WIDE,
        attempt=WIDE,
        phase=_LONGEST_PHASE,
        features=(0.0,) * len(features.NAMES),
        gradient_norms=(0.0,) * num_groups,
        decision_point=None,
    )


def _widest_point(num_groups: int) -> DecisionPoint:
    directions, one = len(DIRECTIONS), (0.0,) * num_groups
    return DecisionPoint(
        window=WIDE,
        fingerprint=FINGERPRINT,
        gram=one * directions**2,
        parameter_norms=one,
        displacement_norms=one,
        happened=one * directions,
        unexplained_share=one,
        window_steps=WIDE,
    )


def _widest_decision(num_groups: int) -> PhaseDecision:
    return PhaseDecision(
        decision_id=f"{WIDE}.{WIDE}",
        phase=_LONGEST_PHASE,
        horizon_steps=WIDE,
        num_groups=WIDE,
        num_directions=WIDE,
        coefficients=(0.0,) * (num_groups * len(DIRECTIONS)),
        controls=Controls(context_tokens=WIDE, decay_start=WIDE, decay_steps=WIDE, read_out="weights"),
        forecast=Forecast(loss=0.0, loss_without=0.0, spread=0.0),
        base_generation=WIDE,
        base_step=WIDE,
        base_attempt=WIDE,
        base_fingerprint=FINGERPRINT,
        valid_until_step=WIDE,
        reason="×" * REASON_CHARACTERS,  # two bytes, as ours says "batch ×2"; "÷" too
        arm="a" * ARM_CHARACTERS,
        chunks=WIDE,
        next_window_steps=WIDE,
    )


def _started(groups: Sequence[GroupSpec], settings: RunSettings) -> RunStarted:
    return RunStarted(
        run_id="r" * 64,
        generation=WIDE,
        resumed_from="c" * 64,
        settings_toml=dump_settings(settings),
        feature_version=WIDE,
        directions=DIRECTIONS,
        groups=tuple(groups),
        first_step=WIDE,
    )


_LONGEST_PHASE = max(Phase, key=lambda phase: len(phase.value))
