"""What must be true of a run whatever was done to it. Pure: evidence in, violations out, with where to look.

Each law is a function from Evidence to a list of violations; `violations` asks them all. tests/campaign/
test_campaign_laws.py shows each of them failing on a forged breach.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.bus import STREAM_START, Entry, EntryId
from common.features import INDEX
from common.messages import APPLIED_VERDICTS, PhaseDecision, RunEnded
from common.streams import DECISIONS, HISTORY, STREAMS
from tests.campaign.lineage import Lineage, decoded, lineage
from tests.campaign.lives import Expected, Life, recorded_decisions


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What a run left behind, read but not judged."""

    entries: Sequence[Entry]  # of all streams, in the order of arrival, as the witness read them
    recording: Sequence[Entry] | None  # recording.hpt; None: it cannot be read
    recording_fault: str
    data_was_lost: bool  # by an attack: then the recorder may lack what the witness saw
    lives: Sequence[Life]  # of the predictor
    expected: Expected  # of these lives
    saved_states: Mapping[str, Mapping[str, bytes]]  # of the predictor, on disk: name -> file -> content
    broken_checkpoints: Sequence[str]
    model: bytes  # of the newest trainer checkpoint
    replayed_model: bytes  # of a run that took the recorded decisions; b"" where there is none
    taken: Sequence[PhaseDecision]  # by the starts that led to the end, in order
    undecided: Sequence[str]  # taken decisions that nobody recorded
    summary: Mapping[str, Any] | None
    steps: int  # that the run was to have
    unpublished_told: bool  # the trainer said that its last words did not reach the server
    stack_traces: Sequence[str]  # one line each: log and exception
    attack_notes: Sequence[str]  # what attacks themselves found wrong


Law = Callable[[Evidence], list[str]]


def ids_come_once(evidence: Evidence) -> list[str]:
    counts = Counter((entry.stream, entry.id) for entry in evidence.entries)
    return [f"{stream} {id_} was written {n} times" for (stream, id_), n in counts.items() if n > 1]


def no_stale_generation_writes(evidence: Evidence) -> list[str]:
    """In the order of arrival no stream goes back to an older generation."""
    newest = dict.fromkeys(STREAMS, STREAM_START)
    found = []
    for entry in evidence.entries:
        if entry.id.generation < newest[entry.stream].generation:
            found.append(f"{entry.stream} {entry.id} was written after {newest[entry.stream]}")
        newest[entry.stream] = max(newest[entry.stream], entry.id)
    return found


def steps_are_observed_once(evidence: Evidence) -> list[str]:
    """Within one start of the trainer no step of an attempt is told twice."""
    told = Counter(
        (entry_id.generation, message.attempt, message.step)
        for entry_id, message in decoded(evidence.entries, HISTORY)
        if type(message).__name__ == "Observation"
    )
    return [
        f"step {step} of attempt {attempt}, generation {generation} was observed {n} times"
        for (generation, attempt, step), n in told.items()
        if n > 1
    ]


def gaps_are_reported(evidence: Evidence) -> list[str]:
    """A hole in the history that nobody can fill any more was told by the predictor that met it."""
    found = []
    for first, instead in holes(evidence.entries, HISTORY):
        lives = [life for life in evidence.lives if life.behind < instead]
        if lives and not any(life.has_missed(first) for life in lives):
            found.append(f"history {first} to before {instead} is missing and no life reported it")
    return found


def decisions_follow_from_what_was_applied(evidence: Evidence) -> list[str]:
    """Byte for byte those of a predictor that applied each entry once, but for the reported gaps."""
    found = [*evidence.expected.unknown]
    for key, body in recorded_decisions(evidence.entries).items():
        made = evidence.expected.decisions.get(key)
        name = f"decision {key[2]} of trainer generation {key[1]}, predictor generation {key[0]}"
        if made is None:
            found.append(f"{name} cannot be made again from what was applied")
        elif made != body:
            found.append(f"{name} differs from the one made again")
    return found


def states_follow_from_what_was_applied(evidence: Evidence) -> list[str]:
    """What the predictor saved last, byte for byte: the exactly-once effect of every observation."""
    found = []
    for name, files in evidence.saved_states.items():
        wanted = evidence.expected.states.get(name)
        if wanted is None:
            found.append(f"predictor state {name} cannot be made again")
        else:
            found += [
                f"predictor state {name}: {file} differs" for file in wanted if wanted[file] != files[file]
            ]
    return found


def no_delta_is_applied_twice(evidence: Evidence) -> list[str]:
    line = lineage(evidence.entries)
    applied = Counter(o.decision_id for _, o in line.outcomes if o.verdict in APPLIED_VERDICTS)
    return [
        f"decision {name} was applied {n} times on the way to the end" for name, n in applied.items() if n > 1
    ]


