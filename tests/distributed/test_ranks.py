"""Laws of training on several ranks: real processes, real collectives (gloo), the same run as in one process.

Tolerance: after 200 hybrid steps with the same verdicts at every decision point, the weights of all ranks
together are those of the single process within 1e-4 of their norm (L2; float32 sums in another order).
Two launches serve all tests: starting ranks costs more than what they do.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.hybrid_run import (
    CONTROLS,
    change_controls,
    hybrid_settings,
    relative_distance,
    take,
    verdicts,
    whole_weights,
)
from tests.distributed.launch import launch_joined
from tests.distributed.scenes import COMPRESSED, KINDS, all_kinds
from tests.trainer.tiny import ScriptedLinks
from trainer_node.assembly import prepare_task
from trainer_node.data import Batch
from trainer_node.ranks import ONE_RANK
from trainer_node.tasks import Task

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def single() -> tuple[dict[str, torch.Tensor], list[str]]:
    torch.set_num_threads(1)
    loop = take(hybrid_settings(), ONE_RANK)
    return whole_weights(loop), verdicts(loop)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch_joined(all_kinds, str(folder), (*KINDS, *COMPRESSED), ranks=2)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_run_of_one_process(two_ranks: Path, single, kind: str) -> None:
    weights, verdicts_alone = single
    told = json.loads((two_ranks / f"{kind}.json").read_text())
    assert told["verdicts"] == verdicts_alone
    assert {"accepted", "refused"} <= set(verdicts_alone)
    assert relative_distance(load_file(two_ranks / f"{kind}.safetensors"), weights) < TOLERANCE


@pytest.mark.parametrize("kind", [*KINDS, *COMPRESSED])
def test_all_ranks_hold_the_same_numbers_at_every_decision_point(two_ranks: Path, kind: str) -> None:
    told = json.loads((two_ranks / f"{kind}.json").read_text())
    assert told["points_of_rank"][0]
    assert all(points == told["points_of_rank"][0] for points in told["points_of_rank"])


@pytest.fixture(scope="module")
def single_with_controls():
    torch.set_num_threads(1)
    return take(hybrid_settings(*CONTROLS), ONE_RANK, ScriptedLinks(answer=change_controls))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_change_their_controls_as_one_process_does(
    two_ranks: Path, single_with_controls, kind: str
) -> None:
    """At the same steps, with the same verdicts, on every rank: the same run."""
    alone, told = single_with_controls, json.loads((two_ranks / f"controls.{kind}.json").read_text())
    assert told["verdicts"] == verdicts(alone)
    assert told["verdicts"].count("accepted") >= 2
    assert told["controls"] == [repr(alone.progress.controls)] * 2
    assert told["step"] == alone.progress.step != 100
    weights = load_file(two_ranks / f"controls.{kind}.safetensors")
    assert relative_distance(weights, whole_weights(alone)) < TOLERANCE


def test_the_first_piece_of_shards_is_that_of_all_ranks_and_of_replicas_each_ones_own(
    two_ranks: Path,
) -> None:
    """Which part of the batch the noise scale is measured on, by gradients that one process makes of it."""
    task = prepare_task(hybrid_settings().trainer)
    batch = task.train.batch(0)
    halves = [Batch(batch.inputs[half], batch.targets[half]) for half in (slice(0, 16), slice(16, 32))]
    whole, *mine = [norm_of_gradient(task, piece) for piece in (batch, *halves)]
    told = json.loads((two_ranks / "first_pieces.json").read_text())
    assert told["fsdp"] == [[pytest.approx(whole, rel=1e-4), 0.5]] * 2
    assert told["ddp"] == [[pytest.approx(norm, rel=1e-4), 0.25] for norm in mine]
    assert abs(mine[0] - mine[1]) > 0.01 * whole  # or the two could not be told apart


def norm_of_gradient(task: Task, batch: Batch) -> float:
    task.model.train()
    task.model.zero_grad()
    task.loss(batch).backward()
    return float(torch.cat([p.grad.flatten() for p in task.model.parameters()]).norm())


def test_compressed_gradients_are_others_on_the_wire_and_train_the_model_too(two_ranks: Path) -> None:
    """And the copies stay the same to the last bit: a decision point where they do not ends the run."""
    compressed, whole = (json.loads((two_ranks / f"{kind}.json").read_text()) for kind in ("powersgd", "ddp"))
    assert compressed["losses"][:10] == whole["losses"][:10]
    assert compressed["losses"][12:20] != whole["losses"][12:20]
    assert sum(compressed["losses"][-8:]) < 0.9 * sum(compressed["losses"][:8])
