"""Who is alive: folds heartbeats into one state per node. Reads no clock; publishes nothing.

Silence is judged by the monitor's own clock at the time of receipt, so clocks of other machines
do not matter, and never while the monitor itself could not read (`readable`). A node that beats
without its step moving is stalled: only the trainer is judged so, since the others follow it.
A loss is reported once, a return is noticed; a node that said "stopping" is finished, not lost.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from common.messages import Alert, Heartbeat, NodeLost
from common.streams import NODES, TRAINER

# Compilation, a held-out evaluation and a slow checkpoint are not a stall. Guess, untested.
STALLED_SECONDS = 120.0


class Liveness(enum.Enum):
    UNSEEN = "unseen"
    ALIVE = "alive"
    STALLED = "stalled"
    SILENT = "silent"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class NodeLife:
    node: str
    beat: Heartbeat
    beat_at_seconds: float
    step_at_seconds: float  # when the step last moved
    is_lost: bool = False  # a NodeLost was reported and the node has not come back


@dataclass(kw_only=True)
class Watch:
    """All nodes of one run. Seconds are of the monitor's monotonic clock."""

    silent_seconds: float
    stalled_seconds: float = STALLED_SECONDS
    run_ended: bool = False
    lives: dict[str, NodeLife] = field(default_factory=dict)
    _readable_since_seconds: float = -math.inf

    def heard(self, beat: Heartbeat, *, at_seconds: float) -> None:
        """Take a heartbeat that arrived at `at_seconds`; one of an older start or of no node is ignored."""
        if beat.node not in NODES:
            return
        life = self.lives.get(beat.node)
        if life is not None and beat.generation < life.beat.generation:
            return
        moved = life is None or beat.step != life.beat.step or beat.generation != life.beat.generation
        self.lives[beat.node] = NodeLife(
            node=beat.node,
            beat=beat,
            beat_at_seconds=at_seconds,
            step_at_seconds=at_seconds if moved or life is None else life.step_at_seconds,
            is_lost=life is not None and life.is_lost,
        )

    def readable(self, *, since_seconds: float) -> None:
        """The monitor can read again after a while of not reading: nobody was silent meanwhile."""
        self._readable_since_seconds = since_seconds

    def age_seconds(self, node: str, now_seconds: float) -> float | None:
        life = self.lives.get(node)
        return None if life is None else max(0.0, now_seconds - life.beat_at_seconds)

    def state_of(self, node: str, now_seconds: float) -> Liveness:
        life = self.lives.get(node)
        if life is None:
            return Liveness.UNSEEN
        heard_seconds = max(life.beat_at_seconds, self._readable_since_seconds)
        if now_seconds - heard_seconds > self.silent_seconds:
            gone_on_purpose = self.run_ended or life.beat.state == "stopping"
            return Liveness.FINISHED if gone_on_purpose else Liveness.SILENT
        may_stall = node == TRAINER and life.beat.state == "running" and not self.run_ended
        if may_stall and self._still_seconds(life, now_seconds) > self.stalled_seconds:
            return Liveness.STALLED
        return Liveness.ALIVE

    def still_seconds(self, node: str, now_seconds: float) -> float | None:
        """For how long a node that lives has stayed at its step; None if it is not there or not training."""
        state = self.state_of(node, now_seconds)
        life = self.lives.get(node)
        if life is None or state not in (Liveness.ALIVE, Liveness.STALLED) or life.beat.state != "running":
            return None
        return self._still_seconds(life, now_seconds)

    def _still_seconds(self, life: NodeLife, now_seconds: float) -> float:
        return now_seconds - max(life.step_at_seconds, self._readable_since_seconds)

    def changes(self, now_seconds: float, nodes: Iterable[str] = NODES) -> list[NodeLost | Alert]:
        """Losses and returns since the last call."""
        found: list[NodeLost | Alert] = []
        for node in nodes:
            life = self.lives.get(node)
            if life is None:
                continue
            is_lost = self.state_of(node, now_seconds) is Liveness.SILENT
            if is_lost and not life.is_lost:
                silent_seconds = now_seconds - life.beat_at_seconds
                found.append(NodeLost(node=node, silent_seconds=silent_seconds, last_step=life.beat.step))
            elif life.is_lost and not is_lost:
                text = f"{node} is back (generation {life.beat.generation})"
                step = life.beat.step
                found.append(Alert(node="monitor", severity="info", kind="node_back", text=text, step=step))
            self.lives[node] = replace(life, is_lost=is_lost)
        return found
