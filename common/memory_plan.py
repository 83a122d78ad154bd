"""What a run will hold, in bytes, before it begins: from shapes, types and settings alone.

One function for all nodes: `trainer-node up --dry-run` and the live page print the same numbers. Names and
places are those of a MemoryReport's holders, so that planned and held stand side by side. Exact for all that
is made of tensors (tests/trainer/test_memory_plan.py holds it to the byte); activations, workspaces and the
interpreter are not planned. Reads no device, no disk and no model.

N weights of s bytes each, G groups, K directions, m sampled weights a group, c snapshots:

    weights, gradients    N s each            optimizer    AdamW 2 N s; Muon, SGD, Lion N s; 8-bit AdamW 2 N
    averages, fp32        2 N s, and N s parked          averages, bf16    3 N 2
    history               (c - 1) N (4 or 2) parked, and its path 4 G S
    sample                4 G K m, and 8 bytes for the place of each sampled weight
    snapshot              weights, optimizer state and the moving averages at the moment of a jump

A shard is what torch's fully_shard gives the first rank: rows are dealt in ceil(rows / shards).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from common.errors import SettingsError
from common.messages import DIRECTIONS, GroupSpec, Holder, ParameterSpec
from common.settings import BasisSettings, OptimizerSettings, RunSettings, TrainerSettings
from common.trying import keeps_directions

BASIS = ("averages", "history", "sample")  # the holders that make up the directions
NOT_HIDDEN = ("embedding", "head")  # kinds of groups whose matrices Muon leaves to AdamW
STEP_COUNTER_BYTES = 4  # AdamW: one float32 for each parameter
# bitsandbytes: a float32 for each block of weights; two tables of 256 codes, seen once for each parameter; in
# smaller parameters the moments are float32.
BLOCK_WEIGHTS, CODE_TABLE_BYTES, MIN_8BIT_WEIGHTS = 256, 4 * 256, 4096
TIME_CONSTANT_BYTES = 16  # of the averages: two float64
FLAG_BYTES = 8  # an int64
RANDOM_STATE_BYTES = {False: 5056, True: 5056 + 16}  # torch's generators of the CPU, and with a GPU
# A checkpoint beside its tensors: name, shape and offsets of each (92 measured), progress and ledger (10 kB).
TENSOR_HEAD_BYTES, STATE_BYTES = 200, 64 << 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where a run is to take place, as far as its bytes depend on it."""

    is_gpu: bool
    num_shards: int = 1  # ranks that the weights are dealt to; 1 = every rank holds all of them
    has_run_folder: bool = True  # False: nothing can be parked on disk
    is_basis_on_host: bool = False  # as after the memory order BASIS_HOST
    unlisted_bytes: int = 0  # frozen weights and buffers, which no group lists
    unlisted_saved_bytes: int = 0  # of these, what a checkpoint holds
    free_host_bytes: int | None = None  # for staging = auto; None: as if it were plenty


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    num_weights: int  # that are trained, of the whole model
    holders: tuple[Holder, ...]  # on one rank; on a CPU "device" and "host" are the same memory
    passing: tuple[Holder, ...]  # held for a moment only, on top; the name says when
    checkpoint_tensor_bytes: int  # exact; of one rank's part
    checkpoint_bytes: int  # upper bound of its files

    def on(self, place: str) -> int:
        """Bytes of all holders there."""
        return sum(holder.num_bytes for holder in self.holders if holder.place == place)

    def of(self, *names: str) -> int:
        """Bytes of the holders of these names, wherever they are."""
        return sum(holder.num_bytes for holder in self.holders if holder.name in names)

    @property
    def basis_bytes(self) -> int:
        return self.of(*BASIS)


@dataclass(frozen=True, slots=True)
class _Parameter:
    kind: str  # of its group, without the depth
    shape: tuple[int, ...]  # of its shard
    num_weights: int  # of its shard
    weight_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_weights * self.weight_bytes


