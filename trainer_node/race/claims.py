"""The four claims of the project, judged by the committed evidence. Pure: evidence in, sentences out.

    1  no harm                ours is nowhere more than 2 % slower than the same optimizer without prediction,
                              and ends at most 0.5 % higher at equal budget
    2  forecasts mean         ours beats a random direction of the same norm and the fixed policy on most
       something              tasks; its 80 % interval holds 70 to 90 % of what happened
    3  constant-rate rules    at least 2.0 times as fast, geometric mean over the tasks
    4  honest rules           at least 1.15 times as fast as the best tuned, decayed, averaged arm of the same
                              optimizer, interval above 1.05, on half of the tasks; 1.4 where fitted

The bars are constants here; whether they are met follows from the files. None is met before all six tasks
are raced to the end with ten seeds and all of the rule's trials. 5 to 9: claims_controls.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer_node.race.evidence import GOAL_FITTED_ON, ArmEvidence, Evidence, PairEvidence
from trainer_node.race.rules import RULES
from trainer_node.race.statistics import MEANINGFUL_LOSS, geometric_mean, regressions
from trainer_node.race.tasks import CPU_TASKS
from trainer_node.race.words import FEW_SEEDS, JUMPING_ARM, percent

LOSS_GAP = 0.005
COVERAGE = (0.7, 0.9)
CONSTANT_GOAL = 2.0
COLD_GOAL, COLD_LOW = 1.15, 1.05
FITTED_GOAL = 1.4
RIVALS = ("ours-random", "ours-fixed")


def no_harm(files: Sequence[Evidence]) -> list[str]:
    rows, harmless, found = [], 0, _of_rule(files, "decayed")
    for evidence in found:
        ours, plain = _ours(evidence), evidence.arms.get(_ours(evidence).plain_arm)
        pair = evidence.against(_ours(evidence).plain_arm)
        gap = None if plain is None else loss_gap(ours, plain)
        slow_ok = pair is not None and pair.ratio_median is not None and not regressions([pair.ratio_median])
        good = slow_ok and gap is not None and gap <= LOSS_GAP
        harmless += good
        name = ours.plain_arm or "no plain arm"
        rows.append((task_name(evidence), name, pair_words(pair), _percent(gap), "yes" if good else "**no**"))
    said = _verdict(harmless == len(rows), f"{harmless} of {len(rows)} tasks without harm", found)
    return [
        f"{said} The bar: at most {percent(MEANINGFUL_LOSS - 1)} slower, the final loss at most"
        f" {percent(LOSS_GAP, 1)} higher.",
        *table(("task", "without prediction", "ours against it", "loss gap", "no harm"), rows),
    ]


def forecasts_mean_something(files: Sequence[Evidence]) -> list[str]:
    rows, better, covered = [], dict.fromkeys(RIVALS, 0), 0
    evidences = _of_rule(files, "decayed")
    for evidence in evidences:
        name = JUMPING_ARM if JUMPING_ARM in evidence.arms else evidence.headline_arm
        ours = evidence.arms[name]
        pairs = [evidence.against(rival, arm=name) for rival in RIVALS]
        for rival, pair in zip(RIVALS, pairs, strict=True):
            better[rival] += pair is not None and pair.ratio_median is not None and pair.ratio_median > 1
        inside = ours.coverage_80 is not None and COVERAGE[0] <= ours.coverage_80 <= COVERAGE[1]
        covered += inside
        coverage = f"{_percent(ours.coverage_80)} of {ours.forecasts:,}" if ours.forecasts else "–"
        numbers = _number(ours.cosine_median), coverage
        rows.append((task_name(evidence), name, *map(pair_words, pairs), *numbers))
    count = len(rows)
    met = all(2 * wins > count for wins in better.values()) and covered == count
    wins = ", ".join(f"{rival} on {better[rival]} of {count}" for rival in RIVALS)
    said = _verdict(met, f"ours beat {wins}; intervals calibrated on {covered} of {count}", evidences)
    return [
        f"{said} The bar: most tasks, and the 80 % interval holds 70 to 90 %.",
        *table(
            ("task", "arm", *(f"against {rival}" for rival in RIVALS), "cosine", "80 % interval held"), rows
        ),
    ]


def constant_rules(files: Sequence[Evidence]) -> list[str]:
    rows, ratios, found = [], [], _of_rule(files, "constant")
    for evidence in found:
        pair = evidence.against(evidence.reference_arm)
        if pair is not None and pair.ratio_median is not None:
            ratios.append(pair.ratio_median)
        rows.append((task_name(evidence), evidence.headline_arm, evidence.reference_arm, pair_words(pair)))
    mean = geometric_mean(ratios)
    worst = f", worst {min(ratios):.2f}×, {regressions(ratios)} slower by more than 2 %" if ratios else ""
    unknown = f", {len(rows) - len(ratios)} without a finite ratio" if len(rows) > len(ratios) else ""
    met = len(ratios) == len(rows) and mean >= CONSTANT_GOAL
    words = f"geometric mean {mean:.2f}× over {len(ratios)} tasks{worst}{unknown}"
    said = _verdict(met, words, found)
    return [
        f"{said} The bar: {CONSTANT_GOAL}×. A tuned, decayed rate takes most of such a gain away: see 4.",
        *table(("task", "arm", "reference", "speed"), rows),
    ]


def honest_rules(files: Sequence[Evidence]) -> list[str]:
    lines = []
    for rule, goal, low in (("decayed", COLD_GOAL, COLD_LOW), ("fitted", FITTED_GOAL, None)):
        rows, reached, judged, found = [], 0, 0, _of_rule(files, rule)
        for evidence in found:
            pair, absent = hardest_plain(evidence), _unraced_plain(evidence)
            good = _reaches(pair, goal, low) and not absent
            # On another number of earlier runs a race is told, and no task of its own.
            reached, judged = reached + (good and evidence.is_as_the_goal), judged + evidence.is_as_the_goal
            rows.append(
                (
                    task_name(evidence),
                    evidence.headline_arm,
                    (pair.versus if pair else "–") + "".join(f" ({name} not raced)" for name in absent),
                    pair_words(pair),
                    "yes" if good else "**no**",
                )
            )
        bar = f"{goal}×" + (f", interval above {low}×" if low else "")
        name = "Cold" if rule == "decayed" else f"Fitted on {GOAL_FITTED_ON} earlier runs of the same job"
        said = _verdict(2 * reached >= judged, f"{reached} of {judged} tasks reach {bar}", found)
        lines += [f"{name}. {said} The bar: at least half of the tasks."]
        lines += [*table(("task", "arm", "best plain arm", "against it", "reached"), rows), ""]
    return lines[:-1]


def hardest_plain(evidence: Evidence) -> PairEvidence | None:
    """The headline arm against the plain arms of its optimizer, averaged or not: the worse of both."""
    pairs = [pair for name in _plain_arms(evidence) if (pair := evidence.against(name))]
    known = [pair for pair in pairs if pair.ratio_median is not None]
    return min(known, key=lambda pair: pair.ratio_median or 0.0, default=None)


def _plain_arms(evidence: Evidence) -> tuple[str, str]:
    plain = _ours(evidence).plain_arm
    return plain, f"{plain}-ema"


def _unraced_plain(evidence: Evidence) -> list[str]:
    """Who is not in the race cannot be beaten in it."""
    return [name for name in _plain_arms(evidence) if name not in evidence.arms]


def pair_words(pair: PairEvidence | None) -> str:
    if pair is None or pair.ratio_median is None:
        return "–"
    ends = [f"{end:.3f}" if end is not None else "∞" for end in (pair.ratio_low95, pair.ratio_high95)]
    return f"{pair.ratio_median:.3f}× ({ends[0]} – {ends[1]})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; nothing for no rows."""
    if not rows:
        return []
    cells = [head, ["---"] * len(head), *rows]
    return ["", *(f"| {' | '.join(row)} |" for row in cells)]


