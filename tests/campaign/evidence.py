"""Reads what a run left behind into laws.Evidence, and repeats the run with its own decisions.

Reads folders and logs, and starts one trainer for the repetition. Judges nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import codec, sealed_folder
from common.bus import Entry, EntryId
from common.errors import CheckpointError, RecordingError
from common.messages import PhaseDecision
from common.recording import read_recording
from common.recording_writer import RecordingWriter
from common.streams import DECISIONS
from tests.campaign.laws import Evidence
from tests.campaign.lineage import lineage, taken_decisions
from tests.campaign.lives import expected, lives_of
from tests.campaign.plan import PREDICTOR
from tests.campaign.scene import RUN_ID, Scene, spawn
from tests.nodes import metric_lines

REPEAT_SECONDS = 300.0


def gather(scene: Scene, *, steps: int, data_was_lost: bool, attack_notes: Sequence[str]) -> Evidence:
    """After `Scene.end`. The server must still be there: the repetition writes into a run of its own."""
    entries = scene.witness.all_entries()
    lives = lives_of(log_records(scene.log_folder / f"{PREDICTOR}.log"))
    taken, undecided = taken_decisions(entries, lineage(entries), _verdicts(scene.run))
    recording, recording_fault = _recording(scene.run / "recording.hpt")
    return Evidence(
        entries=entries,
        recording=recording,
        recording_fault=recording_fault,
        data_was_lost=data_was_lost,
        lives=lives,
        expected=expected(entries, lives),
        saved_states=_newest_state(scene.run / "checkpoints" / "predictor"),
        broken_checkpoints=list(_broken(scene.run / "checkpoints")),
        model=_model(scene.run),
        replayed_model=repeat(scene, taken) if not undecided else b"",
        taken=taken,
        undecided=undecided,
        summary=_summary(scene.run),
        steps=steps,
        unpublished_told=any(
            line["alert_kind"] == "unpublished" for line in metric_lines(scene.run, "Alert")
        ),
        stack_traces=list(_stack_traces(scene.log_folder)),
        attack_notes=attack_notes,
    )


def repeat(scene: Scene, taken: Sequence[PhaseDecision]) -> bytes:
    """The model of a run that takes these decisions and has no predictor; b"" if it did not end."""
    file = scene.folder / "decisions.hpt"
    write_decisions(file, taken)
    again = scene.folder / "again"
    arguments = [
        "trainer_node", "train", "--config", str(scene.run / "config.toml"), "--runs-dir", str(again),
        "--run-id", RUN_ID + "-again", "--decisions", str(file), "--stop-with-parent",
    ]  # fmt: skip
    environment = {**scene.environment(""), "HPT_REDIS_URL": scene.server.url}
    process = spawn(arguments, environment, scene.log_folder / "again.log")
    try:
        scene.wait_for(lambda: process.poll() is not None, REPEAT_SECONDS)
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    return _model(again / f"{RUN_ID}-again") if process.returncode == 0 else b""


def write_decisions(file: Path, taken: Sequence[PhaseDecision]) -> None:
    """A recording of decisions only, renumbered: they come from several starts."""
    with contextlib.closing(RecordingWriter(file, run_id=RUN_ID, created_unix_seconds=0.0)) as writer:
        for number, decision in enumerate(taken, start=1):
            body = codec.encode(replace(decision, base_generation=1))
            writer.append(Entry(DECISIONS, EntryId(1, number), PhaseDecision.__name__, body, 0.0))
        writer.seal()


def log_records(log: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a node's log; other lines are for people."""
    if not log.exists():
        return
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "event" in record:
                yield record


def _recording(file: Path) -> tuple[Sequence[Entry] | None, str]:
    try:
        recording = read_recording(file)
    except RecordingError as error:
        return None, str(error)
    return recording.entries, "" if recording.sealed else "not sealed"


def _newest_state(root: Path) -> dict[str, dict[str, bytes]]:
    for folder in sealed_folder.folders(root)[:1]:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        return {folder.name: files}
    return {}


def _broken(root: Path) -> Iterator[str]:
    for node in sorted(root.iterdir()) if root.is_dir() else ():
        for folder in sealed_folder.folders(node):
            try:
                sealed_folder.verify(folder)
            except CheckpointError as error:
                yield str(error)


def _model(run: Path) -> bytes:
    folders = sealed_folder.folders(run / "checkpoints" / "trainer")
    return (folders[0] / "model.safetensors").read_bytes() if folders else b""


def _verdicts(run: Path) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in metric_lines(run, "Outcome"):
        found.setdefault(record["decision_id"], set()).add(record["verdict"])
    return found


def _summary(run: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    return None


def _stack_traces(folder: Path) -> Iterator[str]:
    for log in sorted(folder.glob("*.log")):
        text = log.read_text(encoding="utf-8", errors="replace")
        if "Traceback (most recent call last)" in text:
            after = text.partition("Traceback (most recent call last)")[2].splitlines()
            last = next((line for line in after[1:] if line and not line.startswith((" ", "{"))), "")
            yield f"{log.name}: {last}"