@lru_cache(maxsize=8)  # the page asks for the same plan with every snapshot
def plan_memory(groups: tuple[GroupSpec, ...], settings: RunSettings, site: Site) -> MemoryPlan:
    """Raises SettingsError for an optimizer whose state is not known here."""
    trainer, predicts = settings.trainer, keeps_directions(settings)
    parameters = list(_parameters(groups, site.num_shards))
    trained_bytes = sum(p.num_bytes for p in parameters)
    state_bytes, counter_bytes = optimizer_bytes(parameters, trainer.optimizer)
    holders = [
        Holder(name="weights", num_bytes=trained_bytes + site.unlisted_bytes, place="device"),
        Holder(name="gradients", num_bytes=trained_bytes, place="device"),
        Holder(name="optimizer", num_bytes=state_bytes, place="device"),
    ]
    saved_bytes = trained_bytes + site.unlisted_saved_bytes + state_bytes + counter_bytes
    saved_bytes += RANDOM_STATE_BYTES[site.is_gpu]
    if predicts:
        basis = list(_basis(groups, parameters, trainer, site))
        moving_bytes = _moving_bytes(parameters, trainer.basis, site)
        kept_bytes = trained_bytes + state_bytes + counter_bytes + moving_bytes + TIME_CONSTANT_BYTES
        holders += [*basis, Holder(name="snapshot", num_bytes=kept_bytes, place=parked_at(trainer, site))]
        saved_bytes += sum(h.num_bytes for h in basis if h.name != "sample")
        saved_bytes += TIME_CONSTANT_BYTES + _former_bytes(groups, trainer.basis) + FLAG_BYTES
        saved_bytes += FLAG_BYTES if trainer.basis.history_snapshots else 0
    if trainer.read_out == "average":
        saved_bytes += trained_bytes
    num_tensors = len(parameters) * (7 + trainer.basis.history_snapshots) + 16
    checkpoint_bytes = saved_bytes + num_tensors * TENSOR_HEAD_BYTES + STATE_BYTES
    holders += _staging(checkpoint_bytes, trainer, site)
    return MemoryPlan(
        num_weights=sum(p.num_weights for p in _parameters(groups, 1)),
        holders=tuple(holders),
        passing=tuple(_passing(parameters, trained_bytes, trainer, site)) if predicts else (),
        checkpoint_tensor_bytes=saved_bytes,
        checkpoint_bytes=checkpoint_bytes,
    )


def optimizer_bytes(parameters: Sequence[_Parameter], optimizer: OptimizerSettings) -> tuple[int, int]:
    """Of its tensors that are shaped like weights, and of its step counters.

    Routing as in trainer_node/optim/build.py. Raises SettingsError for an unknown name.
    """
    if optimizer.name == "sgd":
        return sum(p.num_bytes for p in parameters) if optimizer.beta1 > 0.0 else 0, 0
    if optimizer.name == "lion":
        return sum(p.num_bytes for p in parameters), 0
    if optimizer.name == "adamw8bit":
        return sum(map(_moments_of_8_bits, parameters)), 0
    if optimizer.name not in ("adamw", "muon"):
        raise SettingsError(f"the state of the optimizer {optimizer.name} is not known to the planner")
    state_bytes = counter_bytes = 0
    for parameter in parameters:
        is_hidden = parameter.kind not in NOT_HIDDEN and len(parameter.shape) == 2
        if optimizer.name == "muon" and is_hidden:
            state_bytes += parameter.num_bytes
        else:
            state_bytes += 2 * parameter.num_bytes
            counter_bytes += STEP_COUNTER_BYTES
    return state_bytes, counter_bytes


