"""What people train with Hybrid: frozen and tied weights, several optimizers, autocast, compiled models."""

# ruff: noqa: B023  closures over the loop variable are what people write here, and what is held apart

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
from torch import nn

from common.messages import Outcome, Verdict
from tests.trainer import own

STEPS = 120


def test_frozen_tied_and_foreign_parameters_are_never_moved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 9, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    model["body"].bias.requires_grad_(False)
    model["spare"] = nn.Linear(3, 3)  # trained by nobody
    optimizer = torch.optim.AdamW([model["embed"].weight, model["body"].weight], lr=1e-2)
    still = [model["body"].bias.clone(), *(p.clone() for p in model["spare"].parameters())]

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model["head"](torch.tanh(model["body"](model["embed"](tokens))))
        return nn.functional.cross_entropy(logits, (tokens + 1) % 9)

    with own.in_process(model, optimizer, tmp_path, *own.FIXED) as hybrid:
        said = own.heard(hybrid)
        for seed in range(STEPS):
            tokens = torch.randint(9, (64,), generator=torch.Generator().manual_seed(seed))
            hybrid.step(lambda: loss_of(tokens))
    assert any(isinstance(m, Outcome) and m.verdict is Verdict.ACCEPTED for m in said)
    assert model["head"].weight is model["embed"].weight
    now = [model["body"].bias, *model["spare"].parameters()]
    assert own.same([p.detach() for p in now], [p.detach() for p in still])


def test_several_optimizers_schedulers_clipping_and_accumulation(tmp_path: Path) -> None:
    model, _ = own.job()
    first = torch.optim.SGD(model[0].parameters(), lr=1e-2, momentum=0.9)
    rest = [p for module in list(model)[1:] for p in module.parameters()]
    second = torch.optim.AdamW(rest, lr=1e-2)
    schedules = [torch.optim.lr_scheduler.StepLR(o, 30, 0.5) for o in (first, second)]
    with own.in_process(model, [first, second], tmp_path, *own.FIXED) as hybrid:
        said = own.heard(hybrid)
        for batch in own.batches(STEPS):
            with hybrid.probe(hold=lambda: own.loss_of(model, batch)):
                halves = [tuple(part[half::2] for part in batch) for half in range(2)]
                losses = [own.loss_of(model, half) for half in halves]  # type: ignore[arg-type]
                for loss in losses:
                    (loss / 2).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                for optimizer, schedule in zip((first, second), schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                hybrid.after_step(torch.stack([loss.detach() for loss in losses]).mean())
    assert any(isinstance(m, Outcome) and m.verdict is Verdict.ACCEPTED for m in said)


def test_a_compiled_model_under_autocast_with_a_scaler_has_jumps_that_are_kept(tmp_path: Path) -> None:
    model, optimizer = own.job()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend="eager")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with own.in_process(compiled, optimizer, tmp_path, *own.FIXED) as hybrid:  # type: ignore[arg-type]
        said = own.heard(hybrid)
        for batch in own.batches(STEPS):
            with hybrid.probe(hold=lambda: own.loss_of(compiled, batch)):  # type: ignore[arg-type]
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = own.loss_of(compiled, batch)  # type: ignore[arg-type]
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                hybrid.after_step(loss)
    kept = [m for m in said if isinstance(m, Outcome) and m.verdict is Verdict.ACCEPTED]
    assert kept
    assert all(outcome.delta_norm > 0.0 and math.isfinite(outcome.loss_end) for outcome in kept)
