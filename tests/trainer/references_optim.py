"""Slow, obviously right twins of the schedule and of the momentum directions.

Plain Python floats and loops; no torch in the arithmetic except matrices for Newton-Schulz.
"""

import math

import numpy as np


def slow_rates(total, *, name, warmup, decay_share=0.2, final_share=0.0):
    """The whole curve as a list, built piece by piece."""
    rates = [(step + 1) / warmup for step in range(min(warmup, total))]
    if len(rates) == total and name != "one-cycle":
        return rates
    if name == "constant":
        return rates + [1.0] * (total - len(rates))
    if name == "wsd":
        falling = round(decay_share * total)
        # The plateau's last step is the first of the fall's corner points.
        while len(rates) < total - falling:
            rates.append(1.0)
        corner = len(rates) - 1 if len(rates) > warmup else len(rates)
    elif name == "one-cycle":
        rise = [(1 - math.cos(math.pi * step / (warmup - 1))) / 2 for step in range(warmup) if warmup > 1]
        rates[: len(rise)] = [1 / 25 * (1 - share) + 1.0 * share for share in rise]
        corner = max(0, warmup - 1)
    else:
        corner = len(rates)
    last = total - 1
    for step in range(len(rates), total):
        share = (step - corner) / max(1, last - corner)
        if name in ("cosine", "one-cycle"):
            rates.append(final_share + (1 - final_share) * (1 + math.cos(math.pi * share)) / 2)
        else:
            rates.append(1.0 * (1 - share) + final_share * share)
    return rates


def slow_adam_direction(gradients, *, rate, beta1, beta2, eps=1e-8):
    """Direction after the given gradients of one weight, from the definition of Adam's moments."""
    steps = len(gradients)
    first = sum((1 - beta1) * beta1 ** (steps - 1 - i) * g for i, g in enumerate(gradients))
    second = sum((1 - beta2) * beta2 ** (steps - 1 - i) * g * g for i, g in enumerate(gradients))
    first_hat, second_hat = first / (1 - beta1**steps), second / (1 - beta2**steps)
    return -rate * first_hat / (math.sqrt(second_hat) + eps)


def slow_muon_direction(gradients, *, rate, momentum, scaling):
    """Newton-Schulz of the averaged gradient in float64 (torch works in bfloat16)."""
    average = np.zeros_like(gradients[0], dtype=np.float64)
    for gradient in gradients:
        average = momentum * average + (1 - momentum) * gradient
    rows, columns = average.shape
    x = average / max(np.linalg.norm(average), 1e-7)
    if rows > columns:
        x = x.T
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    if rows > columns:
        x = x.T
    factors = {
        "original": math.sqrt(max(1.0, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
    }
    return -rate * factors[scaling] * x


def slow_sgd_direction(gradients, *, rate, momentum):
    buffer = gradients[0]
    for gradient in gradients[1:]:
        buffer = momentum * buffer + gradient
    return -rate * buffer


def slow_lion_direction(gradients, *, rate, beta2):
    """Step for a gradient equal to the momentum m: the interpolation of m and m, its sign alone."""
    momentum = 0.0
    for gradient in gradients:
        momentum = beta2 * momentum + (1 - beta2) * gradient
    return -rate * (momentum > 0) + rate * (momentum < 0)


def slow_adam_8bit_direction(state, *, rate, beta1, beta2, eps):
    """Step for a gradient equal to the first moment, weight by weight, from codes, table and block scales."""
    steps, directions = state["step"] + 1, []
    for index in range(state["state1"].numel()):
        first, second = (_slow_moment(state, number, index) for number in "12")
        second = beta2 * second + (1 - beta2) * first**2
        first_hat, second_hat = first / (1 - beta1**steps), second / (1 - beta2**steps)
        directions.append(-rate * first_hat / (math.sqrt(second_hat) + eps))
    return directions


def _slow_moment(state, number, index):
    stored = state[f"state{number}"].reshape(-1)[index].item()
    if f"qmap{number}" not in state:
        return stored
    return state[f"qmap{number}"][stored].item() * state[f"absmax{number}"][index // 256].item()
