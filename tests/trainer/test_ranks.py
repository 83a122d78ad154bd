"""Laws of what ranks agree on, with ranks that are threads; with real processes: tests/distributed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from common.errors import SettingsError
from common.messages import CheckpointRequest, MemoryAction, MemoryOrder, Order, Outcome, Verdict
from tests.trainer.ranks_in_threads import ThreadRank, on_threads
from tests.trainer.small_job import small_job
from tests.trainer.test_jump import Trial
from tests.trainer.tiny import ScriptedLinks, tiny_settings
from trainer_node import out_of_memory, random_states
from trainer_node import ranks as ranks_module
from trainer_node.assembly import prepare_task
from trainer_node.data import Batch
from trainer_node.out_of_memory import RankOutOfMemory, attempt
from trainer_node.parallel import on_ranks
from trainer_node.ranks import OneRank, ranks_of_environment
from trainer_node.shared_decisions import SharedDecisions
from trainer_node.split import ReplicasDiffer, Split
from trainer_node.weight_sample import WeightSample

CPU = torch.device("cpu")


# ---- decisions -----------------------------------------------------------------------------------


def test_what_rank_0_hears_is_what_all_ranks_hear() -> None:
    decision = Trial().decision()
    orders: list[Order] = [
        MemoryOrder(order_id="1", action=MemoryAction.CLEANUP, reason="full", undo=False),
        CheckpointRequest(request_id="2", emergency=True, reason="fuller"),
    ]

    def work(rank: ThreadRank) -> object:
        source = ScriptedLinks(reason="heat", orders=list(orders))
        source.wait_decision = lambda **_: decision
        shared = SharedDecisions(source if rank.rank == 0 else None, rank, is_told_to_stop=lambda: False)
        answer = shared.wait_decision(step=8, attempt=0, seconds=1.0)
        return answer, shared.veto(), shared.take_orders(), shared.take_orders(), shared.stop_agreed

    for heard in on_threads(3, work):
        assert heard == (decision, "heat", orders, [], False)


def test_no_answer_and_no_veto_are_shared_too() -> None:
    def work(rank: ThreadRank) -> object:
        shared = SharedDecisions(
            ScriptedLinks() if rank.rank == 0 else None, rank, is_told_to_stop=lambda: False
        )
        shared._source.wait_decision = lambda **_: None
        return shared.wait_decision(step=1, attempt=0, seconds=0.0), shared.veto()

    assert on_threads(2, work) == [(None, None)] * 2


@pytest.mark.parametrize("told", [0, 1])
def test_a_stop_told_to_any_rank_is_known_to_all_at_the_same_step(told: int) -> None:
    def work(rank: ThreadRank) -> list[bool]:
        news = iter([False] * 3 + [rank.rank == told] * 9)
        shared = SharedDecisions(
            ScriptedLinks() if rank.rank == 0 else None, rank, is_told_to_stop=lambda: next(news)
        )
        known = []
        for _ in range(5):
            shared.take_orders()
            known.append(shared.stop_agreed)
        return known

    assert on_threads(2, work) == [[False, False, False, True, True]] * 2


# ---- numbers -------------------------------------------------------------------------------------


def test_the_parts_of_a_batch_make_it_up_and_an_odd_one_stays_whole() -> None:
    batch = Batch(torch.arange(12.0), torch.arange(12))
    parts = on_threads(3, lambda rank: Split(ranks=rank).part_of(batch))
    assert torch.equal(torch.cat([part.inputs for part in parts]), batch.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    odd = on_threads(5, lambda rank: Split(ranks=rank).part_of(batch))
    assert all(torch.equal(part.inputs, batch.inputs) for part in odd)


def test_loss_and_norms_of_parts_become_those_of_the_whole() -> None:
    losses, norms = [1.0, 3.0], [[3.0, 0.0], [4.0, 2.0]]

    def work(rank: ThreadRank, *, sharded: bool) -> tuple[float, list[float]]:
        split = Split(ranks=rank, shards=rank if sharded else OneRank())
        loss, norms_G = split.whole(torch.tensor(losses[rank.rank]), torch.tensor(norms[rank.rank]))
        return float(loss), norms_G.tolist()

    assert on_threads(2, lambda rank: work(rank, sharded=True)) == [(2.0, [5.0, 2.0])] * 2
    assert on_threads(2, lambda rank: work(rank, sharded=False)) == [(2.0, norms[0]), (2.0, norms[1])]
    assert on_threads(2, lambda rank: Split(ranks=rank).mean_loss(losses[rank.rank])) == [2.0, 2.0]


def test_copies_that_differ_end_the_run_and_name_the_rank() -> None:
    weights = [torch.ones(3), torch.ones(3), torch.ones(3)]
    same = on_threads(3, lambda rank: Split(ranks=rank).fingerprint([weights[rank.rank]]))
    assert len(set(same)) == 1
    weights[2][1] = 1.0000001
    with pytest.raises(ReplicasDiffer, match="rank 2"):
        on_threads(3, lambda rank: Split(ranks=rank).fingerprint([weights[rank.rank]]))


def test_the_fingerprint_of_shards_is_one_and_sees_every_shard() -> None:
    shards = [torch.zeros(4), torch.ones(4)]

    def seen() -> set[str]:
        return set(
            on_threads(2, lambda rank: Split(ranks=rank, shards=rank).fingerprint([shards[rank.rank]]))
        )

    before = seen()
    shards[1][3] = -1.0
    assert len(before) == len(seen()) == 1
    assert before != seen()


def test_the_sample_of_shards_adds_up_to_that_of_the_whole() -> None:
    groups = small_job().groups
    whole = WeightSample(groups, 32, seed=3)
    parameters = [p for group in groups for p in group.parameters]
    expected_GKm = torch.zeros(len(groups), 1, 32)
    for index, parameter in enumerate(parameters):
        whole.gather(expected_GKm, index, [parameter.detach().reshape(-1)])
    found_GKm = torch.zeros_like(expected_GKm)
    for half in range(2):
        rows = [p.detach().chunk(2) for p in parameters]
        held = [parts[half] if half < len(parts) else parts[0][:0] for parts in rows]
        starts = [0 if half == 0 else parts[0].numel() for parts in rows]
        parts = iter(held)
        cut = [
            replace(group, parameters=tuple(_Cut(p, next(parts)) for p in group.parameters))
            for group in groups
        ]
        sample = WeightSample(cut, 32, seed=3, starts=starts)
        for index, part in enumerate(held):
            sample.gather(found_GKm, index, [part.reshape(-1)])
    assert torch.equal(found_GKm, expected_GKm)


class _Cut:
    """As much of a DTensor as a sample looks at."""

    def __init__(self, whole: torch.Tensor, local: torch.Tensor) -> None:
        self._whole, self._local = whole, local

    def numel(self) -> int:
        return self._whole.numel()

    def detach(self) -> _Cut:
        return self

    def to_local(self) -> torch.Tensor:
        return self._local


def test_every_rank_gets_its_own_random_state_back() -> None:
    saved = {"cpu": torch.full((5,), 1), "cpu.1": torch.full((5,), 2)}
    found: dict[int, object] = {}

    class Rank(OneRank):
        def __init__(self, rank: int) -> None:
            self.rank = rank

    with pytest.MonkeyPatch.context() as patch:
        for rank in range(3):
            patch.setattr(
                random_states, "set_random_state", lambda s, _, rank=rank: found.update({rank: s["cpu"]})
            )
            random_states.put_random_state(saved, Rank(rank), CPU)
    assert found[0] is saved["cpu"]
    assert found[1] is saved["cpu.1"]
    assert 2 not in found


# ---- all or none ---------------------------------------------------------------------------------


def test_one_rank_without_room_for_a_snapshot_and_none_jumps() -> None:
    class Elsewhere(OneRank):
        def any(self, flag: bool) -> bool:
            return True

    trial = Trial()
    trial.job.basis.split = Split(ranks=Elsewhere())
    before = trial.job.state()
    outcome = trial.start()
    assert isinstance(outcome, Outcome)
    assert outcome.verdict is Verdict.FAILED
    assert trial.job.state() == before


def test_memory_that_runs_out_on_one_of_several_ranks_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert attempt(work) is not None
    monkeypatch.setattr(out_of_memory, "are_several", lambda: True)
    with pytest.raises(RankOutOfMemory, match="--max-restarts"):
        attempt(work)


# ---- mistakes ------------------------------------------------------------------------------------


def test_several_ranks_that_would_each_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="ddp or fsdp"), ranks_of_environment("none", on_gpu=False):
        pass


def test_without_torchrun_any_kind_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    settings = tiny_settings("trainer.parallel.kind=fsdp").trainer
    with ranks_of_environment("fsdp", on_gpu=False) as ranks:
        task = prepare_task(settings)
        assert on_ranks(task, settings, ranks) is task


def test_a_batch_that_cannot_be_dealt_out_is_refused_with_the_cure() -> None:
    settings = tiny_settings("trainer.parallel.kind=ddp", "trainer.batch.sequences=15").trainer
    task = prepare_task(settings)

    class Two(OneRank):
        size = 2

    with pytest.raises(SettingsError, match="a multiple of 2"):
        on_ranks(task, settings, Two())


def test_a_restart_under_the_same_agent_sees_nothing_that_the_start_before_left_in_its_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True)
    stores: list[dist.Store] = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: stores.append(store))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(ranks_module, "ProcessGroupRanks", object)
    of_torchrun = {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, text in {**of_torchrun, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, text)
    for rank, restarts in ((0, 0), (1, 0), (0, 1), (1, 1)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        with ranks_of_environment("ddp", on_gpu=False):
            pass
    stores[0].set("address of rank 0", "here")
    assert [store.check(["address of rank 0"]) for store in stores] == [True, True, False, False]
