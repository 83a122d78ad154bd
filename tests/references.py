"""Slow, obviously right twins of the trainer's numerics.

Plain Python and float64 numpy; whole vectors, explicit sums, no incremental state. Nothing here
is imported by the product. The twins of optimizers and schedules are in trainer/references_optim.py.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics

import numpy as np

from common.messages import Phase, Verdict


def average_of(path, *, average_steps):
    """Exponential average of a list of weight vectors, path[0] being the start, by the explicit sum."""
    share = 1.0 / max(1, average_steps)
    last = len(path) - 1
    total = (1 - share) ** last * path[0]
    for step in range(1, last + 1):
        total = total + share * (1 - share) ** (last - step) * path[step]
    return total


def slow_drift_of(drifts, *, momentum):
    """Sum of the windows' drifts, the newest with weight 1, the one before with `momentum`, ..."""
    last = len(drifts) - 1
    return sum(momentum ** (last - window) * drift for window, drift in enumerate(drifts))


def gram_of(vectors_KN):
    """All inner products of whole vectors: (K, K) nested lists."""
    return [[math.fsum(a * b for a, b in zip(u, v, strict=True)) for v in vectors_KN] for u in vectors_KN]


def happened_of(basis_KN, target_N):
    """Least squares of a whole vector over whole directions: coefficients (K,), unexplained share."""
    design_NK = np.asarray(basis_KN, dtype=np.float64).T
    target_N = np.asarray(target_N, dtype=np.float64)
    coefficients_K = np.linalg.pinv(design_NK) @ target_N
    residual_N = target_N - design_NK @ coefficients_K
    return coefficients_K, (residual_N @ residual_N) / (target_N @ target_N)


def cosine_of(left_N, right_N):
    return float(left_N @ right_N / (np.linalg.norm(left_N) * np.linalg.norm(right_N)))


def snoo_weights(start, updates, *, rate, momentum):
    """Weights after each window of SNOO: Nesterov SGD on the displacement of `len(updates[w])` steps.

    `updates` is a list of windows, each a list of the inner optimizer's updates. phi are the slow
    weights, D = theta - phi, b <- mu b + D, phi <- phi + rate (D + mu b), theta <- phi.
    """
    slow, buffer, found = start, np.zeros_like(start), []
    for window in updates:
        displacement = sum(window)
        buffer = momentum * buffer + displacement
        slow = slow + rate * (displacement + momentum * buffer)
        found.append(slow)
    return found


def fingerprint_of(arrays):
    """The law of fingerprint.py by Python integers: words of each array's own width, signed."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        width = array.dtype.itemsize
        raw = np.ascontiguousarray(array).tobytes()
        words = [
            int.from_bytes(raw[place : place + width], "little", signed=True)
            for place in range(0, len(raw), width)
        ]
        for total in (sum(words), sum((2 * i + 1) * word for i, word in enumerate(words))):
            digest.update((total % (1 << 64)).to_bytes(8, "little"))
    return digest.hexdigest()


def line_forecast_of(losses, *, horizon_steps):
    """(change, spread) of a fitted line over the horizon, by numpy's covariance of the slope."""
    x = np.arange(len(losses), dtype=np.float64)
    (slope, _), covariance = np.polyfit(x, np.asarray(losses, dtype=np.float64), 1, cov=True)
    return slope * horizon_steps, math.sqrt(covariance[0, 0]) * horizon_steps


# What the phase machine may do. (phase, steps left is 0) -> event -> phase. All else is an error.
PHASE_TABLE = {
    (Phase.WARMUP, False): {"step": {Phase.WARMUP, Phase.FULL}},
    (Phase.FULL, False): {"step": {Phase.FULL}},
    (Phase.FULL, True): {"apply": {Phase.CORRECT}, "go on": {Phase.FULL}},
    (Phase.CORRECT, False): {"step": {Phase.CORRECT}, "judge": {Phase.FULL}},  # judged early: aborted
    (Phase.CORRECT, True): {"judge": {Phase.FULL}},
}

