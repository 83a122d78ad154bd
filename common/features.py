"""The observation vector: names, order and units. A change of meaning raises VERSION.

Computed by trainer_node/featurize.py from what a step already knows. Units: losses in nats, rates as
configured, durations in log10 seconds (lockstep: log10 forward-equivalents), shares in [0, 1].
`d_` is a difference, `z_` a z-score over the stated number of steps; before there are that many,
what there is. A value that cannot be known yet is 0.0 and its `has_` feature is 0.0.
"""

VERSION = 2

LOSS = (
    "loss", "loss_ema_4", "loss_ema_16", "loss_ema_64", "loss_mean_16", "loss_std_16", "loss_min_16",
    "loss_max_16", "loss_mean_64", "loss_std_64", "loss_slope_16", "loss_slope_64", "d_loss", "z_loss_64",
    "loss_over_first", "loss_over_best",
)  # fmt: skip
GRADIENT = (
    "log10_grad_norm", "log10_grad_norm_ema_16", "log10_grad_norm_ema_64", "grad_norm_over_ema_64",
    "grad_norm_cv_64", "clip_scale", "clipped_share_64", "grad_norm_max_64_over_mean",
)  # fmt: skip
OPTIMIZER = (
    "rate", "rate_over_peak", "beta1", "beta2", "weight_decay", "log10_update_norm",
    "update_over_parameter_norm", "log10_parameter_norm",
)  # fmt: skip
SCHEDULE = (
    "progress", "rate_warmup_progress", "decay_progress", "steps_in_phase_share", "log10_steps_done",
    "log10_steps_left", "is_warmup", "is_full", "is_correct", "window_progress",
)  # fmt: skip
DATA = ("log10_units_per_step", "epoch", "micro_batches", "log10_context")
COST = (
    "log10_step_seconds",
    "step_seconds_over_ema_64",
    "data_wait_share",
    "check_share_of_run",
    "lost_share_of_run",
)
JUMPS = (
    "has_jump", "steps_since_jump_log10", "accepted_share_8", "last_horizon_over_window", "last_accepted",
    "last_gain_in_spreads", "last_delta_over_parameter_norm", "virtual_share_of_run", "last_delta_cosine",
    "loss_over_guard", "attempts_log10", "has_guard_loss", "guard_loss",
)  # fmt: skip
# Version 2. The noise scale (trainer_node/noise_scale.py) is in batches of the step; progress is the fall of
# the loss over 64 steps in nats per second; factors and context are those in force (control_rules.py).
CONTROLS = (
    "has_noise_scale", "log10_noise_scale_over_batch", "progress_per_second", "has_average",
    "distance_to_average_over_norm", "log2_rate_factor", "log2_batch_factor", "context_share",
)  # fmt: skip

NAMES: tuple[str, ...] = LOSS + GRADIENT + OPTIMIZER + SCHEDULE + DATA + COST + JUMPS + CONTROLS
INDEX: dict[str, int] = {name: position for position, name in enumerate(NAMES)}
