"""The table of a race's arms: what each is, what of it is tuned, and where it starts. Data only.

A setting is named as in a run file (`trainer.optimizer.rate`); a knob of an arm's own method, which no
run file knows, is named `arm.<knob>`. An arm that wraps another takes over that arm's tuned settings and
tunes only what is its own. Ranges of tuning: space.py. Settings of a run: arms.py. Methods: optimizers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.settings import OptimizerSettings

Pairs = tuple[tuple[str, Any], ...]
KNOB = "arm."
BATCH_FACTOR = f"{KNOB}batch_factor"  # of the task's batch; equal tokens: batch_size.py

_RATE = "trainer.optimizer.rate"
_WEIGHT_DECAY = "trainer.optimizer.weight_decay"
_DECAY_SHARE = "trainer.schedule.decay_share"
_ADAMW = (_RATE, _WEIGHT_DECAY, _DECAY_SHARE)
_MUON = ("trainer.optimizer.muon_rate", *_ADAMW)
_CONSTANT: Pairs = (("trainer.schedule.name", "constant"),)
_LEARNED: Pairs = (("predictor.enabled", True), ("predictor.policy", "learned"))
_BOLD: Pairs = (*_LEARNED, ("predictor.temper", "aggressive"))  # in short runs only this temper can try
_FIXED: Pairs = (("predictor.enabled", True), ("predictor.policy", "fixed"))
_AVERAGE = ("trainer.basis.average_steps",)
_LINE = ("trainer.basis.average_steps", "predictor.drift_gain")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One contestant. `rule` says how it may be read: a constant rate also in the middle of a run."""

    name: str
    meaning: str  # one line for people
    base_optimizer: str = "adamw"  # or "muon"
    rule: str = "decayed"  # or "constant"
    tuned: tuple[str, ...] = ()  # settings that a tuning trial of this arm draws
    wraps: str = ""  # arm whose tuned settings it takes over
    is_ours: bool = False  # runs through the phase loop, with a predictor
    method: str = "plain"  # what surrounds the base optimizer: a name in optimizers.METHODS
    settings: Pairs = ()  # what it fixes, on top of the task's settings
    knobs: Pairs = ()  # its method's own knobs and their defaults
    off_by: tuple[tuple[str, float], ...] = ()  # it starts that many times off the tuned setting


def _ours(name: str, meaning: str, settings: Pairs, **rest: Any) -> Arm:
    return Arm(
        name=name, meaning=meaning, is_ours=True, settings=settings, **{"wraps": "adamw-decay", **rest}
    )


