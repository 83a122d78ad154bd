"""Each observation has its effect once, whenever the predictor dies, and what was trimmed is told."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import codec
from common.bus import EntryId
from common.config import settings_from_toml
from common.memory_bus import MemoryBus
from common.messages import CheckpointWritten, Message, PhaseDecision
from common.streams import HISTORY
from predictor_node.learned import LearnedPolicy
from predictor_node.node import Predictor
from predictor_node.state import FolderStore, MemoryStore, StateStore
from tests.predictor.dying_predictor import Key, Lives, digest_of, live_through, server_with
from tests.predictor.scripted import (
    RUN_ID,
    Log,
    ScriptedTrainer,
    observed,
    point,
    small_settings,
    started,
)

KEEP_ALL = "trainer.checkpoint.keep=1000"
Expected = tuple[dict[Key, set[bytes]], dict[str, str]]  # bodies by decision, digests by saved state


def history_of(*overrides: str, shape: tuple[int, ...] = (2, 3), last_step: int = 200) -> Log:
    """A run that is resumed once, so that steps come again under a newer generation."""
    store = MemoryStore(keep_all=True)
    log = Log(Predictor(store).handle)
    trainer = ScriptedTrainer(small_settings(KEEP_ALL, *overrides), shape=shape)
    trainer.run(log.publish, until_step=last_step // 2 + 20)
    name = list(trainer.checkpoints)[-2]
    trainer.resumed(name, generation=2).run(log.publish, until_step=last_step)
    log.publish(checkpoint(last_step, generation=2))
    return log


def checkpoint(step: int, *, generation: int) -> CheckpointWritten:
    name = f"step-{step:08d}.gen-{generation}"
    return CheckpointWritten(name=name, step=step, attempt=0, emergency=False, fingerprint="")


def unbroken(log: Log) -> Expected:
    store = MemoryStore(keep_all=True)
    predictor = Predictor(store)
    bodies: dict[Key, set[bytes]] = {}
    for entry_id, message in log.entries:
        for answer in predictor.handle(message, entry_id):
            if isinstance(answer, PhaseDecision):
                key = (answer.base_generation, answer.decision_id)
                bodies.setdefault(key, set()).add(codec.encode(answer))
    return bodies, digests(log, store)


def digests(log: Log, store: StateStore) -> dict[str, str]:
    names = [message.name for _, message in log.entries if isinstance(message, CheckpointWritten)]
    return {name: digest_of(store.load(name)) for name in names}


LOG = history_of()
EXPECTED = unbroken(LOG)
NUM_MOMENTS = 2 * (len(EXPECTED[0]) + len(EXPECTED[1]) + 2 * len(LOG.entries) // 32)


def test_the_history_of_these_laws_has_all_that_can_go_wrong() -> None:
    kinds = {type(message).__name__ for _, message in LOG.entries}
    assert kinds == {"RunStarted", "Observation", "Outcome", "CheckpointWritten"}
    assert LOG.entries[-1][0].generation == 2
    assert len(EXPECTED[0]) > 15
    assert len(EXPECTED[1]) > 4


@settings(max_examples=30, deadline=None)
@given(
    deaths=st.lists(st.integers(1, NUM_MOMENTS + 8), min_size=1, max_size=4),
    repeated=st.sampled_from((0, 0, 1, 7, 32)),
)
def test_wherever_it_dies_it_says_and_learns_the_same_as_one_that_never_did(
    deaths: list[int], repeated: int
) -> None:
    store = MemoryStore(keep_all=True)
    lives = live_through(server_with(LOG.entries), store, deaths, repeated=repeated)
    assert (lives.bodies(), digests(LOG, store)) == EXPECTED
    assert lives.alerts() == []


def test_it_may_die_at_every_single_moment_of_a_short_run() -> None:
    """Not by chance: each of them in turn, before and after each decision, each save, each reading."""
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(small_settings(KEEP_ALL)).run(log.publish, until_step=56)
    log.publish(checkpoint(56, generation=1))
    expected, died = unbroken(log), 0
    for moment in range(1, 1000):
        store = MemoryStore(keep_all=True)
        lives = live_through(server_with(log.entries), store, [moment])
        assert (lives.bodies(), digests(log, store)) == expected, f"died at moment {moment}"
        if lives.num_lives == 1:
            break
        died += 1
    assert died > 2 * (len(expected[0]) + len(expected[1]))


LEARNING = (
    'predictor.policy="learned"',
    'predictor.temper="aggressive"',
    "predictor.learn_share=4.0",
    "trainer.checkpoint.every_steps=24",
)


@pytest.fixture(scope="module")
def learning() -> tuple[Log, Expected]:
    """The world model learns in it."""
    log = history_of(*LEARNING, shape=(2048, 2048), last_step=96)
    return log, unbroken(log)


@pytest.mark.parametrize("deaths", [(40,), (3, 3, 20)])
def test_the_learned_policy_goes_on_from_its_folder_to_the_byte(
    learning: tuple[Log, Expected], deaths: Sequence[int]
) -> None:
    log, expected = learning
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder) / "predictor")
        lives = live_through(server_with(log.entries), store, deaths)
        assert (lives.bodies(), digests(log, store)) == expected
        assert lives.num_lives == len(deaths) + 1
        newest = store.newest(RUN_ID)
        assert newest is not None
        assert newest.learned.policy is not None
        models = LearnedPolicy(settings_from_toml(newest.facts.settings_toml), newest.facts).models
        models.load(newest.learned.policy.values["models"], newest.learned.policy.tensors)  # type: ignore[arg-type]
        assert models.world.updates > 0, "it slept: nothing was proved"


# ---- what is not there any more ------------------------------------------------------------------


def trimmed_at(position: int) -> Lives:
    """A predictor dies in the middle of a run of one generation; meanwhile the server forgets."""
    log = Log(Predictor(MemoryStore()).handle)
    ScriptedTrainer(small_settings(KEEP_ALL)).run(log.publish, until_step=200)
    server, store = server_with(log.entries), MemoryStore(keep_all=True)
    below = log.entries[position][0]

    def forget(life: int) -> None:
        MemoryBus(server, RUN_ID).trim(HISTORY, below=below)

    return live_through(server, store, [60], between=forget)


@settings(max_examples=15, deadline=None)
@given(position=st.integers(1, 200))
def test_what_the_server_trimmed_unread_is_told_and_counted(position: int) -> None:
    lives = trimmed_at(position)
    restored = [json.loads(line) for line in lives.events if "state_restored" in line]
    saved = EntryId.parse(restored[-1]["behind"]) if restored else EntryId(1, 0)
    lost = max(0, position - saved.sequence)  # sequence = position + 1, and the one trimmed up to is there
    missing = [json.loads(line) for line in lives.events if "entries_missing" in line]
    assert len(missing) == (lost > 0)
    gaps = [alert for alert in lives.alerts() if alert.kind == "history_gap"]
    assert gaps == lives.alerts()
    assert len(gaps) in ((1, 2) if lost else (0,)), "of entries, then of steps, if an outcome is read first"
    if lost:
        assert missing[0]["first"] == str(EntryId(1, saved.sequence + 1))
        assert missing[0]["read_instead"] == str(EntryId(1, position + 1))


def play(messages: Sequence[tuple[EntryId, Message]]) -> tuple[Predictor, list[Message]]:
    predictor = Predictor(MemoryStore())
    return predictor, [a for entry_id, message in messages for a in predictor.handle(message, entry_id)]


def test_a_hole_in_which_no_step_is_missing_is_told_too() -> None:
    """An outcome was lost, not an observation: nothing but the ids shows it."""
    history = [(EntryId(1, 1), started(small_settings())), (EntryId(1, 2), observed(1))]
    predictor, answers = play([*history, (EntryId(1, 5), observed(2))])
    assert [(a.kind, "2 entries" in a.text) for a in answers] == [("history_gap", True)]  # type: ignore[union-attr]
    assert predictor.counters["lost_entries"] == 2


def test_steps_of_a_start_that_was_trimmed_away_do_not_pass_for_repeats() -> None:
    """The trainer went back to step 4 under a new generation, and the message that says so is gone."""
    old = [(EntryId(1, 1), started(small_settings()))]
    old += [(EntryId(1, step + 1), observed(step, attempt=3)) for step in range(1, 30)]
    new = [(EntryId(2, n), observed(n + 2, attempt=2)) for n in range(5, 12)]
    last = (EntryId(2, 12), observed(14, attempt=2, decision_point=point(3)))
    predictor, answers = play([*old, *new, last])
    alert, decision = answers
    assert alert.kind == "run_start_lost"  # type: ignore[union-attr]
    assert isinstance(decision, PhaseDecision), "in lockstep the trainer would wait for ever"
    assert (decision.base_generation, decision.horizon_steps) == (2, 0)
    assert predictor.counters["repeats"] == 0
    restarted = (EntryId(3, 1), started(small_settings(), generation=3, first_step=14))
    predictor, answers = play([*old, *new, last, restarted, (EntryId(3, 2), observed(15))])
    assert len(answers) == 2
    assert predictor.last_step == 15
