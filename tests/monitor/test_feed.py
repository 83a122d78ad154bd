"""Deltas: applied to any earlier snapshot they give the newest one exactly."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor_node import feed as feed_module
from monitor_node.feed import Feed


def apply(snapshot: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """What page.js does."""
    result = {**({} if delta["whole"] else deepcopy(snapshot)), **delta["set"]}
    for name, tail in delta["curves"].items():
        curves = result.setdefault("series", {})
        curves[name] = curves.get(name, [])[: tail["keep"]] + tail["add"]
    return result


CURVE = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6)
STEADY = st.fixed_dictionaries(
    {"run": st.integers(0, 2), "series": st.fixed_dictionaries({"train": CURVE, "memory": CURVE})}
)
# Sections and curves may come and go, and a section may be null.
SNAPSHOT = st.fixed_dictionaries(
    {"run": st.integers(0, 2), "series": st.fixed_dictionaries({"train": CURVE}, optional={"memory": CURVE})},
    optional={"nodes": st.one_of(st.none(), st.integers(0, 2))},
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from((STEADY, SNAPSHOT)).flatmap(lambda of: st.lists(of, min_size=1)), st.integers(1, 4))
def test_a_client_that_resumes_anywhere_ends_with_the_newest_snapshot(
    snapshots: list[dict[str, Any]], history_revisions: int
) -> None:
    kept, feed_module._HISTORY_REVISIONS = feed_module._HISTORY_REVISIONS, history_revisions
    try:
        feed = Feed("boot")
        seen = {0: {}}
        for snapshot in snapshots:
            feed.publish(snapshot)
            seen[feed.revision] = snapshot
        for revision, snapshot in seen.items():
            newest, delta = feed.since(feed.revision_of(feed.event_id(revision)))
            assert newest == feed.revision
            assert apply(snapshot, delta) == snapshots[-1]
    finally:
        feed_module._HISTORY_REVISIONS = kept


def test_a_growing_curve_sends_only_its_tail() -> None:
    feed = Feed("boot")
    points = [(x, 1.0) for x in range(1000)]
    feed.publish({"series": {"train": points[:990]}})
    feed.publish({"series": {"train": points}})
    _, delta = feed.since(1)
    assert delta == {"whole": False, "set": {}, "curves": {"train": {"keep": 990, "add": points[990:]}}}


def test_an_unchanged_snapshot_is_no_revision() -> None:
    feed = Feed("boot")
    assert feed.publish({"run": 1, "series": {}})
    assert not feed.publish({"run": 1, "series": {}})
    assert feed.revision == 1


@settings(max_examples=200)
@given(st.one_of(st.none(), st.text(), st.integers().map(lambda n: f"boot.{n}")))
def test_any_event_id_is_safe_and_a_foreign_one_means_everything(event_id: str | None) -> None:
    feed = Feed("boot")
    feed.publish({"run": 1})
    revision = feed.revision_of(event_id)
    assert revision == (1 if event_id == "boot.1" else 0)


def test_a_curve_that_changed_more_often_than_is_remembered_is_sent_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The forgotten change was at the front; those that are remembered were at the end."""
    monkeypatch.setattr(feed_module, "_HISTORY_REVISIONS", 3)
    feed = Feed("boot")
    feed.publish({"series": {"train": [[1, 9.0], [2, 9.0]]}})
    for length in range(2, 8):
        feed.publish({"series": {"train": [[1, 5.0], *([x, 9.0] for x in range(2, length + 2))]}})
    _, delta = feed.since(1)
    assert delta["curves"]["train"]["keep"] == 0
    assert apply({"series": {"train": [[1, 9.0], [2, 9.0]]}}, delta) == feed.snapshot()
