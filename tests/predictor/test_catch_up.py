"""Behind for good, the predictor passes observations over, says so, and answers the newest points again."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from common.bus import EntryId
from common.messages import Alert, CheckpointWritten, Message, Outcome, PhaseDecision, RunEnded
from predictor_node.catch_up import KEPT_ENTRIES, LOOK_ENTRIES, MOST_BEHIND_ENTRIES, CatchUp, pass_up_to
from predictor_node.holes import PASSED_OVER, QUIET_ENTRIES
from predictor_node.node import Predictor
from predictor_node.state import MemoryStore
from tests.predictor.scripted import Log, ScriptedTrainer, observed, small_settings

LIVE = 'trainer.decision_mode="live"'
LOCKSTEP = 'trainer.decision_mode="lockstep"'
PASSING_COST = 0.02  # of the time that handling an observation takes: it is decoded and left


def history_of(*overrides: str, steps: int = 16_000) -> Log:
    settings = small_settings(
        LIVE, f"trainer.steps={steps}", "trainer.checkpoint.every_steps=4000", *overrides
    )
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(settings).run(log.publish)
    return log


LOG = history_of()


@dataclass
class Pursuit:
    """The trainer writes `speed` entries in the time in which one is handled; who reads is a CatchUp."""

    speed: float
    head_start: int = 0  # entries that are there when the predictor starts
    log: Log = field(default_factory=lambda: LOG)
    store: MemoryStore = field(default_factory=lambda: MemoryStore(keep_all=True))
    behind: list[int] = field(default_factory=list)  # at every entry that is looked at
    answers: list[Message] = field(default_factory=list)
    looks: int = 0

    def __post_init__(self) -> None:
        self.predictor = Predictor(self.store)
        self._written = float(self.head_start)

    def newest(self) -> EntryId:
        self.looks += 1
        return self.log.entries[self._newest()][0]

    def _newest(self) -> int:
        return min(len(self.log.entries) - 1, int(self._written))

    def run(self) -> Pursuit:
        catch_up = CatchUp(self.predictor, self.newest)
        for position, (entry_id, message) in enumerate(self.log.entries):
            self._written = max(self._written, position)
            passed = self.predictor.passed_over
            self.answers += catch_up.handle(message, entry_id)
            if self.predictor.passed_over == passed:
                self.behind.append(self._newest() - position)
                self._written += self.speed
            else:
                self._written += self.speed * PASSING_COST
        return self

    def of(self, kind: type) -> list:
        return [answer for answer in self.answers if isinstance(answer, kind)]


def test_nothing_is_passed_over_while_working_it_off_gains_on_the_trainer() -> None:
    """Also not by a predictor that starts far behind: what it reads there teaches it."""
    pursuit = Pursuit(speed=0.4, head_start=9_000).run()
    assert max(pursuit.behind) > MOST_BEHIND_ENTRIES
    assert pursuit.predictor.passed_over == 0
    assert pursuit.of(PhaseDecision) == LOG.decisions
    assert pursuit.of(Alert) == []


def test_a_trainer_that_is_too_fast_is_followed_within_a_bound_and_its_newest_points_are_answered() -> None:
    pursuit = Pursuit(speed=8.0).run()
    slack = LOOK_ENTRIES * 9  # what comes in between two looks
    assert max(pursuit.behind) <= MOST_BEHIND_ENTRIES + slack
    assert pursuit.predictor.passed_over > 5_000
    last_points = [d for d in LOG.decisions if d.base_step > LOG.decisions[-1].base_step - KEPT_ENTRIES // 2]
    answered = {d.decision_id for d in pursuit.of(PhaseDecision)}
    assert {d.decision_id for d in last_points} <= answered


def test_what_is_passed_over_is_counted_and_told_and_nothing_else_is_passed_over() -> None:
    pursuit = Pursuit(speed=8.0).run()
    told = [alert for alert in pursuit.of(Alert) if alert.kind == PASSED_OVER]
    assert len(told) == len(pursuit.of(Alert)) >= 2, "the first at once, the rest in sums, no other"
    assert sum(int(alert.text.split()[0]) for alert in told) == pursuit.predictor.passed_over
    assert pursuit.predictor.counters["passed_over"] == pursuit.predictor.passed_over
    assert pursuit.predictor.counters["lost_entries"] == 0
    outcomes = sum(isinstance(message, Outcome) for _, message in LOG.entries)
    verdicts = ("accepted", "refused", "ruined", "rest")
    assert sum(pursuit.predictor.counters.get(verdict, 0) for verdict in verdicts) == outcomes
    names = [message.name for _, message in LOG.entries if isinstance(message, CheckpointWritten)]
    assert all(pursuit.store.has(name) for name in names)
    assert isinstance(LOG.entries[-1][1], RunEnded)
    assert pursuit.predictor.ended == LOG.entries[-1][0]


def test_a_trainer_that_outruns_its_predictor_for_long_is_told_of_in_sums() -> None:
    """Every third step arrives: 1,356 alerts were one for each hole."""
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(small_settings(LIVE)).run(log.publish, until_step=40)
    predictor, told = Predictor(MemoryStore()), list[tuple[int, Message]]()
    for entry_id, message in log.entries:
        predictor.handle(message, entry_id)
    last_id, last_step = log.entries[-1][0], predictor.last_step
    holes = QUIET_ENTRIES + 100
    for n in range(1, holes + 1):
        answers = predictor.handle(observed(last_step + 3 * n), EntryId(1, last_id.sequence + 3 * n))
        told += [(n, answer) for answer in answers if isinstance(answer, Alert)]
    answers = predictor.handle(
        RunEnded(step=1, reason="finished"), EntryId(1, last_id.sequence + 3 * holes + 1)
    )
    told += [(holes, answer) for answer in answers]
    assert [n for n, _ in told] == [1, 1 + QUIET_ENTRIES, holes], "the first at once, the last with the end"
    missing = [int(alert.text.split()[0]) for _, alert in told]  # type: ignore[union-attr]
    assert sum(missing) == predictor.counters["missing_steps"] == predictor.lost_entries == 2 * holes


def test_in_lockstep_every_point_is_answered_however_far_behind() -> None:
    log = history_of(LOCKSTEP, steps=6_000)
    pursuit = Pursuit(speed=8.0, log=log, head_start=5_500).run()
    assert (pursuit.predictor.passed_over, pursuit.looks) == (0, 0)
    assert pursuit.of(PhaseDecision) == log.decisions


def test_passing_over_an_entry_that_is_known_changes_nothing() -> None:
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    ScriptedTrainer(small_settings(LIVE)).run(log.publish, until_step=40)
    before = (predictor.applied, predictor.counters)
    predictor.pass_over(log.entries[3][0])
    assert (predictor.applied, predictor.counters) == before


def test_a_step_that_was_passed_over_is_a_hole_in_the_history() -> None:
    predictor = Predictor(MemoryStore())
    log = Log(predictor.handle)
    ScriptedTrainer(small_settings(LIVE)).run(log.publish, until_step=40)
    last_id, last_step = log.entries[-1][0], predictor.last_step
    for n in range(1, 4):
        predictor.pass_over(EntryId(1, last_id.sequence + n))
    answers = predictor.handle(observed(last_step + 4, attempt=9), EntryId(1, last_id.sequence + 4))
    assert [alert.kind for alert in answers] == [PASSED_OVER]  # type: ignore[union-attr]
    assert predictor._history.contiguous_steps == 1


ids = st.builds(EntryId, st.integers(1, 3), st.integers(1, 1 << 40))


@given(at=ids, newest=ids, before=st.none() | ids, is_passing=st.booleans())
def test_what_is_kept_is_always_the_newest(
    at: EntryId, newest: EntryId, before: EntryId | None, is_passing: bool
) -> None:
    up_to = pass_up_to(at, newest, before, is_passing=is_passing)
    if up_to is not None:
        assert up_to == EntryId(newest.generation, newest.sequence - KEPT_ENTRIES)
        assert up_to.sequence > 0
        assert before is not None or is_passing
