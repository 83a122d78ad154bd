"""The rules of a race: which arms, what the target comes from, what is tuned, whose number is the headline.

What the rules are held to is in claims.py and claims_controls.py. Data only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from trainer_node.race.arm_table import ARMS, CLASSIC, GROUPS

DEFAULT_TRIALS = 8
SWEEP_TRIALS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one part of the whole is worth: `arm` differs from `versus` in it alone."""

    word: str
    arm: str
    versus: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """`plain_arms`: the best of them is the reference, and its median end is the target."""

    name: str
    meaning: str  # one line for people
    plain_arms: tuple[str, ...]
    arms: tuple[str, ...]  # raced where the user names none
    quick_arms: tuple[str, ...]
    headlines: tuple[str, ...] = ("ours",)  # the first that is in the race: nobody picks the best
    tunes: bool = True  # else every arm runs at its defaults, and no trial is made
    trials: int = DEFAULT_TRIALS
    parts: tuple[Part, ...] = ()


def _decaying() -> tuple[str, ...]:
    return tuple(name for name in CLASSIC if ARMS[name].rule == "decayed" or not ARMS[name].is_ours)


_PLAIN = ("adamw-decay", "adamw-decay-ema")
_QUICK = ("adamw-decay", "ours-fixed", "ours")
_CONTROLS = ("rate", "batch", "context", "decay", "read-out")
_TABLE = (
    Rule(
        name="constant",
        meaning="rates do not decay",
        plain_arms=("adamw-constant",),
        arms=tuple(name for name in CLASSIC if ARMS[name].rule == "constant"),
        quick_arms=tuple(name for name in CLASSIC if ARMS[name].rule == "constant"),
        headlines=("ours-constant", "ours"),
    ),
    Rule(
        name="decayed",
        meaning="every arm tuned and decayed, the target reached at the end of a planned run",
        plain_arms=_PLAIN,
        arms=_decaying(),
        quick_arms=_QUICK,
    ),
    Rule(
        name="fitted",
        meaning="the predictor has learned from earlier runs of the same job with other seeds",
        plain_arms=_PLAIN,
        arms=_decaying(),
        quick_arms=_QUICK,
        headlines=("ours-phi", "ours-aggressive", "ours"),
    ),
    Rule(
        name="whole-stack",
        meaning="schedule, Muon and prediction together, against tuned AdamW with a cosine",
        plain_arms=("adamw-cosine",),
        arms=(
            "adamw-decay", "muon-decay", "adamw-cosine", "adamw-cosine-ema", "muon-cosine", "ours-cosine",
            "ours-muon",
        ),
        quick_arms=("adamw-cosine", "muon-decay", "ours-muon"),
        headlines=("ours-muon",),
        parts=(
            Part(word="schedule alone", arm="adamw-decay", versus="adamw-cosine"),
            Part(word="Muon alone", arm="muon-cosine", versus="adamw-cosine"),
            Part(word="read-out alone", arm="adamw-cosine-ema", versus="adamw-cosine"),
            Part(word="prediction alone", arm="ours-cosine", versus="adamw-cosine"),
            Part(word="schedule and Muon", arm="muon-decay", versus="adamw-cosine"),
            Part(word="prediction on top", arm="ours-muon", versus="muon-decay"),
        ),
    ),
    Rule(
        name="untuned",
        meaning="nobody tunes: the product's defaults against AdamW with a cosine at the rates people use",
        plain_arms=("adamw-3e-4-cosine", "adamw-1e-3-cosine"),
        arms=(
            "adamw-3e-4-cosine", "adamw-1e-3-cosine", "muon-defaults", "ours-muon-defaults", "ours-muon",
        ),
        quick_arms=("adamw-3e-4-cosine", "adamw-1e-3-cosine", "ours-muon-defaults"),
        headlines=("ours-muon-defaults",),
        tunes=False,
        parts=(
            Part(word="prediction", arm="ours-muon-defaults", versus="muon-defaults"),
            Part(word="rates of the task's preset", arm="ours-muon", versus="ours-muon-defaults"),
        ),
    ),
    Rule(
        name="hands-free",
        meaning="no trials, wrong starts, against a sweep over rate and batch",
        plain_arms=("adamw-swept",),
        arms=("adamw-decay", "adamw-swept", *GROUPS["ours-hands-free"], "ours-rescue"),
        quick_arms=("adamw-swept", "ours-hands-free-rate-high", "ours-hands-free-batch-low"),
        headlines=("ours-hands-free",),
        trials=SWEEP_TRIALS,
        parts=(
            Part(word="30 times the rate", arm="ours-rescue", versus="adamw-swept"),
            Part(word="30 times the rate", arm="ours-rescue", versus="adamw-decay"),
        ),
    ),
    Rule(
        name="ramp",
        meaning="rate and batch moved while it runs, against the best fixed ones of a sweep",
        plain_arms=("adamw-swept",),
        arms=("adamw-decay", "adamw-swept", "ours-ramp", "ours-ramp-rate", "ours-ramp-batch"),
        quick_arms=("adamw-swept", "ours-ramp"),
        headlines=("ours-ramp",),
        trials=SWEEP_TRIALS,
        parts=(
            Part(word="rate", arm="ours-ramp-rate", versus="adamw-swept"),
            Part(word="batch", arm="ours-ramp-batch", versus="adamw-swept"),
        ),
    ),
    Rule(
        name="controls",
        meaning="every control on, against the same optimizer, all at their defaults",
        plain_arms=("adamw-decay",),
        arms=("adamw-decay", "ours", "ours-controls", *(f"ours-controls-{name}" for name in _CONTROLS)),
        quick_arms=("adamw-decay", "ours", "ours-controls"),
        headlines=("ours-controls",),
        tunes=False,
        parts=(
            Part(word="jumps", arm="ours", versus="adamw-decay"),
            *(Part(word=name, arm=f"ours-controls-{name}", versus="adamw-decay") for name in _CONTROLS),
        ),
    ),
)  # fmt: skip
RULES: Mapping[str, Rule] = {rule.name: rule for rule in _TABLE}


def headline_arm(arms: tuple[str, ...], rule: str) -> str:
    """The arm, or the group of arms, whose result is the headline; "" if none is in the race."""
    return next((name for name in RULES[rule].headlines if _is_in(name, arms)), "")


def _is_in(name: str, arms: tuple[str, ...]) -> bool:
    return set(GROUPS.get(name, (name,))) <= set(arms)
