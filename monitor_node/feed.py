"""Revisions of a snapshot, so that a page gets only what changed and misses nothing.

A Feed holds the newest snapshot (a dict of sections) and knows for each section at which revision
it changed last; of curves it also knows how many leading points stayed. `since(revision)` is
therefore small, and applying it to the snapshot of that revision gives the newest one exactly:
a client that lost its connection resumes without gap or duplicate. Thread-safe; knows no HTTP.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

CURVES = "series"  # the section of lists that mostly grow at their end
_HISTORY_REVISIONS = 2400  # ten minutes at four revisions a second; older clients get everything


class Feed:
    def __init__(self, boot_id: str) -> None:
        """`boot_id` tells revisions of this process from those of an earlier one."""
        self._boot_id = boot_id
        self._lock = threading.Lock()
        self._revision = 0
        self._sections: dict[str, Any] = {}
        self._changed_at: dict[str, int] = {}
        # Per curve: (revision, number of leading points that were the same as one revision before).
        self._kept: dict[str, deque[tuple[int, int]]] = {}

    @property
    def revision(self) -> int:
        return self._revision

    def publish(self, snapshot: dict[str, Any]) -> bool:
        """Take the newest snapshot, which must not be changed afterwards. True if it is a new revision."""
        with self._lock:
            changed = [name for name, section in snapshot.items() if self._sections.get(name) != section]
            if not changed:
                return False
            self._revision += 1
            if CURVES in changed:
                self._note_curves(self._sections.get(CURVES, {}), snapshot[CURVES])
            self._changed_at.update(dict.fromkeys(changed, self._revision))
            self._sections = dict(snapshot)
            return True

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            return dict(self._sections)

    def event_id(self, revision: int) -> str:
        return f"{self._boot_id}.{revision}"

    def revision_of(self, event_id: str | None) -> int:
        """The revision in an event id of this process; 0 (nothing seen) for any other text."""
        boot_id, _, number = (event_id or "").rpartition(".")
        known = boot_id == self._boot_id and number.isdecimal() and len(number) < 20
        return int(number) if known and int(number) <= self._revision else 0

    def since(self, revision: int) -> tuple[int, dict[str, Any]]:
        """The newest revision and a delta: {"set": {section: value}, "curves": {name: tail}}.

        A tail is {"keep": leading points to keep, "add": points that follow them}.
        """
        with self._lock:
            delta: dict[str, Any] = {"set": {}, "curves": {}}
            for name, changed_at in self._changed_at.items():
                if changed_at <= revision:
                    continue
                if name != CURVES:
                    delta["set"][name] = self._sections[name]
                    continue
                for curve, points in self._sections[CURVES].items():
                    keep = self._kept_since(curve, revision)
                    if keep is not None:
                        delta["curves"][curve] = {"keep": keep, "add": points[keep:]}
            return self._revision, delta

    def _note_curves(self, old: dict[str, list[Any]], new: dict[str, list[Any]]) -> None:
        for curve, points in new.items():
            before = old.get(curve, [])
            if curve in old and before == points:
                continue
            history = self._kept.setdefault(curve, deque(maxlen=_HISTORY_REVISIONS))
            history.append((self._revision, _common_prefix(before, points)))

    def _kept_since(self, curve: str, revision: int) -> int | None:
        """Leading points unchanged since then; None if the whole curve is."""
        history = self._kept[curve]
        if history[-1][0] <= revision:
            return None
        if history[0][0] > revision and len(history) == _HISTORY_REVISIONS:
            return 0  # too long ago to know
        return min(keep for at, keep in history if at > revision) if revision else 0


def _common_prefix(old: list[Any], new: list[Any]) -> int:
    for index, (before, after) in enumerate(zip(old, new, strict=False)):
        if before != after:
            return index
    return min(len(old), len(new))
