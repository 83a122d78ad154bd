"""What the figures of a race say and do not say, in sentences. Every word follows from the numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from statistics import fmean

from trainer_node.race.figures import ArmFigures, RaceFigures
from trainer_node.race.rules import RULES, headline_arm
from trainer_node.race.statistics import Ratio, best_possible_coverage

# Beside every result of the rule, and on the page of evidence.
RESERVATIONS = {
    "whole-stack": "The factor is that of the whole stack: most of it is Muon's or the schedule's where their"
    " own rows say so. Ours took the choice of the same arm without prediction and had no trials of its own."
    " Convolutions get no Muon: on digits its arms are AdamW.",
    "untuned": "Nothing was tuned, least of all the reference: the factor says what another optimizer and"
    " rate are worth to someone who would not look for them, not that prediction is fast. 3e-4 and 1e-3 come"
    " from larger nets and longer runs; where they are too low for this one, that is in the factor. The"
    " headline arm runs at the product's defaults; the preset's rates, those of ours-muon, come of a sweep"
    " over this very task.",
    "hands-free": "The sweep chose by the held-out loss after equal tokens, and what it cost is not counted."
    " A batch that is faster by the clock may have lost there, so the tuned AdamW of the task's own batch is"
    " raced too; the faster of both counts. Arms of ours took the sweep's choice, put it wrong on purpose,"
    " and had no trials; a batch that cannot be cut by four is cut as far as it can.",
    "ramp": "The sweep chose by the held-out loss after equal tokens, and what it cost is not counted. A"
    " batch that is faster by the clock may have lost there, so the tuned AdamW of the task's own batch is"
    " raced too; the faster of both counts.",
    "controls": "Nothing was tuned: every arm runs at the settings of the task's preset.",
}
JUMPING_ARM = "ours-aggressive"  # jumps in short runs too: only there forecasts of jumps can be judged
FEW_SEEDS = 10  # reference/speedup.md: with a 10 % spread of the ratio, 10 seeds resolve about 7 %


def comparison(arm: str, versus: str, ratio: Ratio) -> str:
    """One clause: what a ratio of times and its interval allow to say."""
    if not ratio.pairs:
        both = f": on {ratio.both_missed} seeds neither reached the target" if ratio.both_missed else " yet"
        return f"{arm} and {versus} cannot be compared{both}"
    times = f"{factor(ratio.median)} ({interval(ratio)}; faster on {ratio.wins} of {ratio.pairs} seeds)"
    if ratio.median == 0:
        return f"{arm} missed the target on half or more of the seeds where {versus} reached it"
    if best_possible_coverage(ratio.pairs) < 0.95:
        return f"{arm} against {versus}: {times}, too few seeds to tell a difference from luck"
    if ratio.low95 > 1:
        return f"{arm} reached the target faster than {versus}: {times}"
    if ratio.high95 < 1:
        return f"{arm} was slower than {versus}: {times}"
    return f"no difference between {arm} and {versus} could be shown: {times}"


def factor(ratio: float) -> str:
    """A ratio of times for people: how many times as fast."""
    if math.isnan(ratio):
        return "–"
    return "∞" if math.isinf(ratio) else f"{ratio:.2f}×" if ratio >= 9.995 else f"{ratio:.3f}×"


def ends(ratio: Ratio) -> str:
    """Of the interval, for a cell: "0.98 – 1.04"."""
    return " – ".join(factor(end).removesuffix("×") for end in (ratio.low95, ratio.high95))


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %"


def interval(ratio: Ratio) -> str:
    if ratio.pairs < 2:
        return "one seed: no interval"
    return f"95 % interval {factor(ratio.low95)} to {factor(ratio.high95)}"


def headline(figures: RaceFigures) -> str:
    """The result in one or two sentences."""
    race = figures.race
    if race.target is None or not race.reference_arm:
        return f"The race on {race.task} is not that far yet: its target is not known."
    name = headline_arm(race.arms, race.rule)
    ratio = figures.pair(name, race.reference_arm)
    if not name:
        result = " or ".join(RULES[race.rule].headlines)
        first = (
            f"This race on {race.task} has no result: {result}, on which its rule is judged, is not all in it"
        )
    elif ratio is None:
        first = f"This race on {race.task} has no finished arm of ours"
    else:
        first = f"On {race.task}, " + comparison(name, race.reference_arm, ratio)
    first += f". The target is a held-out loss of {race.target:.4g}, time is that of the core"
    first += ", the predictor's included." if ratio else "."
    best = fastest(figures)
    if best and best.arm != name:
        first += f" The fastest arm was {best.arm} ({factor(best.ratio.median)})."
    return first


def fastest(figures: RaceFigures) -> ArmFigures | None:
    """The arm with the highest median ratio; None while nothing can be compared."""
    known = [arm for arm in figures.arms if not math.isnan(arm.ratio.median)]
    return max(known, key=lambda arm: arm.ratio.median, default=None)


def reservations(figures: RaceFigures) -> list[str]:
    """What must be said beside the headline."""
    race = figures.race
    lines = ["One task, one machine, one budget: other models, data and lengths may come out differently."]
    if race.rule == "constant":
        lines.append(
            "All arms train at a constant rate. Such methods are usually scored like that, and it flatters"
            " them: a tuned, decayed rate takes most of the gain away. The decayed rules decide."
        )
    lines += [RESERVATIONS[race.rule]] if race.rule in RESERVATIONS else []
    if (seeds := len(race.seeds)) < FEW_SEEDS:
        lines.append(
            f"{seeds} seed{'s' * (seeds != 1)}: an interval of their median covers at most"
            f" {percent(best_possible_coverage(seeds))}, whatever it is called; claims need {FEW_SEEDS}."
        )
    if race.trials <= 1 and RULES[race.rule].tunes:
        lines.append("One trial an arm: nothing was tuned, so differences may be those of a lucky setting.")
    lines += _about_overtraining(figures) + _about_misses(figures)
    if race.in_distribution:
        lines.append(
            f"Fitted on earlier runs of this very task (in-distribution): {', '.join(race.in_distribution)}."
        )
    lines += race.remarks
    if figures.missing:
        lines.append("Runs are missing (named below): every figure may still change.")
    return lines


def _about_overtraining(figures: RaceFigures) -> list[str]:
    """The crossing search takes for granted that a longer run ends lower."""
    race, ends = figures.race, defaultdict(list)
    for run in figures.runs.get(race.reference_arm, ()):
        if run.key.planned_steps < race.base_steps:
            ends[run.key.planned_steps].append(run.final.read_loss)
    short = [steps for steps, losses in ends.items() if fmean(losses) <= (race.target or -math.inf)]
    if not short:
        return []
    return [
        f"{race.reference_arm} reaches the target on average with {min(short)} of {race.base_steps} steps"
        " already: past the best length of a run a time to target means nothing. Race with fewer steps."
    ]


def _about_misses(figures: RaceFigures) -> list[str]:
    missed = [f"{arm.arm} ({arm.misses} of {len(arm.crossings)})" for arm in figures.arms if arm.misses]
    early = [f"{arm.arm} ({arm.at_most})" for arm in figures.arms if arm.at_most]
    lines = []
    if missed:
        lines.append(f"Seeds that never reached the target count as infinitely slow: {', '.join(missed)}.")
    if early:
        lines.append(
            f"Past the target at the first reading, so possibly faster than stated: {', '.join(early)}."
        )
    return lines
