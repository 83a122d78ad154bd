"""What the rules with controls and the whole stack are held to, judged by the committed evidence. Pure.

    5  whole stack   Muon, schedule and prediction at least 2.0 times as fast as tuned AdamW with a cosine
    6  untuned       at least 3 times as fast as AdamW at the rates that people use
    7  hands-free    no trials and a wrong start: within 2 % of the best of a sweep over rate and batch;
                     from 30 times the rate within 10 %
    8  ramp          at least 1.15 times as fast as the best fixed rate and batch, on half of the tasks
    9  controls on   nowhere more than 2 % slower than the same optimizer, both at their defaults

5 and 6 by the geometric mean over the tasks; 7 and 9 on every task. None is met before all six tasks are
raced to the end with ten seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trainer_node.race.arm_table import GROUPS
from trainer_node.race.claims import pair_words, table, task_name
from trainer_node.race.evidence import Evidence, PairEvidence
from trainer_node.race.rules import RULES
from trainer_node.race.statistics import MEANINGFUL_LOSS, geometric_mean, regressions
from trainer_node.race.tasks import CPU_TASKS
from trainer_node.race.words import FEW_SEEDS, RESERVATIONS, percent

STACK_GOAL = 2.0
UNTUNED_GOAL = 3.0
RAMP_GOAL = 1.15
RESCUE_LOSS = 1.10

Judge = Callable[[Evidence], PairEvidence | None]


def whole_stack(files: Sequence[Evidence]) -> list[str]:
    return _by_mean(files, "whole-stack", STACK_GOAL)


def untuned(files: Sequence[Evidence]) -> list[str]:
    """The reference is the better of the two: it set the target. The other one is in the table."""
    return _by_mean(files, "untuned", UNTUNED_GOAL)


def hands_free(files: Sequence[Evidence]) -> list[str]:
    rule = "hands-free"
    starts = GROUPS[RULES[rule].headlines[0]]
    rows, near, rescued = [], 0, 0
    for evidence in _of(files, rule):
        pair, rescue = _headline(evidence), evidence.against(evidence.reference_arm, arm="ours-rescue")
        good = _within(pair, MEANINGFUL_LOSS)
        near += good
        rescued += _within(rescue, RESCUE_LOSS)
        single = [_factor(evidence.against(evidence.reference_arm, arm=arm)) for arm in starts]
        rows.append((task_name(evidence), _words(evidence, pair), *single, _factor(rescue), _yes(good)))
    names = [start.removeprefix("ours-hands-free-").replace("-", " ") for start in starts]
    lines = _judged(
        files,
        rule,
        near == len(rows),
        f"{near} of {len(rows)} tasks within {percent(MEANINGFUL_LOSS - 1)} of the sweep",
        f"every task within {percent(MEANINGFUL_LOSS - 1)}, over four starts and all seeds",
    )
    if rows:
        bar = percent(RESCUE_LOSS - 1)
        lines.append(f"From 30 times the best rate: {rescued} of {len(rows)} tasks within {bar}.")
    head = ("task", "all starts against the sweep", *names, "rate × 30", f"within {MEANINGFUL_LOSS - 1:.0%}")
    return [*lines, *table(head, rows)]


def ramp(files: Sequence[Evidence]) -> list[str]:
    rows, reached = [], 0
    for evidence in _of(files, "ramp"):
        pairs = [evidence.against(plain) for plain in (evidence.reference_arm, "adamw-decay")]
        known = [pair for pair in pairs if pair is not None and pair.ratio_median is not None]
        hardest = min(known, key=lambda pair: pair.ratio_median or 0.0, default=None)
        good = hardest is not None and (hardest.ratio_median or 0.0) >= RAMP_GOAL
        reached += good
        rows.append((task_name(evidence), *(_words(evidence, pair) for pair in pairs), _yes(good)))
    lines = _judged(
        files,
        "ramp",
        2 * reached >= len(rows),
        f"{reached} of {len(rows)} tasks reach {RAMP_GOAL}× against the faster fixed arm",
        f"{RAMP_GOAL}× on at least half of the tasks",
    )
    head = ("task", "against the best of the sweep", "against the task's batch, tuned", "reached")
    return [*lines, *table(head, rows)]


def controls_do_no_harm(files: Sequence[Evidence]) -> list[str]:
    rule = "controls"
    rows, harmless = [], 0
    for evidence in _of(files, rule):
        pair = _headline(evidence)
        good = _within(pair, MEANINGFUL_LOSS)
        harmless += good
        rows.append((task_name(evidence), _words(evidence, pair), *_parts(evidence, rule), _yes(good)))
    bar = f"nowhere more than {percent(MEANINGFUL_LOSS - 1)} slower"
    words = f"{harmless} of {len(rows)} tasks without harm"
    lines = _judged(files, rule, harmless == len(rows), words, bar)
    head = ("task", "every control on", *(f"{part.word} alone" for part in RULES[rule].parts), "no harm")
    return [*lines, *table(head, rows)]


def _by_mean(files: Sequence[Evidence], rule: str, goal: float) -> list[str]:
    """The headline arm against the reference: the geometric mean over tasks."""
    rows, ratios = [], []
    others = [name for name in RULES[rule].plain_arms if len(RULES[rule].plain_arms) > 1]
    for evidence in _of(files, rule):
        pair = _headline(evidence)
        if pair is not None and pair.ratio_median is not None:
            ratios.append(pair.ratio_median)
        against = [_words(evidence, evidence.against(name)) for name in others]
        row = (task_name(evidence), evidence.reference_arm, _words(evidence, pair), *against)
        rows.append((*row, *_parts(evidence, rule)))
    mean = geometric_mean(ratios)
    words = f"geometric mean {mean:.2f}× over {len(ratios)} tasks"
    if ratios:
        reached = sum(ratio >= goal for ratio in ratios)
        words += f", worst {min(ratios):.2f}×, {reached} at {goal:g}× or more"
        words += f", {regressions(ratios)} slower by more than {percent(MEANINGFUL_LOSS - 1)}"
    if len(rows) > len(ratios):
        words += f", {len(rows) - len(ratios)} without a finite ratio"
    met = len(ratios) == len(rows) and mean >= goal
    lines = _judged(files, rule, met, words, f"a geometric mean of {goal:g}×")
    head = ("task", "reference", f"{RULES[rule].headlines[0]} against it")
    return [
        *lines,
        *table((*head, *(f"against {name}" for name in others), *_part_heads(rule)), rows),
    ]


def _judged(files: Sequence[Evidence], rule: str, met: bool, words: str, bar: str) -> list[str]:
    """Verdict, bar and label; one line while there is no evidence."""
    found = _of(files, rule)
    if not found:
        return [f"**No evidence yet.** The bar: {bar}."]
    raced = {e.task for e in found if len(e.seeds) >= FEW_SEEDS and not e.missing}
    absent = [task for task in CPU_TASKS if task not in raced]
    if absent:
        words += f"; not raced to the end with {FEW_SEEDS} seeds: {', '.join(absent)}"
    verdict = "Met" if met and not absent else "Not met"
    return [f"**{verdict}**: {words}. The bar: {bar}.", *_label(rule)]


def _label(rule: str) -> list[str]:
    return ["", RESERVATIONS[rule]] if rule in RESERVATIONS else []


def _of(files: Sequence[Evidence], rule: str) -> list[Evidence]:
    return [evidence for evidence in files if evidence.rule == rule]


def _headline(evidence: Evidence) -> PairEvidence | None:
    return evidence.against(evidence.reference_arm)


def _part_heads(rule: str) -> list[str]:
    return [f"{part.word} ({part.arm} / {part.versus})" for part in RULES[rule].parts]


def _parts(evidence: Evidence, rule: str) -> list[str]:
    return [_factor(evidence.against(part.versus, arm=part.arm)) for part in RULES[rule].parts]


def _within(pair: PairEvidence | None, loss: float) -> bool:
    """At most `loss` times as long."""
    return pair is not None and pair.ratio_median is not None and pair.ratio_median >= 1 / loss


def _words(evidence: Evidence, pair: PairEvidence | None) -> str:
    """A ratio that is null because only the other side never got there says so."""
    if pair is not None and pair.ratio_median is None and _never(evidence, pair.versus):
        return f"{pair.versus} never got there" if not _never(evidence, pair.arm) else "both never got there"
    return pair_words(pair)


def _never(evidence: Evidence, arm: str) -> bool:
    return arm in evidence.arms and evidence.arms[arm].seconds_median is None


def _factor(pair: PairEvidence | None) -> str:
    return "–" if pair is None or pair.ratio_median is None else f"{pair.ratio_median:.3f}×"


def _yes(good: bool) -> str:
    return "yes" if good else "**no**"
