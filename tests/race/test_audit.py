"""The road not taken: looking down it changes nothing, and what is seen there is counted right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from common.messages import (
    DIRECTIONS,
    Controls,
    Forecast,
    Message,
    Observation,
    Outcome,
    Phase,
    PhaseDecision,
    Verdict,
)
from tests.trainer.tiny import ScriptedLinks, same_bits, tiny_loop, tiny_settings, weights_of
from trainer_node.loop import Loop
from trainer_node.race.anatomy import candidate, change_of
from trainer_node.race.audit import AUDIT_SCHEMA, Auditor, audit_run, audit_task
from trainer_node.race.audit_table import (
    audit_lines,
    verdict_counts,
)
from trainer_node.race.twin import Crossroads, nothing
from trainer_node.snapshot import optimizer_tensors

DRIFT = DIRECTIONS.index("drift")
UNGUARDED = "trainer.verify.tolerance=100"
STRICT = "trainer.verify.tolerance=0"
WIDE = "trainer.verify.ruin_share=1.0"
SHORT = "trainer.probation_steps=2"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Proposer(ScriptedLinks):
    """Jumps by `gain` windows along the drift at every decision point from `first` on."""

    def __init__(self, gain: float, *, first: int = 20, last: int = 10_000) -> None:
        super().__init__(answer=self._propose)
        self._gain, self._first, self._last = gain, first, last

    def _propose(self, seen: Observation) -> PhaseDecision | None:
        if not self._first <= seen.step <= self._last or seen.decision_point is None:
            return None
        groups = len(seen.decision_point.parameter_norms)
        row = [0.0] * len(DIRECTIONS)
        row[DRIFT] = self._gain
        return PhaseDecision(
            decision_id=f"{seen.step}.{seen.attempt}",
            phase=Phase.PREDICT,
            horizon_steps=5,
            num_groups=groups,
            num_directions=len(DIRECTIONS),
            coefficients=tuple(row) * groups,
            controls=Controls(),
            forecast=Forecast(loss=1.0, loss_without=1.0, spread=0.1, refusal=0.25),
            base_generation=1,
            base_step=seen.step,
            base_attempt=seen.attempt,
            base_fingerprint=seen.decision_point.fingerprint,
            valid_until_step=seen.step,
            reason="test",
        )


def audited(gain: float, *overrides: str, last: int = 10_000) -> tuple[Auditor, Loop, Proposer]:
    proposer = Proposer(gain, last=last)
    auditor = Auditor(proposer, seed=0)
    loop = audit_run(tiny_settings(*overrides), auditor)
    return auditor, loop, proposer


def unaudited(gain: float, *overrides: str, last: int = 10_000) -> tuple[Loop, Proposer]:
    proposer = Proposer(gain, last=last)
    loop = tiny_loop(proposer, tiny_settings(*overrides))
    loop.run()
    return loop, proposer


EVERY_KIND = {
    "kept": (0.5, (UNGUARDED,)),
    "refused": (-4.0, (STRICT, WIDE, SHORT)),
    "ruined": (-3000.0, ()),
    "muon": (0.5, ("trainer.optimizer.name=muon", UNGUARDED)),
    "bf16": (0.5, ("trainer.basis.dtype=bf16", UNGUARDED)),
    "growing average": (0.5, ("trainer.basis.average_share=0.5", "trainer.basis.history_snapshots=3")),
}


SLOW = ("muon", "bf16", "growing average")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in EVERY_KIND]
)
def test_an_audited_run_ends_bit_for_bit_as_an_unaudited_one(name: str) -> None:
    gain, overrides = EVERY_KIND[name]
    auditor, loop, proposer = audited(gain, *overrides, last=35)
    plain, told = unaudited(gain, *overrides, last=35)
    expected = name if name in ("refused", "ruined") else "accepted"
    assert {jump.verdict for jump in auditor.jumps} == {expected}
    assert same_bits(weights_of(loop), weights_of(plain))
    assert same_bits(optimizer_tensors(loop.optimizers), optimizer_tensors(plain.optimizers))
    assert loop.basis is not None
    assert plain.basis is not None
    assert same_bits(loop.basis.tensors().values(), plain.basis.tensors().values())
    assert told_apart_from_time(proposer.said) == told_apart_from_time(told.said)


def told_apart_from_time(said: list[Message]) -> list[str]:
    """In lockstep equal runs say equal things. As text, because NaN is not equal to itself."""
    return [repr(message) for message in said if isinstance(message, (Observation, Outcome))]


def test_the_twin_takes_the_steps_that_the_run_then_takes() -> None:
    """Not merely something repeatable: the loop's own next steps, to the bit."""
    seen: dict[str, torch.Tensor] = {}

    class Looker(ScriptedLinks):
        loop: Loop

        def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> None:
            if step == 20:
                with Crossroads(self.loop) as here:
                    road = here.road(nothing, [0, 40])
                    seen["weights"], seen["held_out"] = road[40].weights_Gm, road[40].held_out

    links = Looker()
    loop = links.loop = tiny_loop(links, tiny_settings())
    loop.run()
    assert loop.progress.step == 60
    assert loop.basis is not None
    assert torch.equal(loop.basis.sampled(loop.basis.parameters), seen["weights"])
    with Crossroads(loop) as here:
        assert here.road(nothing, [0])[0].held_out == seen["held_out"]


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_under_controls_the_twin_takes_the_steps_that_the_run_then_takes_up_to_its_end(factor: float) -> None:
    seen: dict[str, object] = {}

    class Looker(ScriptedLinks):
        loop: Loop

        def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> None:
            if not seen:
                self.loop.progress.controls = Controls(rate_factor=0.5, batch_factor=factor)
                with Crossroads(self.loop) as here:
                    last = here.steps_left
                    seen["steps"] = step + last
                    seen["weights"] = here.road(nothing, [0, last])[last].weights_Gm

    links = Looker()
    loop = links.loop = tiny_loop(
        links, tiny_settings("trainer.controls.rate=true", "trainer.controls.batch=true")
    )
    loop.run()
    assert loop.progress.step == seen["steps"] != 60
    assert loop.basis is not None
    assert torch.equal(loop.basis.sampled(loop.basis.parameters), seen["weights"])  # type: ignore[arg-type]


