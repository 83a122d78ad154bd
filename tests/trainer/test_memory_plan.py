"""The plan made of shapes and settings against what a real job holds: equal to the byte."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common import memory_plan
from common.config import load_settings
from common.errors import SettingsError
from common.memory_plan import MemoryPlan, plan_memory, type_bytes
from common.messages import Holder, MemoryAction, MemoryReport, ParameterSpec
from common.settings import OptimizerSettings, RunSettings
from tests.trainer.memory_scene import Scene, gpt_settings, ordered
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks
from trainer_node.averages import ExactAverages
from trainer_node.basis import Basis
from trainer_node.checkpoint_buffer import CheckpointBuffer
from trainer_node.checkpoint_content import files_of
from trainer_node.dry_run import run_plan, site_of
from trainer_node.groups import parameter_groups
from trainer_node.optim import build
from trainer_node.optim.build import build_optimizers
from trainer_node.optim.state import optimizer_tensors
from trainer_node.snapshot import MemoryStore, Snapshot, make_store
from trainer_node.tasks import build_model

CPU = torch.device("cpu")
OPTIMIZERS = ("adamw", "muon", "sgd", "lion", "adamw8bit")
TYPES, HISTORIES = ("fp32", "bf16"), (0, 3)
STORES, WEIGHTS = ("memory", "disk"), ("float32", "bfloat16")


def words(case: tuple[object, ...]) -> str:
    return "-".join(map(str, case))


def settings_of(optimizer: str, dtype: str, history: int, snapshot: str) -> RunSettings:
    return gpt_settings(
        f"trainer.optimizer.name={optimizer}",
        f"trainer.basis.dtype={dtype}",
        f"trainer.basis.history_snapshots={history}",
        f"trainer.checkpoint.snapshot={snapshot}",
    )


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


class Job:
    """Model, optimizers with state, basis and a snapshot: all that holds tensors."""

    def __init__(self, settings: RunSettings, folder: Path, weights: torch.dtype = torch.float32) -> None:
        trainer = settings.trainer
        self.model = build_model(trainer, CPU).to(weights)
        self.optimizers = build_optimizers(self.model, trainer.optimizer, CPU)
        groups = parameter_groups(self.model)
        self.groups = tuple(group.spec() for group in groups)
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        for optimizer in self.optimizers:
            optimizer.step()

        def new_store():
            return make_store(trainer.checkpoint.snapshot, CPU, folder)

        self.basis = Basis(
            groups, self.optimizers, trainer.basis, seed=0, park=new_store(), make_history_store=new_store
        )
        self.store = new_store()
        Snapshot(self.store, self.basis.parameters, self.optimizers, self.basis.averages.moving_tensors())

    def plan(self, settings: RunSettings, **site: object) -> MemoryPlan:
        found = site_of(self.model, is_gpu=False, free_bytes=None)
        return plan_memory(self.groups, settings, replace(found, **site))

    def places_of_the_sample(self) -> int:
        """Bytes of where the sampled weights lie, which `bytes_held` leaves out."""
        samples = [self.basis._sample]
        if self.basis.history is not None:
            samples.append(self.basis.history._sample)
        return nbytes(positions for sample in samples for _, _, positions in sample._places)


def placed(holders: Iterable[Holder], name: str) -> dict[str, int]:
    """Bytes by place."""
    found: dict[str, int] = {}
    for holder in holders:
        if holder.name == name and holder.num_bytes:
            found[holder.place] = found.get(holder.place, 0) + holder.num_bytes
    return found


def by_place(places: Iterable[tuple[str, int]], name: str) -> dict[str, int]:
    return placed([Holder(name=name, num_bytes=size, place=place) for place, size in places], name)


@pytest.mark.parametrize(
    "case", [*itertools.product(OPTIMIZERS, TYPES, HISTORIES, STORES, WEIGHTS)], ids=words
)
def test_what_is_planned_is_what_is_held_to_the_byte(case, tmp_path: Path) -> None:
    *chosen, weights = case
    if library := build.LIBRARIES.get(case[0]):
        pytest.importorskip(library)
    settings = settings_of(*chosen)
    job = Job(settings, tmp_path, getattr(torch, weights))
    plan, basis = job.plan(settings), job.basis
    state = optimizer_tensors(job.optimizers)
    assert plan.num_weights == sum(p.numel() for p in job.model.parameters())
    assert plan.of("weights") == nbytes([*job.model.parameters(), *job.model.buffers()])
    assert plan.of("gradients") == nbytes(p.grad for p in job.model.parameters())
    assert plan.of("optimizer") == nbytes(t for t in state if t.dim())
    assert placed(plan.holders, "averages") == by_place(basis.averages.places(), "averages")
    history = basis.history.places() if basis.history else []
    assert placed(plan.holders, "history") == by_place(history, "history")
    in_memory = sum(h.num_bytes for h in plan.holders if h.name in memory_plan.BASIS and h.place != "disk")
    assert in_memory == basis.bytes_held() + job.places_of_the_sample()
    assert placed(plan.holders, "snapshot") == {job.store.place: job.store.stored_bytes}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_averages_on_the_host_are_planned_there_and_exact_whatever_the_type(dtype: str, tmp_path) -> None:
    settings = settings_of("adamw", dtype, 0, "memory")
    job = Job(settings, tmp_path)
    # To the averages "cpu:0" is another device than "cpu": that of the weights is the GPU here.
    averages = ExactAverages(
        job.basis.parameters,
        average_steps=4,
        slow_momentum=0.5,
        park=MemoryStore(),
        device=torch.device("cpu:0"),
        former=job.basis.averages,
    )
    plan = job.plan(settings, is_gpu=True, is_basis_on_host=True)
    assert placed(plan.holders, "averages") == by_place(averages.places(), "averages")
    assert set(placed(plan.holders, "averages")) == {"host"}
    snapshot = MemoryStore()
    Snapshot(snapshot, job.basis.parameters, job.optimizers, averages.moving_tensors())
    assert placed(plan.holders, "snapshot") == {"host": snapshot.stored_bytes}


@pytest.mark.parametrize("order", [None, MemoryAction.BASIS_BF16])
def test_a_run_reports_the_holders_that_were_planned(order, tmp_path: Path) -> None:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.1))
    settings = gpt_settings("trainer.verify.tolerance=100.0", "trainer.basis.history_snapshots=3")
    scene = Scene(settings, links=links, folder=tmp_path, is_counted=False)
    if order is not None:
        scene.at[1] = ordered(order)
        settings = gpt_settings("trainer.basis.history_snapshots=3", "trainer.basis.dtype=bf16")
    scene.run()
    groups = tuple(group.spec() for group in scene.loop.groups)
    plan = plan_memory(groups, settings, site_of(scene.task.model, is_gpu=False, free_bytes=None))
    newest = [r for r in links.of(MemoryReport) if r.occasion == "predict"][-1].holders
    for name in ("weights", "gradients", "optimizer", "averages", "history", "snapshot"):
        assert placed(newest, name) == placed(plan.holders, name), name


@pytest.mark.parametrize(
    ("optimizer", "dtype", "history", "read_out"),
    [
        ("adamw", "fp32", 0, "weights"),
        ("muon", "fp32", 3, "average"),
        ("adamw", "bf16", 3, "weights"),
        ("muon", "bf16", 0, "weights"),
        ("adamw8bit", "fp32", 0, "weights"),
    ],
)
def test_a_checkpoint_holds_the_planned_tensors_and_fits_into_the_planned_buffer(
    optimizer: str, dtype: str, history: int, read_out: str
) -> None:
    if library := build.LIBRARIES.get(optimizer):
        pytest.importorskip(library)
    settings = gpt_settings(
        "trainer.steps=4",
        f"trainer.optimizer.name={optimizer}",
        f"trainer.basis.dtype={dtype}",
        f"trainer.basis.history_snapshots={history}",
        f"trainer.read_out={read_out}",
    )
    scene = Scene(settings, is_counted=False).run()
    model, loop = scene.task.model, scene.loop
    groups = tuple(group.spec() for group in loop.groups)
    plan = plan_memory(groups, settings, site_of(model, is_gpu=False, free_bytes=None))
    kept = dict(model.named_parameters()) if read_out == "average" else None
    files = list(files_of(loop, {}, kept))
    tensors = [t for _, content in files if not isinstance(content, bytes) for t in content.values()]
    assert plan.checkpoint_tensor_bytes == nbytes(tensors)
    buffer = CheckpointBuffer(is_bounded=False, is_pinned=False)
    buffer.hold(files)
    assert plan.checkpoint_tensor_bytes < buffer.num_bytes <= plan.checkpoint_bytes == plan.of("staging")
    buffer.close()


def test_prediction_off_holds_no_basis_and_no_snapshot() -> None:
    plan = run_plan(load_settings(preset="nano", overrides=["predictor.enabled=false"])).memory
    assert {h.name for h in plan.holders} == {"weights", "gradients", "optimizer", "staging"}
    assert plan.passing == ()


@pytest.mark.parametrize("shape", [(10, 3), (3, 5), (7,), (), (1, 4)])
@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
def test_a_shard_is_the_first_of_torchs_chunks(shape: tuple[int, ...], num_shards: int) -> None:
    whole = torch.zeros(shape)
    first = whole.chunk(num_shards)[0] if shape else whole
    spec = ParameterSpec(name="w", shape=shape, dtype="float32")
    assert memory_plan._shard(spec, num_shards) == tuple(first.shape)


def test_sgd_without_momentum_holds_nothing(tmp_path: Path) -> None:
    settings = gpt_settings("trainer.optimizer.name=sgd", "trainer.optimizer.beta1=0.0")
    job = Job(settings, tmp_path)
    assert job.plan(settings).of("optimizer") == nbytes(optimizer_tensors(job.optimizers)) == 0


def test_shards_hold_what_one_rank_holds_but_for_the_rounding_of_rows() -> None:
    settings = load_settings(preset="gpt2-small")
    plan = run_plan(settings)
    quarter = plan_memory(plan.groups, settings, replace(plan.site, num_shards=4))
    assert quarter.num_weights == plan.memory.num_weights
    for name in ("gradients", "optimizer", "averages", "snapshot"):
        assert 4 * quarter.of(name) == pytest.approx(plan.memory.of(name), rel=1e-6)
    assert quarter.of("sample") == plan.memory.of("sample")


def test_auto_staging_is_planned_where_it_is_at_most_an_eighth_of_free_memory() -> None:
    settings = load_settings(preset="nano")
    plan = run_plan(settings)
    need = plan.memory.checkpoint_bytes
    for free_bytes, held in ((8 * need, need), (8 * need - 8, 0)):
        site = replace(plan.site, free_host_bytes=free_bytes)
        assert plan_memory(plan.groups, settings, site).of("staging") == held


def test_every_optimizer_of_the_settings_is_known_to_the_planner() -> None:
    (names,) = (
        f.metadata["choices"] for f in OptimizerSettings.__dataclass_fields__.values() if f.name == "name"
    )
    assert set(names) == set(OPTIMIZERS)
    with pytest.raises(SettingsError, match="sophia"):
        memory_plan.optimizer_bytes([], OptimizerSettings(name="sophia"))


def test_the_planner_routes_matrices_as_the_trainer_does() -> None:
    assert memory_plan.NOT_HIDDEN == build._NOT_HIDDEN


def test_the_size_of_a_type_follows_from_its_name() -> None:
    names = ["float32", "bfloat16", "float16", "float64", "int64", "uint8", "bool", "float8_e4m3fn"]
    for name in [*names, "complex64"]:
        assert type_bytes(name) == typing.cast(torch.dtype, getattr(torch, name)).itemsize


def test_a_plan_needs_no_weights_so_a_billion_of_them_are_planned_at_once() -> None:
    shapes = ("layers=24", "width=1792", "heads=28", "vocabulary_size=50304")
    settings = load_settings(preset="nano", overrides=[f"trainer.model.{shape}" for shape in shapes])
    memory = run_plan(settings).memory
    assert 1.0e9 < memory.num_weights < 1.2e9
    assert memory.of("gradients") == 4 * memory.num_weights
    assert placed(memory.holders, "averages")["device"] == 8 * memory.num_weights
