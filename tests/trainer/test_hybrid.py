"""Laws of Hybrid, the three lines in other people's loops."""

# ruff: noqa: B023  closures over the loop variable are what people write here, and what is held apart

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import CheckpointError, UserError
from common.messages import Alert, Evaluation, Outcome, Verdict
from tests.trainer import own
from trainer_node.hybrid import Hybrid

STEPS = 120


def train(hybrid: Hybrid, model: nn.Module, data: object) -> list[float]:
    return [float(hybrid.step(lambda: own.loss_of(model, batch))) for batch in data]  # type: ignore[attr-defined]


def test_a_hybrid_that_tries_no_jump_is_the_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    plain = own.job()
    plain_losses = own.train_plain(*plain, own.batches(STEPS))
    watched = own.job()
    with own.in_process(*watched, tmp_path, *own.QUICK) as hybrid:
        losses = train(hybrid, watched[0], own.batches(STEPS))
    assert losses == plain_losses
    assert own.same(own.state_of(*watched), own.state_of(*plain))


def test_a_loop_that_owns_its_backward_pass_is_the_plain_loop_bit_for_bit(tmp_path: Path) -> None:
    plain = own.job()
    own.train_plain(*plain, own.batches(STEPS))
    model, optimizer = own.job()
    with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
        for batch in own.batches(STEPS):
            with hybrid.probe(hold=lambda: own.loss_of(model, batch)):
                optimizer.zero_grad()
                loss = own.loss_of(model, batch)
                loss.backward()
                optimizer.step()
                assert hybrid.after_step(loss)
        assert hybrid.loop is not None
        assert hybrid.loop.progress.step == STEPS
    assert own.same(own.state_of(model, optimizer), own.state_of(*plain))


def test_switched_off_it_is_the_plain_loop_and_writes_nothing(tmp_path: Path) -> None:
    plain = own.job()
    own.train_plain(*plain, own.batches(20))
    off = own.job()
    with own.in_process(*off, tmp_path, redis=None) as hybrid:
        train(hybrid, off[0], own.batches(20))
        with hybrid.probe():
            pass
        assert hybrid.state_dict() == {}
        hybrid.load_state_dict({})
        hybrid.rest()
    assert own.same(own.state_of(*off), own.state_of(*plain))
    assert list(tmp_path.iterdir()) == []


def test_jumps_move_the_weights_and_are_judged(tmp_path: Path) -> None:
    plain = own.job()
    own.train_plain(*plain, own.batches(STEPS))
    jumped = own.job()
    with own.in_process(*jumped, tmp_path, *own.FIXED) as hybrid:
        said = own.heard(hybrid)
        train(hybrid, jumped[0], own.batches(STEPS))
    kept = [m for m in said if isinstance(m, Outcome) and m.verdict is Verdict.ACCEPTED]
    assert kept
    assert all(outcome.delta_norm > 0.0 for outcome in kept)
    assert not own.same(own.state_of(*jumped), own.state_of(*plain))


@pytest.mark.parametrize(("factor", "verdict"), [(1e9, Verdict.RUINED), (-12.0, Verdict.REFUSED)])
def test_a_refused_jump_leaves_weights_moments_and_statistics_bit_identical(
    tmp_path: Path, factor: float, verdict: Verdict
) -> None:
    model, optimizer = own.job()
    before: dict[int, list[torch.Tensor]] = {}  # by the loop's count of kept steps
    restored: list[tuple[Outcome, list[torch.Tensor]]] = []
    with own.in_process(model, optimizer, tmp_path, *own.FIXED) as hybrid:
        own.Tampering(hybrid, factor)
        assert hybrid.loop is not None
        tell = hybrid.loop.emit

        def hear(message: object) -> None:
            if isinstance(message, Outcome):
                restored.append((message, own.state_of(model, optimizer)))
            tell(message)  # type: ignore[arg-type]

        hybrid.loop.emit = hear
        for batch in own.batches(STEPS):
            hybrid.step(lambda: own.loss_of(model, batch))
            before.setdefault(hybrid.loop.progress.step, own.state_of(model, optimizer))
    judged = [pair for pair in restored if pair[0].verdict is verdict]
    assert judged
    for outcome, state in judged[:1]:  # the first: later ones start from steps that were taken twice
        assert own.same(state, before[outcome.base_step])


