"""What goes wrong with a run without any node failing: an Alert as it begins, and one as it ends. Pure.

    stalled          the trainer beats, but its step stays where it is
    plateau          the held-out loss does not fall any more, and that is sure
    lagging          a node is seconds of training behind, or its messages do not get to the server
    history_full     the history is about to lose what the predictor has not saved
    disk_full        there is no room for the next checkpoints
    overconfident    the output is far surer than it is right: entropy well below cross entropy
    constant_output  the output has come to be the same whatever goes in

Each has a badness: from 1 on it begins, below RELEASE it is over, and unknown changes nothing. The second
Alert is of the same kind and of severity "info". Dead nodes: liveness.py. Signs in the training loss:
divergence.py; spikes are the trainer's own business. Reads no clock, sends nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from common.messages import Alert
from common.streams import HISTORY, MONITOR, NODES, PREDICTOR, STREAMS, TRAINER
from monitor_node.control_section import expected_steps
from monitor_node.liveness import Liveness
from monitor_node.run_view import RunView
from monitor_node.trend import fit_trend

LOOK_SECONDS = 1.0
RELEASE = 0.75

# Guesses, untested, on the side of silence; the laws in tests/monitor/test_health.py say what they let pass.
PLATEAU_SHARE = 0.2  # of the run: the stretch in which the loss should have fallen
PLATEAU_EVALUATIONS = 8  # at least
PLATEAU_FALL = 0.005  # of the loss
PLATEAU_ERRORS = 2.5  # standard errors: Student's t for eight points at 2 % on each side
LAG_SECONDS, LAG_WINDOWS = 10.0, 2.0
QUEUED_ENTRIES = 2000.0  # a tenth of what the trainer holds back before it drops anything
HISTORY_SHARE = 0.9  # of the stream's fuse
FREE_CHECKPOINTS = 2.0  # the newest is written before the oldest is removed, and the predictor saves as well
CONFIDENT_SHARE, CONFIDENT_NATS = 0.5, 0.5  # of the cross entropy, and below it
CONSTANT_SHARE, LEARNED_NATS = 0.05, 0.1  # of the most information that there was, if that was worth the name


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a run that goes on; see `facts_of`."""

    step: int
    total_steps: int
    window_steps: int
    steps_per_second: float | None
    still_seconds: float | None  # of the trainer; None while it is not training
    stalled_seconds: float  # that count as a stall
    held_out: tuple[tuple[int, float], ...]  # (step, loss), by step
    metrics: Mapping[str, float | None]  # of the trainer's newest HealthSample
    lag_steps: Mapping[str, int]  # by node that lives
    queued_entries: Mapping[str, float]  # by node that lives and says so
    history_entries: int | None
    is_history_needed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    kind: str
    badness: float | None  # None = cannot be known now
    text: str  # what happened and what to do
    severity: str = "warning"


@dataclass(frozen=True, kw_only=True, slots=True)
class HealthState:
    active: frozenset[str] = field(default_factory=frozenset)  # kinds that have begun
    most_information: float = 0.0  # nats: what the output has told of its input at best


class HealthWatch:
    """Holds the state of one run for the node."""

    def __init__(self) -> None:
        self._state: HealthState | None = None
        self._due_seconds = -math.inf

    def changes(self, view: RunView, now_seconds: float) -> list[Alert]:
        """Alerts since the last call; at most one look a second. `view` must have caught up."""
        facts = facts_of(view, now_seconds=now_seconds) if now_seconds >= self._due_seconds else None
        if facts is None:
            return []
        self._due_seconds = now_seconds + LOOK_SECONDS
        self._state, alerts = judged(self._state or state_of(view), facts)
        return alerts