# What is wrong with a decision, the first that holds counts.
OBJECTIONS_IN_ORDER = (
    Verdict.MISSING,
    Verdict.STALE,
    Verdict.REST,
    Verdict.USED,
    Verdict.MALFORMED,
    Verdict.VETOED,
)


def slow_features(history, *, jump):
    """The observation after the last step of `history` by definition: name -> value.

    `history` is a list of (facts, loss, gradient norm, clip scale, norm of a part of the batch, its share);
    `jump` holds what the features know besides: parameter_norm, displacement_norm, average_distance, the last
    judged jumps and pass counts.
    """
    facts, loss, norm, clip = history[-1][:4]
    losses = [row[1] for row in history]
    norms = [row[2] for row in history][-64:]
    values = {}
    values.update(_slow_loss_features(losses))
    values.update(
        {
            "log10_grad_norm": math.log10(norm),
            "log10_grad_norm_ema_16": math.log10(_slow_ema([r[2] for r in history], 16)),
            "log10_grad_norm_ema_64": math.log10(_slow_ema([r[2] for r in history], 64)),
            "grad_norm_over_ema_64": norm / _slow_ema([r[2] for r in history], 64),
            "grad_norm_cv_64": statistics.pstdev(norms) / statistics.fmean(norms),
            "clip_scale": clip,
            "clipped_share_64": statistics.fmean([float(r[3] < 1) for r in history][-64:]),
            "grad_norm_max_64_over_mean": max(norms) / statistics.fmean(norms),
        }
    )
    values.update(_slow_schedule_features(facts, jump))
    seconds = [r[0].step_seconds for r in history][-64:]
    values.update(
        {
            "log10_step_seconds": math.log10(facts.step_seconds),
            "step_seconds_over_ema_64": facts.step_seconds / statistics.fmean(seconds),
            "data_wait_share": facts.data_seconds / facts.step_seconds,
            "check_share_of_run": jump["check_passes"] / jump["all_passes"],
            "lost_share_of_run": jump["lost_passes"] / jump["all_passes"],
        }
    )
    values.update(
        {
            "has_jump": 1.0,
            "steps_since_jump_log10": math.log10(1 + facts.step - jump["jump_step"]),
            "accepted_share_8": statistics.fmean(jump["accepted"][-8:]),
            "last_horizon_over_window": jump["horizon_windows"],
            "last_accepted": jump["accepted"][-1],
            "last_gain_in_spreads": jump["gain_spreads"],
            "last_delta_over_parameter_norm": jump["delta_norm"] / jump["parameter_norm"],
            "virtual_share_of_run": jump["virtual_steps"] / (jump["virtual_steps"] + facts.step),
            "last_delta_cosine": jump["cosine"],
            "loss_over_guard": loss / jump["guard_loss"],
            "attempts_log10": math.log10(1 + jump["attempts"]),
            "has_guard_loss": 1.0,
            "guard_loss": jump["guard_loss"],
        }
    )
    values.update(_slow_control_features(history, jump))
    return values


def _slow_control_features(history, jump):
    facts = history[-1][0]
    last = history[-64:]
    fall = -_slow_slope([row[1] for row in last])
    noise = slow_noise_scale([(row[4], row[2], row[5], row[0].batch_factor) for row in history])
    return {
        "has_noise_scale": float(noise is not None),
        "log10_noise_scale_over_batch": math.log10(noise / facts.batch_factor) if noise else 0.0,
        "progress_per_second": fall / statistics.fmean(row[0].step_seconds for row in last),
        "has_average": 1.0,
        "distance_to_average_over_norm": jump["average_distance"] / jump["parameter_norm"],
        "log2_rate_factor": math.log2(facts.rate_factor),
        "log2_batch_factor": math.log2(facts.batch_factor),
        "context_share": facts.context_share,
    }


