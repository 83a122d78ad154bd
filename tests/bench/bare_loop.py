"""What we cost beside a bare loop: `python -m tests.bench.bare_loop [--preset nano|gpt2-small] [--rounds N]`.

The same model, weights, batches, optimizer and schedule in a plain loop (bare_arms.py, as nanoGPT's), in our
trainer without and with prediction (every decision rests), and in `Hybrid` without nodes, with a predictor in
this process and with a server of its own. All arms live in one process and take turns every few steps
(trainer_node/race/together.py), so that all meet the same machine. Overhead is of thread CPU time on a CPU
with one thread and of wall time else, per round, against the bare loop of the same round; both are told.
MFU = FLOP/s of the model / peak; FLOPs per token: 6 N + 12 layers x width x context (Chowdhery et al. 2022,
appendix B). Prints; asserts nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.config import load_settings
from common.settings import RunSettings, TrainerSettings
from tests.bench.bare_arms import TURNS_PER_ROUND, WARM_TURNS, Account, arms, wait_for
from trainer_node.assembly import choose_device
from trainer_node.race.machine import machine
from trainer_node.race.together import TURN_STEPS, run_together
from trainer_node.tasks import build_model

ROUNDS = 5
BARS_PERCENT = {"cpu": 2.0, "cuda": 1.0}  # of our trainer without prediction, issue 6
# Dense bfloat16 FLOP/s by the maker's data sheet, by what the name of the card begins with.
PEAKS = {"NVIDIA H100": 989.4e12, "NVIDIA H200": 989.4e12, "NVIDIA A100": 312e12}


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large product in the type of the model: the best of several."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds_of = time.thread_time if _is_one_thread(device) else time.perf_counter
    best = float("inf")
    for _ in range(10):
        wait_for(device)
        started = seconds_of()
        left @ right
        wait_for(device)
        best = min(best, seconds_of() - started)
    return 2.0 * size**3 / best


def _is_one_thread(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def flops_per_token(settings: TrainerSettings) -> float:
    """Forward and backward. A table of embeddings is no product, unless it is the head too."""
    shape = settings.model
    with torch.device("meta"):
        model = build_model(settings, torch.device("meta"))
    tied = getattr(shape, "tied_head", False)
    count = sum(p.numel() for p in model.parameters())
    count -= 0 if tied else shape.vocabulary_size * shape.width
    return 6.0 * count + 12.0 * shape.layers * shape.width * shape.context_tokens


def known_peak(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for start, peak in PEAKS.items() if name.startswith(start)), None)


def report(settings: RunSettings, preset: str) -> dict[str, Any]:
    trainer = settings.trainer
    device = choose_device(trainer)
    if device.type == "cpu":
        torch.set_num_threads(1)
    measured, by_maker = matmul_peak(device, trainer.precision), known_peak(device)
    with tempfile.TemporaryDirectory() as folder:
        chosen = arms(settings, Path(folder))
        accounts = {name: Account(device) for name in chosen}
        losses = run_together([partial(work, accounts[name]) for name, work in chosen.items()])
    clock = "thread" if _is_one_thread(device) else "wall"
    plain = accounts["bare loop"]
    steps = TURNS_PER_ROUND * TURN_STEPS
    tokens = steps * trainer.batch.sequences * trainer.batch.accumulation * trainer.model.context_tokens
    lines: dict[str, Any] = {}
    for (name, account), loss in zip(accounts.items(), losses, strict=True):
        seconds = statistics.median(getattr(account, clock))
        rate = tokens / seconds
        lines[name] = {
            **{f"{c}_overhead_percent": _overhead(account, plain, c) for c in ("thread", "wall")},
            "seconds_per_step": seconds / steps,
            "tokens_per_second": rate,
            "mfu": rate * flops_per_token(trainer) / (by_maker or measured),
            "last_loss": loss,
        }
    return {
        "preset": preset, "machine": machine(), "device": device.type, "clock": clock,
        "rounds": len(plain.wall), "steps_per_round": steps,
        "peak_flops": by_maker or measured, "measured_peak_flops": measured,
        "peak_is": "data sheet" if by_maker else "measured, matmul", "bar_percent": BARS_PERCENT[device.type],
        "arms": lines,
    }  # fmt: skip


def _overhead(account: Account, plain: Account, clock: str) -> dict[str, float]:
    pairs = zip(getattr(account, clock), getattr(plain, clock), strict=True)
    shares = [100.0 * (seconds / bare_seconds - 1.0) for seconds, bare_seconds in pairs]
    return {"median": statistics.median(shares), "least": min(shares), "most": max(shares)}


def table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['preset']} on {found['machine']}",
        f"{found['rounds']} rounds of {found['steps_per_round']} steps, {found['clock']} time; peak"
        f" {found['peak_flops'] / 1e12:.2f} TFLOP/s ({found['peak_is']}; a product reached"
        f" {found['measured_peak_flops'] / 1e12:.2f}); bar: prediction off at most"
        f" {found['bar_percent']:g} %",
    ]
    for name, arm in found["arms"].items():
        spread = arm[f"{found['clock']}_overhead_percent"]
        lines.append(
            f"  {name:<26} {spread['median']:+6.2f} % ({spread['least']:+.2f} to {spread['most']:+.2f})"
            f"  {arm['tokens_per_second']:>10,.0f} tokens/s  MFU {arm['mfu']:.1%}"
            f"  loss {arm['last_loss']:.4f}"
        )
    return "\n".join(lines)


def settings_of(preset: str, rounds: int, overrides: Sequence[str]) -> RunSettings:
    steps = TURN_STEPS * (WARM_TURNS + rounds * TURNS_PER_ROUND)
    device = [] if torch.cuda.is_available() else ["trainer.device=cpu", "trainer.threads=1"]
    return load_settings(preset=preset, overrides=[*device, f"trainer.steps={steps}", *overrides])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="nano", help="a language preset")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE")
    parser.add_argument("--json", type=Path, help="append the figures as one line")
    options = parser.parse_args(arguments)
    found = report(settings_of(options.preset, options.rounds, options.set), options.preset)
    print(table(found))
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