def test_a_refusal_takes_neither_the_rate_nor_the_random_state_back(tmp_path: Path) -> None:
    model, optimizer = own.job()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    with own.in_process(model, optimizer, tmp_path, *own.FIXED) as hybrid:
        own.Tampering(hybrid, -12.0)
        said = own.heard(hybrid)
        seen = set()
        for batch in own.batches(STEPS):
            hybrid.step(lambda: own.loss_of(model, batch))
            schedule.step()
            seen.add(torch.get_rng_state().numpy().tobytes())
    assert any(isinstance(m, Outcome) and m.lost_steps for m in said)
    assert len(seen) == STEPS
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.99**STEPS)


def test_looking_at_held_batches_changes_no_mode_statistic_or_random_state(tmp_path: Path) -> None:
    model, optimizer = own.job()
    model[1].eval()  # somebody's frozen batch norm in a model that trains
    with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
        train(hybrid, model, own.batches(2))
        modes = [module.training for module in model.modules()]
        state, random = own.state_of(model, optimizer), torch.get_rng_state()
        assert hybrid.loop is not None
        first = hybrid.loop.guard_loss()
        assert hybrid.loop.guard_loss() == first
        assert [module.training for module in model.modules()] == modes
        assert own.same(own.state_of(model, optimizer), state)
        assert torch.equal(torch.get_rng_state(), random)


def test_without_a_guard_no_jump_is_tried_and_it_is_said_once(tmp_path: Path) -> None:
    model, optimizer = own.job()
    with own.in_process(model, optimizer, tmp_path, *own.FIXED) as hybrid:
        said = own.heard(hybrid)
        for batch in own.batches(STEPS):
            with hybrid.probe():
                optimizer.zero_grad()
                loss = own.loss_of(model, batch)
                loss.backward()
                optimizer.step()
                hybrid.after_step(loss)
    assert [m.kind for m in said if isinstance(m, Alert)] == ["no_guard"]
    assert {m.verdict for m in said if isinstance(m, Outcome)} == {Verdict.MISSING}


def test_leaving_takes_every_hook_back(tmp_path: Path) -> None:
    model, optimizer = own.job()
    marks = [dict(vars(model)), dict(vars(optimizer))]
    hooks = [key for key in vars(optimizer) if "hooks" in key]
    with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
        train(hybrid, model, own.batches(30))
        assert any(getattr(optimizer, key) for key in hooks)
    hybrid.close()  # again: nothing to do
    assert not any(getattr(optimizer, key) for key in hooks)
    assert set(vars(model)) == set(marks[0])
    assert {*vars(optimizer)} - {*marks[1]} <= {"_opt_called"}


def test_an_update_that_did_not_happen_is_no_step(tmp_path: Path) -> None:
    model, optimizer = own.job()
    with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
        counted = []
        for number, batch in enumerate(own.batches(20)):
            with hybrid.probe(hold=lambda: own.loss_of(model, batch)):
                loss = own.loss_of(model, batch)
                (loss / 2).backward()
                if number % 2:  # the second of two micro-batches
                    optimizer.step()
                    optimizer.zero_grad()
                counted.append(hybrid.after_step(loss))
        assert counted == [False, True] * 10
        assert hybrid.loop is not None
        assert hybrid.loop.progress.step == 10


