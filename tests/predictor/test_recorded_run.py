"""A recording that this project made and keeps: what was decided then is decided now, to the byte.

tests/fixtures/digits-lockstep.hpt is a lockstep run of 200 steps: `tests.nodes.up_command` with
"trainer.decision_mode=lockstep", "trainer.verify.tolerance=0.0".
A change of the message schema, the features or the fixed policy's arithmetic shows here; if it is meant, make
the file anew and say so in the changelog.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import RecordingError
from common.messages import APPLIED_VERDICTS, Outcome, PhaseDecision, RunEnded, RunStarted, Verdict
from common.recording import messages_of, read_recording
from common.streams import DECISIONS, HISTORY
from predictor_node.replay import replay

RECORDING = Path(__file__).parent.parent / "fixtures" / "digits-lockstep.hpt"


def test_the_kept_recording_still_gives_the_same_decisions_byte_for_byte() -> None:
    recording = read_recording(RECORDING)
    assert recording.sealed
    replayed = replay(recording.entries, is_sealed=recording.sealed)
    assert (replayed.difference, replayed.gap, replayed.unrecorded) == ("", "", 0)
    assert list(replayed.decisions) == list(messages_of(recording, DECISIONS))
    assert len(replayed.decisions) > 5


def test_the_kept_recording_holds_a_whole_run_with_kept_and_undone_jumps() -> None:
    recording = read_recording(RECORDING)
    history = list(messages_of(recording, HISTORY))
    assert isinstance(history[0], RunStarted)
    assert isinstance(history[-1], RunEnded)
    verdicts = {m.verdict for m in history if isinstance(m, Outcome)}
    assert Verdict.ACCEPTED in verdicts
    assert verdicts & APPLIED_VERDICTS - {Verdict.ACCEPTED}
    assert all(isinstance(m, PhaseDecision) for m in messages_of(recording, DECISIONS))


def test_one_flipped_byte_of_the_kept_recording_is_refused(tmp_path: Path) -> None:
    content = bytearray(RECORDING.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = tmp_path / "damaged.hpt"
    damaged.write_bytes(content)
    with pytest.raises(RecordingError, match="damaged"):
        read_recording(damaged)
