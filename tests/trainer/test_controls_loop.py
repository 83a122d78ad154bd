"""Laws of controls in the loop: off and refused ones leave no trace, kept ones are applied exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from common import sealed_folder
from common.errors import CheckpointError, SettingsError
from common.features import INDEX
from common.messages import Alert, Controls, Observation, Outcome, Phase, PhaseDecision, Verdict
from common.schedule import rate_factor
from tests.trainer import own
from tests.trainer.test_controls import ALL_ON
from tests.trainer.test_loop import plain_weights, proposal
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node import checkpoint, cycle, jump, real_step
from trainer_node.checkpoint import Checkpoints
from trainer_node.data import Batch
from trainer_node.first_weights import FirstWeights
from trainer_node.housekeeping import Housekeeping
from trainer_node.links import RecordedDecisions
from trainer_node.loop import Loop
from trainer_node.read_out import weights_that_count
from trainer_node.snapshot import optimizer_tensors

DROPOUT = "trainer.model.dropout=0.1"  # a step draws random numbers
FIRST, SECOND, THIRD = 14, 26, 38  # decision points while every proposal goes on probation


def of_controls(observation: Observation, controls: Controls) -> PhaseDecision:
    """A proposal that moves no weight."""
    moved = proposal(observation)
    return replace(moved, horizon_steps=0, coefficients=(), controls=controls)


def script(wanted: Mapping[int, Controls]) -> Callable[[Observation], PhaseDecision | None]:
    """By the real step at which they are asked for."""
    return lambda o: of_controls(o, wanted[o.step]) if o.step in wanted else None


@dataclass
class Noted:
    """Training data that note which micro-batches were made."""

    batches: object
    used: list[int] = field(default_factory=list)

    def batch(self, position: int) -> Batch:
        self.used.append(position)
        return self.batches.batch(position)

    def __getattr__(self, name: str) -> object:
        return getattr(self.batches, name)


def looped(answer, *overrides: str, on: tuple[str, ...] = ALL_ON, **options) -> tuple[Loop, ScriptedLinks]:
    links = ScriptedLinks(answer=answer)
    loop = tiny_loop(links, tiny_settings(*on, *overrides), **options)
    object.__setattr__(loop.task, "train", Noted(loop.task.train))
    return loop, links


def run(answer, *overrides: str, **options) -> tuple[Loop, ScriptedLinks]:
    loop, links = looped(answer, *overrides, **options)
    loop.run()
    return loop, links


@cache
def undisturbed() -> list[torch.Tensor]:
    """Weights of a run with all switches on that nobody proposes anything to."""
    return weights_of(run(lambda _: None)[0])


@pytest.fixture(autouse=True)
def saves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint waits for the run to learn something (test_first_weights.py)."""
    monkeypatch.setattr(FirstWeights, "may_help", lambda *_: False)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is taken in halves for the noise scale: that is the same step up to rounding only."""
    monkeypatch.setattr(real_step, "is_measured", lambda _: False, raising=False)


def all_bits(loop: Loop) -> list[torch.Tensor]:
    return [*weights_of(loop), *[t.clone() for t in optimizer_tensors(loop.optimizers)]]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Verdict], None]:
    """Every trial ends so, at once. (Beside a twin: test_control_twin.py.)"""

    def judged(verdict: Verdict) -> None:
        monkeypatch.setattr(jump, "judge", lambda **_: verdict)
        monkeypatch.setattr(cycle, "has_twin", lambda _: False)

    return judged


def verdicts(links: ScriptedLinks) -> list[Verdict]:
    return [o.verdict for o in links.of(Outcome) if o.verdict is not Verdict.MISSING]


CHANGES = {
    "rate": Controls(rate_factor=2.0),
    "batch": Controls(batch_factor=2.0),
    "small batch": Controls(batch_factor=0.5),
    "decay": Controls(decay_start=40, decay_steps=10),
    "read_out": Controls(read_out="average"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_with_all_switches_off_controls_are_refused_and_leave_no_trace(name: str) -> None:
    change = CHANGES[name]
    answers = iter([lambda o: of_controls(o, change), lambda o: replace(proposal(o), controls=change)] * 20)
    loop, links = run(lambda o: next(answers)(o), on=("predictor.policy=fixed",))
    assert {o.verdict for o in links.of(Outcome)} == {Verdict.MALFORMED}
    assert same_bits(weights_of(loop), plain_weights())
    assert loop.progress.controls == Controls()
    told = {alert.text for alert in links.of(Alert)}
    assert len(told) == 1
    assert "is off" in told.pop()


@pytest.mark.usefixtures("unmeasured")
def test_switches_alone_change_no_bit() -> None:
    loop, _ = run(lambda _: None)
    assert same_bits(weights_of(loop), plain_weights())
    assert loop.task.train.used == list(range(60))


@pytest.mark.usefixtures("unmeasured")
def test_neutral_controls_change_no_bit_of_a_jump() -> None:
    left, left_links = run(lambda o: replace(proposal(o, 0.3), controls=Controls()))
    right, right_links = run(lambda o: replace(proposal(o, 0.3), controls=None), on=())
    assert Verdict.ACCEPTED in verdicts(left_links)
    assert same_bits(all_bits(left), all_bits(right))
    assert repr(left_links.of(Outcome)) == repr(right_links.of(Outcome))


def test_controls_as_they_stand_are_no_proposal() -> None:
    _, links = run(lambda o: of_controls(o, Controls()))
    assert {o.verdict for o in links.of(Outcome)} == {Verdict.MALFORMED}


SPOILT = {
    "with coefficients": {"coefficients": (0.5, 0.0, 0.0, 0.0)},
    "with a forecaster": {"forecaster": b"phi"},
    "no controls": {"controls": None},
    "out of bounds": {"controls": Controls(rate_factor=1e9)},
    "no number": {"controls": Controls(batch_factor=math.nan)},
    "no chunks": {"chunks": 0},
    "too late to be judged": {"controls": Controls(decay_start=FIRST, decay_steps=5)},
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_proposal_of_controls_changes_nothing(name: str) -> None:
    loop, links = run(lambda o: replace(of_controls(o, Controls(rate_factor=0.5)), **SPOILT[name]))
    assert verdicts(links)[0] is Verdict.MALFORMED
    assert set(verdicts(links)) == {Verdict.MALFORMED}
    assert loop.progress.controls == Controls()
    assert same_bits(weights_of(loop), undisturbed())


def test_rest_never_changes_controls() -> None:
    resting = Controls(rate_factor=2.0)
    loop, links = run(lambda o: replace(of_controls(o, resting), phase=Phase.FULL))
    assert {o.verdict for o in links.of(Outcome)} == {Verdict.REST}
    assert same_bits(weights_of(loop), undisturbed())


def test_a_veto_holds_for_controls_too() -> None:
    loop, links = looped(lambda o: of_controls(o, Controls(rate_factor=0.5)))
    links.reason = "memory"
    loop.run()
    assert Verdict.VETOED in verdicts(links)
    assert same_bits(weights_of(loop), undisturbed())


@pytest.mark.parametrize("name", [*CHANGES, "all"])
def test_refused_controls_leave_no_bit_behind(name: str, judged, tmp_path: Path) -> None:
    """Weights, moments, averages, data, random state and controls: at once, and at the end of the run."""
    judged(Verdict.REFUSED)
    all_of_them = Controls(
        rate_factor=0.5, batch_factor=0.5, decay_start=45, decay_steps=5, read_out="average"
    )
    wanted = CHANGES.get(name, all_of_them)
    plain, _ = run(lambda _: None, DROPOUT)
    random_of_plain = torch.get_rng_state()
    seen: list[tuple[list[torch.Tensor], str, torch.Tensor]] = []

    def state(loop: Loop) -> tuple[list[torch.Tensor], str, torch.Tensor]:
        progress = loop.progress.to_json()
        kept = {key: progress[key] for key in ("step", "controls", "extra_steps", "extra_data_steps")}
        return [*all_bits(loop), *loop.basis.tensors().values()], json.dumps(kept), torch.get_rng_state()

    def ask(observation: Observation) -> PhaseDecision | None:
        if observation.step not in (FIRST, SECOND) or observation.attempt > 1:
            return None
        seen.append(state(loop))
        return of_controls(observation, wanted)

    loop, _ = looped(ask, DROPOUT, folder=tmp_path)
    emit = loop.emit

    def listen(message: object) -> None:
        emit(message)  # type: ignore[arg-type]
        if isinstance(message, Outcome) and message.verdict is Verdict.REFUSED:
            assert message.lost_steps == 6
            before, after = seen.pop(), state(loop)
            assert same_bits(before[0], after[0])
            assert before[1] == after[1]
            assert torch.equal(before[2], after[2])
            seen_outcomes.append(message)

    seen_outcomes: list[Outcome] = []
    loop.emit = listen
    loop.run()
    assert len(seen_outcomes) == 2
    assert same_bits(all_bits(plain), all_bits(loop))
    assert torch.equal(torch.get_rng_state(), random_of_plain)


def test_a_stop_on_probation_sets_the_controls_back(judged) -> None:
    judged(Verdict.ACCEPTED)
    loop, links = looped(script({FIRST: Controls(rate_factor=2.0)}))
    note_step = loop.note_step

    def stop_soon(taken):
        loop.stop_requested = loop.progress.step == FIRST + 2
        return note_step(taken)

    loop.note_step = stop_soon
    loop.run()
    assert verdicts(links) == [Verdict.ABORTED]
    assert (loop.progress.step, loop.progress.controls) == (FIRST, Controls())


def test_a_larger_batch_and_back_uses_every_item_once_and_ends_with_the_same_tokens(judged) -> None:
    judged(Verdict.ACCEPTED)
    plan = {FIRST: Controls(batch_factor=2.0), SECOND: Controls()}
    loop, links = run(script(plan))
    assert verdicts(links) == [Verdict.ACCEPTED] * 2
    assert loop.task.train.used == list(range(60))
    assert (loop.progress.clock, loop.progress.data_step) == (60, 60)
    assert loop.progress.step == 60 - 12  # twelve steps were twice as large
    assert len(links.of(Observation)) == loop.progress.step


def test_what_is_told_of_a_step_is_what_was_done(judged) -> None:
    judged(Verdict.ACCEPTED)
    wanted = {FIRST: Controls(rate_factor=0.5), SECOND: Controls(rate_factor=0.5, batch_factor=2.0)}
    loop, links = run(script(wanted))
    settings, clock = loop.settings, 0.0
    for observation in links.of(Observation):
        values = {name: observation.features[index] for name, index in INDEX.items()}
        factor = 1.0 if observation.step <= SECOND else 2.0
        rate = 1.0 if observation.step <= FIRST else 0.5
        scheduled = rate_factor(clock, 60, settings.schedule)
        expected = scheduled * rate * math.sqrt(factor) * settings.optimizer.rate
        assert values["rate"] == pytest.approx(expected)
        clock += factor
        assert values["log2_rate_factor"] == math.log2(rate)
        assert values["log2_batch_factor"] == math.log2(factor)
        assert values["context_share"] == 1.0
        assert values["micro_batches"] == factor
        assert 10 ** values["log10_units_per_step"] == pytest.approx(16 * factor)
        assert values["progress"] == pytest.approx(clock / 60)
    assert clock == 60


def test_a_small_batch_takes_more_real_steps_and_the_last_one_takes_what_is_left(judged) -> None:
    judged(Verdict.ACCEPTED)
    wide = "trainer.controls.batch_change=4"
    loop, _ = run(script({FIRST: Controls(batch_factor=0.25)}), "trainer.steps=20", wide)
    assert (loop.progress.clock, loop.progress.step) == (20, FIRST + 4 * 6)
    wanted = {FIRST: Controls(batch_factor=0.25), SECOND: Controls(batch_factor=1.0)}
    loop, _ = run(script(wanted), "trainer.steps=24", wide)
    assert (loop.progress.clock, loop.progress.step) == (24, SECOND + 7)
    assert loop.task.train.used[-1] == 23


def test_a_chosen_tail_ends_the_run_at_its_end(judged) -> None:
    judged(Verdict.ACCEPTED)
    loop, links = run(script({FIRST: Controls(decay_start=30, decay_steps=10)}))
    assert (loop.progress.step, loop.is_over) == (40, True)
    last = links.of(Observation)[-1]
    assert last.step == 40
    assert last.features[INDEX["rate_over_peak"]] == pytest.approx(loop.settings.schedule.final_share)
    assert last.features[INDEX["progress"]] == 1.0


def test_a_jump_may_bring_controls_with_it(judged) -> None:
    judged(Verdict.ACCEPTED)

    def both(observation: Observation) -> PhaseDecision | None:
        decision = replace(proposal(observation, 0.2), controls=Controls(rate_factor=0.5))
        return decision if observation.step == FIRST else None

    loop, links = run(both)
    outcome = next(o for o in links.of(Outcome) if o.verdict is Verdict.ACCEPTED)
    assert (outcome.horizon_steps, outcome.delta_norm > 0) == (5, True)
    assert loop.progress.controls == Controls(rate_factor=0.5)
    alone, _ = run(lambda o: replace(proposal(o, 0.2), controls=None) if o.step == FIRST else None)
    assert not same_bits(weights_of(loop), weights_of(alone))


def test_what_a_ruinous_jump_brought_is_not_in_force() -> None:
    def both(observation: Observation) -> PhaseDecision | None:
        decision = replace(proposal(observation, 1e6), controls=Controls(rate_factor=0.5))
        return decision if observation.step == FIRST else None

    loop, links = run(both)
    assert verdicts(links) == [Verdict.RUINED]
    assert loop.progress.controls == Controls()
    assert same_bits(weights_of(loop), undisturbed())


def test_without_the_guard_controls_simply_stay() -> None:
    loop, links = run(script({FIRST: Controls(rate_factor=0.25)}), "trainer.verify.enabled=false")
    assert verdicts(links) == [Verdict.ACCEPTED]
    assert loop.progress.controls == Controls(rate_factor=0.25)
    (outcome,) = [o for o in links.of(Outcome) if o.verdict is Verdict.ACCEPTED]
    assert (outcome.delta_norm, outcome.chunks_applied, outcome.passes) == (0.0, 0, 0.0)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_controls_are_judged_at_equal_data(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    horizons, of_guard = [], []
    forecast = jump.forecast_without_jump

    def noted(*arguments, horizon_steps, guard_horizon_steps, **named):
        horizons.append(horizon_steps)
        of_guard.append(guard_horizon_steps)
        return forecast(
            *arguments, horizon_steps=horizon_steps, guard_horizon_steps=guard_horizon_steps, **named
        )

    monkeypatch.setattr(jump, "forecast_without_jump", noted)
    run(
        script({FIRST: Controls(batch_factor=factor), SECOND: Controls(rate_factor=0.5, batch_factor=factor)})
    )
    assert horizons[0] == 6 * factor
    assert set(horizons[1:]) <= {6, 6 * factor}
    assert set(of_guard) == {6 * factor}  # both ask for this batch


def test_what_the_guard_learns_is_per_token_whatever_the_batch(judged) -> None:
    """At each judgement its record stands at the clock, and between two of them lie steps of data."""
    judged(Verdict.ACCEPTED)
    halves, doubles = Controls(batch_factor=0.5), Controls(batch_factor=2.0)
    loop, _ = looped(script({FIRST: halves, SECOND: doubles, THIRD: replace(doubles, rate_factor=0.5)}),
                         "trainer.controls.batch_change=4", "trainer.steps=90")  # fmt: skip
    emit, clocks = loop.emit, []

    def listen(message: object) -> None:
        emit(message)  # type: ignore[arg-type]
        if isinstance(message, Outcome) and message.verdict is Verdict.ACCEPTED:
            clocks.append(loop.progress.clock)
            assert loop.progress.guard.step == loop.progress.clock

    loop.emit = listen
    loop.run()
    assert clocks == [FIRST + 3, FIRST + 3 + 3 + 12, FIRST + 3 + 3 + 12 + 12 + 12]
    assert [steps for steps, _ in loop.progress.guard.changes] == [3, 12]


@pytest.fixture
def text_job(tmp_path: Path) -> tuple[str, ...]:
    """Settings of a very small GPT on a few files."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(20):
        lines = [f"def function_{i}_{j}(x):\n    return x + {j}\n" for j in range(20)]
        (folder / f"{i}.py").write_text("".join(lines))
    return (
        "trainer.task=language",
        f"trainer.data.path='{folder}'",
        f"trainer.data.cache_dir='{tmp_path / 'cache'}'",
        "trainer.data.validation_share=0.2",
        "trainer.model.layers=1",
        "trainer.model.width=16",
        "trainer.model.heads=2",
        "trainer.model.context_tokens=32",
        "trainer.model.vocabulary_size=300",
        "trainer.batch.sequences=4",
    )


