"""The guard end to end on a bus: every level reached, every order answered, and all the way back."""

from __future__ import annotations

import itertools

import pytest

from common import messages as m
from common.streams import MONITOR
from monitor_node.device import TrainerProcess
from monitor_node.thresholds import Level
from tests.monitor import fake_run as fake
from tests.monitor.test_ladder import Trainer, words
from tests.monitor.test_monitor_node import Scene

GIB = 1 << 30
# What a halved micro-batch and each other action gives back, of a device of 16 GiB.
FREED_GIB = {
    m.MemoryAction.BASIS_BF16: 0.2,
    m.MemoryAction.BASIS_HOST: 0.2,
    m.MemoryAction.PREDICTION_OFF: 0.2,
    m.MemoryAction.HALVE_MICRO_BATCH: 0.3,
    m.MemoryAction.RECOMPUTE: 0.5,
}


class GpuOfTrainer:
    """A device whose use follows what the trainer gave up, and what a test puts on top of it."""

    is_gpu = True

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.base_gib, self.is_lost = trainer, 5.0, False

    @property
    def used_gib(self) -> float:
        return self.base_gib - sum(FREED_GIB[action] for action in self.trainer.given_up)

    def sample(self, trainer: TrainerProcess | None) -> m.VramSample:
        return fake.sample(None if self.is_lost else int(self.used_gib * GIB), source="nvml")


class Guarded:
    """A monitor and a trainer that answers on the bus; a turn is a second and ten steps."""

    def __init__(self) -> None:
        self.trainer = Trainer(micro_batch=16)  # of the settings
        self.device = GpuOfTrainer(self.trainer)
        self.scene = Scene(self.device)
        self.step, self.said = 0, []
        self.scene.say(fake.started("run"), fake.heartbeat())
        self.scene.turn(0.1, times=3)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.step += 10
            self.scene.say(fake.observation(self.step, 4.0))
            self.scene.turn(1.0)
            for message in self.scene.outbox.take(m.MemoryOrder, m.CheckpointRequest, m.VramSample, m.Alert):
                self.scene.say(message, writer=MONITOR)
                if isinstance(message, m.MemoryOrder | m.CheckpointRequest):
                    self.said.append(message)
                    self.obey(message)

    def obey(self, order: m.MemoryOrder | m.CheckpointRequest) -> None:
        before = int(self.device.used_gib * GIB)
        done = isinstance(order, m.CheckpointRequest) or self.trainer.carry_out(order)
        order_id = order.order_id if isinstance(order, m.MemoryOrder) else order.request_id
        after = int(self.device.used_gib * GIB)
        self.scene.say(
            m.OrderDone(order_id=order_id, done=done, bytes_before=before, bytes_after=after, detail="")
        )
        self.scene.say(self.report())

    def report(self) -> m.MemoryReport:
        return m.MemoryReport(
            step=self.step,
            occasion="order",
            allocated_bytes=None,
            reserved_bytes=None,
            inactive_split_bytes=None,
            peak_bytes=None,
            alloc_retries=0,
            out_of_memory=0,
            micro_batch=self.trainer.micro_batch,
            accumulation=16 // self.trainer.micro_batch,
            in_force=tuple(self.trainer.given_up),
            holders=(m.Holder(name="weights", num_bytes=GIB, place="device"),),
        )

    def restart_monitor(self) -> None:
        second = Scene(self.device, server=self.scene.server)
        second.node._generation = 2
        second._publishers = self.scene._publishers
        self.scene = second
        second.turn(0.1, times=4)

    @property
    def memory(self) -> dict:
        self.scene.turn(0.3)
        return self.scene.page["memory"]


@pytest.fixture
def guarded() -> Guarded:
    return Guarded()


