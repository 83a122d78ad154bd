"""Nothing that a node keeps grows with the length of its run; long: `python -m tests.bench.load days`."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from common import codec
from common.bus import Entry, EntryId
from common.clock import FakeClock
from common.errors import BusUnavailable
from common.memory_bus import MemoryBus, MemoryServer
from common.messages import Observation, Outcome, PhaseDecision, Verdict
from common.outbox import Outbox
from common.publisher import Publisher
from common.recorder import Recorder
from common.recording import open_scan, scan_entries
from common.recording_writer import RecordingWriter
from common.streams import HISTORY, PREDICTOR, STREAMS, TRAINER, notes_of
from monitor_node.feed import Feed
from monitor_node.pace import MAX_JUMPS
from monitor_node.run_reader import new_view
from monitor_node.snapshot import as_dict
from predictor_node.history import LIMIT_STEPS, History
from predictor_node.node import Predictor
from predictor_node.phi import MAX_WINDOWS
from predictor_node.phi_runs import WindowSample
from predictor_node.state import MemoryStore
from tests.faults import wait_until
from tests.long_run import LongRun, Tape, long_settings
from tests.monitor.long_watch import deep_bytes
from tests.predictor.scripted import RUN_ID, observed, outcome, point

GROWTH = 1.1  # of the largest size in the last half over the largest one in the first


def grown(sizes: Sequence[int]) -> float:
    """Curves are thinned when they are full, so sizes swing: the largest ones are compared."""
    warm = sizes[len(sizes) // 10 :]
    half = len(warm) // 2
    return max(warm[half:]) / max(warm[:half])


def test_what_the_monitor_keeps_of_a_run_stops_growing() -> None:
    """A jump every 12 steps: each limit is reached. One number kept of every step would be another MB."""
    steps = 40_000
    settings = long_settings("trainer.window_steps=8", "trainer.probation_steps=4", steps=steps)
    run = LongRun(settings=settings, steps_per_second=10.0, jump_windows=1)
    view, feed, sizes = new_view(RUN_ID), Feed("boot"), []
    for count, (_, message) in enumerate(run.messages(steps=steps)):
        view.fold(message, sent_unix_seconds=run.unix_seconds, at_seconds=run.seconds)
        if count % 4_000 == 0:
            feed.publish(as_dict(view, now_seconds=run.seconds))
            sizes.append(deep_bytes(view))
    assert view.verdicts[Verdict.ACCEPTED] > MAX_JUMPS
    assert 2 * max(sizes[-4:]) > max(sizes), "it was measured"
    assert max(sizes) < 2.75 * (1 << 20)  # measured: 2.4, of it 1.2 trials of controls at their limits


def test_the_history_of_200_000_steps_keeps_its_limit() -> None:
    history, one = History(), observed(1)
    for step in range(1, 200_001):
        history = history.append(replace(one, step=step))
    assert len(history.rows) == LIMIT_STEPS
    assert history.contiguous_steps == 200_000


def test_a_learning_predictor_keeps_no_window_for_ever() -> None:
    """Samples for the per-weight forecaster are the largest things that it is sent."""
    steps = 2_400
    settings = long_settings(
        'predictor.policy="learned"',
        "trainer.basis.history_snapshots=3",
        "trainer.window_steps=8",
        "trainer.probation_steps=4",
        steps=steps,
    )
    tape = Tape(LongRun(settings=settings, steps_per_second=1e9, sampled_weights=64), steps=steps)
    predictor, samples_before = Predictor(MemoryStore()), _num_samples()
    while not tape.ended:
        for entry in tape.entries(400):
            if entry.stream == HISTORY:
                predictor.handle(codec.decode_entry(entry), entry.id)
    assert predictor.counters["rests"] + predictor.counters.get("proposals", 0) > 3 * MAX_WINDOWS
    assert 0 < _num_samples() - samples_before <= MAX_WINDOWS


def _num_samples() -> int:
    return sum(type(thing) is WindowSample for thing in gc.get_objects())


class AwayBus(MemoryBus):
    """Takes nothing until it is told to."""

    is_away = True

    def publish(self, entries: Sequence[Entry]) -> None:
        if self.is_away:
            raise BusUnavailable("away")
        super().publish(entries)


def test_back_pressure_drops_are_counted_and_no_outcome_nor_decision_point_is_among_them() -> None:
    bus, capacity, steps = AwayBus(MemoryServer(), RUN_ID), 2_000, 200_000
    publisher = Publisher(bus, writer=TRAINER, generation=1, clock=FakeClock(), rng=random.Random(0))
    outbox = Outbox(publisher, capacity=capacity)
    plain, asking, kept = observed(1), observed(1, decision_point=point(1)), 0
    settled = outcome(_rest(), Verdict.REST, 0)
    for step in range(1, steps + 1):
        is_asking = step % 500 == 0
        outbox.put(asking if is_asking else plain)
        if is_asking:
            outbox.put(settled)
            kept += 2
    counters = outbox.counters()
    assert counters.queued <= capacity
    bus.is_away = False
    wait_until(lambda: outbox.counters().queued == 0, 30.0)
    assert outbox.close(10.0)
    counters = outbox.counters()
    entries = bus.read_after({HISTORY: EntryId(0, 0)}, max_count=steps, block_seconds=0.0)
    messages = [codec.decode_entry(entry) for entry in entries]
    assert len(entries) + counters.dropped_observations == steps + kept // 2
    points = [m for m in messages if isinstance(m, Observation) and m.decision_point is not None]
    assert len(points) + sum(isinstance(m, Outcome) for m in messages) == kept
    assert counters.dropped_observations > steps - 2 * capacity
    ids = [entry.id.sequence for entry in entries]
    missing = ids[-1] - len(ids)
    assert missing == counters.dropped_observations, "what was dropped kept its number: readers see the gap"


def _rest() -> PhaseDecision:
    predictor = Predictor(MemoryStore())
    decision = predictor.handle(observed(1, decision_point=point(1)), EntryId(1, 1))[0]
    assert isinstance(decision, PhaseDecision)
    return decision


def test_a_recorder_keeps_positions_and_nothing_else(tmp_path: Path) -> None:
    steps = 8_000
    tape = Tape(LongRun(settings=long_settings(steps=steps), steps_per_second=100.0), steps=steps)
    clock = FakeClock()
    writer = RecordingWriter(tmp_path / "r.hpt", run_id=RUN_ID, created_unix_seconds=0.0)
    recorder, sizes = Recorder(tape, writer, tuple(STREAMS), clock=clock), []  # type: ignore[arg-type]
    while not tape.ended:
        recorder.run_once(0.0)
        clock.advance(0.2)
        sizes.append(writer.waiting_bytes + deep_bytes(writer._scan.last_ids, recorder._positions))
    recorder.seal()
    assert grown(sizes) <= GROWTH
    with (tmp_path / "r.hpt").open("rb") as file:
        scan = open_scan(file, tmp_path / "r.hpt")
        found = sum(1 for _ in scan_entries(file, tmp_path / "r.hpt", scan))
    assert (found, scan.sealed) == (tape.num_entries, True)
    assert notes_of(PREDICTOR) in scan.last_ids
