"""Learning from recorded runs: their histories through a learned policy that follows instead of leading.

Each recording is read as the predictor read it live: every observation is learned from, every decision that
was made is taken as if it had been ours, its outcome settles it. Trials of controls are no jumps: the world
model sees them in the features of their steps, and nothing else learns from them here. What was learned goes
on to the next recording; at the end the networks are trained for as many updates as asked. Reads no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import settings_from_toml
from common.errors import RecordingError
from common.messages import Message, Observation, Outcome, PhaseDecision, RunStarted
from common.recording import messages_of, read_recording
from common.streams import DECISIONS, HISTORY
from predictor_node.history import History
from predictor_node.learned import LearnedPolicy
from predictor_node.phi_runs import WindowSample
from predictor_node.policy import DecisionInput
from predictor_node.state import RunFacts, facts_of
from predictor_node.warm_start import write_warm_start


@dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    runs: int
    steps: int  # observations learned from
    jumps: int  # outcomes of applied jumps


def fit(
    recordings: Sequence[str | Path],
    out: str | Path,
    *,
    updates: int = 400,
    progress: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Train on the recordings, oldest first, and write the state for `predictor.state`.

    Raises RecordingError for a file without a run, EnvironmentFault when `out` cannot be written.
    """
    policy: LearnedPolicy | None = None
    runs: list[list[WindowSample]] = []
    steps = jumps = 0
    for path in recordings:
        recording = read_recording(Path(path))
        policy, run_steps, run_jumps = _live_through(
            list(messages_of(recording, HISTORY)), list(messages_of(recording, DECISIONS)), policy, path
        )
        steps, jumps = steps + run_steps, jumps + run_jumps
        runs.append(policy.models.samples)
        progress(f"{path}: {run_steps} steps, {run_jumps} jumps")
    if policy is None:
        raise RecordingError("no recording was given")
    progress(policy.models.fit(runs, updates))
    write_warm_start(Path(out), policy.state())
    return Fitted(runs=len(recordings), steps=steps, jumps=jumps)


def _live_through(
    history: Sequence[Message],
    decisions: Sequence[Message],
    former: LearnedPolicy | None,
    path: str | Path,
) -> tuple[LearnedPolicy, int, int]:
    made = {(d.base_step, d.base_attempt): d for d in decisions if isinstance(d, PhaseDecision)}
    of_controls = {d.decision_id for d in made.values() if d.controls is not None and not d.horizon_steps}
    policy, facts, seen = None, None, History()
    steps = jumps = 0
    for message in history:
        match message:
            case RunStarted():
                if policy is not None:
                    break  # resumed: the second half would repeat steps that were learned from
                facts = facts_of(message)
                policy = _policy_for(facts)
                if former is not None:
                    policy.start_warm(former.state())
            case Observation() if policy is not None and facts is not None and not seen.is_repeat(message):
                seen = seen.append(message)
                policy.observe(message, seen)
                decision = made.get((message.step, message.attempt))
                if (
                    message.decision_point is not None
                    and decision
                    and decision.decision_id not in of_controls
                ):
                    policy.follow(
                        DecisionInput(
                            observation=message,
                            point=message.decision_point,
                            generation=facts.generation,
                            history=seen,
                            num_groups=facts.num_groups,
                            directions=facts.directions,
                        ),
                        decision,
                    )
                steps += 1
            case Outcome() if policy is not None and message.decision_id in of_controls:
                seen = seen.after(message)
            case Outcome() if policy is not None:
                policy.settle(message)
                jumps += message.probation_steps > 0
    if policy is None or not steps:
        raise RecordingError(f"{path}: holds no run from its start: nothing to learn from")
    return policy, steps, jumps


def _policy_for(facts: RunFacts) -> LearnedPolicy:
    """Of the settings of the recorded run, starting from nothing."""
    settings = settings_from_toml(facts.settings_toml)
    settings = replace(settings, predictor=replace(settings.predictor, policy="learned", state=""))
    policy = LearnedPolicy(settings, facts)
    policy.models.new_run(is_warm=True)  # offline there is no trainer to be fair to
    policy.models.keeps_samples = True
    return policy