_CLASSIC = (
    Arm(
        name="adamw-constant",
        meaning="AdamW at a constant rate",
        rule="constant",
        tuned=(_RATE, _WEIGHT_DECAY),
        settings=_CONSTANT,
    ),
    Arm(name="adamw-decay", meaning="AdamW with a decayed rate", tuned=_ADAMW),
    Arm(
        name="adamw-decay-ema",
        meaning="the same, averaged weights handed out",
        tuned=("arm.average_share",),
        wraps="adamw-decay",
        method="ema",
        knobs=(("arm.average_share", 0.03),),
    ),
    Arm(
        name="muon-decay",
        meaning="Muon for hidden matrices, AdamW for the rest, decayed",
        base_optimizer="muon",
        tuned=_MUON,
    ),
    Arm(
        name="muon-decay-ema",
        meaning="the same, averaged weights handed out",
        base_optimizer="muon",
        tuned=("arm.average_share",),
        wraps="muon-decay",
        method="ema",
        knobs=(("arm.average_share", 0.03),),
    ),
    Arm(
        name="schedule-free",
        meaning="Schedule-Free AdamW: averaging instead of decay",
        rule="constant",
        tuned=(_RATE, _WEIGHT_DECAY, "trainer.optimizer.beta1"),
        method="schedule-free",
        settings=_CONSTANT,
    ),
    Arm(
        name="lookahead",
        meaning="Lookahead: every few steps part of the way back to slow weights",
        tuned=("arm.inner_steps", "arm.slow_share"),
        wraps="adamw-decay",
        method="lookahead",
        knobs=(("arm.inner_steps", 5), ("arm.slow_share", 0.5)),
    ),
    Arm(
        name="snoo",
        meaning="step-K Nesterov on the displacement of K steps",
        tuned=("arm.inner_steps", "arm.outer_rate", "arm.outer_momentum"),
        wraps="adamw-decay",
        method="snoo",
        knobs=(("arm.inner_steps", 20), ("arm.outer_rate", 0.7), ("arm.outer_momentum", 0.5)),
    ),
    Arm(
        name="ema-nesterov",
        meaning="gradient taken at weights pushed along an average of past updates",
        tuned=("arm.push_steps", "arm.push_average_steps"),
        wraps="adamw-decay",
        method="ema-nesterov",
        knobs=(("arm.push_steps", 5.0), ("arm.push_average_steps", 20.0)),
    ),
    _ours(
        "line-fit",
        "a line through each weight's last window, with our guard",
        (*_FIXED, ("trainer.basis.average_steps", 0), ("predictor.drift_gain", 1.0)),
        tuned=("predictor.drift_gain",),
    ),
    _ours("ours-fixed", "ours with a fixed policy: half the averaged drift", _FIXED, tuned=_LINE),
    _ours(
        "ours-unguarded",
        "ours-aggressive, no jump checked or judged",
        (*_BOLD, ("trainer.verify.enabled", False)),
        tuned=_AVERAGE,
    ),
    _ours(
        "ours-random",
        "ours-aggressive, every delta replaced by a random direction of its norm",
        (*_BOLD, ("trainer.basis.ablation", "random")),
        tuned=_AVERAGE,
    ),
    _ours("ours", "world model and bandit as users get them: the balanced temper", _LEARNED, tuned=_AVERAGE),
    *(
        _ours(
            f"ours-{temper}",
            f"ours with the {temper} preset",
            (*_LEARNED, ("predictor.temper", temper)),
            tuned=_AVERAGE,
        )
        for temper in ("conservative", "aggressive")
    ),
    _ours(
        "ours-constant",
        "ours at a constant rate, averaged weights handed out",
        (
            *_LEARNED,
            *_CONSTANT,
            ("trainer.read_out", "average"),
            ("trainer.basis.average_share", 0.1),
            ("trainer.basis.average_every_steps", 1),
        ),
        tuned=(_RATE, _WEIGHT_DECAY, "trainer.basis.average_share"),
        wraps="",
        rule="constant",
    ),
    _ours(
        "ours-phi",
        "ours-aggressive with the per-weight forecaster",
        (*_BOLD, ("trainer.basis.history_snapshots", 5)),
        tuned=_AVERAGE,
    ),
)

_COSINE: Pairs = (("trainer.schedule.name", "cosine"),)
_DEFAULTS: Pairs = (
    (_RATE, OptimizerSettings().rate),
    ("trainer.optimizer.muon_rate", OptimizerSettings().muon_rate),
    (_WEIGHT_DECAY, OptimizerSettings().weight_decay),
)
_SWITCHES = ("rate", "batch", "context", "decay", "read_out")
_BATCH: Pairs = ((BATCH_FACTOR, 1.0),)


def _controls(*switches: str) -> Pairs:
    """Ours, and what the predictor may move besides weights."""
    return (*_LEARNED, *((f"trainer.controls.{name}", True) for name in switches))


def _started(name: str, meaning: str, *switches: str, **off_by: float) -> Arm:
    """Started off the settings that the sweep chose, with rate and batch under control; nothing is tuned."""
    keys = {"rate": _RATE, "batch": BATCH_FACTOR}
    return _ours(
        name,
        meaning,
        _controls(*(switches or ("rate", "batch"))),
        wraps="adamw-swept",
        knobs=_BATCH,
        off_by=tuple((keys[key], factor) for key, factor in off_by.items()),
    )


