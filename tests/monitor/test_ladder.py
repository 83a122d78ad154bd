"""The ladder: one order at a time, mildest first, never blind; and all the way back when memory is calm."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from common.messages import CheckpointRequest, MemoryAction, MemoryOrder, OrderDone
from monitor_node import order_book
from monitor_node.ladder import (
    ANSWER_SECONDS,
    CLEANUP_DWELL_SECONDS,
    COOLDOWN_SECONDS,
    MAX_PATIENCE,
    RUNGS,
    Footing,
    LadderState,
    climb,
)
from monitor_node.order_book import HALVE, OrderBook
from monitor_node.thresholds import Level

CLEANUP, BF16, HOST, OFF, RECOMPUTE = (action for action in RUNGS if action is not HALVE)
GROW_BACK_STEPS = 20


@dataclass
class Trainer:
    """What the trainer of the other side does with orders: see trainer_node/memory_orders.py."""

    micro_batch: int = 8
    cannot: frozenset[MemoryAction] = frozenset()
    given_up: list[MemoryAction] = field(default_factory=list)

    def carry_out(self, order: MemoryOrder) -> bool:
        if order.action is CLEANUP:
            return not order.undo
        if order.undo:
            if order.action not in self.given_up:
                return order.action is not HALVE  # taken back already
            self.given_up.reverse()
            self.given_up.remove(order.action)
            self.given_up.reverse()
            self.micro_batch *= 2 if order.action is HALVE else 1
            return True
        if order.action in self.cannot or (order.action is HALVE and self.micro_batch == 1):
            return False
        if order.action is not HALVE and order.action in self.given_up:
            return True
        self.given_up.append(order.action)
        self.micro_batch //= 2 if order.action is HALVE else 1
        return True


class Scene:
    """A ladder that is fed readings one second apart, and a trainer that answers when it is told to."""

    def __init__(self, trainer: Trainer | None = None, *, cleanup_every_steps: int = 0) -> None:
        self.trainer = trainer or Trainer()
        self.state, self.book = LadderState(), OrderBook()
        self.open: list[MemoryOrder] = []  # given and not answered
        self.said: list[tuple[float, MemoryOrder | CheckpointRequest]] = []
        self.now_seconds, self.step, self.count = 1000.0, 100, 0
        self.out_of_memory = 0
        self.cleanup_every_steps = cleanup_every_steps

    def read(
        self, level: Level, *, known: bool = True, relieved: bool = False, steps: int = 1
    ) -> list[MemoryOrder | CheckpointRequest]:
        self.now_seconds += 1.0
        self.step += steps
        footing = Footing(
            is_known=known,
            level=level,
            is_relieved=relieved,
            reason=level.label,
            step=self.step,
            now_seconds=self.now_seconds,
            micro_batch=self.trainer.micro_batch,
            out_of_memory=self.out_of_memory,
            book=self.book,
            grow_back_steps=GROW_BACK_STEPS,
            cleanup_every_steps=self.cleanup_every_steps,
        )
        self.state, messages = climb(self.state, footing, next_id=self._next_id)
        for message in messages:
            self.said.append((self.now_seconds, message))
            self.book = order_book.ordered(self.book, message, at_seconds=self.now_seconds)
            if isinstance(message, MemoryOrder):
                self.open.append(message)
        return list(messages)

    def _next_id(self) -> str:
        self.count += 1
        return f"1.{self.count}"

    def answer(self) -> None:
        for order in self.open:
            done = self.trainer.carry_out(order)
            said = OrderDone(
                order_id=order.order_id, done=done, bytes_before=None, bytes_after=None, detail=""
            )
            self.book = order_book.answered(self.book, said)
        self.open = []

    def hold(self, level: Level, *, times: int = 40) -> list[str]:
        """Readings of one level, each order answered before the next one; what was ordered in words."""
        before = len(self.said)
        for _ in range(times):
            self.read(level)
            self.answer()
        return words([message for _, message in self.said[before:]])


def words(messages: Sequence[MemoryOrder | CheckpointRequest]) -> list[str]:
    return [
        ("undo " if message.undo else "") + message.action.value
        if isinstance(message, MemoryOrder)
        else "checkpoint"
        for message in messages
    ]


LEVELS = st.sampled_from(Level)
TICKS = st.lists(
    st.tuples(
        LEVELS,
        st.booleans(),  # known
        st.booleans(),  # relieved
        st.integers(-3, 30),  # steps
        st.sampled_from(["answer", "answer", "silence", "shortage"]),
    ),
    max_size=150,
)
CANNOT = st.frozensets(st.sampled_from(MemoryAction))


def play(scene: Scene, ticks: list[tuple[Level, bool, bool, int, str]]) -> None:
    for level, known, relieved, steps, event in ticks:
        scene.read(level, known=known, relieved=relieved, steps=steps)
        if event == "answer":
            scene.answer()
        elif event == "shortage":
            scene.out_of_memory += 1


@settings(deadline=None)
@given(TICKS, CANNOT)
def test_there_are_never_two_memory_orders_in_flight(ticks: list, cannot: frozenset[MemoryAction]) -> None:
    scene = Scene(Trainer(cannot=cannot))
    for tick in ticks:
        play(scene, [tick])
        assert len(scene.open) <= 1


@settings(deadline=None)
@given(TICKS, CANNOT)
def test_an_unknown_reading_orders_nothing(ticks: list, cannot: frozenset[MemoryAction]) -> None:
    scene = Scene(Trainer(cannot=cannot), cleanup_every_steps=5)
    for level, known, relieved, steps, event in ticks:
        messages = scene.read(level, known=known, relieved=relieved, steps=steps)
        assert known or messages == []
        if event == "answer":
            scene.answer()


@settings(deadline=None)
@given(TICKS, CANNOT)
def test_nothing_is_undone_that_was_not_done(ticks: list, cannot: frozenset[MemoryAction]) -> None:
    scene = Scene(Trainer(cannot=cannot))
    for tick in ticks:
        play(scene, [tick])
        for order in scene.open:
            assert not order.undo or order.action in scene.trainer.given_up


@settings(deadline=None)
@given(TICKS, CANNOT)
def test_nothing_is_ordered_that_is_in_force_and_nothing_beyond_its_level(
    ticks: list, cannot: frozenset[MemoryAction]
) -> None:
    scene = Scene(Trainer(cannot=cannot))
    taken_back: set[MemoryAction] = set()
    for tick in ticks:
        given_up = list(scene.trainer.given_up)
        for message in scene.read(tick[0], known=tick[1], relieved=tick[2], steps=tick[3]):
            if isinstance(message, CheckpointRequest):
                assert tick[0] is Level.EMERGENCY
            elif message.undo:
                taken_back.add(message.action)
                assert tick[0] <= Level.NOTICE
            else:
                assert message.action in (CLEANUP, HALVE) or message.action not in given_up
                # What was taken back too early may come back below its own level.
                needed = Level.CLEANUP if message.action in taken_back else RUNGS[message.action]
                assert tick[0] >= needed
                assert not tick[2]
        if tick[4] == "answer":
            scene.answer()


@settings(deadline=None)
@given(TICKS)
def test_a_checkpoint_is_asked_for_once_in_an_excursion_and_a_cooldown(ticks: list) -> None:
    scene = Scene()
    asked: list[float] = []
    was_normal_since = True
    for tick in ticks:
        for message in scene.read(tick[0], known=tick[1], relieved=tick[2], steps=tick[3]):
            if isinstance(message, CheckpointRequest):
                assert was_normal_since
                assert not asked or scene.now_seconds - asked[-1] >= COOLDOWN_SECONDS
                asked.append(scene.now_seconds)
                was_normal_since = False
        was_normal_since |= tick[1] and tick[0] is Level.NORMAL
        scene.now_seconds += 400.0 * (tick[4] == "silence")


@settings(deadline=None)
@given(TICKS, CANNOT)
def test_after_enough_calm_everything_is_undone(ticks: list, cannot: frozenset[MemoryAction]) -> None:
    scene = Scene(Trainer(cannot=cannot))
    play(scene, ticks)
    for _ in range(200):
        scene.read(Level.NORMAL, steps=GROW_BACK_STEPS * MAX_PATIENCE)
        scene.answer()
    assert scene.trainer.given_up == []
    assert scene.trainer.micro_batch == 8
    assert scene.book.in_force == ()
    assert scene.read(Level.NORMAL, steps=10_000) == []


@settings(deadline=None)
@given(TICKS, CANNOT)
def test_orders_are_the_same_for_the_same_run(ticks: list, cannot: frozenset[MemoryAction]) -> None:
    first, second = (Scene(Trainer(cannot=cannot)) for _ in range(2))
    play(first, ticks)
    play(second, ticks)
    assert first.said == second.said


@settings(deadline=None)
@given(TICKS, CANNOT, st.integers(0, 150))
def test_a_restart_of_the_monitor_loses_nothing_that_is_in_force(
    ticks: list, cannot: frozenset[MemoryAction], restart_at: int
) -> None:
    scene = Scene(Trainer(cannot=cannot))
    play(scene, ticks[:restart_at])
    is_under_way = bool(scene.open)
    scene.state = LadderState()
    fresh = [m for m in scene.read(Level.EMERGENCY) if isinstance(m, MemoryOrder)]
    assert not (is_under_way and fresh)
    scene.answer()
    play(scene, ticks[restart_at:])
    for _ in range(200):
        scene.read(Level.NORMAL, steps=GROW_BACK_STEPS * MAX_PATIENCE)
        scene.answer()
    assert scene.trainer.given_up == []


def test_each_level_allows_its_rungs_mildest_first() -> None:
    scene = Scene()
    assert scene.hold(Level.NOTICE) == []
    assert scene.hold(Level.CLEANUP, times=20) == ["cleanup", "basis-bf16", "basis-host", "prediction-off"]
    assert scene.hold(Level.HIGH, times=20) == ["halve-micro-batch"] * 3
    assert scene.trainer.micro_batch == 1
    assert scene.hold(Level.EMERGENCY, times=10) == ["recompute", "checkpoint"]


def test_a_sudden_emergency_asks_for_a_clean_up_and_a_checkpoint_at_once() -> None:
    scene = Scene()
    assert words(scene.read(Level.EMERGENCY)) == ["cleanup", "checkpoint"]


def test_the_next_rung_needs_the_answer_and_a_reading_after_it() -> None:
    scene = Scene()
    assert words(scene.read(Level.CLEANUP)) == ["cleanup"]
    assert [scene.read(Level.CLEANUP) for _ in range(5)] == [[]] * 5
    scene.answer()
    assert scene.read(Level.CLEANUP) == []  # this reading may be from before the answer
    assert words(scene.read(Level.CLEANUP)) == ["basis-bf16"]


def test_use_that_has_fallen_waits_for_the_level_instead_of_climbing() -> None:
    scene = Scene()
    scene.hold(Level.CLEANUP, times=2)
    assert [scene.read(Level.CLEANUP, relieved=True) for _ in range(5)] == [[]] * 5


def test_what_the_trainer_cannot_do_is_passed_over_until_memory_was_normal() -> None:
    scene = Scene(Trainer(cannot=frozenset({BF16, HOST})))
    ordered = scene.hold(Level.CLEANUP, times=50)
    assert ordered == ["cleanup", "basis-bf16", "basis-host", "prediction-off"]
    scene.hold(Level.NORMAL, times=100)
    assert scene.hold(Level.CLEANUP, times=8) == ordered


def test_clean_ups_are_a_dwell_apart() -> None:
    scene = Scene()
    scene.hold(Level.CLEANUP, times=300)
    at = [when for when, m in scene.said if isinstance(m, MemoryOrder) and m.action is CLEANUP]
    assert len(at) == 5
    assert all(late - early >= CLEANUP_DWELL_SECONDS for early, late in itertools.pairwise(at))


def test_clean_ups_every_so_many_steps_are_off_unless_asked_for() -> None:
    assert Scene().hold(Level.NORMAL, times=100) == []
    assert Scene(cleanup_every_steps=10).hold(Level.NORMAL, times=40) == ["cleanup"] * 3


def test_the_way_back_takes_the_newest_first_one_at_a_time() -> None:
    scene = Scene()
    scene.hold(Level.EMERGENCY, times=30)
    done = list(scene.trainer.given_up)
    assert len(done) == 7
    ordered = scene.hold(Level.NORMAL, times=30 * GROW_BACK_STEPS)
    assert ordered == [f"undo {action.value}" for action in reversed(done)]
    at = [when for when, m in scene.said if isinstance(m, MemoryOrder) and m.undo]
    assert all(late - early >= GROW_BACK_STEPS for early, late in itertools.pairwise(at))


def test_growing_back_is_also_tried_at_notice() -> None:
    scene = Scene()
    scene.hold(Level.CLEANUP, times=4)
    assert scene.hold(Level.NOTICE, times=2 * GROW_BACK_STEPS)[0] == "undo basis-bf16"


def test_what_was_taken_back_too_early_is_ordered_again_and_kept_twice_as_long() -> None:
    scene = Scene()
    scene.hold(Level.HIGH, times=10)
    assert scene.trainer.given_up[-1] is HALVE
    waits = []
    for _ in range(3):
        start = scene.step
        while not words(scene.read(Level.NORMAL)):
            pass
        waits.append(scene.step - start)
        scene.answer()
        scene.read(Level.NORMAL)
        assert words(scene.read(Level.CLEANUP)) == ["halve-micro-batch"]  # below the level of that rung
        scene.answer()
        scene.read(Level.CLEANUP)
    assert waits == [GROW_BACK_STEPS, 2 * GROW_BACK_STEPS, 4 * GROW_BACK_STEPS]


def test_what_has_been_without_pressure_long_enough_begins_anew() -> None:
    scene = Scene()
    scene.hold(Level.CLEANUP, times=4)
    scene.state = replace(scene.state, patience={BF16: 4})
    assert scene.hold(Level.NORMAL, times=4 * GROW_BACK_STEPS + 4) == ["undo basis-bf16"]
    scene.hold(Level.NORMAL, times=GROW_BACK_STEPS)
    assert scene.state.patience == {}


def test_after_a_start_of_the_trainer_what_was_in_force_is_ordered_again_when_needed() -> None:
    scene = Scene()
    scene.hold(Level.CLEANUP, times=20)
    scene.trainer.given_up.clear()  # it went on from an older checkpoint
    scene.book = OrderBook()  # as its first report says
    assert scene.hold(Level.CLEANUP, times=20) == ["basis-bf16", "basis-host", "prediction-off"]
    assert len(scene.trainer.given_up) == 3


def test_a_shortage_during_a_trial_counts_against_it() -> None:
    scene = Scene()
    scene.hold(Level.CLEANUP, times=4)
    while not words(scene.read(Level.NORMAL)):
        pass
    scene.answer()
    scene.read(Level.NORMAL)
    scene.out_of_memory = 1
    scene.read(Level.NORMAL)
    assert scene.state.patience == {BF16: 2}


def test_blind_steps_are_not_clean_steps() -> None:
    scene = Scene()
    scene.hold(Level.CLEANUP, times=4)
    for _ in range(10):
        assert scene.read(Level.NORMAL, known=False, steps=1000) == []
    assert scene.read(Level.NORMAL, steps=GROW_BACK_STEPS - 1) == []
    assert words(scene.read(Level.NORMAL)) == ["undo basis-bf16"]


def test_an_order_that_a_moving_trainer_does_not_answer_is_given_up_and_a_still_trainer_is_waited_for() -> (
    None
):
    scene = Scene()
    scene.read(Level.CLEANUP)
    for _ in range(3 * int(ANSWER_SECONDS)):
        assert scene.read(Level.CLEANUP, steps=0) == []
    scene.read(Level.CLEANUP, steps=1)
    assert words(scene.read(Level.CLEANUP)) == ["basis-bf16"]
