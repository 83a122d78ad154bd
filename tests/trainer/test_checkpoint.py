"""Checkpoints: what is saved comes back bit for bit; what is damaged is never loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common import sealed_folder
from common.errors import CheckpointError
from common.messages import (
    Alert,
    CheckpointRequest,
    CheckpointWritten,
    Observation,
    OrderDone,
    Phase,
    StopRequest,
)
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node import checkpoint
from trainer_node.checkpoint import Checkpoints
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop
from trainer_node.snapshot import optimizer_tensors


def run_with_checkpoints(root: Path, *overrides: str, stop_at: int = 0, resume: Path | None = None) -> Loop:
    settings = tiny_settings(*overrides)
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.3))
    failures: list[str] = []
    checkpoints = Checkpoints(root, keep=settings.trainer.checkpoint.keep, on_failure=failures.append)
    housekeeping = Housekeeping(links.emit, checkpoints)

    def between(loop: Loop) -> None:
        housekeeping(loop)
        loop.stop_requested = 0 < stop_at <= loop.progress.step

    loop = tiny_loop(links, settings, housekeeping=between)
    if resume is None:
        housekeeping.begin(loop)
    else:
        housekeeping.load(checkpoint.load(resume, loop))
    loop.run()
    checkpoints.close()
    assert failures == []
    loop.links = links
    return loop


def newest(root: Path) -> Path:
    return sealed_folder.folders(root)[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_k_steps_then_resume_equals_all_steps_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    name = f"trainer.optimizer.name={optimizer}"
    whole = run_with_checkpoints(tmp_path / "whole", name)
    random_of_whole = torch.get_rng_state()
    torch.rand(7)  # a resume must set the generator back, not find it right by chance
    run_with_checkpoints(tmp_path / "parts", name, stop_at=33)
    resumed = run_with_checkpoints(tmp_path / "parts", name, resume=newest(tmp_path / "parts"))
    assert same_bits(weights_of(whole), weights_of(resumed))
    assert same_bits(optimizer_tensors(whole.optimizers), optimizer_tensors(resumed.optimizers))
    assert same_bits(whole.basis.tensors().values(), resumed.basis.tensors().values())
    assert torch.equal(torch.get_rng_state(), random_of_whole)
    said = {o.step: repr(o) for o in whole.links.of(Observation)}
    again = {o.step: repr(o) for o in resumed.links.of(Observation)}
    assert again
    assert all(said[step] == text for step, text in again.items())


def test_a_checkpoint_is_never_taken_on_probation(tmp_path: Path) -> None:
    loop = run_with_checkpoints(tmp_path, "trainer.checkpoint.every_steps=1")
    saved_at = {(w.attempt, w.step) for w in loop.links.of(CheckpointWritten)}
    probation = {(o.attempt, o.step) for o in loop.links.of(Observation) if o.phase is Phase.CORRECT}
    assert saved_at
    assert probation
    assert not saved_at & probation


def test_only_the_newest_the_best_and_one_emergency_are_kept(tmp_path: Path) -> None:
    settings = tiny_settings("trainer.checkpoint.every_steps=3", "predictor.enabled=false")
    links = ScriptedLinks()
    checkpoints = Checkpoints(tmp_path, keep=2, on_failure=pytest.fail)
    housekeeping = Housekeeping(links.emit, checkpoints)
    best: list[str] = []

    def between(loop: Loop) -> None:
        if loop.progress.step == 7:
            housekeeping.last_loss = -1.0  # nothing will be better
        if loop.progress.step in (22, 40):
            links.orders.append(CheckpointRequest(request_id="r", emergency=True, reason="memory"))
        housekeeping(loop)
        best.append(checkpoints.best_name)

    loop = tiny_loop(links, settings, housekeeping=between)
    housekeeping.begin(loop)
    housekeeping.best_loss = 0.0
    loop.run()
    checkpoints.close()
    names = [folder.name for folder in sealed_folder.folders(tmp_path)]
    emergencies = [name for name in names if sealed_folder.is_emergency(name)]
    ordinary = [name for name in names if not sealed_folder.is_emergency(name)]
    assert len(emergencies) == 1
    assert best[-1] in ordinary
    assert len(ordinary) == 3
    assert [o.order_id for o in links.of(OrderDone)] == ["r", "r"]
    assert all(o.bytes_before > 0 and o.bytes_after > 0 for o in links.of(OrderDone))


def test_a_request_to_stop_is_answered_and_ends_the_run_where_it_may_be_saved() -> None:
    links = ScriptedLinks()
    housekeeping = Housekeeping(links.emit, None)

    def between(loop: Loop) -> None:
        if loop.progress.step == 21:
            links.orders.append(StopRequest(request_id="s", reason="from the page"))
        housekeeping(loop)

    loop = tiny_loop(links, tiny_settings(), housekeeping=between)
    loop.run()
    assert (loop.progress.step, loop.is_calm) == (21, True)
    assert [(o.order_id, o.done) for o in links.of(OrderDone)] == [("s", True)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_with_checkpoints(root, stop_at=12)
    return newest(root)


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors", "basis.safetensors",
     "random.safetensors"],
)  # fmt: skip
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_found_before_anything_changes(
    saved: Path, tmp_path: Path, name: str, damage: str
) -> None:
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    path = folder / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    loop = tiny_loop(ScriptedLinks(), tiny_settings())
    before = weights_of(loop)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(folder, loop)
    assert "\n" not in str(error.value)
    assert loop.progress.step == 0
    assert same_bits(before, weights_of(loop))


def test_a_checkpoint_of_another_model_names_the_first_difference(saved: Path) -> None:
    other = tiny_loop(ScriptedLinks(), tiny_settings("trainer.model.channels=8"))
    with pytest.raises(CheckpointError, match=r"is of another model: .* use the config.toml of its run"):
        checkpoint.load(saved, other)


def test_a_checkpoint_with_another_basis_is_refused(saved: Path) -> None:
    other = tiny_loop(ScriptedLinks(), tiny_settings("trainer.basis.dtype=bf16"))
    with pytest.raises(CheckpointError, match=r"another \[trainer.basis\]"):
        checkpoint.load(saved, other)


def test_a_full_disk_costs_the_checkpoint_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    failures: list[str] = []
    links = ScriptedLinks()
    checkpoints = Checkpoints(tmp_path, keep=3, on_failure=failures.append)
    housekeeping = Housekeeping(links.emit, checkpoints)
    links.orders.append(CheckpointRequest(request_id="c", emergency=True, reason="memory"))
    loop = tiny_loop(links, tiny_settings(), housekeeping=housekeeping)
    housekeeping.begin(loop)
    loop.run()
    assert loop.progress.step == 60
    assert failures
    assert [o.done for o in links.of(OrderDone)] == [False], "said done of what is not there"
    assert all("No space left on device" in text for text in failures)
    assert links.of(CheckpointWritten) == []
    assert sealed_folder.folders(tmp_path) == []


def test_the_newest_is_of_the_highest_generation_then_step(tmp_path: Path) -> None:
    emergency, ordinary = "step-00000120.gen-2.emergency", "step-00000120.gen-2"
    names = ["step-00000150.gen-1", "step-00000050.gen-2", emergency, ordinary, "x", "step-1.tmp"]
    for name in names:
        (tmp_path / name).mkdir()
    found = [folder.name for folder in sealed_folder.folders(tmp_path)]
    assert found == [emergency, ordinary, "step-00000050.gen-2", "step-00000150.gen-1"]


def test_a_manifest_cannot_reach_outside_its_folder(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": sealed_folder.sha256_of(secret)}
    (folder / "manifest.json").write_text(sealed_folder.manifest_text(manifest))
    with pytest.raises(CheckpointError):
        sealed_folder.verify(folder)


def test_a_run_whose_loss_is_lost_says_so_once_and_keeps_its_best_checkpoint(tmp_path: Path) -> None:
    links = ScriptedLinks()
    checkpoints = Checkpoints(tmp_path, keep=1, on_failure=pytest.fail)
    housekeeping = Housekeeping(links.emit, checkpoints)

    def poison(loop: Loop) -> None:
        housekeeping(loop)
        if loop.progress.step == 25:
            with torch.no_grad():
                next(iter(loop.task.model.parameters())).fill_(float("nan"))

    settings = tiny_settings("predictor.enabled=false", "trainer.spikes.enabled=false")
    loop = tiny_loop(links, settings, housekeeping=poison)
    housekeeping.begin(loop)
    loop.run()
    checkpoints.close()
    alerts = [a for a in links.of(Alert) if a.kind == "diverged"]
    assert len(alerts) == 1
    assert checkpoints.best_name in alerts[0].text
    weights = load_file(tmp_path / checkpoints.best_name / "model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


def test_a_checkpoint_sets_the_random_generator_back(tmp_path: Path) -> None:
    settings = tiny_settings()
    links = ScriptedLinks()
    loop = tiny_loop(links, settings)
    torch.rand(5)  # beyond the seed, so that seeding anew would not do
    wanted = torch.get_rng_state()
    checkpoints = Checkpoints(tmp_path, keep=1, on_failure=pytest.fail)
    Housekeeping(links.emit, checkpoints).save(loop)
    checkpoints.close()
    fresh = tiny_loop(ScriptedLinks(), settings)
    assert not torch.equal(torch.get_rng_state(), wanted)
    checkpoint.load(newest(tmp_path), fresh)
    assert torch.equal(torch.get_rng_state(), wanted)
