"""Who is alive: by the monitor's clock, once per loss, never while the monitor could not read."""

from __future__ import annotations

from common.messages import Alert, NodeLost
from monitor_node.liveness import Liveness, Watch
from tests.monitor.fake_run import heartbeat


def watch(*, silent_seconds: float = 3.0, stalled_seconds: float = 60.0) -> Watch:
    return Watch(silent_seconds=silent_seconds, stalled_seconds=stalled_seconds)


def test_a_node_lives_while_it_beats_and_is_silent_afterwards() -> None:
    nodes = watch()
    assert nodes.state_of("trainer", 0.0) is Liveness.UNSEEN
    nodes.heard(heartbeat(step=4), at_seconds=10.0)
    assert nodes.state_of("trainer", 13.0) is Liveness.ALIVE
    assert nodes.state_of("trainer", 13.1) is Liveness.SILENT
    assert nodes.age_seconds("trainer", 13.0) == 3.0


def test_a_loss_is_reported_once_and_a_return_is_noticed() -> None:
    nodes = watch()
    nodes.heard(heartbeat("predictor", step=4), at_seconds=0.0)
    assert nodes.changes(2.0) == []
    (lost,) = nodes.changes(5.0)
    assert lost == NodeLost(node="predictor", silent_seconds=5.0, last_step=4)
    assert nodes.changes(6.0) == []
    nodes.heard(heartbeat("predictor", step=4, generation=2), at_seconds=7.0)
    (back,) = nodes.changes(7.0)
    assert isinstance(back, Alert)
    assert (back.kind, back.severity) == ("node_back", "info")
    assert nodes.changes(7.5) == []
    assert [type(change) for change in nodes.changes(20.0)] == [NodeLost]


def test_a_node_that_was_never_seen_is_not_lost() -> None:
    assert watch().changes(1e6) == []


def test_nobody_is_lost_while_the_monitor_could_not_read() -> None:
    nodes = watch()
    nodes.heard(heartbeat(), at_seconds=0.0)
    nodes.readable(since_seconds=100.0)
    assert nodes.changes(102.9) == []
    assert [type(change) for change in nodes.changes(103.1)] == [NodeLost]


def test_a_trainer_that_beats_without_a_step_is_stalled() -> None:
    nodes = watch()
    for second in range(100):
        nodes.heard(heartbeat(step=min(second, 20)), at_seconds=float(second))
        nodes.heard(heartbeat("predictor", step=0), at_seconds=float(second))
    assert nodes.state_of("trainer", 80.0) is Liveness.ALIVE
    assert nodes.state_of("trainer", 80.1) is Liveness.STALLED
    assert nodes.state_of("predictor", 99.0) is Liveness.ALIVE
    assert nodes.changes(99.0) == []
    nodes.heard(heartbeat(step=21), at_seconds=99.0)
    assert nodes.state_of("trainer", 99.0) is Liveness.ALIVE


def test_a_trainer_that_is_still_starting_is_not_stalled() -> None:
    nodes = watch()
    for second in range(200):
        nodes.heard(heartbeat(state="starting"), at_seconds=float(second))
    assert nodes.state_of("trainer", 200.0) is Liveness.ALIVE


def test_a_node_that_said_stopping_is_finished_and_not_lost() -> None:
    nodes = watch()
    nodes.heard(heartbeat(state="stopping"), at_seconds=0.0)
    assert nodes.changes(10.0) == []
    assert nodes.state_of("trainer", 10.0) is Liveness.FINISHED


def test_nobody_is_lost_after_the_run_has_ended() -> None:
    nodes = watch()
    nodes.heard(heartbeat(), at_seconds=0.0)
    nodes.run_ended = True
    assert nodes.changes(10.0) == []


def test_no_names_in_heartbeats_make_the_watch_grow() -> None:
    nodes = Watch(silent_seconds=3.0)
    for number in range(100):
        nodes.heard(heartbeat(f"node-{number}"), at_seconds=0.0)
    nodes.heard(heartbeat("monitor"), at_seconds=0.0)
    assert set(nodes.lives) == {"monitor"}


def test_a_late_heartbeat_of_an_older_start_is_ignored() -> None:
    nodes = watch()
    nodes.heard(heartbeat(generation=2, step=50), at_seconds=0.0)
    nodes.heard(heartbeat(generation=1, step=10), at_seconds=5.0)
    assert nodes.lives["trainer"].beat.step == 50
    assert nodes.state_of("trainer", 5.0) is Liveness.SILENT
