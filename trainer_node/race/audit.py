"""Judges the guard and the forecasts of a task by the road not taken.

At every jump that the run applies, a twin without it is trained from the same state on the same
batches, and the jumped run is trained on past its judgement whatever the verdict was. The audited run
itself ends bit for bit as it would have unwatched. Costs several times the run. Writes audit.json, whose
keys are described in audit_table.py. Decides nothing: people and the choice of settings read it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from common import features
from common.clock import SystemClock
from common.config import dump_settings
from common.messages import (
    Message,
    Observation,
    Order,
    Outcome,
    Phase,
    PhaseDecision,
    Verdict,
)
from common.settings import RunSettings
from trainer_node.assembly import build_loop, prepare_task, run_started
from trainer_node.delta import forecaster_of, move
from trainer_node.links import DecisionSource
from trainer_node.loop import Loop
from trainer_node.race.anatomy import Candidate, Difference, dissect_run, table_of
from trainer_node.race.audit_table import (
    LATER_STEPS,
    LATEST_STEPS,
    AuditedJump,
    audit_lines,
    calibration_of,
    cosines_of,
    gains_of,
    plain,
    verdict_counts,
)
from trainer_node.race.in_process import InProcessPredictor, installed_predictor
from trainer_node.race.machine import machine
from trainer_node.race.twin import Crossroads, Reading, nothing

AUDIT_SCHEMA = 1
JUDGED = (Verdict.ACCEPTED, Verdict.REFUSED, Verdict.RUINED)


class Predictor(DecisionSource, Protocol):
    def emit(self, message: Message) -> None: ...


@dataclass(frozen=True, kw_only=True)
class _OpenJump:
    """A proposal that may be applied, with its twin."""

    decision: PhaseDecision
    probation_steps: int
    twin: dict[int, Reading]  # by steps since the decision
    cosine: float
    jumped: dict[int, Reading] | None = None  # by steps since the judgement


class Auditor:
    """The predictor's place in the loop: passes everything on, and looks down the other road."""

    def __init__(self, predictor: Predictor, *, seed: int) -> None:
        self.loop: Loop | None = None  # the loop is built with its links, so it comes after
        self.jumps: list[AuditedJump] = []
        self._predictor, self._seed = predictor, seed
        self._open: _OpenJump | None = None

    def wait_decision(self, *, step: int, attempt: int, seconds: float | None) -> PhaseDecision | None:
        decision = self._predictor.wait_decision(step=step, attempt=attempt, seconds=seconds)
        self._open = self._with_twin(decision) if decision and decision.phase is Phase.PREDICT else None
        return decision

    def emit(self, message: Message) -> None:
        loop, opened = self._watched, self._open
        if opened is not None and isinstance(message, Observation):
            if loop.progress.phase.is_judgement_point and message.step == loop.progress.step:
                self._open = replace(opened, jumped=self._jumped_from_here())
        elif opened is not None and isinstance(message, Outcome):
            if message.verdict in JUDGED and message.decision_id == opened.decision.decision_id:
                self.jumps.append(self._audited(opened, message))
            self._open = None
        self._predictor.emit(message)

    def veto(self) -> str | None:
        return self._predictor.veto()

    def take_orders(self) -> list[Order]:
        return self._predictor.take_orders()

    @property
    def _watched(self) -> Loop:
        assert self.loop is not None, "the loop was not handed over"
        return self.loop

    def _with_twin(self, decision: PhaseDecision) -> _OpenJump | None:
        """None for a delta that cannot be made: the loop will call it malformed."""
        loop, basis = self._watched, self._watched.tools.basis
        probation_steps = loop.rules.probation_steps
        with Crossroads(loop) as here:
            horizon_steps = max(1, min(decision.horizon_steps, here.steps_left))
            later = [probation_steps + after for after in (0, LATER_STEPS, LATEST_STEPS)]
            twin = here.road(nothing, [0, horizon_steps, *later, here.last(later[1])])
            here.set_back()
            try:
                delta = move(basis, loop.tools.deltas(decision, forecaster_of(basis, decision)))
            except (ValueError, IndexError):
                return None
        if horizon_steps not in twin:
            return None
        real_Gm = twin[horizon_steps].weights_Gm - twin[0].weights_Gm
        return _OpenJump(
            decision=decision,
            probation_steps=probation_steps,
            twin=twin,
            cosine=basis.cosine(delta.sample_Gm, real_Gm),
        )

    def _jumped_from_here(self) -> dict[int, Reading]:
        """The jumped run, corrections and all, stands at its judgement."""
        with Crossroads(self._watched) as here:
            return here.road(nothing, [0, here.last(LATER_STEPS), LATEST_STEPS])

    def _jumped_anew(self, opened: _OpenJump) -> dict[int, Reading]:
        """A jump that was undone at once is taken again, whole, and trained on unguarded."""
        loop, decision = self._watched, opened.decision
        basis, at = loop.tools.basis, opened.probation_steps

        def jump() -> None:
            move(basis, loop.tools.deltas(decision, forecaster_of(basis, decision)))

        with Crossroads(loop) as here:
            stops = [at, here.last(at + LATER_STEPS), at + LATEST_STEPS]
            return {steps - at: reading for steps, reading in here.road(jump, stops).items()}

    def _audited(self, opened: _OpenJump, outcome: Outcome) -> AuditedJump:
        decision, at, twin = opened.decision, opened.probation_steps, opened.twin
        jumped = opened.jumped if opened.jumped is not None else self._jumped_anew(opened)

        def gain(after: int) -> float:
            if after not in jumped or at + after not in twin:
                return math.nan
            found = jumped[after].held_out
            return twin[at + after].held_out - found if math.isfinite(found) else -math.inf

        later = max(after for after in jumped if after <= LATER_STEPS)
        forecast = decision.forecast
        return AuditedJump(
            seed=self._seed,
            step=decision.base_step,
            arm=decision.arm,
            horizon_steps=decision.horizon_steps,
            verdict=outcome.verdict.value,
            gain_judged=gain(0) if opened.jumped is not None else math.nan,
            gain_later=gain(later),
            gain_latest=gain(LATEST_STEPS),
            cosine=opened.cosine,
            guard_forecast=outcome.loss_forecast,
            guard_spread=outcome.loss_spread,
            guard_twin=twin[at].guard,
            refusal_forecast=forecast.refusal if forecast else math.nan,
        )


