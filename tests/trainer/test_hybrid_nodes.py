"""Hybrid with real processes: its own server, predictor, monitor and page; and without any of them."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.request import urlopen

from common.messages import Verdict
from common.recording import messages_of, read_recording
from common.streams import DECISIONS, HISTORY
from tests.nodes import wait_for
from tests.trainer import own


def test_three_lines_start_all_nodes_and_leave_a_whole_run(tmp_path: Path) -> None:
    model, optimizer = own.job()
    options = {"redis": "embedded://", "run_id": "mine"}
    with own.in_process(
        model, optimizer, tmp_path, *own.FIXED, "trainer.decision_mode=lockstep", **options
    ) as hybrid:
        data = own.batches(4000)
        for _ in range(100):
            hybrid.step(own.loss_of, model, next(data))
        hybrid.note_evaluation(1.0)

        def page() -> str:
            hybrid.step(own.loss_of, model, next(data))
            return hybrid.page

        with urlopen(wait_for(page)) as answer:
            assert answer.status == 200
        verdicts = dict(hybrid.loop.ledger.verdicts)  # type: ignore[union-attr]
    run = tmp_path / "mine"
    assert verdicts[Verdict.ACCEPTED]
    kinds = {json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert {"Observation", "Outcome", "Evaluation", "RunEnded"} <= kinds
    recording = read_recording(run / "recording.hpt")
    assert recording.sealed
    assert list(messages_of(recording, DECISIONS))
    assert list(messages_of(recording, HISTORY))


def test_without_predictor_and_monitor_training_goes_on_as_plain_training(tmp_path: Path) -> None:
    plain = own.job()
    own.train_plain(*plain, own.batches(60))
    model, optimizer = own.job()
    options = {"redis": "embedded://"}
    with own.in_process(model, optimizer, tmp_path, *own.QUICK, **options) as hybrid:
        hybrid._on._children.stop()  # type: ignore[attr-defined]
        hybrid._on._children = None  # type: ignore[attr-defined]
        for batch in own.batches(60):
            hybrid.step(own.loss_of, model, batch)
    assert own.same(own.state_of(model, optimizer), own.state_of(*plain))
