"""What a tuning trial draws: a range for every tuned setting, and the configs of an arm's trials.

Trial 0 is the task's preset with the arm's own defaults. Trials 1, 2, ... are points of a scrambled Sobol
sequence with a fixed seed (Bergstra & Bengio 2012; AlgoPerf, arXiv 2306.07179, section 4), the same
points for all arms that tune as many settings; more trials only append. Rates and decays
are log-uniform, batches uniform over powers of two, and the space is the same for every arm. An arm that
starts off the tuned settings has no trials of its own. Chooses nothing: waves.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.settings import RunSettings
from trainer_node.race.arm_table import BATCH_FACTOR, KNOB, Arm
from trainer_node.race.batch_size import least_factor
from trainer_node.race.plan import Config

SOBOL_SEED = 20_261_121
HIGHEST_RATE = 10.0  # that a run file may name
FIGURES = 4  # significant, of a drawn value: configs are read by people


@dataclass(frozen=True, slots=True)
class Around:
    """Log-uniform from centre / factor to centre * factor; `low` and `high` cut it off."""

    factor: float
    low: float = 0.0
    high: float = math.inf
    centre_if_zero: float = 1.0


@dataclass(frozen=True, slots=True)
class Between:
    """Log-uniform. `of_complement`: of 1 - value, for decays near 1."""

    low: float
    high: float
    of_complement: bool = False


@dataclass(frozen=True, slots=True)
class OneOf:
    """Uniform over words."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PowersOfTwo:
    """Uniform over the powers of two from `low` to `high`, both among them."""

    low: float
    high: float


Range = Around | Between | OneOf | PowersOfTwo
RANGES: Mapping[str, Range] = {
    "trainer.optimizer.rate": Around(8.0, high=HIGHEST_RATE),
    "trainer.optimizer.muon_rate": Around(8.0, high=HIGHEST_RATE),
    "trainer.optimizer.weight_decay": Around(8.0, high=10.0, centre_if_zero=0.1),
    "trainer.optimizer.beta1": Between(0.8, 0.98, of_complement=True),
    "trainer.schedule.decay_share": Between(0.1, 1.0),
    "trainer.basis.average_steps": Around(4.0, low=2.0, centre_if_zero=20.0),
    "trainer.basis.average_share": Between(0.01, 0.3),
    "predictor.drift_gain": Between(0.1, 2.0),
    "predictor.temper": OneOf(("conservative", "balanced", "aggressive")),
    BATCH_FACTOR: PowersOfTwo(0.25, 4.0),  # of a batch that was chosen for the task
    "arm.average_share": Between(0.005, 0.3),
    "arm.inner_steps": Around(4.0, low=2.0),
    "arm.slow_share": Between(0.2, 0.9),
    "arm.outer_rate": Between(0.3, 1.2),
    "arm.outer_momentum": Between(0.2, 0.9),
    "arm.push_steps": Around(4.0),
    "arm.push_average_steps": Around(4.0),
}


def trial_config(arm: Arm, base: RunSettings, trial: int, inner: Config = ()) -> Config:
    """Config of one trial: the settings of the wrapped arm and this arm's own draw."""
    centre = {name: _centre(arm, base, name) for name in arm.tuned}
    chosen = dict(centre)
    if trial and arm.tuned:
        point = _sobol_point(len(arm.tuned), trial)
        chosen = {
            name: drawn(RANGES[name], centre[name], share)
            for name, share in zip(arm.tuned, point, strict=True)
        }
    config = {**dict(inner), **chosen}
    for name, times in arm.off_by:
        config[name] = _off(base, name, config.get(name, _centre(arm, base, name)) * times)
    return tuple(sorted(config.items()))


def _off(base: RunSettings, name: str, value: float) -> float:
    """Where the batch cannot be cut that far, as far as it can."""
    if name == BATCH_FACTOR:
        return max(value, least_factor(base.trainer.batch))
    return float(f"{min(value, HIGHEST_RATE):.{FIGURES}g}")


def drawn(over: Range, centre: Any, share: float) -> Any:
    """The value at `share` in [0, 1) of a range; of the type of its centre."""
    if isinstance(over, OneOf):
        return over.words[int(share * len(over.words))]
    if isinstance(over, PowersOfTwo):
        low, high = int(math.log2(over.low)), int(math.log2(over.high))
        return 2.0 ** (low + int(share * (high - low + 1)))
    if isinstance(over, Around):
        middle = centre if centre > 0 else over.centre_if_zero
        low, high = max(over.low, middle / over.factor), min(over.high, middle * over.factor)
        value = _log_uniform(low, high, share)
    elif over.of_complement:
        value = 1.0 - _log_uniform(1.0 - over.high, 1.0 - over.low, share)
    else:
        value = _log_uniform(over.low, over.high, share)
    return round(value) if isinstance(centre, int) else float(f"{value:.{FIGURES}g}")


def _log_uniform(low: float, high: float, share: float) -> float:
    return low * (high / low) ** share


def _centre(arm: Arm, base: RunSettings, name: str) -> Any:
    """The value without tuning: the arm's own where it sets one, else the task's."""
    own = {**dict(arm.settings), **dict(arm.knobs)}
    if name in own or name.startswith(KNOB):
        return own[name]
    value: Any = base
    for part in name.split("."):
        value = getattr(value, part)
    return value


@functools.cache
def _sobol_point(dimensions: int, trial: int) -> tuple[float, ...]:
    """Point number `trial` (from 1) of the sequence; it does not depend on how many are drawn."""
    from torch.quasirandom import SobolEngine  # torch takes a second to load: --list goes without

    engine = SobolEngine(dimensions, scramble=True, seed=SOBOL_SEED)
    return tuple(float(share) for share in engine.fast_forward(trial - 1).draw(1)[0])