@pytest.mark.usefixtures("unmeasured")
def test_shorter_windows_train_on_the_same_tokens_in_the_same_order(judged, text_job) -> None:
    judged(Verdict.ACCEPTED)
    shapes: list[tuple[int, ...]] = []
    tokens: list[torch.Tensor] = []

    def trained(answer) -> tuple[Loop, ScriptedLinks, torch.Tensor]:
        shapes.clear()
        tokens.clear()
        loop, links = looped(answer, *text_job)
        loss = loop.task.loss

        def noted(batch: Batch) -> torch.Tensor:
            if loop.task.model.training:
                shapes.append(tuple(batch.inputs.shape))
                tokens.append(torch.stack([batch.inputs.flatten(), batch.targets.flatten()]))
            return loss(batch)

        object.__setattr__(loop.task, "loss", noted)
        loop.run()
        return loop, links, torch.cat(tokens, dim=1)

    _, _, plain = trained(lambda _: None)
    wanted = {FIRST: Controls(context_tokens=16), SECOND: Controls(context_tokens=16, batch_factor=0.5)}
    loop, links, cut = trained(script(wanted))
    assert torch.equal(plain, cut)
    assert shapes[FIRST] == (8, 16)
    assert shapes[SECOND] == (4, 16)
    assert loop.progress.clock == 60
    last = links.of(Observation)[-1].features
    assert last[INDEX["context_share"]] == 0.5
    assert 10 ** last[INDEX["log10_context"]] == pytest.approx(16)
    assert 10 ** last[INDEX["log10_units_per_step"]] == pytest.approx(4 * 32 / 2)