def judged(state: HealthState, facts: Facts) -> tuple[HealthState, list[Alert]]:
    """One Alert for each kind that has begun or ended since the last call."""
    information = facts.metrics.get("output_information")
    if information is not None and information > state.most_information:
        state = replace(state, most_information=information)
    active, alerts = set(state.active), []
    for finding in findings(facts, most_information=state.most_information):
        if finding.badness is None or math.isnan(finding.badness):
            continue
        if finding.badness >= 1.0 and finding.kind not in active:
            active.add(finding.kind)
            alerts.append(_alert(finding.kind, finding.severity, finding.text, facts.step))
        elif finding.badness < RELEASE and finding.kind in active:
            active.remove(finding.kind)
            alerts.append(_alert(finding.kind, "info", f"over: {finding.kind.replace('_', ' ')}", facts.step))
    return replace(state, active=frozenset(active)), alerts


def findings(facts: Facts, *, most_information: float) -> list[Finding]:
    return [
        _stalled(facts),
        _plateau(facts),
        _lagging(facts),
        _history_full(facts),
        _disk_full(facts),
        _overconfident(facts),
        _constant_output(facts, most_information),
    ]


def _stalled(facts: Facts) -> Finding:
    still_seconds = facts.still_seconds
    badness = None if still_seconds is None else still_seconds / facts.stalled_seconds
    text = (
        f"the trainer has been at step {facts.step} for {still_seconds or 0.0:.0f} s, alive: look at its log,"
        " at the data's disk and at the GPU"
    )
    return Finding(kind="stalled", badness=badness, text=text, severity="error")


def _plateau(facts: Facts) -> Finding:
    fall = certain_fall(facts.held_out, stretch_steps=PLATEAU_SHARE * facts.total_steps)
    badness = None if fall is None else PLATEAU_FALL / fall if fall > 0 else math.inf
    text = (
        f"the held-out loss falls by less than {PLATEAU_FALL:.1%} in {PLATEAU_SHARE:.0%} of the run: lower"
        " the rate, take more data or stop"
    )
    return Finding(kind="plateau", badness=badness, text=text)


def certain_fall(points: tuple[tuple[int, float], ...], *, stretch_steps: float) -> float | None:
    """The most by which the loss may have fallen in the newest stretch, as a share of it.

    None for too few points or a loss about zero. Negative = it has surely risen.
    """
    sound = [(step, loss) for step, loss in points if math.isfinite(loss)]
    newest = [loss for step, loss in sound if step > sound[-1][0] - stretch_steps]
    losses = newest if len(newest) >= PLATEAU_EVALUATIONS else [loss for _, loss in sound]
    losses = losses[-max(len(newest), PLATEAU_EVALUATIONS) :]
    if len(losses) < PLATEAU_EVALUATIONS or sound[-1][0] - sound[0][0] < stretch_steps:
        return None
    trend = fit_trend(losses)
    if trend.mean <= 0:
        return None
    # From the mean to the newest value is half of the stretch; the rest of the level's error is the slope's.
    slope_error = math.sqrt(max(0.0, trend.level_error**2 - trend.spread**2 / len(losses)))
    return 2.0 * (trend.mean - trend.level + PLATEAU_ERRORS * slope_error) / trend.mean


def _lagging(facts: Facts) -> Finding:
    """The worst of all nodes. Steps count only as seconds of training: a fast run is told in bursts."""
    worst = (-1.0, "")
    for node, entries in facts.queued_entries.items():
        text = f"{entries:.0f} messages of the {node} wait for the server: look at the server and its network"
        worst = max(worst, (entries / QUEUED_ENTRIES, text))
    if facts.steps_per_second:
        for node, steps in facts.lag_steps.items():
            seconds = steps / facts.steps_per_second
            badness = min(seconds / LAG_SECONDS, steps / (LAG_WINDOWS * facts.window_steps))
            text = f"the {node} is {steps} steps behind ({seconds:.0f} s): its machine is too busy"
            worst = max(worst, (badness, text))
    return Finding(kind="lagging", badness=worst[0] if worst[1] else None, text=worst[1])


def _history_full(facts: Facts) -> Finding:
    entries, fuse = facts.history_entries, STREAMS[HISTORY].fuse_entries
    known = entries is not None and facts.is_history_needed
    text = (
        f"the history has {entries} of at most {fuse} entries: the oldest go soon, saved by the predictor or"
        " not; set trainer.checkpoint.every_steps above 0"
    )
    return Finding(
        kind="history_full", badness=(entries or 0) / (HISTORY_SHARE * fuse) if known else None, text=text
    )


