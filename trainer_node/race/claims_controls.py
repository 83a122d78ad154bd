"""What the rules with controls and the whole stack are held to, judged by the committed evidence. Pure.

    5  whole stack   Muon, schedule and prediction at least 2.0 times as fast as tuned AdamW with a cosine
    6  untuned       at least 3 times as fast as AdamW at the rates that people use
    7  hands-free    no trials and a wrong start: each start within 2 % of the best of a sweep over rate and
                     batch; from 30 times the rate within 10 %
    8  ramp          at least 1.15 times as fast as the best fixed rate and batch, on half of the tasks
    9  controls on   nowhere more than 2 % slower than the same optimizer, both at their defaults, and no
                     planned run ends more than 0.5 % higher: a control may end a run early

5 and 6 by the geometric mean over the tasks; 7 and 9 on every task. A sweep that chooses at equal tokens may
choose a batch that is slow by the clock: 7 and 8 count against the faster of its choice and the tuned arm of
the task's own batch. None is met before all six tasks are raced to the end with ten seeds and all of the
rule's trials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trainer_node.race.arm_table import ARMS, BATCH_FACTOR, GROUPS
from trainer_node.race.claims import LOSS_GAP, loss_gap, pair_words, table, task_name, unraced_words
from trainer_node.race.evidence import Evidence, PairEvidence
from trainer_node.race.rules import RULES
from trainer_node.race.statistics import MEANINGFUL_LOSS, geometric_mean, regressions
from trainer_node.race.words import RESERVATIONS, percent

STACK_GOAL = 2.0
UNTUNED_GOAL = 3.0
RAMP_GOAL = 1.15
RESCUE_LOSS = 1.10

OWN_BATCH = "adamw-decay"  # tuned at the task's own batch


def whole_stack(files: Sequence[Evidence]) -> list[str]:
    return _by_mean(files, "whole-stack", STACK_GOAL)


def untuned(files: Sequence[Evidence]) -> list[str]:
    """The reference is the better of the two: it set the target. The other one is in the table."""
    return _by_mean(files, "untuned", UNTUNED_GOAL)


def hands_free(files: Sequence[Evidence]) -> list[str]:
    """Every start has to be good: a median over the four would forgive one that never gets there."""
    rule = "hands-free"
    starts = GROUPS[RULES[rule].headlines[0]]
    rows, near, rescued = [], 0, 0
    for evidence in _of(files, rule):
        singles = {start: _against_fixed(evidence, start) for start in starts}
        rescue = _against_fixed(evidence, "ours-rescue")
        good = all(_within(ratio, MEANINGFUL_LOSS) for ratio in singles.values())
        near += good
        rescued += _within(rescue, RESCUE_LOSS)
        told = [_ratio(ratio) + _start_words(evidence, start) for start, ratio in singles.items()]
        pooled = _words(evidence, _headline(evidence))
        rows.append((task_name(evidence), *told, pooled, _ratio(rescue), _yes(good)))
    names = [start.removeprefix("ours-hands-free-").replace("-", " ") for start in starts]
    bar = percent(MEANINGFUL_LOSS - 1)
    lines = _judged(
        files,
        rule,
        near == len(rows),
        f"{near} of {len(rows)} tasks with every start within {bar} of the faster fixed arm",
        f"every start within {bar} on every task",
    )
    if rows:
        said = f"{rescued} of {len(rows)} tasks within {percent(RESCUE_LOSS - 1)}"
        lines.append(f"From 30 times the best rate: {said}.")
    head = ("task", *names, "all four against the sweep", "rate × 30", f"every start within {bar}")
    return [*lines, *table(head, rows)]


def ramp(files: Sequence[Evidence]) -> list[str]:
    rule = "ramp"
    rows, reached = [], 0
    for evidence in _of(files, rule):
        pairs = [evidence.against(plain) for plain in (evidence.reference_arm, OWN_BATCH)]
        hardest = _against_fixed(evidence, evidence.headline_arm)
        good = hardest is not None and hardest >= RAMP_GOAL
        reached += good
        row = (task_name(evidence), *(_words(evidence, pair) for pair in pairs), *_parts(evidence, rule))
        rows.append((*row, _yes(good)))
    lines = _judged(
        files,
        rule,
        2 * reached >= len(rows),
        f"{reached} of {len(rows)} tasks reach {RAMP_GOAL}× against the faster fixed arm",
        f"{RAMP_GOAL}× on at least half of the tasks",
    )
    alone = [f"{part.word} alone" for part in RULES[rule].parts]
    head = ("task", "against the best of the sweep", "against the task's batch, tuned", *alone, "reached")
    return [*lines, *table(head, rows)]


def controls_do_no_harm(files: Sequence[Evidence]) -> list[str]:
    rule = "controls"
    rows, harmless = [], 0
    for evidence in _of(files, rule):
        pair = _headline(evidence)
        gap = _gap(evidence)
        good = _within(pair.ratio_median if pair is not None else None, MEANINGFUL_LOSS) and gap <= LOSS_GAP
        harmless += good
        said = "–" if math.isinf(gap) else percent(gap, 1)
        rows.append((task_name(evidence), _words(evidence, pair), said, *_parts(evidence, rule), _yes(good)))
    bar = f"nowhere more than {percent(MEANINGFUL_LOSS - 1)} slower"
    words = f"{harmless} of {len(rows)} tasks without harm, a final loss at most"
    words += f" {percent(LOSS_GAP, 1)} higher included"
    lines = _judged(files, rule, harmless == len(rows), words, bar)
    alone = [f"{part.word} alone" for part in RULES[rule].parts]
    head = ("task", "every control on", "loss gap of the planned run", *alone, "no harm")
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
    unraced = unraced_words(found, rule)
    verdict = "Met" if met and not unraced else "Not met"
    return [f"**{verdict}**: {words}{unraced}. The bar: {bar}.", *_label(rule)]


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


def _against_fixed(evidence: Evidence, arm: str) -> float | None:
    """Against the faster of the fixed arms; None where one of them was not raced, or nothing is finite."""
    rivals = (evidence.reference_arm, OWN_BATCH)
    if any(name not in evidence.arms for name in rivals):
        return None
    pairs = [pair for name in rivals if (pair := evidence.against(name, arm=arm)) is not None]
    return min((pair.ratio_median for pair in pairs if pair.ratio_median is not None), default=None)


def _start_words(evidence: Evidence, start: str) -> str:
    """A small batch cannot be cut as far as the start's name says: then how far it was."""
    wanted = dict(ARMS[start].off_by).get(BATCH_FACTOR)
    configs = [
        evidence.arms[name].config for name in (start, evidence.reference_arm) if name in evidence.arms
    ]
    if wanted is None or not all(BATCH_FACTOR in config for config in configs) or len(configs) < 2:
        return ""
    times = configs[0][BATCH_FACTOR] / configs[1][BATCH_FACTOR]
    return "" if times == wanted else f" (batch × {times:g} only)"


