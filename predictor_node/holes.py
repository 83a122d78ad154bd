"""What of the history never came to the predictor: the first hole is told at once, those behind it in sums.

Owns what is not told yet. A trainer that outruns its predictor makes a hole every few entries: one alert for
each would bury the others. Counts handled entries, reads no clock, decides nothing.
"""

from __future__ import annotations

from common.bus import EntryId
from common.messages import Alert
from common.streams import PREDICTOR

GAP, PASSED_OVER = "history_gap", "history_passed_over"  # kinds of alerts
QUIET_ENTRIES = (
    4096  # handled ones between two alerts of a sort: seconds at full speed, minutes of a usual run
)

STEPS, ENTRIES, LEFT_OUT = "steps", "entries", "left out"  # sorts of holes
_KINDS = {STEPS: GAP, ENTRIES: GAP, LEFT_OUT: PASSED_OVER}
_TEXTS = {
    STEPS: "{count} steps before step {step} never arrived{holes}:"
    " no proposals until a window without a hole",
    ENTRIES: "{count} entries of the history before {entry} never arrived{holes}: trimmed unread or dropped",
    LEFT_OUT: "{count} observations before step {step} were passed over to catch up with the trainer{holes}:"
    " they teach nothing, and no proposals until a window without a hole",
}


class Holes:
    def __init__(self) -> None:
        self.total = 0  # holes
        self._untold: dict[str, tuple[int, int]] = {}  # by sort: how much is missing, in how many holes
        self._quiet: dict[str, int] = {}  # by sort: entries until the next alert

    def add(self, sort: str, count: int) -> None:
        """One more hole, of `count` steps or entries."""
        self.total += 1
        missing, holes = self._untold.get(sort, (0, 0))
        self._untold[sort] = (missing + count, holes + 1)

    def tell(self, step: int, entry_id: EntryId, *, is_last: bool) -> list[Alert]:
        """To be asked once for each entry that was handled. `is_last`: nothing may wait any longer."""
        self._quiet = {sort: left - 1 for sort, left in self._quiet.items() if left > 1}
        due = [sort for sort in self._untold if is_last or sort not in self._quiet]
        return [self._alert(sort, step, entry_id) for sort in due]

    def _alert(self, sort: str, step: int, entry_id: EntryId) -> Alert:
        count, holes = self._untold.pop(sort)
        self._quiet[sort] = QUIET_ENTRIES
        text = _TEXTS[sort].format(
            count=count, step=step, entry=entry_id, holes=f", in {holes} holes" if holes > 1 else ""
        )
        return Alert(node=PREDICTOR, severity="warning", kind=_KINDS[sort], text=text, step=step)
