"""The pilot through the predictor's front door: which controls it tries, when, and what that may cost."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common import codec
from common.bus import Entry, EntryId
from common.control_rules import NEUTRAL, is_beside_twin, trial_steps
from common.errors import CheckpointError
from common.messages import Controls, Message, Outcome, Phase, PhaseDecision, Verdict
from common.streams import DECISIONS, HISTORY
from predictor_node.control_arms import RATE_DOWN, RATE_UP
from predictor_node.inspect import words
from predictor_node.learned import LearnedPolicy
from predictor_node.node import Predictor
from predictor_node.pilot import MOST_RUIN_TRIALS, Pilot
from predictor_node.piloted import LONGEST_WINDOW_FACTOR, PilotedPolicy
from predictor_node.policies import policy_for
from predictor_node.replay import replay
from predictor_node.state import MemoryStore, facts_of, files_of
from tests.predictor.controlled_run import ALL_ON, ControlledTrainer, World, controlled_settings
from tests.predictor.scripted import Log, ScriptedTrainer, started

RATE, BATCH, CONTEXT, DECAY = (
    f"trainer.controls.{name}=true" for name in ("rate", "batch", "context", "decay")
)
LIVE = 'trainer.decision_mode="live"'
# Nothing but the pilot proposes, and torch is not needed.
NO_JUMPS = ('predictor.policy="fixed"', "predictor.drift_gain=0.0")


@dataclass
class Flight:
    trainer: ControlledTrainer
    log: Log
    predictor: Predictor
    store: MemoryStore

    @property
    def pilot(self) -> dict:  # type: ignore[type-arg]
        policy = self.predictor.learned.policy
        assert policy is not None
        return policy.values["pilot"]  # type: ignore[return-value]

    @property
    def arms(self) -> list[str]:
        return [decision.arm for decision in self.trainer.proposals]


def fly(
    *overrides: str, world: World | None = None, until_step: int | None = None, **values: object
) -> Flight:
    store = MemoryStore(keep_all=True)
    predictor = Predictor(store)
    log = Log(predictor.handle)
    trainer = ControlledTrainer(
        controlled_settings(*NO_JUMPS, *overrides),
        world or World(),
        **values,  # type: ignore[arg-type]
    )
    trainer.run(log.publish, until_step=until_step)
    return Flight(trainer, log, predictor, store)


def of(verdict: Verdict) -> object:
    return lambda decision: verdict


# ---- off is off ------------------------------------------------------------------------------------


def test_with_all_switches_off_there_is_no_pilot() -> None:
    quiet = controlled_settings()
    assert type(policy_for(quiet, facts_of(started(quiet)))) is LearnedPolicy
    loud = controlled_settings(RATE)
    assert type(policy_for(loud, facts_of(started(loud)))) is PilotedPolicy


@pytest.mark.parametrize("policy", ["fixed", "learned"])
def test_where_the_pilot_has_nothing_to_say_jumps_are_decided_as_without_it(policy: str) -> None:
    def bodies(*overrides: str) -> list[bytes]:
        log = Log(Predictor(MemoryStore()).handle)
        chosen = controlled_settings(f'predictor.policy="{policy}"', "trainer.steps=900", *overrides)
        ScriptedTrainer(chosen).run(log.publish, until_step=500)
        return [codec.encode(dataclasses.replace(d, next_window_steps=0)) for d in log.decisions]

    assert bodies() == bodies("trainer.controls.read_out=true", "predictor.control_share=0.0")


def test_a_control_whose_switch_is_off_never_moves() -> None:
    world = World(best_rate=4.0, noise_scale=8.0, fixed_seconds=12.0)
    flight = fly(BATCH, LIVE, world=world)
    assert flight.arms
    assert all(controls.rate_factor == 1.0 for controls in flight.trainer.at_points)
    assert fly(world=World(best_rate=1 / 30)).arms == []


# ---- bounds and allowance --------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    best=st.integers(-7, 5),
    scale=st.sampled_from([0.0, 0.05, 1.0, 30.0]),
    fixed=st.sampled_from([0.0, 3.0, 30.0]),
    bounds=st.tuples(st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([1 / 64, 0.5, 1.0])),
    fate=st.integers(0, 1 << 30),
    sequences=st.sampled_from([1, 2, 16]),
)
def test_whatever_happens_no_proposal_breaks_a_rule(
    best: int, scale: float, fixed: float, bounds: tuple[float, float], fate: int, sequences: int
) -> None:
    """The trainer of the test holds each against control_rules.breach with what is really in force."""
    change, low = bounds

    def verdict(decision: PhaseDecision) -> Verdict | None:
        kinds = (Verdict.ACCEPTED, Verdict.REFUSED, None)
        return kinds[(fate >> (decision.base_step % 28)) % 3]

    fly(
        *ALL_ON,
        LIVE,
        "trainer.steps=400",
        "predictor.control_share=1.0",
        f"trainer.controls.rate_change={change}",
        f"trainer.controls.rate_low={low}",
        f"trainer.controls.batch_low={max(low, 0.25)}",
        f"trainer.batch.sequences={sequences}",
        world=World(best_rate=2.0**best, noise_scale=scale, fixed_seconds=fixed),
        verdict=verdict,
    )


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_trials_that_are_all_refused_cost_no_more_than_their_share(share: float) -> None:
    world = World(best_rate=4.0, noise_scale=8.0, fixed_seconds=12.0)
    flight = fly(*ALL_ON, LIVE, f"predictor.control_share={share}", world=world, verdict=of(Verdict.REFUSED))
    planned = 3.0 * flight.trainer.settings.trainer.steps
    assert bool(flight.arms) == (share * planned > 3.0 + 3.0 * 16)
    assert flight.trainer.undone_passes <= share * (planned + flight.trainer.undone_passes)


def test_a_run_in_ruin_is_rescued_without_an_allowance_but_not_for_ever() -> None:
    ruined = World(best_rate=1 / 30)
    assert fly(RATE, "predictor.control_share=0.0", world=ruined).arms[0] == "rate:/4"
    stubborn = fly(RATE, world=ruined, verdict=of(Verdict.REFUSED))
    assert len(stubborn.arms) == MOST_RUIN_TRIALS


def test_decision_points_go_on_at_no_more_than_twice_the_usual_window() -> None:
    flight = fly(RATE, 'predictor.policy="learned"', "trainer.steps=300", world=World(best_rate=2.0))
    assert max(flight.trainer.window_lengths[:-1]) == LONGEST_WINDOW_FACTOR * 16


# ---- exact state -----------------------------------------------------------------------------------

BUSY = (*ALL_ON, LIVE, 'predictor.policy="learned"')
BUSY_WORLD = World(best_rate=1 / 8, noise_scale=8.0, fixed_seconds=12.0)


def test_a_resumed_run_goes_on_as_the_unbroken_one_and_replays_byte_for_byte() -> None:
    whole = fly(*BUSY, world=BUSY_WORLD, until_step=500)
    assert len(set(whole.arms)) >= 2
    names = sorted(whole.trainer.checkpoints)
    base_steps = [decision.base_step for decision in whole.trainer.proposals]
    name = next(name for name in names if whole.trainer.checkpoints[name].step >= base_steps[1])
    step = whole.trainer.checkpoints[name].step
    resumed = Log(Predictor(whole.store).handle)
    whole.trainer.resumed(name, generation=2).run(resumed.publish, until_step=500)
    expected = [d for d in whole.log.decisions if d.base_step > step or d.base_attempt > 99]
    assert [dataclasses.replace(d, base_generation=2) for d in expected] == resumed.decisions
    result = replay(entries_of(whole.log), is_sealed=False)
    assert (result.difference, result.gap) == ("", "")
    assert len(result.decisions) == len(whole.log.decisions)


def test_equal_runs_leave_equal_states_and_a_state_comes_back_as_it_was() -> None:
    one, two = (fly(*BUSY, world=BUSY_WORLD, until_step=300) for _ in range(2))
    newest = [flight.store.newest("scripted") for flight in (one, two)]
    assert newest[0] is not None
    assert newest[1] is not None
    assert files_of(newest[0]) == files_of(newest[1])
    pilot = Pilot(one.trainer.settings)
    pilot.load(one.pilot)
    assert repr(pilot.state()) == repr(one.pilot)
    with pytest.raises(CheckpointError, match="damaged"):
        pilot.load({**one.pilot, "in_force": []})


def entries_of(log: Log) -> list[Entry]:
    history = [
        Entry(HISTORY, entry_id, type(message).__name__, codec.encode(message), 0.0)
        for entry_id, message in log.entries
    ]
    decisions = [
        Entry(DECISIONS, EntryId(1, number), type(answer).__name__, codec.encode(answer), 0.0)
        for number, answer in enumerate(log.decisions, start=1)
    ]
    return history + decisions


# ---- what is in force ------------------------------------------------------------------------------


def test_what_is_in_force_is_what_was_accepted_through_refusals_and_rollbacks() -> None:
    flight = fly(RATE, "trainer.schedule.warmup_steps=32", world=World(best_rate=8.0), until_step=200)
    trainer = flight.trainer
    assert trainer.controls.rate_factor > 1.0
    assert in_force(flight) == trainer.controls
    early = sorted(trainer.checkpoints)[0]
    assert trainer.checkpoints[early].controls == NEUTRAL
    trainer.go_back(early)
    trainer._cycle(flight.log.publish)
    before = flight.trainer.at_points[-1]
    assert before == NEUTRAL
    assert trainer.proposals[-1].arm in ("rate:/4", "rate:/2")
    assert "rolled back" in trainer.proposals[-1].reason
    assert in_force(flight) == trainer.controls


def in_force(flight: Flight) -> Controls:
    return Controls(**flight.pilot["in_force"][-1]["controls"])


def test_a_predictor_that_was_told_nothing_learns_from_the_features_what_is_in_force() -> None:
    flight = fly(RATE, BATCH, LIVE, world=World(best_rate=8.0), until_step=200)
    assert flight.trainer.controls != NEUTRAL
    stranger = Predictor(MemoryStore())
    log = Log(stranger.handle)
    trainer = dataclasses.replace(flight.trainer, generation=2, resumed_from="step-00000001.gen-1")
    trainer.run(log.publish, until_step=300)
    assert Controls(**stranger.learned.policy.values["pilot"]["in_force"][0]["controls"]) == (  # type: ignore
        flight.trainer.controls
    )


def test_an_outcome_that_never_arrived_is_made_up_for_by_the_features() -> None:
    store = MemoryStore()
    predictor = Predictor(store)
    log, lost = Log(predictor.handle), []

    def deaf(message: Message) -> PhaseDecision | None:
        if isinstance(message, Outcome) and message.verdict is Verdict.ACCEPTED and not lost:
            lost.append(message)
            return None
        return log.publish(message)

    trainer = ControlledTrainer(controlled_settings(*NO_JUMPS, RATE), World(best_rate=16.0))
    trainer.run(deaf, until_step=200)
    assert lost
    trials = predictor.learned.policy.values["pilot"]["trials"]  # type: ignore[union-attr, index]
    assert trials["over"][0]["verdict"] == "lost"
    assert len(trainer.proposals) > 1


# ---- rate ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [1 / 8, 1 / 30, 1 / 60])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_diverges_gets_a_quarter_of_the_rate_at_its_first_decision_point(
    best: float, seed: int
) -> None:
    flight = fly(RATE, world=World(best_rate=best), seed=seed)
    first = flight.trainer.proposals[0]
    assert (first.arm, first.base_step) == ("rate:/4", 32)
    assert 0.4 * best < flight.trainer.controls.rate_factor < 2.0 * best
    assert flight.trainer.excess < 1.0


@dataclass(frozen=True, kw_only=True)
class Turning(World):
    """Below a loss of 1.5 the data turn: it leaps above its first one, where the best rate is a sixteenth."""

    def after(self, excess: float, controls: Controls) -> float:
        if excess < 0.5:
            return 4.5
        turned = dataclasses.replace(self, best_rate=1 / 16)
        return World.after(turned if excess > 4.0 else self, excess, controls)


def test_a_rate_that_was_good_and_is_so_no_more_is_lowered() -> None:
    flight = fly(
        RATE, "trainer.controls.rate_high=1.0", world=dataclasses.replace(Turning(), loss_noise=0.05)
    )
    assert "rate:/4" in flight.arms


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rate_that_starts_at_a_quarter_of_the_best_climbs_to_within_a_factor_of_two(seed: int) -> None:
    flight = fly(RATE, world=World(best_rate=4.0), seed=seed)
    assert 2.0 <= flight.trainer.controls.rate_factor <= 8.0
    assert set(flight.arms) <= {"rate:x2", "rate:x4", "rate:/2"}


@dataclass(frozen=True, kw_only=True)
class Blunt(World):
    """Too high a rate makes a quarter of the progress, and no ruin."""

    def after(self, excess: float, controls: Controls) -> float:
        kept = dataclasses.replace(controls, rate_factor=min(controls.rate_factor, 1.866 * self.best_rate))
        return World.after(self, excess, kept)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_best_rate_stays_within_a_factor_of_two_of_itself(seed: int) -> None:
    flight = fly(RATE, world=World(best_rate=1.0), seed=seed)
    assert 0.5 <= flight.trainer.controls.rate_factor <= 2.0
    assert flight.arms[:2] == ["rate:x4", "rate:/2"]


def test_a_refused_climb_is_tried_again_only_when_the_run_is_twice_as_long() -> None:
    flight = fly(RATE, "predictor.control_share=1.0", world=World(best_rate=9.0), verdict=of(Verdict.REFUSED))
    steps = [decision.base_step for decision in flight.trainer.proposals if decision.arm in RATE_UP]
    assert len(steps) >= 2
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(steps))


def test_after_a_climb_that_was_refused_a_smaller_one_is_tried() -> None:
    flight = fly(RATE, "predictor.control_share=1.0", world=World(best_rate=9.0), verdict=of(Verdict.REFUSED))
    assert [arm for arm in flight.arms if arm in RATE_UP][:2] == ["rate:x4", "rate:x2"]
    assert [arm for arm in flight.arms if arm in RATE_DOWN][:1] == ["rate:/2"]


@pytest.mark.parametrize("warmup_steps", [0, 28])
def test_no_rate_is_judged_before_a_window_at_the_full_rate(warmup_steps: int) -> None:
    flight = fly(RATE, f"trainer.schedule.warmup_steps={warmup_steps}", world=World(best_rate=8.0))
    assert flight.trainer.proposals[0].base_step >= warmup_steps + 16
    assert flight.trainer.proposals[0].base_step <= warmup_steps + 16 + 32


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rate_that_starts_at_twice_a_best_one_that_does_no_ruin_is_lowered(seed: int) -> None:
    flight = fly(RATE, world=Blunt(best_rate=0.5), seed=seed)
    assert flight.arms[:2] == ["rate:x4", "rate:/2"]
    assert 0.25 <= flight.trainer.controls.rate_factor <= 0.5


@pytest.mark.parametrize(
    ("wanted", "is_beside"),
    [
        (Controls(rate_factor=2.0), True),
        (Controls(batch_factor=0.5), True),
        (Controls(rate_factor=0.5, batch_factor=2.0), True),
        (Controls(context_tokens=32), False),
        (Controls(rate_factor=2.0, context_tokens=32), False),
        (Controls(decay_start=9, decay_steps=9), False),
        (Controls(read_out="average"), False),
        (NEUTRAL, False),
    ],
)
def test_rate_and_batch_alone_are_judged_beside_a_twin(wanted: Controls, is_beside: bool) -> None:
    trainer = controlled_settings("trainer.controls.trial_steps=24").trainer
    assert is_beside_twin(wanted, NEUTRAL) is is_beside
    assert trial_steps(wanted, NEUTRAL, trainer) == (24 if is_beside else 16)


def test_on_a_noisy_plateau_no_climb_is_tried() -> None:
    """No fall that could be told from noise: a trial of 16 steps would tell nothing."""
    plateau = World(loss_noise=0.3)
    flight = fly(RATE, "trainer.controls.rate_low=1.0", world=plateau, excess=0.0, best=0.5)
    assert flight.arms == []


# ---- batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "fixed", "best"), [(16.0, 12.0, 8.0), (4.0, 12.0, 4.0), (0.25, 0.75, 0.25), (1.0, 3.0, 1.0)]
)
def test_the_batch_approaches_the_best_one_from_both_sides(scale: float, fixed: float, best: float) -> None:
    """B* = sqrt(a Bn / b); a step of two that would bring less than MIN_GAIN is not taken."""
    assert math.isclose(best, math.sqrt(fixed * scale / 3.0))
    world = World(noise_scale=scale, fixed_seconds=fixed)
    flight = fly(BATCH, LIVE, "trainer.steps=1500", world=world, verdict=of(Verdict.ACCEPTED))
    assert best / 2.0 <= flight.trainer.controls.batch_factor <= 2.0 * best
    factors = [controls.batch_factor for controls in flight.trainer.at_points]
    rising = sorted(factors) if best >= 1.0 else sorted(factors, reverse=True)
    assert factors == rising, "it turned back"


def test_the_reason_names_noise_scale_and_forecast() -> None:
    flight = fly(BATCH, LIVE, world=World(noise_scale=16.0, fixed_seconds=12.0))
    assert flight.trainer.proposals[0].reason.startswith("batch ×2: noise scale 16× batch, +")
    assert flight.trainer.proposals[0].reason.endswith("% progress per second forecast")
    assert flight.trainer.proposals[0].phase is Phase.PREDICT


# ---- the others ------------------------------------------------------------------------------------


def test_a_context_is_shortened_once_and_grows_back_to_the_whole() -> None:
    flight = fly(CONTEXT, "trainer.model.context_tokens=128", verdict=of(Verdict.ACCEPTED))
    contexts = [controls.context_tokens for controls in flight.trainer.at_points]
    assert flight.arms == ["context:shorter", "context:longer", "context:longer"]
    assert list(dict.fromkeys(contexts)) == [0, 32, 64]
    assert flight.trainer.controls.context_tokens == 0


def test_an_early_tail_comes_only_when_going_on_brings_little() -> None:
    done = fly(DECAY, "trainer.steps=2000", verdict=of(Verdict.ACCEPTED))
    assert done.arms == ["decay:now"]
    assert done.trainer.excess < 0.05
    assert done.trainer.step == done.trainer.controls.decay_start + done.trainer.controls.decay_steps < 2000
    slow = World(noise_scale=20.0)
    assert fly(DECAY, world=slow, verdict=of(Verdict.ACCEPTED)).arms == []


def test_inspect_prints_controls_in_words() -> None:
    flight = fly(RATE, world=World(best_rate=4.0), until_step=200)
    policy = flight.predictor.learned.policy
    assert policy is not None
    text = words(policy.values)
    assert "Controls: rate ×" in text
    assert "kept       rate ×4: a higher rate was not tried yet, +20 % progress per second forecast, " in text
    assert "% seen" in text