_WHOLE_STACK = (
    Arm(name="adamw-cosine", meaning="AdamW with a cosine", tuned=(_RATE, _WEIGHT_DECAY), settings=_COSINE),
    Arm(
        name="adamw-cosine-ema",
        meaning="the same, averaged weights handed out",
        tuned=("arm.average_share",),
        wraps="adamw-cosine",
        method="ema",
        settings=_COSINE,
        knobs=(("arm.average_share", 0.03),),
    ),
    Arm(
        name="muon-cosine",
        meaning="Muon with a cosine",
        base_optimizer="muon",
        tuned=("trainer.optimizer.muon_rate", _RATE, _WEIGHT_DECAY),
        settings=_COSINE,
    ),
    # Ours have no trials of their own here: every one would be one more than the reference has.
    _ours(
        "ours-cosine",
        "adamw-cosine with world model and bandit: the balanced temper",
        (*_LEARNED, *_COSINE),
        wraps="adamw-cosine",
    ),
    _ours(
        "ours-muon",
        "Muon with a decayed rate, world model and bandit: the balanced temper",
        _LEARNED,
        base_optimizer="muon",
        wraps="muon-decay",
    ),
)
_UNTUNED = (
    *(
        Arm(
            name=f"adamw-{text}-cosine",
            meaning=f"AdamW at {text} with a cosine: what people use who do not tune",
            settings=((_RATE, rate), *_COSINE),
        )
        for text, rate in (("3e-4", 3e-4), ("1e-3", 1e-3))
    ),
    Arm(
        name="muon-defaults",
        meaning="Muon at the rates of the product, none of the task's preset",
        base_optimizer="muon",
        settings=_DEFAULTS,
    ),
    _ours(
        "ours-muon-defaults",
        "the same with world model and bandit: what a user gets who sets nothing",
        (*_LEARNED, *_DEFAULTS),
        base_optimizer="muon",
        wraps="muon-defaults",
    ),
)
_CONTROLLED = (
    Arm(
        name="adamw-swept",
        meaning="AdamW, decayed: the best of a sweep over rate and batch",
        tuned=(_RATE, BATCH_FACTOR),
        knobs=_BATCH,
    ),
    _started("ours-hands-free-rate-high", "controlled, started at 4 times the best rate", rate=4.0),
    _started("ours-hands-free-rate-low", "controlled, started at a quarter of the best rate", rate=0.25),
    _started("ours-hands-free-batch-high", "controlled, started at 4 times the best batch", batch=4.0),
    _started("ours-hands-free-batch-low", "controlled, started at a quarter of the best batch", batch=0.25),
    _started("ours-rescue", "controlled, started at 30 times the best rate", rate=30.0),
    _started("ours-ramp", "controlled, started at the best fixed rate and batch"),
    _started("ours-ramp-rate", "ours-ramp with the control of the rate alone", "rate"),
    _started("ours-ramp-batch", "ours-ramp with the control of the batch alone", "batch"),
    _ours("ours-controls", "ours with every control on", _controls(*_SWITCHES), tuned=_AVERAGE),
    *(
        _ours(
            f"ours-controls-{name.replace('_', '-')}",
            f"ours with the control of {name.replace('_', '-')} alone",
            _controls(name),
            tuned=_AVERAGE,
        )
        for name in _SWITCHES
    ),
)
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*_CLASSIC, *_WHOLE_STACK, *_UNTUNED, *_CONTROLLED)}
CLASSIC = tuple(arm.name for arm in _CLASSIC)
# One name for several arms whose number is one: over all of them and all seeds.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "ours-hands-free": tuple(name for name in ARMS if name.startswith("ours-hands-free-"))
}