def _disk_full(facts: Facts) -> Finding:
    free, size = facts.metrics.get("disk_free_bytes"), facts.metrics.get("checkpoint_bytes")
    badness = None
    if free is not None and size:
        badness = FREE_CHECKPOINTS * size / free if free > 0 else math.inf
    text = (
        f"{(free or 0) / 2**30:.2f} GiB are free where checkpoints go, one takes {(size or 0) / 2**30:.2f}"
        " GiB: free some space or lower trainer.checkpoint.keep"
    )
    return Finding(kind="disk_full", badness=badness, text=text, severity="error")


def _overconfident(facts: Facts) -> Finding:
    entropy = facts.metrics.get("output_entropy")
    cross_entropy = facts.metrics.get("output_cross_entropy")
    if entropy is None or cross_entropy is None or not math.isfinite(entropy + cross_entropy):
        return Finding(kind="overconfident", badness=None, text="")
    share = CONFIDENT_SHARE * cross_entropy / entropy if entropy > 0 else math.inf
    text = (
        f"entropy of the output {entropy:.3g} nats, cross entropy {cross_entropy:.3g}: it is far surer than"
        " it is right; more data, more weight decay or an earlier stop help"
    )
    badness = min(share, (cross_entropy - entropy) / CONFIDENT_NATS)
    return Finding(kind="overconfident", badness=badness, text=text)


def _constant_output(facts: Facts, most_information: float) -> Finding:
    information = facts.metrics.get("output_information")
    badness = None
    if information is not None and math.isfinite(information) and most_information >= LEARNED_NATS:
        least = CONSTANT_SHARE * most_information
        badness = least / information if information > 0 else math.inf
    text = (
        f"the output tells {information or 0.0:.2g} nats of its input, and has told {most_information:.2g}:"
        " it has collapsed; go back to an older checkpoint and lower the rate"
    )
    return Finding(kind="constant_output", badness=badness, text=text, severity="error")


def _alert(kind: str, severity: str, text: str, step: int) -> Alert:
    return Alert(node=MONITOR, severity=severity, kind=kind, text=text, step=step)


KINDS = ("stalled", "plateau", "lagging", "history_full", "disk_full", "overconfident", "constant_output")


def state_of(view: RunView) -> HealthState:
    """Where a monitor that has read the run begins: what its predecessor said is not said again."""
    newest = {row.alert.kind: row.alert for row in view.alerts if row.alert.node == MONITOR}
    active = (kind for kind in KINDS if kind in newest and newest[kind].severity != "info")
    return HealthState(active=frozenset(active))


def facts_of(view: RunView, *, now_seconds: float) -> Facts | None:
    """None once the run is over."""
    if view.ended is not None:
        return None
    trainer, watch = view.settings.trainer, view.watch
    sample = view.health.get(TRAINER)
    alive = {
        node: watch.lives[node].beat
        for node in NODES
        if watch.state_of(node, now_seconds) in (Liveness.ALIVE, Liveness.STALLED)
    }
    lags = {}
    if TRAINER in alive:
        told_steps = {MONITOR: view.step, **{n: b.step for n, b in alive.items() if n == PREDICTOR}}
        lags = {node: max(0, alive[TRAINER].step - step) for node, step in told_steps.items()}
    queued = {
        node: float(metric.value)
        for node, beat in alive.items()
        for metric in beat.counters
        if metric.name == "outbox_queued" and metric.value is not None
    }
    return Facts(
        step=view.step,
        total_steps=expected_steps(view) or trainer.steps,
        window_steps=trainer.window_steps,
        steps_per_second=view.steps_per_second,
        still_seconds=watch.still_seconds(TRAINER, now_seconds),
        stalled_seconds=watch.stalled_seconds,
        held_out=tuple((int(point[0]), point[1]) for point in view.held_out.points()),
        metrics={metric.name: metric.value for metric in sample.metrics} if sample else {},
        lag_steps=lags,
        queued_entries=queued,
        history_entries=view.stream_lengths.get(HISTORY),
        is_history_needed=view.settings.predictor.enabled,
    )
