"""Revisions of a snapshot, so that a page gets only what changed and misses nothing.

A Feed holds the newest snapshot (a dict of sections) and knows for each section at which revision
it changed last; of curves it also knows how many leading points stayed. `since(revision)` is
therefore small, and applying it to the snapshot of that revision gives the newest one exactly:
a client that lost its connection resumes without gap or duplicate. What many clients ask for is made
and serialised once. Memory is bounded by the snapshot, however many come and go. Thread-safe; knows no HTTP.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

CURVES = "series"  # the section of lists that mostly grow at their end
_HISTORY_REVISIONS = 2400  # four minutes at ten revisions a second; older clients get whole curves
_MAX_TEXTS = 16  # serialised deltas kept, all to the newest revision; clients are rarely two revisions apart


class Feed:
    def __init__(self, boot_id: str) -> None:
        """`boot_id` tells revisions of this process from those of an earlier one."""
        self._boot_id = boot_id
        self._lock = threading.Lock()
        self._revision = 0
        self._whole_below = 0  # clients of an older revision get everything: something was taken away since
        self._sections: dict[str, Any] = {}
        self._changed_at: dict[str, int] = {}
        # Per curve: (revision, number of leading points that were the same as one revision before).
        self._kept: dict[str, deque[tuple[int, int]]] = {}
        self._text_lock = threading.Lock()  # apart, so that a large delta never holds up `publish`
        self._texts: dict[int, tuple[int, bytes]] = {}  # by the client's revision: newest revision, JSON
        self._viewers = 0
        self._wake: Callable[[], None] = lambda: None

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def viewers(self) -> int:
        """Clients that follow right now."""
        return self._viewers

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Counts one client for as long as it follows."""
        with self._lock:
            self._viewers += 1
        try:
            yield
        finally:
            with self._lock:
                self._viewers -= 1

    def on_publish(self, wake: Callable[[], None]) -> None:
        """`wake` is called after each new revision, from the thread that published it; one at most."""
        self._wake = wake

    def publish(self, snapshot: dict[str, Any]) -> bool:
        """Take the newest snapshot, which must not be changed afterwards. True if it is a new revision."""
        with self._lock:
            changed = [name for name, section in snapshot.items() if self._sections.get(name) != section]
            added = snapshot.keys() - self._sections.keys()  # even where its value is None
            gone = self._sections.keys() - snapshot.keys()
            if not (changed or added or gone):
                return False
            self._revision += 1
            old_curves, new_curves = self._sections.get(CURVES, {}), snapshot.get(CURVES, {})
            gone_curves = old_curves.keys() - new_curves.keys()
            if gone or gone_curves:
                self._whole_below = self._revision
            for name in gone:
                del self._changed_at[name]
            for curve in gone_curves:
                del self._kept[curve]
            self._note_curves(old_curves, new_curves)
            self._changed_at.update(dict.fromkeys([*changed, *added], self._revision))
            self._sections = dict(snapshot)
        self._wake()
        return True

    def snapshot(self) -> dict[str, Any]:
        with self._lock:
            return dict(self._sections)

    def event_id(self, revision: int) -> str:
        return f"{self._boot_id}.{revision}"

    def revision_of(self, event_id: str | None) -> int:
        """The revision in an event id of this process; 0 (nothing seen) for any other text."""
        boot_id, _, number = (event_id or "").rpartition(".")
        known = boot_id == self._boot_id and number.isascii() and number.isdecimal() and len(number) < 20
        return int(number) if known and int(number) <= self._revision else 0

    def since(self, revision: int) -> tuple[int, dict[str, Any]]:
        """The newest revision and a delta: {"whole": bool, "set": {section: value}, "curves": {name: tail}}.

        A tail is {"keep": leading points to keep, "add": points that follow them}. A whole delta is
        everything: what the client has from before, perhaps of another monitor, is to be forgotten.
        """
        with self._lock:
            return self._since(self._known(revision))

    def json_since(self, revision: int) -> tuple[int, bytes]:
        """`since` as UTF-8 JSON; made once for all clients of one revision."""
        with self._text_lock:
            with self._lock:
                revision = self._known(revision)
                newest, text = self._texts.get(revision, (-1, b""))
                if newest == self._revision:
                    return newest, text
                newest, delta = self._since(revision)
            text = as_json(delta)
            self._texts = {known: made for known, made in self._texts.items() if made[0] == newest}
            if len(self._texts) >= _MAX_TEXTS:
                del self._texts[next(iter(self._texts))]
            self._texts[revision] = (newest, text)
            return newest, text

    def _known(self, revision: int) -> int:
        return revision if revision >= self._whole_below else 0

    def _since(self, revision: int) -> tuple[int, dict[str, Any]]:
        changed = [name for name, at in self._changed_at.items() if at > revision]
        curves = self._sections.get(CURVES, {}) if CURVES in changed else {}
        tails = {}
        for curve, points in curves.items():
            keep = self._kept_since(curve, revision)
            if keep is not None:
                tails[curve] = {"keep": keep, "add": points[keep:]}
        sections = {name: self._sections[name] for name in changed if name != CURVES}
        return self._revision, {"whole": revision == 0, "set": sections, "curves": tails}

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


def as_json(value: Any) -> bytes:
    """Raises ValueError for a number that is not finite: JSON has none, and a browser would give up."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _common_prefix(old: list[Any], new: list[Any]) -> int:
    for index, (before, after) in enumerate(zip(old, new, strict=False)):
        if before != after:
            return index
    return min(len(old), len(new))
