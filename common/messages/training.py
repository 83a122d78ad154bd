"""The messages that the predictor learns from and answers with, and the glossary. Read this file first.

step            one real optimizer step: forward, backward, update. Numbered from 1.
attempt         how often the run has been set back to a snapshot; (attempt, step) is unique.
virtual step    a step that a delta stands for: no data consumed, no schedule moved.
horizon         virtual steps of one proposal.
phase           WARMUP, FULL, PREDICT, CORRECT.
window          the real steps of one FULL phase; its end is a decision point. A cycle is a
                FULL window, PREDICT, CORRECT.
proposal        a PhaseDecision whose horizon is above zero.
delta           coefficients over directions the trainer holds: delta_g = sum_k c[g,k] * d[g,k].
probation       the real steps of CORRECT, after which a proposal is judged.
verdict         what the trainer made of a decision; Outcome reports it. veto: the monitor's no.
arm             a choice of the bandit: a kind of delta and a horizon, e.g. "drift:25"; "rest".
forecaster      phi: a small network that maps a weight's own past to its displacement.
generation      fencing number of one start of a node; entry ids are `generation-sequence`.

Messages travel on six streams, `hpt:{run_id}:<stream>`, one writer each. All that the predictor
learns from is on one stream, so it has one total order (see docs/messages.md for the reason).
Wall-clock time is in the envelope, never in a message: equal runs send equal bytes.
Seconds inside messages are wall time, or in lockstep forward-equivalents (trainer_node/ledger.py).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

SCHEMA = 4
DIRECTIONS = ("momentum", "drift", "slow_drift", "pull_back")


class Phase(enum.Enum):
    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"


class Verdict(enum.Enum):
    ACCEPTED = "accepted"  # survived probation: the jump is kept
    REFUSED = "refused"  # after probation worse than the no-jump forecast, or than a twin: restored
    RUINED = "ruined"  # non-finite or beyond the ruin bound at once: restored
    ABORTED = "aborted"  # the run was stopped during probation: restored
    REST = "rest"  # the predictor chose FULL
    MISSING = "missing"  # no decision in time
    STALE = "stale"  # made for another step, generation or set of weights
    USED = "used"  # this decision was applied before
    VETOED = "vetoed"
    MALFORMED = "malformed"  # non-finite coefficients, wrong shape or absurd horizon
    FAILED = "failed"  # no snapshot could be taken (disk full): nothing was changed


APPLIED_VERDICTS = frozenset({Verdict.ACCEPTED, Verdict.REFUSED, Verdict.RUINED, Verdict.ABORTED})


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSpec:
    name: str
    shape: tuple[int, ...]
    dtype: str  # torch name without prefix, e.g. "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupSpec:
    """A set of parameters that shares one row of coefficients."""

    name: str  # e.g. "attention.early"
    parameters: tuple[ParameterSpec, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    run_id: str
    generation: int
    resumed_from: str  # name of the checkpoint folder, or "" for a fresh run
    settings_toml: str  # the resolved run file
    feature_version: int
    directions: tuple[str, ...]  # names, length K
    groups: tuple[GroupSpec, ...]  # length G
    first_step: int  # steps already done when this generation starts


@dataclass(frozen=True, kw_only=True, slots=True)
class DecisionPoint:
    """What the predictor needs at the end of a window. G groups, K directions, row-major."""

    window: int  # windows finished in this run, from 1
    fingerprint: str  # of the weights; a decision must echo it
    gram: tuple[float, ...]  # (G*K*K) inner products of the directions
    parameter_norms: tuple[float, ...]  # (G) L2
    displacement_norms: tuple[float, ...]  # (G) L2 of what the averaged weights did in this window
    happened: tuple[float, ...]  # (G*K) least-squares coefficients of that over the previous basis
    unexplained_share: tuple[float, ...]  # (G) residual / total sum of squares, in [0, 1]
    window_steps: int = 0  # real steps of this window; 0 = as configured
    weights: bytes = b""  # (G*S) sampled weights, float32 little-endian; empty unless phi is learned


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    step: int
    attempt: int
    phase: Phase
    features: tuple[float, ...]  # (F) see common.features
    gradient_norms: tuple[float, ...]  # (G) L2 before clipping
    decision_point: DecisionPoint | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    loss: float  # nats, expected training loss at the end of probation if the proposal is applied
    loss_without: float  # the same without the proposal
    spread: float  # one standard deviation of `loss_without`, nats, >= 0
    refusal: float = 0.0  # probability in [0, 1] that the trainer will not keep the jump


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """Levers besides the delta, each as it shall stand. The neutral values change nothing.

    What each one does and how far it may go: common/control_rules.py.
    """

    rate_factor: float = 1.0  # times the scheduled learning rate
    batch_factor: float = 1.0  # times the configured batch: a power of two
    context_tokens: int = 0  # 0 = as configured
    decay_start: int = 0  # nominal step at which the tail of the rate begins; 0 = as configured
    decay_steps: int = 0  # nominal length of that tail, at whose end the run ends; 0 = as configured
    read_out: str = ""  # "weights" or "average"; "" = as configured


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseDecision:
    decision_id: str  # "<step>.<attempt>": deterministic, unique in a run
    phase: Phase  # PREDICT (a proposal) or FULL (rest)
    horizon_steps: int  # 0 when resting
    num_groups: int
    num_directions: int
    coefficients: tuple[float, ...]  # (G*K) row-major; empty when resting
    controls: Controls | None  # None = as they stand; others need a probation, as a delta does
    forecast: Forecast | None  # None while there is too little history
    base_generation: int  # of the trainer
    base_step: int
    base_attempt: int
    base_fingerprint: str
    valid_until_step: int  # inclusive
    reason: str  # one phrase for people
    arm: str = ""  # of the bandit; "" for a policy without arms
    chunks: int = 1  # parts in which the delta is applied, a forward check after each
    correction_share: float = 0.0  # of the parabola's correction after the first CORRECT step, in [0, 1]
    next_window_steps: int = 0  # real steps until the next decision point; 0 = as configured
    forecaster: bytes = b""  # weights of phi (docs/messages.md); empty = coefficients over directions


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a decision brought and all that it cost. One per decision point."""

    decision_id: str
    verdict: Verdict
    base_step: int
    attempt: int  # after the verdict; a restore raises it
    horizon_steps: int
    loss_before: float  # nats on the guard batches; NaN if not measured
    loss_after: float  # at once after the jump
    loss_end: float  # at the end of probation (another rate or batch: see docs/messages.md)
    loss_forecast: float  # at the end of probation, had there been no jump; of a twin: measured
    loss_spread: float  # one standard deviation of that
    delta_norm: float  # L2 over all groups
    delta_cosine: float  # sampled cosine of the delta to the displacement of the probation; NaN if unknown
    probation_steps: int  # real steps taken on probation
    lost_steps: int  # undone by a restore: of these, or of a twin that was run beside them
    passes: float  # forward-equivalents of checks and undone steps
    waiting_seconds: float  # for the decision
    snapshot_seconds: float
    jump_seconds: float  # expand and apply
    check_seconds: float  # guard forward passes
    restore_seconds: float
    lost_seconds: float  # spent in steps that were undone
    full_step_seconds: float  # what one ordinary step costs now
    chunks_applied: int = 0
    slope_after: float = math.nan  # first CORRECT gradient times delta, nats per delta; NaN if not measured
    correction: float = 0.0  # times the delta, added after the first CORRECT step; 0 = none


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointWritten:
    """Sent when the state is captured; the predictor then saves its own under the same name."""

    name: str  # folder name, e.g. "step-00000050.gen-1"
    step: int
    attempt: int
    emergency: bool
    fingerprint: str  # of the weights


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded:
    step: int
    reason: str  # "finished", "stopped"
