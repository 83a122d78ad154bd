"""History is trimmed only below what every reader has saved, and the newest entries always stay."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.bus import EntryId
from common.messages import Heartbeat, Metric
from trainer_node.retention import KEPT_ENTRIES, Retention


def heartbeat(node: str, saved: EntryId | None) -> Heartbeat:
    counters = () if saved is None else (
        Metric(name="saved_generation", value=float(saved.generation), unit="1"),
        Metric(name="saved_sequence", value=float(saved.sequence), unit="1"),
    )  # fmt: skip
    return Heartbeat(
        node=node, generation=1, process_id=1, state="running", step=0, uptime_seconds=0.0, counters=counters
    )


ids = st.builds(EntryId, st.integers(1, 3), st.integers(1, 10 * KEPT_ENTRIES))


@given(newest=ids, saved=st.lists(ids, max_size=3))
def test_nothing_that_a_reader_still_needs_is_trimmed(newest: EntryId, saved: list[EntryId]) -> None:
    retention = Retention()
    for number, offset in enumerate(saved):
        retention.note(heartbeat(f"reader {number}", offset))
    below = retention.trim_below(newest)
    if below is not None:
        assert saved
        assert all(below <= offset for offset in saved)
        assert below <= EntryId(newest.generation, newest.sequence - KEPT_ENTRIES)


def test_without_a_durable_reader_nothing_is_trimmed() -> None:
    retention = Retention()
    retention.note(heartbeat("monitor", None))
    assert retention.trim_below(EntryId(1, 10 * KEPT_ENTRIES)) is None


def test_a_long_history_is_trimmed_to_the_slowest_reader() -> None:
    retention = Retention()
    retention.note(heartbeat("predictor", EntryId(1, 70_000)))
    retention.note(heartbeat("monitor", EntryId(1, 60_000)))
    assert retention.trim_below(EntryId(1, 100_000)) == EntryId(1, 60_000)
    retention.note(heartbeat("monitor", EntryId(1, 99_000)))
    retention.note(heartbeat("predictor", EntryId(1, 99_500)))
    assert retention.trim_below(EntryId(1, 100_000)) == EntryId(1, 80_000)