def test_the_read_out_that_was_chosen_counts(judged) -> None:
    judged(Verdict.ACCEPTED)
    loop, _ = run(script({FIRST: Controls(read_out="average")}))
    losses = iter([2.0, 1.0])
    loop.guard_loss = lambda: next(losses)
    with weights_that_count(loop) as is_average:
        assert is_average
    loop, _ = run(script({FIRST: Controls(read_out="weights")}), "trainer.read_out=average")
    loop.guard_loss = lambda: pytest.fail("nothing is to be compared")
    with weights_that_count(loop) as is_average:
        assert not is_average


def test_smaller_pieces_by_order_of_the_monitor_hold_under_every_batch(judged) -> None:
    judged(Verdict.ACCEPTED)
    loop, _ = looped(script({FIRST: Controls(batch_factor=4.0), SECOND: Controls(batch_factor=2.0)}))
    loop.memory.halvings = 2
    sizes: list[int] = []
    loss = loop.task.loss

    def noted(batch: Batch) -> torch.Tensor:
        if loop.task.model.training:
            sizes.append(len(batch.inputs))
        return loss(batch)

    object.__setattr__(loop.task, "loss", noted)
    loop.run()
    assert set(sizes) == {4}
    assert len(sizes) * 4 == 60 * 16


def with_checkpoints(root: Path, *overrides: str, stop_at: int = 0, resume: Path | None = None) -> Loop:
    wanted = {
        FIRST: Controls(batch_factor=0.5),
        SECOND: Controls(batch_factor=0.5, rate_factor=2.0),
        THIRD: Controls(batch_factor=2.0 * 0.5, rate_factor=0.5, decay_start=38, decay_steps=14),
        50: Controls(batch_factor=2.0, rate_factor=0.5, decay_start=38, decay_steps=14),
    }
    checkpoints = Checkpoints(root, keep=99, on_failure=pytest.fail)

    def between(loop: Loop) -> None:
        housekeeping(loop)
        loop.stop_requested = 0 < stop_at <= loop.progress.step

    loop, links = looped(
        script(wanted), DROPOUT, "trainer.checkpoint.every_steps=5", *overrides, housekeeping=between
    )
    housekeeping = Housekeeping(links.emit, checkpoints)
    if resume is None:
        housekeeping.begin(loop)
    else:
        housekeeping.load(checkpoint.load(resume, loop))
    loop.run()
    checkpoints.close()
    return loop


