"""The account of the trainer's time in its HealthSamples: true to the ledger, and told every few seconds."""

from __future__ import annotations

import pytest

from common.messages import Evaluation, HealthSample
from tests.trainer.tiny import ScriptedLinks, tiny_loop, tiny_settings
from trainer_node import housekeeping
from trainer_node import ledger as purposes
from trainer_node.housekeeping import Housekeeping


def samples_of_a_run(monkeypatch: pytest.MonkeyPatch, *, every_seconds: float):
    monkeypatch.setattr(housekeeping, "ACCOUNT_SECONDS", every_seconds)
    links = ScriptedLinks()
    keeping = Housekeeping(links.emit, None)
    loop = tiny_loop(links, tiny_settings(), housekeeping=keeping)
    loop.ledger.start()
    keeping.begin(loop)
    loop.run()
    keeping.end(loop, emergency=False)
    told = [(s.step, {metric.name: metric.value for metric in s.metrics}) for s in links.of(HealthSample)]
    return loop, told, links.of(Evaluation)


def test_the_account_is_the_ledgers(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, told, _ = samples_of_a_run(monkeypatch, every_seconds=1e9)
    step, last = told[-1]
    assert step == loop.progress.step
    for purpose, seconds in loop.ledger.wall_seconds.items():
        assert last[f"wall_seconds_{purpose}"] == seconds
    assert last["wall_seconds_total"] <= loop.ledger.total_seconds
    assert last["lost_steps"] == loop.ledger.lost_steps
    assert last["generation"] == loop.generation


def test_the_parts_are_within_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _, told, _ = samples_of_a_run(monkeypatch, every_seconds=0.0)
    beside = (purposes.STEPS, purposes.CHECKS, purposes.EVALUATION, purposes.WAITING, purposes.WINDOWS)
    for _, account in told:
        parts = sum(account.get(f"wall_seconds_{purpose}", 0.0) for purpose in beside)
        assert parts <= account["wall_seconds_total"]
    totals = [account["wall_seconds_total"] for _, account in told]
    assert totals == sorted(totals)


def test_it_is_told_with_every_evaluation_and_in_between_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, seldom, evaluations = samples_of_a_run(monkeypatch, every_seconds=1e9)
    assert [step for step, _ in seldom] == [e.step for e in evaluations]
    _, often, evaluations = samples_of_a_run(monkeypatch, every_seconds=0.0)
    assert len(often) > 2 * len(evaluations)
