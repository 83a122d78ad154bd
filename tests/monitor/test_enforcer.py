"""Orders: one clean-up and one checkpoint per excursion, a veto that lasts as long as its reason."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from common import messages as m
from common.settings import MonitorSettings
from monitor_node.enforcer import (
    LOST_SAMPLES,
    VETO_SECONDS,
    EnforcerState,
    Setting,
    enforce,
    object_to_divergence,
)
from tests.monitor.fake_run import sample

GIB = 1 << 30
CALM, HIGH, RED = 2 * GIB, 13 * GIB, 15 * GIB


class Guard:
    """Feeds readings, one a second, and keeps what was ordered."""

    def __init__(self, *, is_gpu: bool = True) -> None:
        self.state = EnforcerState()
        self.said: list[tuple[float, m.Message]] = []
        self.setting = Setting(generation=3, is_gpu=is_gpu, monitor=MonitorSettings())
        self.now_seconds = 100.0

    def feed(self, *used: int | None) -> list[m.Message]:
        fresh: list[m.Message] = []
        for used_bytes in used:
            self.state, messages = enforce(
                self.state, sample(used_bytes), self.setting, now_seconds=self.now_seconds, step=7
            )
            self.said += [(self.now_seconds, message) for message in messages]
            fresh += messages
            self.now_seconds += 1.0
        return fresh

    def object_to(self, reason: str) -> list[m.Message]:
        self.state, messages = object_to_divergence(
            self.state, reason, self.setting, now_seconds=self.now_seconds
        )
        self.said += [(self.now_seconds, message) for message in messages]
        self.now_seconds += 1.0
        return list(messages)

    def of(self, kind: type) -> list[m.Message]:
        return [message for _, message in self.said if isinstance(message, kind)]


def test_calm_memory_gives_no_orders() -> None:
    guard = Guard()
    assert guard.feed(*[CALM] * 50) == []


def test_cleanup_level_orders_one_cleanup_and_a_veto_then_lifts_it() -> None:
    guard = Guard()
    alert, order, veto = guard.feed(CALM, HIGH)
    assert isinstance(alert, m.Alert)
    assert isinstance(order, m.MemoryOrder)
    assert (order.action, order.order_id) == ("cleanup", "3.1")
    assert isinstance(veto, m.PhaseVeto)
    assert veto.active
    assert veto.valid_seconds == VETO_SECONDS
    guard.feed(*[HIGH] * 20, *[CALM] * 8)
    assert len(guard.of(m.MemoryOrder)) == 1
    assert guard.of(m.CheckpointRequest) == []
    last = guard.of(m.PhaseVeto)[-1]
    assert isinstance(last, m.PhaseVeto)
    assert not last.active
    assert guard.feed(*[CALM] * 20) == []


def test_a_veto_is_renewed_before_it_lapses() -> None:
    guard = Guard()
    guard.feed(*[HIGH] * 60)
    given = [at for at, message in guard.said if isinstance(message, m.PhaseVeto)]
    assert max(late - early for early, late in itertools.pairwise(given)) <= VETO_SECONDS / 2
    assert len(given) <= 20


def test_an_excursion_asks_for_one_checkpoint_and_the_next_one_for_another() -> None:
    guard = Guard()
    guard.feed(RED)
    assert [type(message) for _, message in guard.said] == [
        m.Alert, m.MemoryOrder, m.CheckpointRequest, m.PhaseVeto,
    ]  # fmt: skip
    guard.feed(*[RED] * 20, *[HIGH] * 20, *[RED] * 20)
    assert len(guard.of(m.CheckpointRequest)) == 1
    guard.feed(*[CALM] * 20, RED)
    requests = guard.of(m.CheckpointRequest)
    assert len(requests) == 2
    assert all(isinstance(request, m.CheckpointRequest) and request.emergency for request in requests)


def test_a_lost_gpu_sensor_vetoes_with_a_reason_and_a_found_one_lifts_it() -> None:
    guard = Guard()
    assert guard.feed(CALM, *[None] * (LOST_SAMPLES - 1)) == []
    alert, veto = guard.feed(None)
    assert isinstance(alert, m.Alert)
    assert alert.kind == "memory_unknown"
    assert isinstance(veto, m.PhaseVeto)
    assert veto.active
    assert "lost" in veto.reason
    back, lifted = guard.feed(CALM)
    assert isinstance(back, m.Alert)
    assert isinstance(lifted, m.PhaseVeto)
    assert not lifted.active


def test_a_lost_sensor_on_a_cpu_is_only_reported() -> None:
    guard = Guard(is_gpu=False)
    guard.feed(*[None] * 30)
    assert [type(message) for _, message in guard.said] == [m.Alert]


def test_a_sensor_that_is_lost_in_an_emergency_keeps_the_veto() -> None:
    guard = Guard(is_gpu=False)
    guard.feed(RED, *[None] * 60)
    vetoes = guard.of(m.PhaseVeto)
    assert all(isinstance(veto, m.PhaseVeto) and veto.active for veto in vetoes)
    assert len(vetoes) > 5


@given(st.lists(st.sampled_from([CALM, HIGH, RED, None]), max_size=120), st.booleans())
def test_ids_are_unique_and_vetoes_alternate_with_their_end(used: list[int | None], is_gpu: bool) -> None:
    guard = Guard(is_gpu=is_gpu)
    guard.feed(*used)
    ids = [
        getattr(message, name)
        for _, message in guard.said
        for name in ("order_id", "request_id", "veto_id")
        if hasattr(message, name)
    ]
    assert len(ids) == len(set(ids))
    is_vetoed = False
    for veto in guard.of(m.PhaseVeto):
        assert isinstance(veto, m.PhaseVeto)
        assert veto.active or is_vetoed
        is_vetoed = veto.active


def test_divergence_is_vetoed_at_once_renewed_and_lifted() -> None:
    guard = Guard()
    given = [at for at in range(40) if guard.object_to("the loss is not finite")]
    assert given[0] == 0
    assert max(late - early for early, late in itertools.pairwise(given)) <= VETO_SECONDS / 2
    (lifted,) = guard.object_to("")
    assert isinstance(lifted, m.PhaseVeto)
    assert not lifted.active
    assert guard.object_to("") == []


def test_memory_and_divergence_do_not_lift_each_others_veto() -> None:
    guard = Guard()
    guard.feed(CALM, HIGH)
    guard.object_to("the loss is not finite")
    guard.feed(*[CALM] * 10)
    assert all(veto.active for veto in guard.of(m.PhaseVeto) if isinstance(veto, m.PhaseVeto))
    guard.feed(HIGH)
    guard.object_to("")
    assert all(veto.active for veto in guard.of(m.PhaseVeto) if isinstance(veto, m.PhaseVeto))
    guard.feed(*[CALM] * 10)
    last = guard.of(m.PhaseVeto)[-1]
    assert isinstance(last, m.PhaseVeto)
    assert not last.active
    ids = [veto.veto_id for veto in guard.of(m.PhaseVeto) if isinstance(veto, m.PhaseVeto)]
    assert len(ids) == len(set(ids))
