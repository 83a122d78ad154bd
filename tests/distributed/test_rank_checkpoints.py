"""Laws of checkpoints on several ranks: sealed like any other; resumed bit for bit, by others too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from common import sealed_folder
from tests.distributed.hybrid_run import hybrid_settings, relative_distance
from tests.distributed.launch import free_port, launch
from tests.distributed.scenes import RUN, cut_after, train, train_and_resume
from trainer_node import checkpoint_reading
from trainer_node.run_folder import RunFolder
from trainer_node.tasks import build_model

FSDP, DDP = "trainer.parallel.kind=fsdp", "trainer.parallel.kind=ddp"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks: `whole`, and `again`, which was cut after step 8 and resumed."""
    root = tmp_path_factory.mktemp("sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECOND_PORT", str(free_port()))
        launch(train_and_resume, str(root / "whole"), str(root / "again"), FSDP, ranks=2)
    return root


def newest(run: Path) -> Path:
    return sealed_folder.folders(RunFolder(run).trainer_checkpoints)[0]


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """Read in one process, as `trainer-node sample` does."""
    model = build_model(hybrid_settings(*RUN).trainer, torch.device("cpu"))
    assert checkpoint_reading.load_weights(newest(run), model) == 24
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_shards_are_sealed_into_one_folder_without_a_pickle(sharded: Path) -> None:
    folder = newest(sharded / "whole")
    manifest = sealed_folder.verify(folder)
    names = set(manifest["files"])
    assert {"state.json", "random.safetensors"} <= names
    assert len([name for name in names if name.startswith("shard-")]) == 2
    assert all(name.endswith((".safetensors", ".json")) for name in names)


def test_a_resume_of_shards_is_bit_identical(sharded: Path) -> None:
    manifests = [sealed_folder.verify(newest(sharded / name)) for name in ("whole", "again")]
    assert manifests[0]["fingerprint"] == manifests[1]["fingerprint"]
    generations = [sealed_folder.age_key(newest(sharded / name).name)[0] for name in ("whole", "again")]
    assert generations[1] > generations[0]


def test_shards_of_two_ranks_are_resumed_by_one_and_by_four(sharded: Path, tmp_path: Path) -> None:
    for ranks in (1, 4):
        run = str(tmp_path / str(ranks))
        cut_after(str(sharded / "whole"), run, step=8)
        if ranks == 1:
            train(run, FSDP)
        else:
            launch(train, run, FSDP, ranks=ranks)
        assert relative_distance(last_weights(Path(run)), last_weights(sharded / "whole")) < 1e-5
    state = json.loads((newest(tmp_path / "4") / "state.json").read_text())
    assert state["progress"]["step"] == 24


def test_only_rank_0_writes_the_run_folder(sharded: Path) -> None:
    steps = [
        line["step"]
        for line in map(json.loads, (sharded / "whole" / "metrics.jsonl").read_text().splitlines())
        if line.get("kind") == "Observation" or "loss" in line
    ]
    assert steps == sorted(steps)
