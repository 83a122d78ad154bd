"""A made-up snapshot of a run on a 16 GiB card, as snapshot.py sends it: to test and to look at the page.

    python -m tests.monitor.fake_snapshot [STEPS]      serves its page, one step more each 0.3 s, until Ctrl-C

Every number is invented; nothing here is a measurement. Pure but for `main`.
"""

from __future__ import annotations

import bisect
import math
import random
import sys
import time
from typing import Any

from common.messages import Verdict
from tests.monitor.fake_memory import (
    EVERY_STEPS,
    GIB,
    HOLDERS,
    ORDERS,
    START_SECONDS,
    STEP_SECONDS,
    at_unix_seconds,
    held_gib,
    memory_section,
    order_rows,
    used_gib,
)

TOKENS_PER_STEP = 16384
PROBATION_STEPS = 16
TOTAL_STEPS = 4000
_REFUSED = {3: "the loss was above the forecast after probation", 9: "worse than the forecast by 2.1 spreads"}


def loss_at(step: int) -> float:
    return 2.05 + 5.2 * (1 + step / 60) ** -0.62


def fake_snapshot(step: int = 1480, *, run_id: str = "made-up-run", seed: int = 1) -> dict[str, Any]:
    """All sections at `step`. A later one continues an earlier one of the same seed."""
    proposals = _proposals(step)
    kept = [row for row in proposals if row[2] == "accepted"]
    virtual_steps = sum(row[1] for row in kept)
    memory = memory_section(step)
    return {
        "run": _run(run_id, step),
        "progress": _progress(step, virtual_steps),
        "pace": {
            "progress_per_second": 2.343,
            "plain_progress_per_second": 2.38,
            "saved_share": -0.0158,
            "because": f"of {step:,} steps taken 32 were undone; prediction took 1.4% of the time",
        },
        "timing": {
            "shares": {
                "compute": 0.842, "data": 0.061, "verification": 0.031, "checkpoints": 0.022,
                "evaluation": 0.019, "snapshots": 0.011, "windows": 0.006,
                "waiting": 0.002, "jumps": 0.001, "other": 0.005,
            },
            "verdict": "compute-bound",
            "words": "Compute-bound: 84% computing steps, 6% waiting for data, 3% checking jumps.",
        },
        "counters": _counters(proposals),
        "proposals": [_proposal(row) for row in reversed(proposals[-12:])],
        "nodes": _nodes(step),
        "memory": memory,
        "orders": list(reversed(order_rows(step))),
        "alerts": _alerts(step),
        "divergence": {"level": "normal", "kinds": {"loss_spike": "normal"}, "excursions": 0, "text": ""},
        "health": {"trainer": {"disk_free_bytes": 71.0 * GIB}},
        "checkpoint": _checkpoint(step // 200 * 200),
        "checkpoints": _checkpoints(step),
        "streams": {"history": step, "decisions": len(proposals), "orders": 4},
        "stream_health": _stream_health(step, len(proposals)),
        "settings": {"toml": _TOML},
        "provenance": {
            "git_commit": "4f6a682d0c1b7e9a5d3f8c2b6e1a9f7d4c0b8e35",
            "git_diff": _DIFF,
            "config_toml": _TOML,
            "versions": {"python": "3.11.9", "torch": "2.13.0", "hybrid-predict-trainer": "0.4.0"},
        },
        "series": _series(step, seed, proposals),
        "holder_names": list(HOLDERS),
        "marks": {"train": [], "held_out": []},
        "server": {"connected": True, "away_seconds": 0},
        "actions": {"enabled": False, "paused": False},
    }  # fmt: skip


def _run(run_id: str, step: int) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "status": "running",
        "words": f"Running: step {step:,} of {TOTAL_STEPS:,}. Prediction costs 2 % at equal loss."
        f" Memory steady at {used_gib(step):.1f} of 16.0 GiB. Checkpoint 34 s ago.",
        "generation": 1,
        "resumed_from": "",
        "started_unix_seconds": START_SECONDS,
        "ended_reason": None,
        "task": "language",
        "decision_mode": "live",
        "prediction_enabled": True,
        "veto": None,
    }


