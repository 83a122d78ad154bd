"""The arms of a race: what each is, what of it is tuned, and the settings of one run of it.

A setting is named as in a run file (`trainer.optimizer.rate`); a knob of an arm's own method, which no
run file knows, is named `arm.<knob>`. An arm that wraps another starts from that arm's tuned settings
and tunes only what is its own. Ranges of tuning: space.py. The methods themselves: optimizers.py.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.config import dump_settings, parse_settings
from common.errors import SettingsError
from common.settings import RunSettings

Pairs = tuple[tuple[str, Any], ...]
KNOB = "arm."

_RATE = "trainer.optimizer.rate"
_WEIGHT_DECAY = "trainer.optimizer.weight_decay"
_DECAY_SHARE = "trainer.schedule.decay_share"
_ADAMW = (_RATE, _WEIGHT_DECAY, _DECAY_SHARE)
_MUON = ("trainer.optimizer.muon_rate", *_ADAMW)
_CONSTANT: Pairs = (("trainer.schedule.name", "constant"),)
_NO_PREDICTOR: Pairs = (("predictor.enabled", False),)
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


def _ours(name: str, meaning: str, settings: Pairs, **rest: Any) -> Arm:
    return Arm(
        name=name, meaning=meaning, is_ours=True, settings=settings, **{"wraps": "adamw-decay", **rest}
    )


_TABLE = (
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
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _TABLE}


def arm_named(name: str) -> Arm:
    """Raises SettingsError with the nearest name."""
    if name not in ARMS:
        close = difflib.get_close_matches(name, list(ARMS), n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise SettingsError(f"unknown arm '{name}'{hint}; arms: {', '.join(ARMS)}")
    return ARMS[name]


def run_settings(
    arm: Arm, base: RunSettings, config: Pairs, *, steps: int, seed: int, data: str = "", state: str = ""
) -> RunSettings:
    """The task's settings, then the arm's own, then the tuned ones. Raises SettingsError.

    Warm-up keeps its length in steps where the run is not too short for it: runs of different length
    then begin alike.
    """
    warmup_steps = min(base.trainer.schedule.warmup_steps, max(1, steps // 4))
    forced: Pairs = (
        ("trainer.steps", steps),
        ("trainer.seed", seed),
        ("trainer.schedule.warmup_steps", warmup_steps),
        ("trainer.optimizer.name", arm.base_optimizer),
        ("trainer.decision_mode", "lockstep"),
    )
    own = arm.settings if arm.is_ours else (*_NO_PREDICTOR, *arm.settings)
    given = (("trainer.data.path", data),) if data else ()
    learned = (("predictor.state", state),) if state and arm.is_ours else ()
    return with_settings(base, (*forced, *own, *given, *learned, *config))


def knobs_of(arm: Arm, config: Pairs) -> dict[str, Any]:
    """The method's knobs without their prefix. Raises SettingsError for a knob that the arm lacks."""
    known = dict(arm.knobs)
    chosen = {key: value for key, value in config if key.startswith(KNOB)}
    for key in chosen:
        if key not in known:
            raise SettingsError(f"arm {arm.name} has no knob {key}; it has: {', '.join(known) or 'none'}")
    return {key.removeprefix(KNOB): value for key, value in {**known, **chosen}.items()}


def with_settings(base: RunSettings, changes: Iterable[tuple[str, Any]]) -> RunSettings:
    """`base` with some settings changed; knobs of arms are passed over. Raises SettingsError."""
    values = tomllib.loads(dump_settings(base))
    for key, value in changes:
        if key.startswith(KNOB):
            continue
        *path, last = key.split(".")
        table: Any = values
        for part in path:
            table = table.setdefault(part, {})
        table[last] = list(value) if isinstance(value, tuple) else value
    return parse_settings(values)