def _moments_of_8_bits(parameter: _Parameter) -> int:
    if parameter.num_weights < MIN_8BIT_WEIGHTS:
        return 2 * 4 * parameter.num_weights
    num_blocks = -(-parameter.num_weights // BLOCK_WEIGHTS)
    return 2 * (parameter.num_weights + 4 * num_blocks + CODE_TABLE_BYTES)


def parked_at(trainer: TrainerSettings, site: Site) -> str:
    """Where snapshots and the parked part of the basis live: "host" or "disk"."""
    kind = trainer.checkpoint.snapshot
    is_in_memory = kind == "memory" or not site.has_run_folder or (kind == "auto" and site.is_gpu)
    return "host" if is_in_memory else "disk"


def type_bytes(dtype: str) -> int:
    """Bytes of one element of a torch type, by its name: float32, bfloat16, float8_e4m3fn, bool."""
    bits = re.search(r"\d{1,3}", dtype)
    return max(1, int(bits.group()) // 8) if bits else 1


def _parameters(groups: Sequence[GroupSpec], num_shards: int) -> Iterator[_Parameter]:
    for group in groups:
        for parameter in group.parameters:
            shape = _shard(parameter, num_shards)
            kind = group.name.split(".")[0]
            yield _Parameter(kind, shape, math.prod(shape), type_bytes(parameter.dtype))


def _shard(parameter: ParameterSpec, num_shards: int) -> tuple[int, ...]:
    if not parameter.shape:
        return ()
    rows, *rest = parameter.shape
    return (-(-rows // num_shards), *rest)


def _basis(
    groups: Sequence[GroupSpec], parameters: Sequence[_Parameter], trainer: TrainerSettings, site: Site
) -> Iterator[Holder]:
    settings, parked = trainer.basis, parked_at(trainer, site)
    num_weights = sum(p.num_weights for p in parameters)
    trained_bytes = sum(p.num_bytes for p in parameters)
    if _is_compact(settings, site):
        yield Holder(name="averages", num_bytes=3 * 2 * num_weights, place="device")
    else:
        home = "host" if site.is_basis_on_host and site.is_gpu else "device"
        yield Holder(name="averages", num_bytes=2 * trained_bytes, place=home)
        yield Holder(name="averages", num_bytes=trained_bytes, place=parked)
    if settings.history_snapshots:
        slot_bytes = num_weights * _history_weight_bytes(settings)
        path_bytes = 4 * len(groups) * settings.history_sample
        yield Holder(name="history", num_bytes=path_bytes, place="device")
        yield Holder(name="history", num_bytes=(settings.history_snapshots - 1) * slot_bytes, place=parked)
    places_bytes = 8 * _num_sampled(groups, settings.sample_size)
    if settings.history_snapshots:
        places_bytes += 8 * _num_sampled(groups, settings.history_sample)
    flags_bytes = FLAG_BYTES * (2 if settings.history_snapshots else 1)
    sample_bytes = _former_bytes(groups, settings) + places_bytes + flags_bytes
    yield Holder(name="sample", num_bytes=sample_bytes, place="device")


def _former_bytes(groups: Sequence[GroupSpec], settings: BasisSettings) -> int:
    """The sampled directions of the window before, float32."""
    return 4 * len(groups) * len(DIRECTIONS) * settings.sample_size


def _num_sampled(groups: Sequence[GroupSpec], sample_size: int) -> int:
    return sum(min(sample_size, sum(math.prod(p.shape) for p in g.parameters)) for g in groups)


def _moving_bytes(parameters: Sequence[_Parameter], settings: BasisSettings, site: Site) -> int:
    """What a snapshot keeps of the averages."""
    if _is_compact(settings, site):
        return sum(2 * p.num_weights for p in parameters)
    return sum(p.num_bytes for p in parameters)


def _passing(
    parameters: Sequence[_Parameter], trained_bytes: int, trainer: TrainerSettings, site: Site
) -> Iterator[Holder]:
    settings = trainer.basis
    if _is_compact(settings, site):
        yield Holder(name="weights before optimizer.step", num_bytes=trained_bytes, place="device")
    if settings.history_snapshots:
        drift_bytes = sum(p.num_weights for p in parameters) * _history_weight_bytes(settings)
        yield Holder(name="displacements at the end of a window", num_bytes=drift_bytes, place="device")
    if trainer.read_out == "average":
        yield Holder(name="weights while averages are evaluated", num_bytes=trained_bytes, place="device")


def _staging(checkpoint_bytes: int, trainer: TrainerSettings, site: Site) -> list[Holder]:
    """The buffer that a checkpoint is captured in; at most."""
    where, free_bytes = trainer.checkpoint.staging, site.free_host_bytes
    is_too_large = where == "auto" and free_bytes is not None and checkpoint_bytes > free_bytes // 8
    if where == "disk" or is_too_large:
        return []
    return [Holder(name="staging", num_bytes=checkpoint_bytes, place="host")]


def _is_compact(settings: BasisSettings, site: Site) -> bool:
    """Averages as distances in bfloat16; on the host they are exact whatever the type."""
    return settings.dtype == "bf16" and not site.is_basis_on_host


def _history_weight_bytes(settings: BasisSettings) -> int:
    return 2 if settings.dtype == "bf16" else 4