def _of_rule(files: Sequence[Evidence], rule: str) -> list[Evidence]:
    return [e for e in files if e.rule == rule and e.headline_arm in e.arms]


def task_name(evidence: Evidence) -> str:
    """The task, and what keeps a reader from taking its row at face value."""
    few = f" ({len(evidence.seeds)} seeds)" if len(evidence.seeds) < FEW_SEEDS else ""
    other = "" if evidence.is_as_the_goal else f", fitted on {evidence.fitted_on}"
    return evidence.task + other + few + (" (unfinished)" if evidence.missing else "")


def _ours(evidence: Evidence) -> ArmEvidence:
    return evidence.arms[evidence.headline_arm]


def _reaches(pair: PairEvidence | None, goal: float, low: float | None) -> bool:
    if pair is None or pair.ratio_median is None or pair.ratio_low95 is None:
        return False
    return pair.ratio_median >= goal and (low is None or pair.ratio_low95 > low)


def loss_gap(ours: ArmEvidence, plain: ArmEvidence) -> float | None:
    """How much higher ours ends, at equal steps or at equal passes, whichever is worse; None if unknown."""
    pairs = (
        (ours.final_quality_median, plain.final_quality_median),
        (ours.final_quality_equal_passes_median, plain.final_quality_equal_passes_median),
    )
    gaps = [a / b - 1 for a, b in pairs if a is not None and b]
    return max(gaps, default=None)


def _verdict(met: bool, words: str, found: Sequence[Evidence]) -> str:
    """Of races of one rule."""
    if not found:
        return "**No evidence yet.**"
    unraced = unraced_words(found, found[0].rule)
    return f"**{'Met' if met and not unraced else 'Not met'}**: {words}{unraced}."


def unraced_words(found: Sequence[Evidence], rule: str) -> str:
    """The tasks without a whole race of the rule; "" = there is none. A claim is of all six of them."""
    trials = RULES[rule].trials if RULES[rule].tunes else 0
    whole = {
        e.task
        for e in found
        if len(e.seeds) >= FEW_SEEDS and e.trials >= trials and not e.missing and e.is_as_the_goal
    }
    absent = [task for task in CPU_TASKS if task not in whole]
    effort = f"{FEW_SEEDS} seeds" + (f" and {trials} trials" if trials else "")
    return f"; not raced to the end with {effort}: {', '.join(absent)}" if absent else ""


def _percent(share: float | None) -> str:
    return "–" if share is None else percent(share, 1)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