def _progress(step: int, virtual_steps: int) -> dict[str, Any]:
    held_out_step = step // 100 * 100
    return {
        "step": step,
        "total_steps": TOTAL_STEPS,
        "attempt": 2,
        "phase": "full",
        "loss": loss_at(step),
        "held_out_loss": loss_at(held_out_step) + 0.02,
        "held_out_step": held_out_step,
        "held_out_loss_first": 7.27,
        "held_out_accuracy": 0.41,
        "train_seconds": STEP_SECONDS * step,
        "steps_per_second": 1 / STEP_SECONDS,
        "units_per_second": TOKENS_PER_STEP / STEP_SECONDS,
        "unit": "tokens",
        "eta_seconds": (TOTAL_STEPS - step) * STEP_SECONDS,
        "virtual_steps": virtual_steps,
        "virtual_share": virtual_steps / (step + virtual_steps),
        "lost_steps": 32,
    }


def _proposals(step: int) -> list[list[Any]]:
    """Rows of series.proposals."""
    rows: list[list[Any]] = []
    for index, base in enumerate(range(192, step - PROBATION_STEPS, EVERY_STEPS)):
        chance = random.Random(index)
        horizon = min(48, 6 + 2 * index + chance.randrange(5))
        forecast = loss_at(base + PROBATION_STEPS) + chance.gauss(0, 0.01)
        if index in (6, 14):
            rows.append([base, horizon, "vetoed", None, None, "memory is at its notice level"])
        elif index in _REFUSED:
            rows.append([base, horizon, "refused", forecast, forecast + 0.06, _REFUSED[index]])
        elif index % 5 == 4:
            rows.append([base, horizon, "stale", None, None, "made for another set of weights"])
        else:
            gain = abs(chance.gauss(0.02, 0.02))
            why = "the last four windows point the same way"
            rows.append([base, horizon, "accepted", forecast, forecast - gain, why])
    return rows


def _proposal(row: list[Any]) -> dict[str, Any]:
    base, horizon, verdict, forecast, outcome, why = row
    return {
        "decision_id": f"{base}.0",
        "step": base,
        "horizon_steps": horizon,
        "verdict": verdict,
        "reason": why,
        "predicted_loss": forecast,
        "loss_before": loss_at(base),
        "loss_after": outcome,
        "loss_end": outcome,
        "loss_forecast": forecast,
        "loss_spread": 0.02,
        "delta_norm": 0.8,
        "delta_cosine": 0.31,
        "lost_steps": 16 if verdict == "refused" else 0,
        "cost_seconds": 0.4,
        "full_step_seconds": STEP_SECONDS,
    }


def _counters(proposals: list[list[Any]]) -> dict[str, int]:
    names = [verdict.value for verdict in Verdict]
    counted = {name: sum(row[2] == name for row in proposals) for name in names}
    return {"proposals": len(proposals), **counted, "dead_letters": 0}


def _alerts(step: int) -> list[dict[str, Any]]:
    if step < 705:
        return []
    text = "memory was above the clean-up level for 6 s; directions now live in host memory"
    at = at_unix_seconds(705)
    alert = {"severity": "warning", "kind": "memory", "node": "monitor", "text": text, "step": 705}
    return [alert | {"at_unix_seconds": at}]


def _checkpoint(step: int) -> dict[str, Any]:
    return {
        "name": f"step-{step:08d}",
        "step": step,
        "emergency": False,
        "at_unix_seconds": at_unix_seconds(step),
    }


