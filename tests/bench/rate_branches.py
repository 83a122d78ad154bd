"""Which rate wins over a few steps: `python -m tests.bench.rate_branches regression --start 0.25`.

A race task is trained at `start` times its tuned rate. At some steps it branches: from the same weights, on
the same batches, 16 and 32 steps at 1/30 to 8 times the rate, judged on the guard batches by the last weights
and by the mean of the branch's second half (trainer_node/leg_mean.py). Printed: per step and judge the best
rate, in units of the tuned one. What it taught is in docs/lab-log.md (2026-11-22). Asserts nothing.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch

from common.schedule import rate_factor
from common.settings import TrainerSettings
from trainer_node.assembly import prepare_task
from trainer_node.groups import parameter_groups
from trainer_node.leg_mean import LegMean
from trainer_node.optim.build import build_optimizers, set_rates
from trainer_node.race.arms import arm_named, run_settings
from trainer_node.race.tasks import race_settings
from trainer_node.step import train_step

# Tuned by `race TASK --rule decayed`: rate, weight decay, share of the decay, steps (docs/evidence).
TUNED = {
    "digits": (0.01, 0.2, 0.4, 200),
    "regression": (0.01, 0.1, 0.4, 300),
    "python": (0.004, 0.1, 0.4, 300),
}
FACTORS = (8.0, 4.0, 2.0, 1.0, 0.5, 0.25, 0.125, 1 / 30)
BRANCH_STEPS = (16, 32)


class Branching:
    def __init__(self, settings: TrainerSettings) -> None:
        self.settings, self.task = settings, prepare_task(settings)
        self.optimizers = build_optimizers(self.task.model, settings.optimizer, self.task.device)
        self.groups = parameter_groups(self.task.model)

    def step(self, number: int, factor: float) -> None:
        settings, accumulation = self.settings, self.settings.batch.accumulation
        set_rates(self.optimizers, factor * rate_factor(number, settings.steps, settings.schedule))
        batches = [self.task.train.batch(number * accumulation + i) for i in range(accumulation)]
        train_step(
            self.task.model,
            self.task.loss,
            batches,
            self.optimizers,
            self.groups,
            clip_norm=settings.optimizer.clip_norm,
        )

    def guard_loss(self) -> float:
        count = self.settings.verify.guard_batches
        self.task.model.eval()
        with torch.no_grad():
            loss = sum(float(self.task.loss(self.task.train.guard(i))) for i in range(count)) / count
        self.task.model.train()
        return loss

    def saved(self) -> Callable[[], None]:
        """What goes back to here."""
        model = copy.deepcopy(self.task.model.state_dict())
        states = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.optimizers]

        def back() -> None:
            self.task.model.load_state_dict(model)
            for optimizer, state in zip(self.optimizers, states, strict=True):
                optimizer.load_state_dict(copy.deepcopy(state))

        return back

    def judged(self, number: int, factor: float, steps: int) -> tuple[float, float]:
        """Guard loss of the last weights and of their mean, after `steps` steps."""
        parameters = [p for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]]
        mean = LegMean(parameters, steps)
        for offset in range(steps):
            self.step(number + offset, factor)
            mean.after_step()
        last = self.guard_loss()
        with mean.in_place():
            return last, self.guard_loss()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", choices=TUNED)
    parser.add_argument("--start", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rate, decay, share, steps = TUNED[options.task]
    config = (
        ("trainer.optimizer.rate", rate * options.start),
        ("trainer.optimizer.weight_decay", decay),
        ("trainer.schedule.decay_share", share),
    )
    arm = arm_named("adamw-decay")
    settings = run_settings(arm, race_settings(options.task), config, steps=steps, seed=options.seed).trainer
    run, warmup = Branching(settings), settings.schedule.warmup_steps
    print("best of 1/30 to 8 times the rate, in units of the tuned one: by the last weights, by their mean")
    points = (warmup, warmup + 16, round(0.3 * steps), round(0.5 * steps))
    for number in range(points[-1] + 1):
        if number in points:
            back = run.saved()
            for length in BRANCH_STEPS:
                found = {}
                for factor in FACTORS:
                    found[factor] = run.judged(number, factor, length)
                    back()
                last, mean = (min(found, key=lambda f, i=i: found[f][i]) * options.start for i in (0, 1))
                print(f"step {number:4d}, {length} steps: {last:6.3g} {mean:6.3g}", flush=True)
        run.step(number, 1.0)


if __name__ == "__main__":
    main()