def test_the_ladder_reaches_every_level_and_comes_all_the_way_back(guarded: Guarded) -> None:
    levels = {guarded.memory["level"]}
    for base_gib in (10.5, 12.3, 13.6, 15.9):
        guarded.device.base_gib = base_gib
        for _ in range(25):
            guarded.turn()
            levels.add(guarded.memory["level"])
    assert levels == {level.label for level in Level}
    up = words(guarded.said)
    assert up[0] == "cleanup"
    assert [order for order in up if order != "cleanup"] == [
        "basis-bf16", "basis-host", "prediction-off", *["halve-micro-batch"] * 3,
        "checkpoint", "halve-micro-batch", "recompute",
    ]  # fmt: skip
    assert set(up) == {"checkpoint", *(action.value for action in m.MemoryAction)}
    assert guarded.trainer.micro_batch == 1
    assert guarded.memory["in_force"] == [action.value for action in guarded.trainer.given_up]

    guarded.said.clear()
    given_up = list(guarded.trainer.given_up)
    guarded.device.base_gib = 5.0
    guarded.turn(300)
    assert words(guarded.said) == [f"undo {action.value}" for action in reversed(given_up)]
    assert guarded.trainer.micro_batch == 16
    assert guarded.memory["level"] == "normal"
    assert guarded.memory["in_force"] == []
    assert guarded.scene.page["run"]["veto"] is None


def test_what_memory_does_not_allow_is_tried_ever_less_often(guarded: Guarded) -> None:
    guarded.device.base_gib = 12.1  # with the first of the three actions 11.9, without it too much
    tried: list[int] = []
    for _ in range(700):
        before = len(guarded.said)
        guarded.turn()
        tried += [guarded.step for order in words(guarded.said[before:]) if order == "undo basis-bf16"]
    pauses = [late - early for early, late in itertools.pairwise(tried)]
    assert len(pauses) >= 2
    assert all(late >= early + 200 for early, late in itertools.pairwise(pauses))


def test_a_lost_sensor_orders_nothing_and_a_found_one_goes_on(guarded: Guarded) -> None:
    guarded.device.base_gib = 12.3
    guarded.turn(2)
    before = len(guarded.said)
    guarded.device.is_lost = True
    guarded.turn(30)
    assert len(guarded.said) == before
    guarded.device.is_lost = False
    guarded.turn(4)
    assert len(guarded.said) > before


def test_a_restarted_monitor_knows_what_is_in_force_and_takes_it_back(guarded: Guarded) -> None:
    guarded.device.base_gib = 13.6
    guarded.turn(20)
    given_up = list(guarded.trainer.given_up)
    assert len(given_up) > 3
    guarded.restart_monitor()
    guarded.device.base_gib = 5.0
    guarded.said.clear()
    guarded.turn(300)
    undone = [order for order in words(guarded.said) if order.startswith("undo")]
    assert undone == [f"undo {action.value}" for action in reversed(given_up)]
    assert guarded.trainer.given_up == []


def test_a_restarted_monitor_goes_on_at_the_level_of_the_one_before(guarded: Guarded) -> None:
    guarded.device.base_gib = 12.3
    guarded.turn(20)
    assert guarded.memory["level"] == "cleanup"
    assert guarded.device.used_gib == pytest.approx(11.7)  # on the way up that would be notice
    guarded.restart_monitor()
    vetoes = guarded.scene.outbox.take(m.PhaseVeto)
    assert [veto.active for veto in vetoes] == [True]


def test_a_trainer_that_was_resumed_from_before_an_order_is_ordered_again(guarded: Guarded) -> None:
    guarded.device.base_gib = 12.3
    guarded.turn(20)
    guarded.said.clear()
    guarded.trainer.given_up.clear()
    guarded.scene.say(fake.started("run", generation=2, first_step=guarded.step), guarded.report())
    guarded.turn(20)
    assert [order for order in words(guarded.said) if order != "cleanup"] == [
        "basis-bf16", "basis-host", "prediction-off",
    ]  # fmt: skip


def test_every_order_is_on_the_page_with_bytes_before_and_after(guarded: Guarded) -> None:
    guarded.device.base_gib = 12.3
    guarded.turn(4)
    assert guarded.memory["report"]["holders"][0]["name"] == "weights"
    row = guarded.scene.page["orders"][0]
    assert (row["action"], row["done"], row["refused"]) == ("basis-bf16", True, False)
    assert row["bytes_before"] - row["bytes_after"] == pytest.approx(0.2 * GIB, abs=2)