def _checkpoints(step: int) -> list[dict[str, Any]]:
    rows = []
    for index, at in enumerate(range(step // 200 * 200, 0, -200)[:5]):
        state, why = {0: ("written", None), 4: ("gone", "older than the last 4")}.get(
            index, ("verified", None)
        )
        rows.append(_checkpoint(at) | {"num_bytes": int(2.9 * GIB), "state": state, "why": why})
    return rows


def _nodes(step: int) -> list[dict[str, Any]]:
    return [
        {
            "node": node,
            "liveness": "alive",
            "state": "running",
            "step": step,
            "generation": 1,
            "process_id": 4000 + index,
            "heartbeat_age_seconds": 0.2,
            "uptime_seconds": STEP_SECONDS * step,
            "counters": {},
        }
        for index, node in enumerate(("trainer", "predictor", "monitor"))
    ]


def _stream_health(step: int, proposals: int) -> list[dict[str, Any]]:
    def row(stream: str, entries: int, lag_steps: int | None, pending: int | None) -> dict[str, Any]:
        return {
            "stream": stream, "entries": entries, "lag_steps": lag_steps, "pending": pending,
            **dict.fromkeys(("dead_letters", "fenced", "duplicates", "damaged"), 0),
            "gaps": 0 if lag_steps is not None else None,
        }  # fmt: skip

    return [row("history", step, 1, 0), row("decisions", proposals, None, None), row("orders", 4, None, 0)]


def _series(step: int, seed: int, proposals: list[list[Any]]) -> dict[str, list[Any]]:
    noise = random.Random(seed)
    train = [[at, loss_at(at) + noise.gauss(0, 0.09)] for at in range(1, TOTAL_STEPS + 1)]
    width = max(1, step // 900)
    known = [row for row in proposals if row[3] is not None]
    bases = [row[0] for row in known]
    phases = [[1, 128, "warmup"], [129, step, "full"]]
    phases += [[base + 1, base + PROBATION_STEPS, "correct"] for base in bases]
    held_out = [[at, loss_at(at) + 0.02 + noise.gauss(0, 0.008)] for at in range(0, step + 1, 100)]
    seconds = range(0, step + 1, max(1, step // 200))
    return {
        "train": [row for row in train[:step] if row[0] % width == 0],
        "held_out": held_out,
        "forecast": [[row[0] + PROBATION_STEPS, row[3], 0.05] for row in known],
        "memory": [[int(at_unix_seconds(at)), used_gib(at) * GIB] for at in seconds],
        "phases": sorted(phases, key=lambda segment: (segment[2] == "correct", segment[0])),
        "jumps": [[row[0], row[2], row[1]] for row in proposals],
        "seconds": [[at, at_unix_seconds(at)] for at in seconds],
        "units": [[at, at * TOKENS_PER_STEP] for at in seconds],
        "holders": [[int(at_unix_seconds(at)), [int(part * GIB) for part in held_gib(at)]] for at in seconds],
        "order_marks": [
            [at_unix_seconds(at), f"{action}: {reason}", "done" if is_done else "refused"]
            for at, action, reason, is_done, *_ in ORDERS
            if at <= step
        ],
        "proposals": proposals,
        "pace": [
            [at, 2.34 + 0.03 * math.sin(0.8 * bisect.bisect(bases, at)), 2.38 + noise.gauss(0, 0.012)]
            for at in range(100, step + 1, 20)
        ],
    }


_TOML = """[trainer]
task = "language"
steps = 4000
seed = 7
"""

_DIFF = """--- a/trainer_node/tasks.py
+++ b/trainer_node/tasks.py
@@ -41,3 +41,3 @@ def language():
-    context_length = 256
+    context_length = 512
"""


def main() -> None:
    from monitor_node.feed import Feed
    from monitor_node.web import PageServer

    feed = Feed("fake")
    server = PageServer(feed, host="127.0.0.1", port=0)
    server.start()
    print(server.url, flush=True)
    step = int(sys.argv[1]) if len(sys.argv) > 1 else 1480
    while True:
        feed.publish(fake_snapshot(min(step, TOTAL_STEPS)))
        step += 1
        time.sleep(0.3)


if __name__ == "__main__":
    main()