def test_a_resume_under_controls_is_the_unbroken_run_to_the_last_bit(judged, tmp_path: Path) -> None:
    judged(Verdict.ACCEPTED)
    whole = with_checkpoints(tmp_path)
    random_of_whole = torch.get_rng_state()
    said = {o.step: repr(o) for o in whole.links.of(Observation)}
    assert len(set(said)) == whole.progress.step != whole.progress.clock
    folders = {sealed_folder.age_key(f.name)[1]: f for f in sealed_folder.folders(tmp_path)}
    middle = [step for step in sorted(folders) if FIRST + 6 <= step < whole.progress.step]
    assert len(middle) >= 3
    for step in middle[:: len(middle) // 3]:
        torch.rand(7)
        resumed = with_checkpoints(tmp_path / str(step), resume=folders[step])
        assert same_bits(all_bits(whole), all_bits(resumed))
        assert same_bits(whole.basis.tensors().values(), resumed.basis.tensors().values())
        assert torch.equal(torch.get_rng_state(), random_of_whole)
        assert repr(whole.progress) == repr(resumed.progress)
        again = {o.step: repr(o) for o in resumed.links.of(Observation)}
        assert min(again) == step + 1
        assert all(said[step] == text for step, text in again.items())


def test_a_checkpoint_of_senseless_controls_is_not_loaded(judged, tmp_path: Path) -> None:
    loop, _ = looped(lambda _: None)
    values = loop.progress.to_json()
    for spoilt in ({"batch_factor": 0.0}, {"rate_factor": "much"}, {"nonsense": 1.0}):
        checkpoints = Checkpoints(tmp_path, keep=9, on_failure=pytest.fail)
        loop.progress.to_json = lambda spoilt=spoilt: {**values, "controls": {**values["controls"], **spoilt}}
        checkpoints.save(loop, {}, emergency=False)
        checkpoints.close()
        fresh, _ = looped(lambda _: None)
        with pytest.raises(CheckpointError):
            checkpoint.load(sealed_folder.folders(tmp_path)[0], fresh)


def test_a_replay_of_recorded_decisions_is_the_same_run(tmp_path: Path) -> None:
    decisions: list[PhaseDecision] = []
    wanted = {FIRST: Controls(batch_factor=2.0), SECOND: Controls(batch_factor=2.0, rate_factor=0.5)}

    def record(observation: Observation) -> PhaseDecision | None:
        found = script(wanted)(observation)
        decisions.extend([found] if found else [])
        return found

    first, first_links = run(record, DROPOUT)
    assert verdicts(first_links)
    loop, links = looped(lambda _: None, DROPOUT, generation=3)
    loop.links = RecordedDecisions(decisions, generation=3)
    loop.run()
    assert repr(links.said) == repr(first_links.said)
    assert same_bits(all_bits(first), all_bits(loop))


def test_an_own_loop_says_at_once_that_it_has_no_controls(tmp_path: Path) -> None:
    model, optimizer = own.job()
    with pytest.raises(SettingsError, match="loop of your own"):
        own.in_process(model, optimizer, tmp_path, "trainer.controls.rate=true")
    assert list(tmp_path.iterdir()) == []
