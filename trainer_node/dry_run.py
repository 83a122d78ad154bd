"""What a run will hold and say, in words, before it begins: `--dry-run`, and one line of `up`.

Builds the model without its weights (torch's meta device) and asks common/memory_plan.py and
common/message_bounds.py. Looks at the machine for a GPU and for free host memory, and at torchrun's
WORLD_SIZE for shards; reads no data, reaches no server, writes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.control_checks import plan_words, switched_on
from common.memory_plan import BASIS, MemoryPlan, Site, plan_memory
from common.message_bounds import (
    DecisionCost,
    MessageBounds,
    check_history_fits,
    decision_cost,
    message_bounds,
)
from common.messages import GroupSpec, Holder
from common.settings import RunSettings, TrainerSettings
from common.trying import may_ever_jump, why_never
from trainer_node.checkpoint_buffer import free_host_bytes
from trainer_node.checkpoint_content import model_tensors
from trainer_node.groups import parameter_groups
from trainer_node.tasks import build_model

PLACES = ("device", "host", "disk")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlan:
    groups: tuple[GroupSpec, ...]
    site: Site
    memory: MemoryPlan
    messages: MessageBounds
    cost: DecisionCost


def run_plan(settings: RunSettings) -> RunPlan:
    """Raises SettingsError for a basis that no run can have."""
    trainer = settings.trainer
    with torch.device("meta"):
        model = build_model(trainer, torch.device("meta"))
    groups = tuple(group.spec() for group in parameter_groups(model))
    if settings.predictor.enabled:
        check_history_fits(trainer.basis, len(groups))
    site = site_of(
        model,
        is_gpu=_is_on_gpu(trainer),
        free_bytes=free_host_bytes(),
        num_shards=int(os.environ.get("WORLD_SIZE", "1")) if trainer.parallel.kind == "fsdp" else 1,
    )
    return RunPlan(
        groups=groups,
        site=site,
        memory=plan_memory(groups, settings, site),
        messages=message_bounds(groups, settings),
        cost=decision_cost(settings),
    )


def site_of(model: nn.Module, *, is_gpu: bool, free_bytes: int | None, num_shards: int = 1) -> Site:
    """For a model that may be on any device, the meta device included."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    saved = {id(t): t for t in model_tensors(model).values()}
    trained_bytes = sum(t.nbytes for key, t in held.items() if key in trained)
    return Site(
        is_gpu=is_gpu,
        num_shards=num_shards,
        unlisted_bytes=sum(t.nbytes for t in held.values()) - trained_bytes,
        unlisted_saved_bytes=sum(t.nbytes for t in saved.values()) - trained_bytes,
        free_host_bytes=free_bytes,
    )


def plan_line(settings: RunSettings) -> str:
    """What goes behind the word `memory` when a run begins."""
    memory = run_plan(settings).memory
    parts = [f"{name} {size(memory.of(name))}" for name in ("weights", "gradients", "optimizer")]
    if memory.basis_bytes:
        parked = sum(h.num_bytes for h in memory.holders if h.name in BASIS and h.place != "device")
        where = next(h.place for h in memory.holders if h.name == "snapshot")
        share = f" ({size(parked)} of it on {where})" if parked else ""
        parts.append(f"basis {size(memory.basis_bytes)}{share}")
        parts.append(f"a snapshot {size(memory.of('snapshot'))} on {where}")
    return ", ".join([*parts, "and activations"])


def plan_lines(settings: RunSettings) -> list[str]:
    """The whole plan, as a table for people."""
    plan = run_plan(settings)
    memory, trainer = plan.memory, settings.trainer
    where = "a GPU" if plan.site.is_gpu else "CPU, where device and host are one memory"
    shards = f"; on each of {plan.site.num_shards} ranks" if plan.site.num_shards > 1 else ""
    head = [
        f"{memory.num_weights:,} weights in {len(plan.groups)} groups, {trainer.optimizer.name}"
        f" on {where}{shards}",
        "",
        *_table(memory.holders),
        "",
    ]
    if memory.passing:
        head += ["for a moment also:", *_table(memory.passing, with_total=False), ""]
    return [*head, *_words(plan, settings)]


def _table(holders: Sequence[Holder], *, with_total: bool = True) -> Iterator[str]:
    rows: dict[str, dict[str, int]] = {}
    for holder in holders:
        row = rows.setdefault(holder.name, dict.fromkeys(PLACES, 0))
        row[holder.place] += holder.num_bytes
    if with_total:
        rows["together"] = {place: sum(row[place] for row in rows.values()) for place in PLACES}
    wide = max(14, *map(len, rows)) + 2
    yield " " * wide + "".join(f"{place:>12}" for place in PLACES)
    for name, row in rows.items():
        cells = "".join(f"{size(row[place]) if row[place] else '-':>12}" for place in PLACES)
        yield f"{name:<{wide}}{cells}"


def _words(plan: RunPlan, settings: RunSettings) -> Iterator[str]:
    memory, messages, cost = plan.memory, plan.messages, plan.cost
    folders = settings.trainer.checkpoint.keep + 2
    yield (
        f"checkpoint   at most {size(memory.checkpoint_bytes)}; the newest {folders - 2}, the best and an"
        f" emergency one on disk: {size(folders * memory.checkpoint_bytes)}"
    )
    yield (
        f"messages     a step {size(messages.observation)}, a decision point {size(messages.decision_point)}"
        f" more, a decision {size(messages.decision)}: at most, for any number of weights"
    )
    if not may_ever_jump(settings):
        yield f"prediction   {why_never(settings)}"
    else:
        yield (
            f"prediction   in forward passes: a step {cost.step:g}, a decision to rest {cost.rest:g}, a jump"
            f" that is kept {cost.kept:g}, refused {cost.refused:g}, taken back at once {cost.ruined:g}"
        )
    if switched_on(settings.trainer.controls):
        yield f"controls     {plan_words(settings)}"
    yield "not planned  activations, workspaces, the interpreter; no data were read, nothing was written"


def _is_on_gpu(trainer: TrainerSettings) -> bool:
    """What the settings ask for, also on a machine that has none: a plan is made elsewhere."""
    return trainer.device == "cuda" or (trainer.device == "auto" and torch.cuda.is_available())


def size(num_bytes: float) -> str:
    """For people: three digits at most, 1 KiB = 1024 B."""
    unit = 0
    while num_bytes >= 1000 and unit + 1 < len(_UNITS):
        num_bytes, unit = num_bytes / 1024, unit + 1
    return (
        f"{num_bytes:.0f} {_UNITS[unit]}"
        if num_bytes >= 10 or unit == 0
        else f"{num_bytes:.1f} {_UNITS[unit]}"
    )