def slow_noise_scale(rows):
    """McCandlish et al. 2018, A.1, in configured batches; None if unknown: from fewer than 16 measured steps.

    `rows` of (norm of a part, norm of the whole, share of the part or NaN, batch factor). The two batch sizes
    stand as sizes here, and each average is a sum of weights times values. One stands for the steps since the
    one before it, for four at most.
    """
    pairs, numbers = [], []
    for number, (small, big, share, factor) in enumerate(rows):
        if not math.isnan(share):
            big_batch, small_batch = factor, factor * share
            square = (big_batch * big**2 - small_batch * small**2) / (big_batch - small_batch)
            pairs.append((square, (small**2 - big**2) / (1 / small_batch - 1 / big_batch)))
            numbers.append(number)
    if len(pairs) < 16:
        return None
    kept = [(63 / 65) ** min(4, gap) for gap in [1, *(b - a for a, b in itertools.pairwise(numbers))]]
    weights = [(1 - keep) * math.prod(kept[i + 1 :]) for i, keep in enumerate(kept)]
    square, noise = (math.fsum(w * pair[i] for w, pair in zip(weights, pairs, strict=True)) for i in (0, 1))
    return noise / square if noise > 0 < square else None


def _slow_loss_features(losses):
    loss, long, short = losses[-1], losses[-64:], losses[-16:]
    deviation = statistics.pstdev(long)
    return {
        "loss": loss,
        "loss_ema_4": _slow_ema(losses, 4),
        "loss_ema_16": _slow_ema(losses, 16),
        "loss_ema_64": _slow_ema(losses, 64),
        "loss_mean_16": statistics.fmean(short),
        "loss_std_16": statistics.pstdev(short),
        "loss_min_16": min(short),
        "loss_max_16": max(short),
        "loss_mean_64": statistics.fmean(long),
        "loss_std_64": deviation,
        "loss_slope_16": _slow_slope(short),
        "loss_slope_64": _slow_slope(long),
        "d_loss": loss - losses[-2] if len(losses) > 1 else 0.0,
        "z_loss_64": (loss - statistics.fmean(long)) / deviation if deviation > 0 else 0.0,
        "loss_over_first": loss / losses[0],
        "loss_over_best": loss / min(losses),
    }


def _slow_schedule_features(facts, jump):
    in_phase = facts.phase_steps_done / facts.phase_steps
    falling = (facts.step - facts.decay_start_step) / max(1, facts.total_steps - facts.decay_start_step)
    return {
        "rate": facts.rate,
        "rate_over_peak": facts.rate / facts.peak_rate,
        "beta1": facts.beta1,
        "beta2": facts.beta2,
        "weight_decay": facts.weight_decay,
        "log10_update_norm": math.log10(jump["displacement_norm"]),
        "update_over_parameter_norm": jump["displacement_norm"] / jump["parameter_norm"],
        "log10_parameter_norm": math.log10(jump["parameter_norm"]),
        "progress": facts.step / facts.total_steps,
        "rate_warmup_progress": min(1.0, facts.step / facts.warmup_steps),
        "decay_progress": min(1.0, max(0.0, falling)),
        "steps_in_phase_share": in_phase,
        "log10_steps_done": math.log10(1 + facts.step),
        "log10_steps_left": math.log10(1 + facts.total_steps - facts.step),
        "is_warmup": float(facts.phase is Phase.WARMUP),
        "is_full": float(facts.phase is Phase.FULL),
        "is_correct": float(facts.phase is Phase.CORRECT),
        "window_progress": in_phase if facts.phase is Phase.FULL else 0.0,
        "log10_units_per_step": math.log10(facts.units_per_step),
        "epoch": facts.epoch,
        "micro_batches": facts.micro_batches,
        "log10_context": math.log10(facts.context),
    }


def _slow_ema(values, steps):
    """Exponential average of span `steps`, starting at the first value: the explicit sum."""
    share = 2 / (steps + 1)
    last = len(values) - 1
    return (1 - share) ** last * values[0] + math.fsum(
        share * (1 - share) ** (last - i) * values[i] for i in range(1, last + 1)
    )


def _slow_slope(values):
    if len(values) < 2:
        return 0.0
    return statistics.linear_regression(range(len(values)), values).slope
