"""A predictor that means harm: it can cost steps, and never a bit of the weights, the trainer or its memory.

The law in numbers: a decision point needs a whole window of kept steps before it, and costs at most one
probation of lost steps and `chunks + 2` checks. So of N steps at most (N / window) x probation are lost, and
a run all of whose proposals are refused ends with the weights of plain training, to the last bit.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save

from common import codec
from common.bus import Entry, EntryId
from common.clock import SystemClock
from common.memory_bus import MemoryBus, MemoryServer
from common.messages import (
    Controls,
    DeadLetter,
    Forecast,
    Heartbeat,
    Message,
    Metric,
    Observation,
    Outcome,
    Phase,
    PhaseDecision,
    PhaseVeto,
    StopRequest,
    Verdict,
)
from common.streams import DECISIONS, notes_of
from tests.trainer.test_loop import plain_weights, proposal
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node.inbox import MAX_DECISIONS, Inbox
from trainer_node.phases import MAX_ID_CHARACTERS
from trainer_node.snapshot import optimizer_tensors
from trainer_node.weight_forecast import MAX_BYTES, forecaster_shapes

DEADLINE_SECONDS = 60.0
NUM_DIFFERENCES = 2
Attack = Callable[[PhaseDecision], PhaseDecision]


def forecaster(num_groups: int, **values: float) -> bytes:
    """Of the right shape; all numbers are 0.1 except the named ones."""
    shapes = forecaster_shapes(num_groups, NUM_DIFFERENCES, 4)
    return save({name: torch.full(shape, values.get(name, 0.1)) for name, shape in shapes.items()})


def hollow(num_groups: int, name: str, dtype: str, shape: str) -> bytes:
    """A header that names a type or a shape that torch does not have."""
    header = f'{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    return len(header).to_bytes(8, "little") + header


def coefficients(*values: float) -> Attack:
    def spoil(decision: PhaseDecision) -> PhaseDecision:
        return replace(decision, coefficients=(values * decision.num_groups * 4)[: decision.num_groups * 4])

    return spoil


def phi(make: Callable[[int], bytes]) -> Attack:
    return lambda d: replace(d, forecaster=make(d.num_groups))


ATTACKS: dict[str, Attack] = {
    "NaN": coefficients(math.nan),
    "infinite": coefficients(math.inf, 0.0),
    "huge": coefficients(1e300),
    "huge in one group": coefficients(0.0, 0.0, 0.0, -3e38),
    "large": coefficients(0.0, 1e7),
    "subnormal": coefficients(5e-324),
    "lost in rounding": coefficients(1e-30),
    "minus zero": coefficients(-0.0),
    "one group too many": lambda d: replace(d, num_groups=d.num_groups + 1),
    "one direction too many": lambda d: replace(d, num_directions=5),
    "negative shape": lambda d: replace(d, num_groups=-d.num_groups, num_directions=-4),
    "too short": lambda d: replace(d, coefficients=d.coefficients[:-1]),
    "too long": lambda d: replace(d, coefficients=d.coefficients * 100),
    "other weights": lambda d: replace(d, base_fingerprint="f" * 16),
    "step before": lambda d: replace(d, base_step=d.base_step - 1),
    "step after": lambda d: replace(d, base_step=2**63),
    "other attempt": lambda d: replace(d, base_attempt=d.base_attempt - 1),
    "other generation": lambda d: replace(d, base_generation=2**64 - 1),
    "run out": lambda d: replace(d, valid_until_step=-1),
    "horizon zero": lambda d: replace(d, horizon_steps=0),
    "horizon negative": lambda d: replace(d, horizon_steps=-5),
    "horizon huge": lambda d: replace(d, horizon_steps=2**63),
    "a million parts": lambda d: replace(d, chunks=10**6),
    "no parts": lambda d: replace(d, chunks=0),
    "correction NaN": lambda d: replace(d, correction_share=math.nan),
    "correction beyond": lambda d: replace(d, correction_share=-1e9),
    "endless id": lambda d: replace(d, decision_id="x" * 250_000, coefficients=d.coefficients),
    "endless stale id": lambda d: replace(d, decision_id="x" * 250_000, base_step=0),
    "no bytes of a forecaster": phi(lambda g: b"\x80\x04]\x94."),
    "pickle": phi(lambda g: b"cos\nsystem\n(S'true'\ntR."),
    "type without a name in torch": phi(lambda g: hollow(g, "head", "F4", "[0]")),
    "shape beyond 63 bits": phi(lambda g: hollow(g, "head", "F32", f"[0,{2**63}]")),
    "strides that overflow": phi(lambda g: hollow(g, "head", "F32", f"[0,{2**62},{2**62}]")),
    "forecaster of another shape": phi(lambda g: forecaster(g + 1)),
    "forecaster NaN": phi(lambda g: forecaster(g, skip=math.nan)),
    "forecaster scales negative": phi(lambda g: forecaster(g, group_scale=-1.0)),
    "forecaster huge": phi(lambda g: forecaster(g, gain=3e38, limit=3e38, skip=1e30)),
    "forecaster too long": phi(lambda g: bytes(MAX_BYTES + 1)),
    "ruin in 64 parts": lambda d: replace(coefficients(0.0, 1e6)(d), chunks=64, correction_share=1.0),
}  # fmt: skip
NEVER_KEPT = {Verdict.STALE, Verdict.MALFORMED, Verdict.RUINED, Verdict.REFUSED, Verdict.USED}


class Malice:
    """Plays one attack a decision point, in turn; checks that the outcome left every bit as it was."""

    def __init__(self, attacks: dict[str, Attack], *overrides: str) -> None:
        self.settings = tiny_settings(f"trainer.basis.history_snapshots={NUM_DIFFERENCES + 1}", *overrides)
        self._attacks = iter(attacks.items())
        self.played: dict[str, Verdict] = {}
        self._present = ""
        self._before: list[torch.Tensor] = []
        self.links = ScriptedLinks(answer=self._answer)
        self.loop = tiny_loop(self.links, self.settings)
        self.loop.emit = self._emit

    def _answer(self, observation: Observation) -> PhaseDecision | None:
        history = self.loop.basis.history
        if not history.is_full or observation.step + 12 > self.settings.trainer.steps:
            return None
        self._present, spoil = next(self._attacks, ("", lambda d: d))
        self._before = self._state()
        decision = replace(proposal(observation), next_window_steps=-(2**63))
        return spoil(decision) if self._present else None

    def _emit(self, message: Message) -> None:
        codec.encode(message)  # else it would be lost on its way, and the predictor left in doubt
        self.links.emit(message)
        if isinstance(message, Outcome) and self._present:
            self.played[self._present] = message.verdict
            assert same_bits(self._before, self._state()), self._present
            self._present = ""

    def _state(self) -> list[torch.Tensor]:
        return [*weights_of(self.loop), *[t.clone() for t in optimizer_tensors(self.loop.optimizers)]]


def test_no_spoilt_decision_leaves_a_trace_in_the_run() -> None:
    """Each is refused before it has cost a step; the run is the plain one, bit for bit."""
    steps = f"trainer.steps={8 + 6 * (len(ATTACKS) + 6)}"
    malice = Malice(ATTACKS, steps)
    malice.loop.run()
    assert malice.played.keys() == ATTACKS.keys()
    assert set(malice.played.values()) <= NEVER_KEPT
    assert {malice.played["huge"], malice.played["forecaster huge"]} == {Verdict.RUINED}
    assert malice.loop.ledger.lost_steps == 0
    assert all(len(o.decision_id) <= MAX_ID_CHARACTERS for o in malice.links.of(Outcome))
    assert same_bits(weights_of(malice.loop), plain_weights(steps))


def test_proposals_inside_every_bound_cost_what_the_bound_says_and_leave_finite_weights() -> None:
    """A saboteur who knows the rules: a little backwards each time, in up to 64 checked parts."""
    push = {-1.0: 1, -0.3: 64, -0.1: 2, 3.0: 1}

    def answer(observation: Observation) -> PhaseDecision:
        drift, chunks = list(push.items())[observation.decision_point.window % len(push)]
        forecast = Forecast(loss=math.nan, loss_without=-math.inf, spread=0.0, refusal=math.nan)
        known = proposal(observation, drift=drift)
        return replace(known, chunks=chunks, forecast=forecast, correction_share=1.0)

    links = ScriptedLinks(answer=answer)
    settings = tiny_settings("trainer.steps=120", "trainer.verify.ruin_share=1.0").trainer
    loop = tiny_loop(links, tiny_settings("trainer.steps=120", "trainer.verify.ruin_share=1.0"))
    loop.run()
    outcomes = links.of(Outcome)
    jumps = [o for o in outcomes if o.probation_steps or o.passes]
    assert len(outcomes) <= settings.steps / settings.window_steps
    assert loop.ledger.lost_steps <= len(jumps) * settings.probation_steps
    for outcome in jumps:
        if outcome.verdict is Verdict.ACCEPTED:
            assert outcome.loss_end <= outcome.loss_forecast + outcome.loss_spread
        checks = outcome.passes - 3.0 * outcome.probation_steps
        assert checks <= (max(push.values()) + 2) * settings.verify.guard_batches
    assert {o.verdict for o in jumps} >= {Verdict.ACCEPTED}
    assert all(bool(t.isfinite().all()) for t in (*weights_of(loop), *optimizer_tensors(loop.optimizers)))
    assert loop.progress.step == settings.steps


# ---- through the real inbox --------------------------------------------------------------------


@pytest.fixture
def server() -> MemoryServer:
    return MemoryServer()


@pytest.fixture
def inbox(server: MemoryServer) -> Iterator[Inbox]:
    opened = Inbox(
        MemoryBus(server, "run"), generation=1, silent_seconds=DEADLINE_SECONDS, stop=threading.Event(),
        clock=SystemClock(), rng=random.Random(0),
    )  # fmt: skip
    yield opened
    opened.close()


class Intruder:
    """Writes what it likes on the streams that it may write."""

    def __init__(self, server: MemoryServer) -> None:
        self._bus = MemoryBus(server, "run")
        self._sequence = 0

    def __call__(self, stream: str, *messages: Message | tuple[str, bytes]) -> None:
        entries = []
        for message in messages:
            self._sequence += 1
            if not isinstance(message, tuple):
                message = type(message).__name__, codec.encode(message)
            entries.append(Entry(stream, EntryId(1, self._sequence), *message, 0.0))
        self._bus.publish(entries)


def point(step: int, attempt: int = 0) -> PhaseDecision:
    """Of the right run and generation, but of other weights."""
    return PhaseDecision(
        decision_id=f"{step}.{attempt}", phase=Phase.PREDICT, horizon_steps=5, num_groups=1, num_directions=4,
        coefficients=(1e9,) * 4, controls=Controls(), forecast=None, base_generation=1, base_step=step,
        base_attempt=attempt, base_fingerprint="0" * 16, valid_until_step=2**62, reason="",
    )  # fmt: skip


def heartbeat(value: float, node: str = "predictor") -> Heartbeat:
    counters = tuple(Metric(name=f"saved_{n}", value=value, unit="1") for n in ("generation", "sequence"))
    return Heartbeat(
        node=node, generation=1, process_id=1, state="running", step=0, uptime_seconds=0.0, counters=counters
    )


def test_a_flood_of_decisions_is_counted_and_not_kept_and_the_run_is_the_plain_one(
    server: MemoryServer, inbox: Inbox
) -> None:
    """100,000 decisions for this run and others, for points past and to come, while the run goes on."""
    intruder, flood, batch = Intruder(server), 100_000, 500
    links = ScriptedLinks()
    loop = tiny_loop(links, tiny_settings("trainer.decision_mode=live"))
    loop.links = inbox
    kinds = [("PhaseDecision", codec.encode(point(14 + 6 * n, n % 2))) for n in range(batch - 1)]

    most_kept = []

    def pour() -> None:
        for _ in range(flood // batch):
            intruder(DECISIONS, *kinds, ("PhaseDecision", b"\xc1"))
            most_kept.append(len(inbox._decisions))

    pouring = threading.Thread(target=pour)
    pouring.start()
    loop.run()
    pouring.join()
    assert len(most_kept) == flood // batch
    assert max(most_kept) <= MAX_DECISIONS + 1  # one comes before one goes
    intruder(DECISIONS, point(57))  # the last one, for the next point: all before it has been read then
    assert inbox.wait_decision(step=57, attempt=0, seconds=DEADLINE_SECONDS) == point(57)
    assert inbox.stale >= 20_000  # what the stream's own fuse leaves is read and counted
    assert same_bits(weights_of(loop), plain_weights())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1.0])
def test_a_senseless_heartbeat_does_not_end_the_inbox(
    server: MemoryServer, inbox: Inbox, value: float
) -> None:
    intruder = Intruder(server)
    intruder(notes_of("predictor"), heartbeat(value))
    intruder(DECISIONS, point(16))
    assert inbox.wait_decision(step=16, attempt=0, seconds=DEADLINE_SECONDS) is not None
    assert inbox._thread.is_alive()


def test_a_predictor_gives_no_orders_no_veto_and_no_sign_of_life_of_others(
    server: MemoryServer, inbox: Inbox
) -> None:
    intruder = Intruder(server)
    stop = StopRequest(request_id="1", reason="stop")
    veto = PhaseVeto(veto_id="1", active=True, reason="no", valid_seconds=1e9)
    letter = DeadLetter(stream="history", entry_id="1-1", kind="", deliveries=5, error="", body=b"")
    for stream in (DECISIONS, notes_of("predictor")):
        intruder(stream, stop, veto, heartbeat(1.0, node="monitor"))
    intruder(notes_of("monitor"), letter, heartbeat(1.0), point(16))
    intruder(DECISIONS, point(22))
    assert inbox.wait_decision(step=22, attempt=0, seconds=DEADLINE_SECONDS) is not None
    assert inbox.take_orders() == []
    assert inbox.veto() is None
    assert inbox._retention._saved == {}
    assert not inbox._answer._dead
