"""summary.json: what a run did, what it cost, and with what it was made."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.messages import Verdict
from trainer_node import ledger as purposes
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop


def build_summary(
    loop: Loop,
    housekeeping: Housekeeping,
    *,
    run_id: str,
    status: str,
    late: int,
    made_with: Mapping[str, Any],
) -> dict[str, Any]:
    """Over all processes of the run; `late` counts the decisions that came too late to this one.

    `made_with`: provenance.py, of the start: a commit made while the run goes on is not its code.
    """
    ledger, wall = loop.ledger, loop.ledger.wall_seconds
    seconds_total = ledger.total_seconds
    executed_steps = loop.progress.clock + ledger.lost_steps  # nominal, those that were undone nearly so
    seconds_in_steps = wall[purposes.STEPS]
    virtual_steps = ledger.virtual_steps
    cosines = ledger.cosines
    return {
        "run_id": run_id,
        "status": status,
        "seed": loop.settings.seed,
        "task": loop.task.description,
        "git_commit": made_with["git_commit"],
        "versions": made_with["versions"],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, device {loop.task.device}",
        "generation": loop.generation,
        "real_steps": loop.progress.step,
        "lost_steps": ledger.lost_steps,
        "virtual_steps": virtual_steps,
        "virtual_share": virtual_steps / max(1, virtual_steps + loop.progress.step),
        "proposals": ledger.applied + sum(ledger.verdicts[v] for v in (Verdict.VETOED, Verdict.MALFORMED)),
        "applied": ledger.applied,
        "accepted": ledger.verdicts[Verdict.ACCEPTED],
        "refused": ledger.verdicts[Verdict.REFUSED] + ledger.verdicts[Verdict.RUINED],
        "vetoed": ledger.verdicts[Verdict.VETOED],
        "stale": ledger.verdicts[Verdict.STALE] + ledger.verdicts[Verdict.USED] + late,
        "verdicts": {verdict.value: count for verdict, count in sorted(ledger.verdicts.items(), key=str)},
        "delta_cosine_mean": sum(cosines) / len(cosines) if cosines else None,
        "val_loss_first": housekeeping.first_loss,
        "val_loss_last": housekeeping.last_loss,
        "seconds_total": seconds_total,
        "seconds_in_steps": seconds_in_steps,
        "seconds_in_verification": wall[purposes.CHECKS] + wall[purposes.SNAPSHOTS] + wall[purposes.JUMPS],
        "seconds_waiting": wall[purposes.WAITING],
        "seconds_by_purpose": {name: round(seconds, 3) for name, seconds in sorted(wall.items())},
        "passes_by_purpose": dict(sorted(ledger.passes.items())),
        "unit": loop.task.unit,
        "units_per_step": loop.task.units_per_step,
        "tokens_per_second": executed_steps * loop.task.units_per_step / max(1e-9, seconds_total),
        "peak_memory_bytes": peak_memory_bytes(loop.task.device),
        "basis_bytes": loop.basis.bytes_held() if loop.basis else 0,
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        json.dumps(_strict(summary), indent=2, default=str, allow_nan=False) + "\n", encoding="utf-8"
    )
    temporary.replace(path)


def summary_lines(path: Path, run_path: Path) -> list[str]:
    """What a person wants to know at the end of a run."""
    s = json.loads(path.read_text(encoding="utf-8"))
    first, last = float(s["val_loss_first"]), float(s["val_loss_last"])
    fall = 1 - last / first
    lines = [
        f"{s['status']} at step {s['real_steps']} in {s['seconds_total']:.0f} s"
        f" ({s['tokens_per_second']:,.0f} {s['unit']}/s, peak {s['peak_memory_bytes'] / 2**20:.0f} MiB)",
        f"held-out loss {first:.4f} -> {last:.4f} ({fall:.0%} lower)",
        f"proposals {s['proposals']}: {s['accepted']} accepted, {s['refused']} refused and restored,"
        f" {s['vetoed']} vetoed, {s['stale']} stale; {s['virtual_steps']} virtual steps"
        f" ({s['virtual_share']:.0%}), {s['lost_steps']} real steps undone",
        f"time: steps {s['seconds_in_steps']:.1f} s, verification {s['seconds_in_verification']:.1f} s,"
        f" waiting {s['seconds_waiting']:.1f} s",
        f"everything is in {run_path}",
    ]
    return lines if s["status"] == "finished" else [*lines, f"go on with: trainer-node resume {run_path}"]


def _strict(value: Any) -> Any:
    """JSON has no NaN: a non-finite number becomes text."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of this process: allocated on the GPU, resident set on CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
