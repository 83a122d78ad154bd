"""A model of the user's own goes through the same runs as the built-in tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import DataError, SettingsError
from trainer_node.race.library import ListedBatches, race_model

WINDOWS = ("trainer.statistics_steps=6", "trainer.window_steps=4", "trainer.probation_steps=4")


def build(seed: int, *, train: int = 12, held_out: int = 2):
    random = torch.Generator().manual_seed(seed)
    truth = torch.randn(4, 2, generator=random)
    model = nn.Linear(4, 2)

    def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        inputs = [torch.randn(8, 4, generator=random) for _ in range(count)]
        return [(x, x @ truth) for x in inputs]

    return (
        model,
        lambda batch: (model(batch[0]) - batch[1]).square().mean(),
        batches(train),
        iter(batches(held_out)),
    )


def race(**changes):
    given = {
        "arms": ["adamw-decay", "snoo", "ours-fixed"],
        "seeds": [0, 1],
        "steps": 60,
        "overrides": WINDOWS,
    }
    return race_model(**{"build": build, **given, **changes})


def test_every_arm_learns_it_from_the_same_start_on_every_seed() -> None:
    results = race(configs={"snoo": (("trainer.optimizer.rate", 0.05),)})
    assert [(r.key.arm, r.key.seed) for r in results] == [
        (arm, seed) for seed in (0, 1) for arm in ("adamw-decay", "snoo", "ours-fixed")
    ]
    starts = [[r.curve[0].loss for r in results if r.key.seed == seed] for seed in (0, 1)]
    assert all(len(set(losses)) == 1 for losses in starts)
    assert starts[0] != starts[1]
    assert all(r.final.loss < r.curve[0].loss for r in results)
    assert results[1].key.config == (("trainer.optimizer.rate", 0.05),)
    assert sum(count for _, count in results[2].verdicts) > 5


def test_guard_batches_are_never_trained_on_and_every_other_once_per_epoch() -> None:
    batches = ListedBatches(list("abcdefg"), seed=3, guard_batches=2)
    epochs = ["".join(batches.batch(5 * epoch + place) for place in range(5)) for epoch in range(4)]
    assert all(sorted(epoch) == list("abcde") for epoch in epochs)
    assert len(set(epochs)) > 1
    assert [batches.guard(0), batches.guard(1)] == ["f", "g"]
    assert batches.epoch(10) == 2.0
    with pytest.raises(IndexError):
        batches.guard(2)


@pytest.mark.parametrize(
    ("changes", "error", "hint"),
    [
        ({"arms": ["adam-decay"]}, SettingsError, "did you mean adamw-decay"),
        ({"build": lambda seed: build(seed, train=1)}, DataError, "give more"),
        ({"build": lambda seed: build(seed, held_out=0)}, DataError, "held-out"),
    ],
)
def test_mistakes_are_one_line(changes, error: type[Exception], hint: str) -> None:
    with pytest.raises(error, match=hint) as caught:
        race(**changes)
    assert "\n" not in str(caught.value)
