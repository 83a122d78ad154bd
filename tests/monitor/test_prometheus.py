"""/metrics: what Prometheus reads is what the snapshot says; what is unknown is not there."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from common import messages as m
from monitor_node.feed import Feed
from monitor_node.node import new_view
from monitor_node.prometheus import SnapshotCollector, exposition
from monitor_node.snapshot import as_dict
from monitor_node.web import PageServer
from tests.monitor import fake_run as fake

DEADLINE_SECONDS = 20.0
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scraped(collector: SnapshotCollector, accept: str = "text/plain") -> Samples:
    body, content_type = exposition(collector, accept)
    parse = parse_openmetrics if "openmetrics" in content_type else parse_text
    samples: Samples = {}
    for family in parse(body.decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in samples, "a sample twice"
            samples[key] = sample.value
    return samples


def of(snapshot: dict[str, Any]) -> Samples:
    return scraped(SnapshotCollector(lambda: snapshot))


def value(samples: Samples, name: str, **labels: str) -> float | None:
    return samples.get((name, tuple(sorted(labels.items()))))


def fake_snapshot(steps: int = 400) -> dict[str, Any]:
    view = new_view("nano")
    at_seconds = 0.0
    for said in fake.fake_run("nano", steps=steps):
        at_seconds = said.at_seconds
        view.fold(said.message, sent_unix_seconds=1e9 + at_seconds, at_seconds=at_seconds)
    view.stream_lengths = {"history": 400}
    return json.loads(json.dumps(as_dict(view, now_seconds=at_seconds), allow_nan=False))


def test_no_name_says_of_which_type_it_is() -> None:
    """`promtool check metrics` objects to one that does."""
    names = {name for name, _ in of(fake_snapshot())}
    assert not [name for name in names if re.search("counter|gauge|histogram|summary", name)]


def test_a_run_is_told_in_names_with_units() -> None:
    snapshot = fake_snapshot()
    samples = of(snapshot)
    progress = snapshot["progress"]
    assert value(samples, "hpt_current_step") == progress["step"]
    assert value(samples, "hpt_step_total") == progress["step"] + progress["lost_steps"]
    assert value(samples, "hpt_train_loss") == progress["loss"]
    assert value(samples, "hpt_memory_used_bytes") == snapshot["memory"]["used_bytes"]
    assert value(samples, "hpt_node_up", node="trainer") == 1.0
    assert value(samples, "hpt_heartbeat_age_seconds", node="trainer") is not None
    assert value(samples, "hpt_proposals_total", verdict="accepted") == snapshot["counters"]["accepted"]
    assert value(samples, "hpt_run_status", status="running") == 1.0
    assert value(samples, "hpt_run_status", status="crashed") == 0.0
    info = next(dict(labels) for name, labels in samples if name == "hpt_run_info")
    assert info["run_id"] == "nano"


def test_every_name_is_ours_and_both_formats_say_the_same() -> None:
    snapshot = fake_snapshot()
    text, openmetrics = (
        scraped(SnapshotCollector(lambda: snapshot), accept) for accept in ("text/plain", OPENMETRICS)
    )
    assert text == openmetrics
    assert len(text) > 40
    assert all(name.startswith("hpt_") for name, _ in text)


def test_nothing_known_is_nothing_told() -> None:
    assert of({}) == {}
    view = new_view("nano")
    snapshot = as_dict(view, now_seconds=0.0)
    samples = of(snapshot)
    for name in (
        "hpt_train_loss", "hpt_held_out_loss", "hpt_memory_used_bytes", "hpt_eta_seconds",
        "hpt_pace_saved_ratio", "hpt_steps_per_second", "hpt_checkpoint_step",
    ):  # fmt: skip
        assert value(samples, name) is None
    assert value(samples, "hpt_node_up", node="trainer") is None  # never seen: not "down"


NUMBERS = {
    "hpt_train_loss": ("progress", "loss"),
    "hpt_memory_used_bytes": ("memory", "used_bytes"),
    "hpt_pace_saved_ratio": ("pace", "saved_share"),
    "hpt_checkpoint_timestamp_seconds": ("checkpoint", "at_unix_seconds"),
}


@pytest.mark.parametrize("name", NUMBERS)
@settings(deadline=None)
@given(known=st.one_of(st.none(), st.floats(allow_nan=False), st.integers(-(2**50), 2**50)))
def test_a_sample_is_there_exactly_while_its_number_is_known(name: str, known: float | None) -> None:
    section, key = NUMBERS[name]
    assert value(of({section: {key: known}}), name) == known


def test_a_number_that_becomes_unknown_is_not_told_again() -> None:
    snapshot: dict[str, Any] = {"memory": {"used_bytes": 5}}
    collector = SnapshotCollector(lambda: snapshot)
    assert value(scraped(collector), "hpt_memory_used_bytes") == 5
    snapshot["memory"] = {"used_bytes": None}
    assert value(scraped(collector), "hpt_memory_used_bytes") is None


def test_a_loss_that_is_not_finite_is_told_as_that() -> None:
    view = new_view("nano")
    view.fold(fake.started("nano"), sent_unix_seconds=0.0, at_seconds=0.0)
    for step, loss in enumerate((math.nan, math.inf, -math.inf), 1):
        view.fold(fake.observation(step, loss), sent_unix_seconds=0.0, at_seconds=0.0)
        told = value(of(as_dict(view, now_seconds=0.0)), "hpt_train_loss")
        assert told is not None
        assert str(told) == str(loss)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 50)), min_size=1, max_size=20))
def test_the_counter_of_steps_never_goes_back(turns: list[tuple[int, int]]) -> None:
    snapshot: dict[str, Any] = {}
    collector = SnapshotCollector(lambda: snapshot)
    told = []
    for step, lost_steps in turns:
        snapshot["progress"] = {"step": step, "lost_steps": lost_steps}
        told.append(value(scraped(collector), "hpt_step_total") or 0.0)
        assert value(scraped(collector), "hpt_current_step") == step
    assert told == sorted(told)


def test_a_silent_node_is_down_and_an_unseen_one_is_unknown() -> None:
    rows = [("trainer", "silent", 9.0), ("monitor", "stalled", 0.1), ("predictor", "unseen", None)]
    nodes = [{"node": n, "liveness": how, "heartbeat_age_seconds": age} for n, how, age in rows]
    samples = of({"nodes": nodes})
    assert value(samples, "hpt_node_up", node="trainer") == 0.0
    assert value(samples, "hpt_node_up", node="monitor") == 1.0
    assert value(samples, "hpt_node_up", node="predictor") is None
    assert value(samples, "hpt_heartbeat_age_seconds", node="predictor") is None


def test_labels_from_a_stream_are_bounded_and_cannot_forge_a_line() -> None:
    attack = 'x"} 1\nhpt_node_up{node="trainer"} 1\n' + "y" * 5000
    counters = {f"{number}{attack}": 1.0 for number in range(500)}
    samples = of({"nodes": [{"node": attack, "liveness": "silent", "counters": counters}]})
    assert value(samples, "hpt_node_up", node="trainer") is None
    assert len(samples) <= 66
    assert max(len(text) for _, labels in samples for _, text in labels) <= 120


SECTIONS = (
    "run", "progress", "pace", "memory", "nodes", "counters", "checkpoint", "server", "actions", "timing",
    "stream_health",
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(SECTIONS), st.one_of(st.none(), st.just({}), st.just([])), max_size=8))
def test_sections_that_are_empty_or_not_there_yet_break_no_scrape(snapshot: dict[str, Any]) -> None:
    assert all(name.startswith("hpt_") for name, _ in of(snapshot))


def test_a_scrape_of_a_live_server_is_what_prometheus_reads() -> None:
    feed = Feed("boot")
    feed.publish(fake_snapshot())
    server = PageServer(feed, host="127.0.0.1", port=0)
    server.start()
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    try:
        for accept in ("", "text/plain;version=0.0.4", f"{OPENMETRICS},text/plain;q=0.5"):
            with contextlib.closing(
                http.client.HTTPConnection(host, int(port), timeout=DEADLINE_SECONDS)
            ) as caller:
                caller.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
                answer = caller.getresponse()
                body = answer.read().decode()
            assert answer.status == 200
            assert ("openmetrics" in str(answer.headers["content-type"])) == ("openmetrics" in accept)
            assert "hpt_step_total" in body
            assert "python_gc" not in body  # a registry of our own
    finally:
        server.stop()


def test_all_verdicts_have_a_series_from_the_start() -> None:
    samples = of(as_dict(new_view("nano"), now_seconds=0.0))
    told = {dict(labels)["verdict"] for name, labels in samples if name == "hpt_proposals_total"}
    assert told == {verdict.value for verdict in m.Verdict}
