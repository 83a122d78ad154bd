"""How the pictures of a race look: colours, dashes, and the figure that everything is drawn on.

matplotlib is imported when the first figure is made. Colours are Okabe and Ito's, which colour-blind
readers can tell apart; an arm has the same colour and dash in every picture of every race.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from common.errors import SettingsError

PIXELS_PER_POINT = 2  # sharp on screens of double density
CURE = "pictures need matplotlib: pip install 'hybrid-predict-trainer[race]'"
INK, SOFT, RULE = "#1b2330", "#5d6878", "#dfe3e9"
OURS = "#D55E00"
COLOURS = {
    "adamw-constant": "#7f7f7f", "adamw-decay": "#000000", "adamw-decay-ema": "#000000",
    "muon-decay": "#0072B2", "muon-decay-ema": "#0072B2", "schedule-free": "#CC79A7",
    "lookahead": "#56B4E9", "snoo": "#009E73", "ema-nesterov": "#E69F00", "line-fit": "#8c6d1f",
    "adamw-cosine": "#7f7f7f", "adamw-cosine-ema": "#7f7f7f", "muon-cosine": "#56B4E9",
    "muon-defaults": "#0072B2", "adamw-3e-4-cosine": "#CC79A7", "adamw-swept": "#0072B2",
    "ours-muon-defaults": "#E69F00", "ours-controls": "#E69F00",
}  # fmt: skip
# Ours and what is left of it without one part share a colour.
DASHES = {
    "adamw-decay-ema": (0, (5, 2)), "muon-decay-ema": (0, (5, 2)), "line-fit": (0, (1, 1)),
    "ours-fixed": (0, (5, 2)), "ours-random": (0, (1, 1.4)), "ours-unguarded": (0, (6, 2, 1, 2)),
    "ours-constant": (0, (8, 3)), "ours-phi": (0, (3, 1)),
    "adamw-cosine-ema": (0, (5, 2)), "ours-cosine": (0, (5, 2)),
    "ours-hands-free-rate-high": (0, (5, 2)), "ours-hands-free-rate-low": (0, (1, 1.4)),
    "ours-hands-free-batch-high": (0, (6, 2, 1, 2)), "ours-hands-free-batch-low": (0, (3, 1)),
    "ours-ramp-rate": (0, (5, 2)), "ours-ramp-batch": (0, (1, 1.4)),
    "ours-controls-rate": (0, (5, 2)), "ours-controls-batch": (0, (1, 1.4)),
    "ours-controls-context": (0, (6, 2, 1, 2)), "ours-controls-decay": (0, (3, 1)),
    "ours-controls-read-out": (0, (8, 3)),
}  # fmt: skip
PHASES = {"warmup": "#c9a94f", "full": "#9db4d8", "correct": "#9b7fc4"}
KEPT, UNDONE = "#009E73", "#D55E00"


def colour_of(arm: str) -> str:
    return COLOURS.get(arm, OURS if arm.startswith("ours") else "#a0522d")


class Canvas:
    """Makes the one figure of a picture, when it is known how large it has to be."""

    def __init__(self, pyplot: Any) -> None:
        self._pyplot = pyplot
        self.figure: Any = None

    def axes(self, width: float, height: float, rows: Sequence[float] = (1.0,), **options: Any) -> Any:
        """Axes, or an array of them for several rows (their relative heights)."""
        self.figure, axes = self._pyplot.subplots(
            len(rows), 1, figsize=(width, height), height_ratios=rows, layout="constrained", **options
        )
        return axes


@contextmanager
def canvas() -> Iterator[Canvas]:
    """A look of its own, whatever the user's matplotlibrc says; no window, nothing left open."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise SettingsError(CURE) from None
    look = {
        "font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": SOFT, "xtick.color": SOFT, "ytick.color": SOFT, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlelocation": "left", "axes.titlesize": 11.5,
        "axes.titleweight": "bold", "axes.titlepad": 10, "legend.frameon": False, "figure.facecolor": "white",
    }  # fmt: skip
    with mpl.rc_context({**mpl.rcParamsDefault, "backend": "Agg", **look}):
        made = Canvas(pyplot)
        try:
            yield made
        finally:
            if made.figure is not None:
                pyplot.close(made.figure)
