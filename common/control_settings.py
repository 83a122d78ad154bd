"""The levers besides weights that the predictor may move, each with a switch and bounds."""

from __future__ import annotations

from dataclasses import dataclass

from common.setting import setting


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """What they mean: common/control_rules.py."""

    rate: bool = setting(False, "the predictor may change the learning rate")
    batch: bool = setting(False, "the predictor may change the batch, the rate with it (batch_rule)")
    context: bool = setting(False, "text: the predictor may train on shorter windows of the same tokens")
    decay: bool = setting(False, "wsd: the predictor may choose when the decay of the rate begins and ends")
    read_out: bool = setting(False, "the predictor may choose which weights are handed out")
    trial_steps: int = setting(
        32, "real steps of a trial of another rate or batch, and of the run without it", low=2, high=1 << 20
    )
    rate_low: float = setting(1 / 64, "least rate_factor of a run", low=1e-6, high=1.0)
    rate_high: float = setting(64.0, "greatest rate_factor of a run", low=1.0, high=1e6)
    rate_change: float = setting(4.0, "most that one decision changes it by, as a factor", low=1.0, high=1e6)
    batch_low: float = setting(0.25, "least batch_factor of a run", low=1 / 64, high=1.0)
    batch_high: float = setting(16.0, "greatest batch_factor of a run", low=1.0, high=1024.0)
    batch_change: float = setting(
        2.0, "most that one decision changes it by, as a factor", low=1.0, high=1024.0
    )
    context_low_tokens: int = setting(16, "shortest context", low=2, high=1 << 20)
    batch_rule: str = setting(
        "sqrt",
        "how the rate follows the batch (Adam, Muon: sqrt; SGD: linear)",
        choices=("sqrt", "linear", "none"),
    )
    batch_betas: bool = setting(
        False, "the betas of Adam follow the batch too: its moments average over the same number of tokens"
    )