@pytest.mark.parametrize("kept_after", [40, 53], ids=["at rest", "on probation"])
def test_a_resumed_loop_is_the_unbroken_one_bit_for_bit(tmp_path: Path, kept_after: int) -> None:
    def run(folder: Path, *, is_broken: bool) -> list[torch.Tensor]:
        model, optimizer = own.job()
        hybrid = own.in_process(model, optimizer, folder, *own.FIXED, run_id="mine")
        for count, batch in enumerate(own.batches(STEPS), start=1):
            hybrid.step(lambda held: own.loss_of(model, held), batch)
            if count == kept_after:
                hybrid.rest()
                whole = {
                    "hybrid": hybrid.state_dict(),
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": torch.get_rng_state(),
                }
                if is_broken:
                    torch.save(whole, folder / "state.pt")
                    break
        hybrid.close()
        if not is_broken:
            return own.state_of(model, optimizer)
        model, optimizer = own.job()
        saved = torch.load(folder / "state.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        with own.in_process(model, optimizer, folder, *own.FIXED, run_id="mine") as hybrid:
            hybrid.load_state_dict(saved["hybrid"])
            torch.set_rng_state(saved["random"])
            for batch in own.batches(STEPS, skip=kept_after):
                hybrid.step(lambda held: own.loss_of(model, held), batch)
        return own.state_of(model, optimizer)

    assert own.same(run(tmp_path / "a", is_broken=True), run(tmp_path / "b", is_broken=False))


def test_a_state_on_probation_is_refused_and_rest_cures_it(tmp_path: Path) -> None:
    model, optimizer = own.job()
    with own.in_process(model, optimizer, tmp_path, *own.FIXED) as hybrid:
        for batch in own.batches(STEPS):
            hybrid.step(lambda: own.loss_of(model, batch))
            assert hybrid.loop is not None
            if not hybrid.loop.is_calm:
                break
        with pytest.raises(UserError, match=r"call hybrid\.rest\(\)"):
            hybrid.state_dict()
        hybrid.rest()
        assert hybrid.state_dict()["version"] == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {**state, "version": 9},
        lambda state: {**state, "weights": "0" * 16},
        lambda state: {key: value for key, value in state.items() if key != "progress"},
        lambda state: {**state, "progress": {"step": "many"}},
        lambda state: {**state, "basis": {**state["basis"], "former": torch.zeros(1)}},
        lambda state: {**state, "name": "../../elsewhere"},
    ],
    ids=["version", "other weights", "missing", "senseless", "other shape", "path"],
)
def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path: Path, damage: object) -> None:
    model, optimizer = own.job()
    with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
        train(hybrid, model, own.batches(20))
        hybrid.rest()
        state = hybrid.state_dict()
    with own.in_process(model, optimizer, tmp_path / "next", *own.QUICK) as hybrid:
        assert hybrid.loop is not None
        fresh = hybrid.loop.progress.to_json()
        with pytest.raises(CheckpointError):
            hybrid.load_state_dict(damage(state))  # type: ignore[operator]
        assert hybrid.loop.progress.to_json() == fresh


def test_state_comes_before_the_first_step(tmp_path: Path) -> None:
    model, optimizer = own.job()
    with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
        train(hybrid, model, own.batches(3))
        with pytest.raises(UserError, match="before the first step"):
            hybrid.load_state_dict(hybrid.state_dict())


def test_held_out_losses_are_told_and_never_teach(tmp_path: Path) -> None:
    model, optimizer = own.job()
    with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
        said = own.heard(hybrid)
        hybrid.note_evaluation(3.0)  # before the run has begun: there is nobody to tell
        train(hybrid, model, own.batches(5))
        hybrid._on.emit = said.append  # type: ignore[method-assign]
        hybrid.note_evaluation(1.5, accuracy=0.5)
    evaluations = [m for m in said if isinstance(m, Evaluation)]
    assert [(e.step, e.loss, e.accuracy) for e in evaluations] == [(5, 1.5, 0.5)]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"steps": 0}, "number of optimizer steps"),
        ({"redis": "redis://127.0.0.1:1"}, "give run_id"),
        ({"run_id": "a b"}, "run id"),
        ({"settings": ("trainer.stepz=3",)}, "trainer.steps"),
        ({"redis": "http://x", "run_id": "a"}, "unknown scheme"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    tmp_path: Path, changed: dict[str, object], words: str
) -> None:
    model, optimizer = own.job()
    options = {"redis": "memory://", "runs_dir": tmp_path, "steps": 100, **changed}
    with pytest.raises(UserError, match=words) as caught:
        Hybrid(model, optimizer, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not any(getattr(optimizer, key) for key in vars(optimizer) if "hooks" in key)


def test_an_optimizer_of_another_model_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trains no parameter of this model"):
        Hybrid(own.job()[0], own.job()[1], runs_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_used_run_id_is_refused_unless_its_state_is_loaded(tmp_path: Path) -> None:
    for attempt in range(2):
        model, optimizer = own.job()
        hybrid = own.in_process(model, optimizer, tmp_path, *own.QUICK, run_id="mine")
        if attempt:
            with pytest.raises(UserError, match="holds a run already"):
                train(hybrid, model, own.batches(1))
        else:
            train(hybrid, model, own.batches(20))
        hybrid.close()


def test_two_of_one_second_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = set()
    for _ in range(3):
        model, optimizer = own.job()
        with own.in_process(model, optimizer, tmp_path, *own.QUICK) as hybrid:
            train(hybrid, model, own.batches(2))
            folders.add(hybrid.run_folder)
    assert len(folders) == 3