def _gap(evidence: Evidence) -> float:
    """How much higher the headline arm ends than the reference; infinite where that is not known."""
    ours, plain = (evidence.arms.get(name) for name in (evidence.headline_arm, evidence.reference_arm))
    gap = loss_gap(ours, plain) if ours is not None and plain is not None else None
    return math.inf if gap is None else gap


def _within(ratio: float | None, loss: float) -> bool:
    """At most `loss` times as long."""
    return ratio is not None and ratio >= 1 / loss


def _words(evidence: Evidence, pair: PairEvidence | None) -> str:
    """A ratio that is null because only the other side never got there says so."""
    if pair is not None and pair.ratio_median is None and _never(evidence, pair.versus):
        return f"{pair.versus} never got there" if not _never(evidence, pair.arm) else "both never got there"
    return pair_words(pair)


def _never(evidence: Evidence, arm: str) -> bool:
    return arm in evidence.arms and evidence.arms[arm].seconds_median is None


def _factor(pair: PairEvidence | None) -> str:
    return _ratio(pair.ratio_median if pair is not None else None)


def _ratio(ratio: float | None) -> str:
    """0: on half or more of the seeds the arm never got there."""
    return "–" if ratio is None else f"{ratio:.3f}×" if ratio > 0 else "never"


def _yes(good: bool) -> str:
    return "yes" if good else "**no**"
