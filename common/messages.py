"""Every message of the system, and its glossary. Read this file first.

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
generation      fencing number of one start of a node; entry ids are `generation-sequence`.

Messages travel on six streams, `hpt:{run_id}:<stream>`, one writer each. All that the predictor
learns from is on one stream, so it has one total order (see docs/messages.md for the reason).
Wall-clock time is in the envelope, never in a message: equal runs send equal bytes.
Seconds inside messages are wall time, or in lockstep forward-equivalents (trainer_node/ledger.py).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

SCHEMA = 1
DIRECTIONS = ("momentum", "drift", "slow_drift", "pull_back")


class Phase(enum.Enum):
    WARMUP = "warmup"
    FULL = "full"
    PREDICT = "predict"
    CORRECT = "correct"


class Verdict(enum.Enum):
    ACCEPTED = "accepted"  # survived probation: the jump is kept
    REFUSED = "refused"  # worse than the no-jump forecast after probation: restored
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """Levers besides the delta. The neutral values change nothing."""

    rate_factor: float = 1.0  # times the scheduled learning rate
    batch_factor: float = 1.0  # times the configured batch
    context_tokens: int = 0  # 0 = as configured


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseDecision:
    decision_id: str  # "<step>.<attempt>": deterministic, unique in a run
    phase: Phase  # PREDICT (a proposal) or FULL (rest)
    horizon_steps: int  # 0 when resting
    num_groups: int
    num_directions: int
    coefficients: tuple[float, ...]  # (G*K) row-major; empty when resting
    controls: Controls
    forecast: Forecast | None  # None while there is too little history
    base_generation: int  # of the trainer
    base_step: int
    base_attempt: int
    base_fingerprint: str
    valid_until_step: int  # inclusive
    reason: str  # one phrase for people


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
    loss_end: float  # at the end of probation
    loss_forecast: float  # at the end of probation, had there been no jump
    loss_spread: float  # one standard deviation of that
    delta_norm: float  # L2 over all groups
    delta_cosine: float  # sampled cosine of the delta to the displacement of the probation; NaN if unknown
    probation_steps: int  # real steps taken on probation
    lost_steps: int  # of these, undone by a restore
    passes: float  # forward-equivalents of checks and undone steps
    waiting_seconds: float  # for the decision
    snapshot_seconds: float
    jump_seconds: float  # expand and apply
    check_seconds: float  # guard forward passes
    restore_seconds: float
    lost_seconds: float  # spent in steps that were undone
    full_step_seconds: float  # what one ordinary step costs now


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


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseVeto:
    """The newest one counts. It lapses `valid_seconds` after arrival: a dead monitor stops nothing."""

    veto_id: str
    active: bool
    reason: str
    valid_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOrder:
    order_id: str
    action: str  # "cleanup"
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRequest:
    request_id: str
    emergency: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderDone:
    """The trainer's acknowledgement of a MemoryOrder or CheckpointRequest."""

    order_id: str
    bytes_before: int | None  # memory the trainer held; None = unknown
    bytes_after: int | None
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Held-out loss. The predictor never reads it: it must not learn from the score."""

    step: int
    virtual_steps: int
    loss: float  # nats per token, or per example
    accuracy: float | None  # classification only
    train_seconds: float  # wall seconds of training so far


@dataclass(frozen=True, kw_only=True, slots=True)
class VramSample:
    """Memory of the device or process. Unknown is None with a reason, never zero."""

    source: str  # "nvml", "rss"
    device: str
    used_bytes: int | None
    total_bytes: int | None
    trainer_bytes: int | None
    unknown_reason: str  # "" when all is known


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    name: str
    value: float | None
    unit: str


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthSample:
    node: str
    step: int
    metrics: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    node: str
    severity: str  # "info", "warning", "error"
    kind: str  # stable key, e.g. "prediction_lost"
    text: str  # what happened and what to do
    step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Heartbeat:
    node: str
    generation: int
    process_id: int
    state: str  # "starting", "running", "stopping"
    step: int  # last step this node knows of
    uptime_seconds: float
    counters: tuple[Metric, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeLost:
    node: str
    silent_seconds: float
    last_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    stream: str
    entry_id: str
    kind: str
    deliveries: int  # tries of a message that a node could not handle
    error: str
    body: bytes


Message = (
    RunStarted | Observation | Outcome | CheckpointWritten | RunEnded
    | PhaseDecision
    | PhaseVeto | MemoryOrder | CheckpointRequest
    | OrderDone | Evaluation | VramSample | HealthSample | Alert | Heartbeat | NodeLost | DeadLetter
)  # fmt: skip

MESSAGE_TYPES: dict[str, type] = {kind.__name__: kind for kind in Message.__args__}
