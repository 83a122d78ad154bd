"""What readings turn into: orders, alerts, and a veto that lasts as long as its reason."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages as m
from common.settings import MonitorSettings
from monitor_node.enforcer import (
    LOST_SAMPLES,
    VETO_SECONDS,
    EnforcerState,
    Seen,
    Setting,
    enforce,
    object_to_divergence,
)
from monitor_node.ladder import COOLDOWN_SECONDS
from monitor_node.memory_facts import MemoryFacts
from monitor_node.nvml_events import XID
from monitor_node.thresholds import Level
from tests.monitor.fake_run import sample
from tests.monitor.test_order_book import report

GIB = 1 << 30
CALM, NOTICE, HIGH, RED = 2 * GIB, 11 * GIB, 12 * GIB, 15 * GIB


class Guard:
    """Feeds readings, one a second, and keeps what was ordered."""

    def __init__(self, *, is_gpu: bool = True) -> None:
        self.state = EnforcerState()
        self.said: list[tuple[float, m.Message]] = []
        self.setting = Setting(generation=3, is_gpu=is_gpu, monitor=MonitorSettings())
        self.facts = MemoryFacts()
        self.now_seconds = 100.0

    def feed(self, *used: int | None) -> list[m.Message]:
        fresh: list[m.Message] = []
        for used_bytes in used:
            fresh += self.look(sample(used_bytes))
        return fresh

    def look(self, reading: m.VramSample) -> list[m.Message]:
        self.facts.fold_sample(reading, self.now_seconds)
        seen = Seen(sample=reading, facts=self.facts, step=7, now_seconds=self.now_seconds)
        self.state, messages = enforce(self.state, seen, self.setting)
        self.said += [(self.now_seconds, message) for message in messages]
        self.now_seconds += 1.0
        return list(messages)

    def object_to(self, reason: str) -> list[m.Message]:
        self.state, messages = object_to_divergence(
            self.state, reason, self.setting, now_seconds=self.now_seconds
        )
        self.said += [(self.now_seconds, message) for message in messages]
        self.now_seconds += 1.0
        return list(messages)

    def of(self, kind: type) -> list[m.Message]:
        return [message for _, message in self.said if isinstance(message, kind)]


def errors(*codes: float) -> m.VramSample:
    told = [m.Reading(name=XID, value=c, unit="1", source="nvml", unknown_reason="") for c in codes]
    return replace(sample(CALM), readings=tuple(told))


def test_an_error_of_the_gpu_is_told_once_and_a_fatal_one_as_an_error() -> None:
    guard = Guard()
    alerts = guard.look(errors(31.0, 79.0))
    assert [(a.kind, a.severity) for a in alerts] == [("gpu_error", "warning"), ("gpu_error", "error")]
    assert "fallen off the bus" in alerts[1].text
    assert guard.look(errors(31.0)) == []
    assert [a.text[:6] for a in guard.look(errors(31.0, 62.0))] == ["Xid 62"]


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
    assert len(guard.of(m.MemoryOrder)) == 1  # it was not answered
    assert guard.of(m.CheckpointRequest) == []
    last = guard.of(m.PhaseVeto)[-1]
    assert isinstance(last, m.PhaseVeto)
    assert not last.active
    assert guard.feed(*[CALM] * 20) == []


def test_notice_is_told_and_nothing_else() -> None:
    guard = Guard()
    (alert,) = guard.feed(CALM, *[NOTICE] * 30)
    assert isinstance(alert, m.Alert)
    assert (alert.kind, alert.severity) == ("memory_level", "info")


def test_levels_are_told_on_the_way_up_and_the_end_of_pressure_on_the_way_down() -> None:
    guard = Guard()
    guard.feed(CALM, NOTICE, HIGH, RED, *[CALM] * 60)
    told = [message.text for message in guard.of(m.Alert) if isinstance(message, m.Alert)]
    assert [text.partition(":")[0] for text in told[:3]] == [
        "memory level notice", "memory level cleanup", "memory level emergency",
    ]  # fmt: skip
    assert told[3:] == ["memory 2.00 GiB used on host memory: no pressure"]


def test_an_allocator_that_thrashes_counts_as_high_whatever_the_device_says() -> None:
    guard = Guard()
    for step in range(3):
        guard.facts.fold_report(report(step=step, retries=step))
    alert, order, veto = guard.feed(CALM)
    assert isinstance(alert, m.Alert)
    assert alert.kind == "memory_thrashing"
    assert isinstance(order, m.MemoryOrder)
    assert order.reason.startswith(f"memory level {Level.HIGH.label}")
    assert isinstance(veto, m.PhaseVeto)
    assert guard.feed(None) == []


def test_memory_that_fills_up_is_told_once_and_again_after_a_long_good_outlook() -> None:
    guard = Guard()
    leak = [int((8.0 + second * 2.0 / 900) * GIB) for second in range(600)]
    guard.feed(*leak)
    (alert,) = [a for a in guard.of(m.Alert) if isinstance(a, m.Alert) and a.kind == "memory_forecast"]
    assert "will reach the emergency level (14.00 GiB) in about" in alert.text
    guard.feed(*[CALM] * 700, *leak)
    told = [a for a in guard.of(m.Alert) if isinstance(a, m.Alert) and a.kind == "memory_forecast"]
    assert len(told) == 2


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
    guard.feed(*[CALM] * 30, RED)
    assert len(guard.of(m.CheckpointRequest)) == 1  # the cooldown
    guard.now_seconds += COOLDOWN_SECONDS
    guard.feed(*[CALM] * 30, RED)
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


@settings(deadline=None)
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
