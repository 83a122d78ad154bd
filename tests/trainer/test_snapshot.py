import itertools

import pytest
import torch

from common.errors import EnvironmentFault
from tests.trainer.small_job import CPU, bits, small_job
from trainer_node import snapshot as module
from trainer_node.snapshot import DiskStore, MemoryStore, Snapshot, make_store, optimizer_tensors


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    yield (store := MemoryStore() if request.param == "memory" else DiskStore(tmp_path))
    store.close()


@pytest.fixture
def disk_store(tmp_path):
    yield (store := DiskStore(tmp_path))
    store.close()


def snapshot_of(job, store):
    return Snapshot(store, job.basis.parameters, job.optimizers, job.basis.averages.moving_tensors())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_snapshot_is_the_former_state_bit_for_bit(store, optimizer, dtype):
    job = small_job(optimizer=optimizer, dtype=dtype)
    job.window()
    job.basis.averages.begin_window()  # the drift is zero when the steps begin, and again after them
    before = job.state()
    snapshot = snapshot_of(job, store)
    for _ in range(5):
        job.step()
    assert job.state() != before
    snapshot.restore()
    job.basis.averages.begin_window()
    assert job.state() == before


def test_training_after_a_restore_repeats_itself_bit_for_bit(store):
    job = small_job(optimizer="muon")
    job.window()
    snapshot = snapshot_of(job, store)
    states = []
    for _ in range(2):
        job.basis.averages.begin_window()
        job.steps_done = 10
        for _ in range(3):
            job.step()
        states.append(job.state())
        snapshot.restore()
    assert states[0] == states[1]


def test_a_store_serves_one_snapshot_after_the_other(store):
    job = small_job()
    for _ in range(3):
        job.window()
        job.basis.averages.begin_window()
        before, snapshot = job.state(), snapshot_of(job, store)
        job.step()
        snapshot.restore()
        job.basis.averages.begin_window()
        assert job.state() == before


def test_taking_a_snapshot_changes_nothing(store):
    job = small_job()
    job.window()
    before = job.state()
    snapshot_of(job, store)
    assert job.state() == before


def test_a_corrupted_memory_store_is_detected_by_restore():
    store = MemoryStore()
    snapshot = snapshot_of(small_job(), store)
    store._copies[3].view(-1).view(torch.uint8)[1] ^= 4
    with pytest.raises(EnvironmentFault, match="resume from the last checkpoint"):
        snapshot.restore()


def test_a_corrupted_disk_store_is_detected_by_restore(disk_store):
    snapshot = snapshot_of(small_job(), disk_store)
    disk_store._file.seek(101)
    old = disk_store._file.read(1)
    disk_store._file.seek(101)
    disk_store._file.write(bytes([old[0] ^ 1]))
    with pytest.raises(EnvironmentFault, match="differs"):
        snapshot.restore()


def test_a_truncated_disk_store_is_detected_by_restore(disk_store):
    snapshot = snapshot_of(small_job(), disk_store)
    disk_store._file.truncate(1000)
    with pytest.raises(EnvironmentFault, match="cut short"):
        snapshot.restore()


def test_a_full_disk_is_the_environments_fault_and_names_the_cure(disk_store):
    disk_store._opened = open("/dev/full", "wb", buffering=0)  # noqa: SIM115, the fixture closes it
    with pytest.raises(EnvironmentFault, match="free space or set snapshot = memory"):
        snapshot_of(small_job(), disk_store)


def test_the_file_of_a_disk_store_has_no_name(tmp_path, disk_store):
    disk_store.save([torch.ones(3)])
    assert list(tmp_path.iterdir()) == []


def test_a_store_keeps_every_dtype_shape_and_stride(store):
    tensors = [
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(7).to(torch.bfloat16),
        torch.tensor(float("nan")),
        torch.tensor([True, False]),
        torch.zeros(0),
        torch.tensor(3, dtype=torch.int64),
    ]
    before = [bits(t) for t in tensors]
    store.save(tensors)
    for tensor in tensors:
        tensor.zero_()
    store.load_into(tensors)
    assert [bits(t) for t in tensors] == before


def test_a_restore_brings_the_random_numbers_back():
    job = small_job()
    snapshot = snapshot_of(job, MemoryStore())
    first = torch.rand(4)
    snapshot.restore()
    assert torch.equal(torch.rand(4), first)


def test_state_that_the_optimizer_made_after_the_snapshot_is_gone_after_the_restore(store):
    """A parameter whose first gradient comes during probation must not keep moments from it."""
    used = torch.nn.Parameter(torch.ones(3))
    late = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([used, late], lr=0.1)

    used.grad = torch.ones(3)
    optimizer.step()
    before = [bits(t) for t in optimizer_tensors([optimizer])]
    snapshot = Snapshot(store, [used, late], [optimizer], [])
    late.grad = torch.ones(3)
    optimizer.step()
    snapshot.restore()
    assert [bits(t) for t in optimizer_tensors([optimizer])] == before
    assert bits(late) == bits(torch.ones(3))


def test_optimizer_tensors_are_all_of_them_in_a_fixed_order():
    job = small_job(optimizer="muon")
    assert optimizer_tensors(job.optimizers) == []
    job.step()
    tensors = optimizer_tensors(job.optimizers)
    hidden = 3  # one moment each; the rest has step, first and second moment
    assert len(tensors) == hidden + 3 * (len(job.basis.parameters) - hidden)
    again = optimizer_tensors(job.optimizers)
    assert all(a is b for a, b in itertools.zip_longest(tensors, again))


@pytest.mark.parametrize(
    ("kind", "device", "has_folder", "wanted"),
    [
        ("auto", "cpu", True, DiskStore),
        ("auto", "cpu", False, MemoryStore),
        ("auto", "cuda", True, MemoryStore),
        ("memory", "cpu", True, MemoryStore),
        ("disk", "cuda", True, DiskStore),
        ("disk", "cpu", False, MemoryStore),
    ],
)
def test_the_store_is_chosen_by_setting_device_and_folder(tmp_path, kind, device, has_folder, wanted):
    store = make_store(kind, torch.device(device), tmp_path if has_folder else None)
    assert type(store) is wanted
    store.close()


def test_the_random_state_of_the_cpu_is_what_torch_holds():
    assert bits(module.random_state(CPU)["cpu"]) == bits(torch.get_rng_state())