def test_a_road_does_not_depend_on_the_roads_taken_before_it() -> None:
    """Rates too are put back: a step along the momentum is one at the present rate."""
    found: list[float] = []

    class Looker(ScriptedLinks):
        loop: Loop

        def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> None:
            if step == 50:
                jump = change_of(self.loop, candidate("momentum", 5.0, "5 steps"), number=0)
                with Crossroads(self.loop) as here:
                    stops = ([0], [0, 10], [0, 3], [0])
                    found.extend(here.road(jump, stop)[0].held_out for stop in stops)

    links = Looker()
    links.loop = tiny_loop(links, tiny_settings())
    links.loop.run()
    assert found == [found[0]] * 4


def test_a_planted_bad_jump_that_an_indulgent_guard_keeps_is_a_false_accept() -> None:
    auditor, _, proposer = audited(-2.0, UNGUARDED, WIDE, last=20)
    assert [outcome.verdict for outcome in applied(proposer)] == [Verdict.ACCEPTED]
    (jump,) = auditor.jumps
    assert jump.gain_judged < 0
    counts = verdict_counts(auditor.jumps)
    assert (counts["kept"], counts["false_accepts"]) == (1, int(jump.gain_later < 0)) == (1, 1)


def test_a_refused_and_a_ruined_bad_jump_are_right_refusals() -> None:
    refused, _, told = audited(-4.0, STRICT, WIDE, SHORT, last=20)
    assert [outcome.verdict for outcome in applied(told)] == [Verdict.REFUSED]
    ruined, _, told = audited(-3000.0, last=20)
    assert [outcome.verdict for outcome in applied(told)] == [Verdict.RUINED]
    assert math.isnan(ruined.jumps[0].gain_judged)
    counts = verdict_counts(refused.jumps + ruined.jumps)
    assert (counts["refused"], counts["ruined"], counts["false_refusals"]) == (1, 1, 0)
    assert refused.jumps[0].gain_later < 0
    assert ruined.jumps[0].gain_later < 0


def applied(proposer: Proposer) -> list[Outcome]:
    return [outcome for outcome in proposer.of(Outcome) if outcome.horizon_steps > 0]


def test_the_cosine_is_of_the_delta_with_the_real_steps() -> None:
    """Early on a step along the drift goes the way of training, its reverse the other way."""
    there, back = audited(0.5, UNGUARDED, last=20)[0], audited(-0.5, UNGUARDED, last=20)[0]
    assert there.jumps[0].cosine > 0
    assert back.jumps[0].cosine == pytest.approx(-there.jumps[0].cosine, abs=1e-5)


def test_the_guards_forecast_is_held_against_the_twins_guard_loss() -> None:
    auditor, _, proposer = audited(0.5, UNGUARDED, last=20)
    (jump,), (outcome,) = auditor.jumps, applied(proposer)
    assert (jump.guard_forecast, jump.guard_spread) == (outcome.loss_forecast, outcome.loss_spread)
    # The twin's guard loss is that of a run that never jumped, at the step of the judgement.
    assert jump.guard_twin == guard_loss_at(jump.step + outcome.probation_steps)


def guard_loss_at(step: int) -> float:
    class Looker(ScriptedLinks):
        loop: Loop
        found = math.nan

        def emit(self, message: Message) -> None:
            if isinstance(message, Observation) and message.step == step:
                self.found = self.loop.guard_loss()
            super().emit(message)

    links = Looker()
    links.loop = tiny_loop(links, tiny_settings())
    links.loop.run()
    return links.found


def test_what_an_audit_writes_is_what_it_says(tmp_path: Path) -> None:
    lines = list(
        audit_task(
            tiny_settings(UNGUARDED),
            tmp_path / "out",
            seeds=(3, 4),
            task="tiny",
            command="trainer-node race tiny --audit",
            candidates=[candidate("drift", 1.0, "1 window")],
            make_predictor=lambda: Proposer(0.5),
        )
    )
    values = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert (values["schema"], values["task"], values["seeds"]) == (AUDIT_SCHEMA, "tiny", [3, 4])
    assert values["command"] == "trainer-node race tiny --audit"
    assert {jump["seed"] for jump in values["jumps"]} == {3, 4}
    assert values["verdicts"]["kept"] == len(values["jumps"])
    assert [row["point"] for row in values["anatomy"]][-1] == "end"
    assert {row["n"] for row in values["anatomy"]} == {2}
    assert set(values["anatomy"][0]) >= {"direction", "size", "now", "plus20", "plus50", "plus200"}
    table = (tmp_path / "out" / "audit.txt").read_text().splitlines()
    assert table == audit_lines(values) == lines[-len(table) :]
