"""Known methods as rows of coefficients over the trainer's four directions, each exact.

A row (K) is one coefficient per direction, the same for every group; `for_groups` repeats it. The delta a
row stands for is sum_k row[k] d[k], added to the weights at the end of a window:

    drift d = a - a(start of the window)     a = averaged weights; with average_steps = 0 the weights
    slow_drift b <- mu b + d, mu = basis.slow_momentum
    pull_back a - weights                    momentum = the next step from momentum alone

tests/predictor/test_rows.py holds each against its method's own slow twin. Chooses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.messages import DIRECTIONS

Row = tuple[float, ...]


def row_of(
    *,
    momentum: float = 0.0,
    drift: float = 0.0,
    slow_drift: float = 0.0,
    pull_back: float = 0.0,
    directions: Sequence[str] = DIRECTIONS,
) -> Row:
    """(K) in the order of `directions`. Raises ValueError when a coefficient has no direction."""
    known = {"momentum": momentum, "drift": drift, "slow_drift": slow_drift, "pull_back": pull_back}
    missing = [name for name, value in known.items() if value != 0.0 and name not in directions]
    if missing:
        raise ValueError(f"the trainer holds no direction {missing[0]}")
    return tuple(known.get(name, 0.0) for name in directions)


def for_groups(row: Row, num_groups: int) -> tuple[float, ...]:
    """(G*K) row-major: the same row for every group."""
    return row * num_groups


def nesterov_look_ahead(steps: float) -> Row:
    """`steps` steps along the optimizer's own momentum."""
    return row_of(momentum=steps)


def line_fit(horizon_steps: float, window_steps: float, *, share: float = 1.0) -> Row:
    """The line through the two ends of the window, `share` of the way to the horizon (nowcasting)."""
    return row_of(drift=share * horizon_steps / window_steps)


def lookahead(share: float) -> Row:
    """Lookahead (Zhang et al. 2019): back to phi + share (theta - phi). Needs average_steps = 0."""
    return row_of(drift=share - 1.0)


def snoo(rate: float, momentum: float) -> Row:
    """SNOO (2025): Nesterov SGD with `rate` on the displacement of every window.

    phi + rate (d + mu b) - theta with theta = phi + d is (rate - 1) d + rate mu b. Needs average_steps = 0,
    basis.slow_momentum = momentum, and a jump at every window.
    """
    return row_of(drift=rate - 1.0, slow_drift=rate * momentum)


def pull_back(share: float) -> Row:
    """`share` of the way back to the averaged weights."""
    return row_of(pull_back=share)


def ema_push(push_windows: float, momentum: float) -> Row:
    """EMA-Nesterov's push: `push_windows` times the average displacement of a window, m = (1 - mu) b.

    The first of a run; `ema_push_moved` keeps the push where it belongs afterwards.
    """
    return row_of(slow_drift=push_windows * (1.0 - momentum))


def ema_push_moved(push_windows: float, momentum: float) -> Row:
    """From the former push to this window's, so that gradients are always taken at the pushed point.

    push (m' - m) with m = (1 - mu) b and b = (b' - d) / mu is
    push (1 - mu) / mu (d - (1 - mu) b'). Needs 0 < mu < 1, average_steps = 0 and a jump at every window.
    """
    if not 0.0 < momentum < 1.0:
        raise ValueError("the moved push needs a slow momentum between 0 and 1")
    factor = push_windows * (1.0 - momentum) / momentum
    return row_of(drift=factor, slow_drift=-factor * (1.0 - momentum))