def audit_run(settings: RunSettings, auditor: Auditor) -> Loop:
    """One lockstep run of the task under audit, from its first step to its last."""
    loop = build_loop(
        prepare_task(settings.trainer),
        settings,
        links=auditor,
        emit=auditor.emit,
        housekeeping=lambda _: None,
        clock=SystemClock(),
        generation=1,
        snapshot_folder=None,
    )
    auditor.loop = loop
    auditor.emit(
        run_started(
            loop,
            run_id="audit",
            settings_toml=dump_settings(settings),
            resumed_from="",
            feature_version=features.VERSION,
        )
    )
    loop.run()
    return loop


def audit_task(
    settings: RunSettings,
    out_dir: Path,
    *,
    seeds: Sequence[int],
    task: str = "",
    command: str = "",
    candidates: Sequence[Candidate] | None = None,
    to_the_end: bool = False,
    make_predictor: Callable[[], Predictor] | None = None,
) -> Iterator[str]:
    """Audit and dissect a run per seed, write audit.json and audit.txt; yields lines for people.

    Raises DataError and EnvironmentFault as `prepare_task` does. `task` defaults to the settings' own.
    """
    jumps: list[AuditedJump] = []
    dissected: list[Difference] = []
    for seed in seeds:
        trainer = replace(settings.trainer, seed=seed, decision_mode="lockstep")
        seeded = replace(settings, trainer=trainer)
        auditor = Auditor(make_predictor() if make_predictor else _installed(), seed=seed)
        audit_run(seeded, auditor)
        jumps += auditor.jumps
        yield f"seed {seed}: {len(auditor.jumps)} jumps audited"
        dissected += dissect_run(seeded, seed=seed, candidates=candidates, to_the_end=to_the_end)
        yield f"seed {seed}: {len(dissected)} trials of the anatomy so far"
    values = {
        "schema": AUDIT_SCHEMA,
        "task": task or settings.trainer.task,
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": machine(),
        "command": command,
        "seeds": list(seeds),
        "anatomy": table_of(dissected),
        "verdicts": verdict_counts(jumps),
        "gains": gains_of(jumps),
        "cosines": cosines_of(jumps),
        "calibration": calibration_of(jumps),
        "jumps": [plain(jump) for jump in jumps],
    }
    lines = audit_lines(values)
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=1, allow_nan=False)
    (out_dir / "audit.json").write_text(text + "\n", encoding="utf-8")
    (out_dir / "audit.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    yield from lines


def _installed() -> Predictor:
    return InProcessPredictor(installed_predictor(), SystemClock())
