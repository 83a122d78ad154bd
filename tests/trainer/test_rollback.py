"""Back from a spike: to a sound checkpoint, as a new attempt, past the batches; bounded, and repeatable."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from common import sealed_folder
from common.errors import CheckpointError, UserError
from common.messages import Alert, CheckpointWritten, HealthSample, Observation, Phase, PhaseDecision
from common.settings import TrainerSettings
from predictor_node.history import History
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node import checkpoint, node, rollback
from trainer_node.assembly import prepare_task
from trainer_node.checkpoint import Checkpoints
from trainer_node.data import Batch
from trainer_node.housekeeping import Housekeeping
from trainer_node.loop import Loop
from trainer_node.node import TrainerJob, run_trainer
from trainer_node.rollback import SpikeWatch
from trainer_node.run_folder import RunFolder
from trainer_node.snapshot import optimizer_tensors
from trainer_node.tasks import Task

PLAIN = "predictor.enabled=false"
LONG_RUN = ("trainer.steps=120", "trainer.optimizer.name=adamw")
DROPOUT = "trainer.model.dropout=0.1"  # a step draws random numbers


@dataclass
class Rotten:
    """Training data whose batches at some positions are poison; notes which batches were used."""

    batches: object
    is_rotten: Callable[[int], bool] = lambda _: False
    shift: Callable[[int], int] = lambda position: position
    scale: float = math.nan
    used: list[int] = field(default_factory=list)

    def batch(self, position: int) -> Batch:
        position = self.shift(position)
        self.used.append(position)
        batch = self.batches.batch(position)
        return Batch(batch.inputs * self.scale, batch.targets) if self.is_rotten(position) else batch

    def __getattr__(self, name: str) -> object:
        return getattr(self.batches, name)


@dataclass
class Run:
    loop: Loop
    links: ScriptedLinks
    data: Rotten
    housekeeping: Housekeeping

    def spikes(self) -> list[Alert]:
        return [alert for alert in self.links.of(Alert) if alert.kind == "spike"]


def run(
    root: Path | None,
    *overrides: str,
    answer: Callable[[Observation], PhaseDecision | None] = lambda _: None,
    resume: bool = False,
    stop_at: int = 0,
    before_housekeeping: Callable[[Loop], None] = lambda _: None,
    after_step: Callable[[Loop], None] = lambda _: None,
    waits_for_saves: bool = False,
    **rot: object,
) -> Run:
    """`waits_for_saves`: `after_step` finds every checkpoint so far whole, and nobody at work on it."""
    links = ScriptedLinks(answer=answer)
    settings = tiny_settings(*LONG_RUN, *overrides)
    checkpoints = None
    if root is not None:
        checkpoints = Checkpoints(root, keep=settings.trainer.checkpoint.keep, on_failure=pytest.fail)
    housekeeping = Housekeeping(links.emit, checkpoints)

    def between(loop: Loop) -> None:
        before_housekeeping(loop)
        housekeeping(loop)
        if waits_for_saves and checkpoints is not None:
            checkpoints.wait()
        after_step(loop)
        loop.stop_requested = loop.stop_requested or 0 < stop_at <= len(data.used)

    loop = tiny_loop(links, settings, housekeeping=between)
    data = Rotten(loop.task.train, **rot)
    object.__setattr__(loop.task, "train", data)  # the loop's task is built from settings alone
    if resume:
        housekeeping.load(checkpoint.load(sealed_folder.folders(root)[0], loop))
    else:
        housekeeping.begin(loop)
    loop.run()
    housekeeping.end(loop, emergency=loop.progress.step < settings.trainer.steps)
    return Run(loop, links, data, housekeeping)


def rotten_from_52_to_54(position: int) -> bool:
    return 52 <= position < 54


def test_the_batches_of_a_spike_are_left_behind_and_the_run_ends_whole(tmp_path: Path) -> None:
    done = run(tmp_path, PLAIN, is_rotten=rotten_from_52_to_54)
    (alert,) = done.spikes()
    assert "step 53" in alert.text
    assert "back to step-00000051.gen-1" in alert.text  # 50 is a decision point: nothing is saved there
    progress = done.loop.progress
    assert (progress.step, progress.attempt) == (120, 1)
    assert done.data.used == list(range(120 + progress.skipped_steps))
    assert all(bool(torch.isfinite(p).all()) for p in weights_of(done.loop))
    assert done.loop.ledger.lost_steps == progress.skipped_steps > 0
    (skipped,) = {m.value for m in done.links.of(HealthSample)[-1].metrics if m.name == "skipped_steps"}
    assert skipped == progress.skipped_steps


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("predictor", ["predictor.enabled=true", PLAIN])
def test_what_remains_is_a_run_that_never_met_these_batches(
    optimizer: str, predictor: str, tmp_path: Path
) -> None:
    """Weights, optimizer state, averages and random numbers, to the last bit."""
    overrides = (f"trainer.optimizer.name={optimizer}", predictor, DROPOUT)
    spiked = run(tmp_path / "spiked", *overrides, is_rotten=rotten_from_52_to_54)
    random_of_spiked = torch.get_rng_state()
    skipped = spiked.loop.progress.skipped_steps
    clean = run(tmp_path / "clean", *overrides, shift=lambda p: p if p < 51 else p + skipped)
    assert skipped > 0
    assert same_bits(weights_of(spiked.loop), weights_of(clean.loop))
    assert same_bits(optimizer_tensors(spiked.loop.optimizers), optimizer_tensors(clean.loop.optimizers))
    if spiked.loop.basis is not None and clean.loop.basis is not None:
        assert same_bits(spiked.loop.basis.tensors().values(), clean.loop.basis.tensors().values())
    assert torch.equal(random_of_spiked, torch.get_rng_state())


@pytest.mark.parametrize(("ruined_at", "back_to"), [(75, 71), (71, 61)])
def test_a_gross_spike_that_stays_finite_is_answered_too(
    ruined_at: int, back_to: int, tmp_path: Path
) -> None:
    """As one monstrous update does. The checkpoint of step 71 is good, or is the first to hold the ruin."""

    def ruin(loop: Loop) -> None:
        if len(loop.task.train.used) == ruined_at:
            with torch.no_grad():
                for parameter in loop.task.model.parameters():
                    parameter.mul_(-8.0)

    done = run(tmp_path, PLAIN, before_housekeeping=ruin)
    (alert,) = done.spikes()
    assert f"back to step-{back_to:08d}.gen-1" in alert.text
    assert done.housekeeping.last_loss < done.housekeeping.first_loss


def test_a_second_spike_soon_after_leads_further_back(tmp_path: Path) -> None:
    """By then there is a checkpoint at 61: trouble may have been under way."""
    done = run(tmp_path, PLAIN, is_rotten=lambda p: p in (52, 53, 75, 76))
    back_to = [alert.text.split("back to ")[1].split(",")[0] for alert in done.spikes()]
    assert back_to == ["step-00000051.gen-1", "step-00000051.gen-1"]
    assert done.loop.progress.step == 120


def jumpy(observation: Observation) -> PhaseDecision | None:
    return proposal(observation, drift=0.3) if observation.step % 12 == 2 else None


def test_a_resume_after_a_rollback_goes_on_bit_for_bit(tmp_path: Path) -> None:
    overrides = (DROPOUT,)
    whole = run(tmp_path / "whole", *overrides, answer=jumpy, is_rotten=rotten_from_52_to_54)
    run(tmp_path / "parts", *overrides, answer=jumpy, is_rotten=rotten_from_52_to_54, stop_at=80)
    parts = run(tmp_path / "parts", *overrides, answer=jumpy, is_rotten=rotten_from_52_to_54, resume=True)
    assert whole.loop.progress.skipped_steps > 0
    assert parts.data.used[0] > 60  # after the rollback
    assert same_bits(weights_of(whole.loop), weights_of(parts.loop))
    said = {(o.attempt, o.step): repr(o) for o in whole.links.of(Observation)}
    again = {(o.attempt, o.step): repr(o) for o in parts.links.of(Observation)}
    assert again
    assert all(said[key] == text for key, text in again.items())


def test_equal_runs_in_lockstep_go_back_at_the_same_step_and_say_the_same(tmp_path: Path) -> None:
    kinds = (Observation, Alert, CheckpointWritten)
    said = []
    for number in range(2):
        done = run(tmp_path / str(number), DROPOUT, answer=jumpy, is_rotten=rotten_from_52_to_54)
        said.append([repr(m) for m in done.links.said if isinstance(m, kinds)])
    assert said[0] == said[1]


def test_for_the_predictor_it_is_a_set_back_like_any_other(tmp_path: Path) -> None:
    done = run(tmp_path, answer=jumpy, is_rotten=rotten_from_52_to_54)
    history = History()
    for observation in done.links.of(Observation):
        history = history.append(observation)
    assert [row.step for row in history.rows] == list(range(1, 121))
    assert (history.repeats, history.missing_steps, history.contiguous_steps) == (0, 0, 120)
    assert all(math.isfinite(row.loss) for row in history.rows)
    keys = [(o.attempt, o.step) for o in done.links.of(Observation)]
    assert len(set(keys)) == len(keys)


def test_what_lies_behind_the_spike_is_never_resumed_from(tmp_path: Path) -> None:
    """Steps without a checkpoint follow a rollback, so a crash then finds the one it went back to."""
    found: list[list[str]] = []

    def look(loop: Loop) -> None:
        if loop.progress.attempt == 1 and not found:
            found.append([folder.name for folder in sealed_folder.folders(tmp_path)])

    run(
        tmp_path, PLAIN, "trainer.checkpoint.every_steps=2", after_step=look, is_rotten=lambda p: 50 <= p < 54
    )
    assert max(sealed_folder.age_key(name)[1] for name in found[0]) <= 50


def test_a_run_that_spikes_again_and_again_stops_in_a_sound_state_and_says_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, PLAIN, "trainer.spikes.max_rollbacks=2", is_rotten=lambda p: p >= 52)
    back_to = [alert.text.split("back to ")[1].split(",")[0] for alert in done.spikes()]
    assert back_to == ["step-00000051.gen-1", "step-00000041.gen-1", "step-00000031.gen-1"]
    assert "trainer.optimizer.rate" in done.housekeeping.fault
    assert [a.text for a in done.links.of(Alert) if a.kind == "diverged"] == [done.housekeeping.fault]
    newest = sealed_folder.folders(tmp_path)[0]
    assert newest.name == "step-00000031.gen-1.emergency"
    resumed = tiny_loop(ScriptedLinks(), tiny_settings(*LONG_RUN, PLAIN))
    checkpoint.load(newest, resumed)
    assert all(bool(torch.isfinite(p).all()) for p in weights_of(resumed))
    assert resumed.progress.data_step == len(done.data.used)
    assert resumed.progress.rollbacks_next == 1


def test_without_a_checkpoint_from_before_it_is_told_once_and_nothing_is_touched(tmp_path: Path) -> None:
    for root in (None, tmp_path):
        done = run(root, PLAIN, "trainer.checkpoint.every_steps=0", is_rotten=lambda p: p >= 52)
        assert len(done.spikes()) == 1
        assert "no sound checkpoint" in done.spikes()[0].text
        assert (done.loop.progress.step, done.loop.progress.attempt) == (120, 0)


def test_checkpoints_that_cannot_be_used_are_not_read_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one means hashing all of it."""
    read_at: list[str] = []

    def damaged(folder: Path, _: Loop) -> None:
        read_at.append(folder.name)
        raise CheckpointError(f"{folder}: is damaged")

    monkeypatch.setattr(rollback, "read", damaged)
    done = run(tmp_path, PLAIN, "trainer.checkpoint.keep=1", is_rotten=lambda p: p >= 52)
    assert len(done.spikes()) == 1
    assert 1 <= len(read_at) <= 4  # newest and best, twice in 70 steps


