"""What is known of a race by now: its record, from its plan and the runs that are there. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from trainer_node.race.arms import ARMS
from trainer_node.race.crossing_search import Found, Missed
from trainer_node.race.options import RaceOptions
from trainer_node.race.plan import RaceRecord
from trainer_node.race.run_result import TIME, RunResult
from trainer_node.race.waves import Standing


def record_of(
    options: RaceOptions, standing: Standing, notes: Sequence[str] = (), runs: Sequence[RunResult] = ()
) -> RaceRecord:
    """`runs`: all that are there, those of other seeds and configs too."""
    plan, reference = standing.plan, standing.reference_arm()
    tuned = {name: standing.tuned(ARMS[name]) for name in plan.arms}
    states = {name: standing.crossing(ARMS[name]) for name in plan.arms if ARMS[name].rule != "constant"}
    return RaceRecord(
        task=plan.task,
        rule=plan.rule,
        target=standing.target(),
        base_steps=plan.base_steps,
        seeds=plan.seeds,
        trials=plan.trials,
        total_trials=plan.trials * plan.levels,
        arms=plan.arms,
        tuned={name: config for name, config in tuned.items() if config is not None},
        reference_arm=reference.name if reference is not None else "",
        machine=" and ".join(dict.fromkeys(run.machine for run in runs)),  # it may have gone on elsewhere
        date=options.today,
        command=options.command,
        crossings={
            name: plan.lattice.steps(state.k) if isinstance(state, Found) else None
            for name, state in states.items()
            if isinstance(state, Found | Missed)
        },
        incomplete=tuple(name for name in plan.arms if standing.missing_of(ARMS[name])),
        notes=tuple(notes),
        in_distribution=tuple(name for name in plan.arms if plan.rule == "fitted" and ARMS[name].is_ours),
        fitted_on=options.fitted_on or 0,
        remarks=remarks_on(runs),
    )


def remarks_on(runs: Sequence[RunResult]) -> tuple[str, ...]:
    """Runs of one folder may be of several versions of the code: they are kept, and it is said."""
    all_made, timed = len({run.code for run in runs}), len({r.code for r in runs if r.key.purpose == TIME})
    if all_made < 2:
        return ()
    return (f"Its runs were made by {all_made} versions of the code, those that were timed by {timed}.",)
