"""metrics.jsonl and TensorBoard files: complete, valid JSON, and never a reason to stop."""

from __future__ import annotations

import json
from pathlib import Path

from common.messages import Evaluation, Heartbeat, Observation, Outcome
from tests.trainer.test_loop import proposal
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node.sinks import MetricSinks


def some_messages() -> list:
    links = ScriptedLinks(answer=lambda o: proposal(o, drift=0.2))
    tiny_loop(links, tiny_settings("trainer.steps=30")).run()
    nan_loss = Evaluation(step=30, virtual_steps=5, loss=float("nan"), accuracy=None, train_seconds=1.0)
    beat = Heartbeat(
        node="trainer", generation=1, process_id=1, state="running", step=1, uptime_seconds=0.0, counters=()
    )
    return [*links.said, nan_loss, beat]


def test_every_step_and_outcome_has_one_strict_json_line(tmp_path: Path) -> None:
    messages = some_messages()
    sinks = MetricSinks(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", lambda _: None)
    for message in messages:
        sinks.put(message)
    sinks.close()

    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=no_constant) for line in lines]
    assert [r["step"] for r in records if r["kind"] == "Observation"] == [
        m.step for m in messages if isinstance(m, Observation)
    ]
    assert sum(r["kind"] == "Outcome" for r in records) == sum(isinstance(m, Outcome) for m in messages)
    assert records[-1]["loss"] == "nan"
    assert {r["kind"] for r in records} == {"Observation", "Outcome", "Evaluation"}
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_sink_that_cannot_write_says_so_once_and_lets_training_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    sinks = MetricSinks(tmp_path / "no folder" / "metrics.jsonl", tmp_path / "tensorboard", said.append)
    for message in some_messages():
        sinks.put(message)
    sinks.close()
    assert len(said) == 1
    assert "training goes on" in said[0]


def test_a_resumed_run_appends(tmp_path: Path) -> None:
    message = Evaluation(step=1, virtual_steps=0, loss=1.0, accuracy=0.5, train_seconds=1.0)
    for _ in range(2):
        sinks = MetricSinks(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", lambda _: None)
        sinks.put(message)
        sinks.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "Evaluation", "st')
    sinks = MetricSinks(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", lambda _: None)
    sinks.put(Evaluation(step=1, virtual_steps=0, loss=1.0, accuracy=0.5, train_seconds=1.0))
    sinks.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["step"] == 1