def test_switched_off_it_does_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, PLAIN, "trainer.spikes.enabled=false", is_rotten=rotten_from_52_to_54)
    assert done.spikes() == []
    assert done.loop.progress.attempt == done.loop.progress.skipped_steps == 0


def test_a_jump_on_probation_is_the_guards_business(tmp_path: Path) -> None:
    """All batches of a probation are poison: the jump is refused, and there is no spike left to answer."""
    base_steps: list[int] = []

    def once(observation: Observation) -> PhaseDecision | None:
        if observation.step < 60 or base_steps:
            return None
        base_steps.append(observation.step)
        return proposal(observation, drift=0.1)

    poison: list[bool] = []

    def during_probation(position: int) -> bool:
        rotten = bool(base_steps) and len(poison) < 6  # TINY's probation
        poison.extend([True] * rotten)
        return rotten

    done = run(tmp_path, answer=once, is_rotten=during_probation)
    on_probation = [o for o in done.links.of(Observation) if o.phase is Phase.CORRECT]
    assert [math.isfinite(o.features[0]) for o in on_probation].count(False) >= 5
    assert done.spikes() == []
    assert done.loop.progress.skipped_steps == 0


def test_a_checkpoint_of_weights_that_are_not_finite_is_passed_over(tmp_path: Path) -> None:
    def save_rotten_weights(loop: Loop) -> None:
        if loop.progress.step == 45 and loop.progress.attempt == 0:
            first = next(iter(loop.task.model.parameters()))
            kept = first.detach().clone()
            with torch.no_grad():
                first.fill_(math.nan)
                saver.save(loop)
                first.copy_(kept)

    saver = Housekeeping(lambda _: None, Checkpoints(tmp_path, keep=9, on_failure=pytest.fail))
    done = run(
        tmp_path,
        PLAIN,
        "trainer.checkpoint.every_steps=40",
        after_step=save_rotten_weights,
        is_rotten=rotten_from_52_to_54,
    )
    assert "back to step-00000040.gen-1" in done.spikes()[0].text


