"""What a campaign found, as a table for people and as JSON for programs; pure, but it names the machine."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from typing import Any

from tests.campaign.campaign import Injected, Round


def rows(injected: Sequence[Injected]) -> list[dict[str, Any]]:
    """One row per kind and target of fault."""
    by_kind: dict[tuple[str, str], list[Injected]] = {}
    for one in injected:
        by_kind.setdefault((one.fault.kind, one.fault.target), []).append(one)
    return [
        {
            "kind": kind,
            "target": target,
            "injected": len(group),
            "survived": sum(one.survived for one in group),
            "recovery_seconds_p50": quantile(_recoveries(group), 0.5),
            "recovery_seconds_p99": quantile(_recoveries(group), 0.99),
        }
        for (kind, target), group in sorted(by_kind.items())
    ]


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least `share` of all do not exceed; None of none."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def report(rounds: Sequence[Round], *, seed: int, command: str, date: str, seconds: float) -> dict[str, Any]:
    """Of all rounds; the first one is the undisturbed twin."""
    injected = [one for played in rounds for one in played.injected]
    fired: dict[str, int] = {}
    for played in rounds:
        for kind, count in played.fired.items():
            fired[kind] = fired.get(kind, 0) + count
    return {
        "command": command,
        "date": date,
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores, Python {platform.python_version()}",
        "seconds": round(seconds, 1),
        "rounds": len(rounds),
        "steps_published": sum(played.steps_published for played in rounds),
        "decisions_applied": sum(played.decisions_applied for played in rounds),
        "held_out_loss_undisturbed": rounds[0].held_out_loss,
        "held_out_losses": [played.held_out_loss for played in rounds[1:]],
        "equal_to_undisturbed": sum(p.model_digest == rounds[0].model_digest for p in rounds[1:]),
        "faults": rows(injected),
        "all": {
            "injected": len(injected),
            "survived": sum(one.survived for one in injected),
            "recovery_seconds_p50": quantile(_recoveries(injected), 0.5),
            "recovery_seconds_p99": quantile(_recoveries(injected), 0.99),
        },
        "link_faults": dict(sorted(fired.items())),
        "ended_by_themselves": [f"{p.folder.name}: {text}" for p in rounds for text in p.ended_by_themselves],
        "violations": [f"{p.folder}: {text}" for p in rounds for text in p.violations],
    }


def text(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [f"{'fault':<22} {'of':<10} {'injected':>8} {'survived':>8} {'p50 s':>7} {'p99 s':>7}"]
    for row in [*found["faults"], {"kind": "all", "target": "", **found["all"]}]:
        p50, p99 = (_seconds(row[f"recovery_seconds_{name}"]) for name in ("p50", "p99"))
        counts = f"{row['injected']:>8} {row['survived']:>8}"
        lines.append(f"{row['kind']:<22} {row['target']:<10} {counts} {p50:>7} {p99:>7}")
    lines.append(f"{found['steps_published']} steps, {found['decisions_applied']} decisions applied,"
                 f" {found['rounds']} runs, {found['seconds']:.0f} s, seed {found['seed']}")  # fmt: skip
    losses = ", ".join(f"{loss:.3f}" for loss in found["held_out_losses"])
    lines.append(f"held-out loss undisturbed {found['held_out_loss_undisturbed']:.3f}, attacked {losses};"
                 f" {found['equal_to_undisturbed']} of them bit for bit the undisturbed run")  # fmt: skip
    if found["link_faults"]:
        lines.append("on the links: " + ", ".join(f"{n} {kind}" for kind, n in found["link_faults"].items()))
    lines += [f"gave up and was started again: {text}" for text in found["ended_by_themselves"]]
    lines += [f"VIOLATION {text}" for text in found["violations"]] or ["no violation"]
    return "\n".join(lines)


def _recoveries(injected: Sequence[Injected]) -> list[float]:
    return [one.recovery_seconds for one in injected if one.recovery_seconds is not None]


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