def every_delta_was_decided_for_its_start(evidence: Evidence) -> list[str]:
    """An applied decision was made for the very generation that applied it, or nobody recorded it."""
    made: dict[str, set[int]] = {}
    for _, message in decoded(evidence.entries, DECISIONS):
        if isinstance(message, PhaseDecision):
            made.setdefault(message.decision_id, set()).add(message.base_generation)
    found = []
    for generation, outcome in lineage(evidence.entries).outcomes:
        made_for = made.get(outcome.decision_id, {generation})
        if outcome.verdict in APPLIED_VERDICTS and generation not in made_for:
            name = outcome.decision_id
            found.append(f"generation {generation} applied decision {name}, made for {sorted(made_for)}")
    return found


def parameters_are_those_of_the_decisions(evidence: Evidence) -> list[str]:
    found = [f"taken decision {name} was recorded by nobody" for name in evidence.undecided]
    if not evidence.undecided and evidence.model != evidence.replayed_model:
        found.append("the weights differ from those of a run with the same decisions: model.safetensors")
    return found


def checkpoints_verify(evidence: Evidence) -> list[str]:
    return [f"checkpoint does not verify: {text}" for text in evidence.broken_checkpoints]


def losses_are_finite(evidence: Evidence) -> list[str]:
    line: Lineage = lineage(evidence.entries)
    lost = [o.step for _, o in line.observations if not math.isfinite(o.features[INDEX["loss"]])]
    return [f"the training loss of step {step} is not finite" for step in lost[:5]]


def the_run_is_finished(evidence: Evidence) -> list[str]:
    summary = evidence.summary
    if summary is None:
        return ["there is no summary.json: the run did not end"]
    if (summary["status"], summary["real_steps"]) != ("finished", evidence.steps):
        return [f"the run ended as {summary['status']} at step {summary['real_steps']} of {evidence.steps}"]
    held_out = summary["val_loss_last"]
    return [] if isinstance(held_out, float) and math.isfinite(held_out) else [f"held-out loss {held_out}"]


def the_end_is_told(evidence: Evidence) -> list[str]:
    """The newest start said on the streams that the run is over, or told people that it could not."""
    history = decoded(evidence.entries, HISTORY)
    newest = max((entry_id.generation for entry_id, _ in history), default=0)
    said = any(isinstance(m, RunEnded) and entry_id.generation == newest for entry_id, m in history)
    return [] if said or evidence.unpublished_told else ["nobody was told that the run ended"]


def the_recording_is_the_run(evidence: Evidence) -> list[str]:
    """Readable, nothing in it that was not said, and whole unless the server lost data on purpose."""
    if evidence.recording is None:
        return [f"recording.hpt: {evidence.recording_fault}"]
    said = {(e.stream, e.id): (e.kind, e.body) for e in evidence.entries}
    recorded = {(e.stream, e.id): (e.kind, e.body) for e in evidence.recording}
    found = [f"recorded but never said: {key[0]} {key[1]}" for key in recorded if key not in said]
    found += [
        f"recorded otherwise than said: {k[0]} {k[1]}"
        for k in recorded
        if said.get(k, recorded[k]) != recorded[k]
    ]
    if not evidence.data_was_lost:
        found += [f"said but not recorded: {key[0]} {key[1]}" for key in said if key not in recorded]
    return found


def no_stack_trace(evidence: Evidence) -> list[str]:
    return [f"stack trace in {text}" for text in evidence.stack_traces]


def attacks_went_as_they_must(evidence: Evidence) -> list[str]:
    return list(evidence.attack_notes)


LAWS: tuple[Law, ...] = (
    ids_come_once,
    no_stale_generation_writes,
    steps_are_observed_once,
    gaps_are_reported,
    decisions_follow_from_what_was_applied,
    states_follow_from_what_was_applied,
    no_delta_is_applied_twice,
    every_delta_was_decided_for_its_start,
    parameters_are_those_of_the_decisions,
    checkpoints_verify,
    losses_are_finite,
    the_run_is_finished,
    the_end_is_told,
    the_recording_is_the_run,
    no_stack_trace,
    attacks_went_as_they_must,
)


def violations(evidence: Evidence) -> list[str]:
    """All, each with the name of its law in front."""
    return [f"{law.__name__}: {text}" for law in LAWS for text in law(evidence)]


def holes(entries: Sequence[Entry], stream: str) -> list[tuple[EntryId, EntryId]]:
    """(first missing id, id that came instead), within generations: the end of one is not known."""
    found = []
    previous = STREAM_START
    for entry_id in sorted({entry.id for entry in entries if entry.stream == stream}):
        is_new = entry_id.generation != previous.generation
        wanted = EntryId(entry_id.generation, 1 if is_new else previous.sequence + 1)
        if wanted < entry_id:
            found.append((wanted, entry_id))
        previous = entry_id
    return found