def test_a_loss_that_is_not_finite_pushes_no_good_checkpoint_out(tmp_path: Path) -> None:
    done = run(
        tmp_path, PLAIN, "trainer.spikes.enabled=false", "trainer.checkpoint.every_steps=5",
        is_rotten=lambda p: p >= 52,
    )  # fmt: skip
    written = [w.step for w in done.links.of(CheckpointWritten)]
    assert written[-2:] == [51, 120]  # what the run ends with is kept, whatever it is


def test_a_healthy_run_is_looked_at_and_left_as_it_is(tmp_path: Path, monkeypatch) -> None:
    looks: list[int] = []
    look = SpikeWatch.look
    monkeypatch.setattr(
        SpikeWatch,
        "look",
        lambda self, loop, *, settle: (looks.append(loop.progress.step), look(self, loop, settle=settle))[1],
    )
    watched = run(tmp_path / "on", answer=jumpy)
    unwatched = run(tmp_path / "off", "trainer.spikes.enabled=false", answer=jumpy)
    assert max(b - a for a, b in zip([0, *looks], looks, strict=False)) <= 20
    assert watched.spikes() == []
    assert same_bits(weights_of(watched.loop), weights_of(unwatched.loop))


def test_the_process_ends_with_a_line_that_names_the_cure_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rotten_task(settings: TrainerSettings) -> Task:
        task = prepare_task(settings)
        return replace(task, train=Rotten(task.train, is_rotten=lambda p: p >= 52))

    monkeypatch.setattr(node, "prepare_task", rotten_task)
    settings = tiny_settings(*LONG_RUN, PLAIN, "trainer.spikes.max_rollbacks=1")
    job = TrainerJob(
        run=RunFolder(tmp_path / "run"), settings=settings, redis_url=f"memory://{tmp_path.name}"
    )
    with pytest.raises(UserError, match=r"lower trainer\.optimizer\.rate"):
        run_trainer(job, threading.Event())
    assert json.loads(job.run.summary.read_text())["status"] == "stopped"
    monkeypatch.undo()
    sound = TrainerJob(run=job.run, settings=settings, redis_url=job.redis_url, resume=True)
    assert run_trainer(sound, threading.Event()) == 0
    assert json.loads(job.run.summary.read_text())["real_steps"] == 120
