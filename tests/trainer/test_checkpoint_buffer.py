"""The buffer of a checkpoint: the library's bytes, captured at one instant, in memory that is bounded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from common import sealed_folder
from common.folder_job import FilePart
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node import checkpoint_buffer
from trainer_node.checkpoint import Checkpoints
from trainer_node.checkpoint_buffer import CheckpointBuffer, NoHostMemory, make_buffer
from trainer_node.checkpoint_content import Content
from trainer_node.housekeeping import Housekeeping

CPU = torch.device("cpu")
TYPES = tuple(checkpoint_buffer._CODES)


def read_back(buffer: CheckpointBuffer, part: FilePart) -> bytes:
    return os.pread(buffer.descriptor, part.num_bytes, part.offset)


def held(files: list[tuple[str, Content]]) -> dict[str, bytes]:
    buffer = make_buffer("memory", CPU)
    assert buffer is not None
    try:
        return {part.name: read_back(buffer, part) for part in buffer.hold(files)}
    finally:
        buffer.close()


def some_bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if dtype is torch.bool:
        return torch.zeros(shape, dtype=torch.bool)
    random = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), generator=random, dtype=torch.uint8).view(dtype).view(shape)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12),
        st.tuples(st.sampled_from(TYPES), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
        max_size=8,
    ).filter(lambda tensors: "__metadata__" not in tensors)
)
def test_a_file_has_the_bytes_that_safetensors_would_have_written(
    shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    tensors = {name: some_bits(*kind, seed) for seed, (name, kind) in enumerate(shapes.items())}
    assert held([("text", b"{}"), ("file", tensors)]) == {"text": b"{}", "file": save(tensors)}


def test_tensors_that_are_not_contiguous_are_packed() -> None:
    matrix = torch.arange(12.0).view(3, 4).t()
    assert held([("m", {"m": matrix})])["m"] == save({"m": matrix.contiguous()})


def test_the_same_memory_is_used_again_and_grows_when_it_must() -> None:
    buffer = make_buffer("memory", CPU)
    assert buffer is not None
    small, large = {"t": torch.ones(10)}, {"t": torch.arange(50_000.0)}
    for tensors in (small, large, small, large):
        (part,) = buffer.hold([("file", tensors)])
        assert read_back(buffer, part) == save(tensors)
    assert buffer.num_bytes == len(save(large))
    buffer.close()


def test_auto_takes_at_most_an_eighth_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_buffer, "free_host_bytes", lambda: 8000)
    buffer = make_buffer("auto", CPU)
    assert buffer is not None
    buffer.hold([("file", bytes(1000))])
    with pytest.raises(NoHostMemory):
        buffer.hold([("file", bytes(1000)), ("another", bytes(1000))])
    assert os.fstat(buffer.descriptor).st_size == 0, "memory was kept"
    buffer.close()


@pytest.mark.parametrize("where", ["disk", "auto", "memory"])
def test_without_room_for_a_buffer_checkpoints_are_written_straight_to_disk(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", full)
    buffer = make_buffer(where, CPU)
    checkpoints = Checkpoints(tmp_path, keep=3, on_failure=pytest.fail, buffer=buffer)
    loop = tiny_loop(ScriptedLinks(), tiny_settings())
    Housekeeping(lambda _: None, checkpoints).save(loop)
    checkpoints.close()
    sealed_folder.verify(sealed_folder.folders(tmp_path)[0])


def test_both_ways_to_capture_give_the_same_files(tmp_path: Path) -> None:
    loop = tiny_loop(ScriptedLinks(), tiny_settings("trainer.steps=12", "trainer.optimizer.name=muon"))
    loop.run()
    for where in ("disk", "memory"):
        checkpoints = Checkpoints(
            tmp_path / where, keep=1, on_failure=pytest.fail, buffer=make_buffer(where, CPU)
        )
        assert checkpoints.save(loop, {}, emergency=False) is not None
        checkpoints.close()
    ours, theirs = (sealed_folder.folders(tmp_path / where)[0] for where in ("memory", "disk"))
    manifests = [sealed_folder.verify(folder) for folder in (ours, theirs)]
    for manifest in manifests:
        del manifest["files"]["state.json"], manifest["manifest_sha256"]  # they hold seconds
    assert manifests[0] == manifests[1]


def test_a_step_is_never_torn(tmp_path: Path) -> None:
    """Weights that change while the files are still being written are not those of the checkpoint."""
    loop = tiny_loop(ScriptedLinks(), tiny_settings())
    buffer = make_buffer("memory", CPU)
    checkpoints = Checkpoints(tmp_path, keep=1, on_failure=pytest.fail, buffer=buffer)
    jobs = []
    checkpoints._make_durable = jobs.append  # it waits until the weights have changed
    written = checkpoints.save(loop, {}, emergency=False)
    wanted = save(dict(loop.task.model.state_dict()))
    checkpoints.wait()
    with torch.no_grad():
        for parameter in loop.task.model.parameters():
            parameter.add_(1.0)
    Checkpoints._make_durable(checkpoints, jobs[0])
    assert written is not None
    assert (tmp_path / written.name / "model.safetensors").read_bytes() == wanted
    checkpoints.close()


@pytest.mark.gpu
def test_on_a_gpu_the_buffer_is_pinned_and_right() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    buffer = make_buffer("memory", torch.device("cuda"))
    assert buffer is not None
    tensors = {"t": torch.randn(1000, 1000, device="cuda"), "u": torch.randn(50, 70, device="cuda").t()}
    before_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (part,) = buffer.hold([("file", tensors)])
    assert torch.cuda.max_memory_allocated() == before_bytes
    assert buffer._registered
    host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    assert read_back(buffer, part) == save(host)
    buffer.close()
