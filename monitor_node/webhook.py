"""Tells each alert once to one address, from a thread of its own: JSON by POST, as chat receivers take it.

    {"text": "[error] run nano, step 400: trainer has been silent for 5.0 s",
     "run_id", "severity", "kind", "node", "step", "at_unix_seconds", "alert_text"}

A receiver that is away or busy is tried again for a minute and a half; one that says no is not. Never holds
up the node: the queue is bounded, the oldest go, and what was not told is counted and logged. Follows no
redirect, and never logs more of the address than its host: for such receivers the path is the password.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from common.errors import UserError
from common.log import NodeLog
from monitor_node.run_view import AlertRow

WEBHOOK_VARIABLE = "HPT_WEBHOOK"
MAX_WAITING = 256
MAX_TRIES = 8
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0  # doubling: 1, 2, 4, 8, 16, 30, 30 s between tries
ANSWER_SECONDS = 10.0
MAX_TEXT_CHARACTERS = 1500  # Discord refuses more than 2,000
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
# What a chat would take for a link or a call to everybody (<!channel>, @here) in text that is not ours.
_HARMLESS = str.maketrans({"<": "‹", ">": "›", "@": "＠", **dict.fromkeys(map(chr, range(32)), " ")})


def checked_url(url: str) -> str:
    """Raises UserError, which does not show the address."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        is_plain = url.isascii() and url.isprintable() and " " not in url and "@" not in parts.netloc
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and is_plain:
            return url
    raise UserError("--webhook: write it as https://HOST/PATH (or http://), without user name and spaces")


def payload(run_id: str, row: AlertRow) -> dict[str, Any]:
    """`text` is for people; the other fields say the same to programs, unchanged."""
    alert = row.alert
    step = f", step {alert.step:,}" if alert.step else ""
    text = f"[{alert.severity}] run {run_id}{step}: {alert.text}".translate(_HARMLESS)
    return {
        "text": text[:MAX_TEXT_CHARACTERS],
        "run_id": run_id,
        "severity": alert.severity,
        "kind": alert.kind,
        "node": alert.node,
        "step": alert.step,
        "at_unix_seconds": row.at_unix_seconds,
        "alert_text": alert.text[:MAX_TEXT_CHARACTERS],
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookCounts:
    posted: int = 0
    dropped: int = 0  # not told: the queue was full, the tries were used up, or the receiver said no


class Webhook:
    """`put` never waits and never raises. Posts in the order of `put`, one at a time."""

    def __init__(
        self, url: str, run_id: str, log: NodeLog, *, first_pause_seconds: float = FIRST_PAUSE_SECONDS
    ) -> None:
        """Raises UserError for an address that is none. Connects only when there is something to tell."""
        self._url = checked_url(url)
        self._host = urlsplit(url).hostname
        self._run_id = run_id
        self._log = log
        self._first_pause_seconds = first_pause_seconds
        self._opener = _opener()
        self._news = threading.Condition()  # guards everything below
        self._waiting: deque[AlertRow] = deque()
        self._closing = False
        self._posted = 0
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> WebhookCounts:
        with self._news:
            return WebhookCounts(posted=self._posted, dropped=self._dropped)

    def put(self, row: AlertRow) -> None:
        with self._news:
            is_full = len(self._waiting) >= MAX_WAITING
            if is_full:
                self._waiting.popleft()
            self._waiting.append(row)
            self._news.notify_all()
        if is_full:
            self._count_drop("too many wait")

    def close(self, deadline_seconds: float) -> None:
        """One last try for each that waits, for at most so long. May be called again."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join(deadline_seconds)
        with self._news:
            left, self._waiting = len(self._waiting), deque()
        for _ in range(left):
            self._count_drop("the monitor ended")

    def _run(self) -> None:
        while (row := self._next()) is not None:
            failure = self._deliver(json.dumps(payload(self._run_id, row)).encode())
            if failure:
                self._count_drop(failure)
                continue
            with self._news:
                self._posted += 1

    def _next(self) -> AlertRow | None:
        with self._news:
            self._news.wait_for(lambda: self._waiting or self._closing)
            return self._waiting.popleft() if self._waiting else None

    def _deliver(self, body: bytes) -> str:
        """Why it was given up; "" when it was told."""
        failure = ""
        for tries in range(1, MAX_TRIES + 1):
            is_last = tries == MAX_TRIES or self._closing
            failure, may_try_again = self._post(body)
            if not failure or is_last or not may_try_again:
                break
            pause_seconds = min(LONGEST_PAUSE_SECONDS, self._first_pause_seconds * 2 ** (tries - 1))
            with self._news:
                self._news.wait_for(lambda: self._closing, pause_seconds)
        return failure

    def _post(self, body: bytes) -> tuple[str, bool]:
        """(what went wrong or "", whether another try may help)."""
        headers = {"Content-Type": "application/json", "User-Agent": "hybrid-predict-trainer"}
        request = urllib.request.Request(self._url, data=body, headers=headers, method="POST")
        try:
            self._opener.open(request, timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError as error:
            error.close()
            return f"the receiver answered {error.code}", error.code in _TRY_AGAIN
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f"no connection ({type(error).__name__})", True
        return "", False

    def _count_drop(self, reason: str) -> None:
        with self._news:
            self._dropped += 1
            dropped = self._dropped
        if dropped & (dropped - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            fields = {"host": self._host, "reason": reason, "dropped": dropped}
            self._log.event("alert_not_told", level="warning", **fields)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the alert, and the secret in the path, to an address nobody chose."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _opener() -> urllib.request.OpenerDirector:
    """HTTP and HTTPS through the proxies of the environment; no files, no FTP."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _NoRedirect(),
    ):
        opener.add_handler(handler)
    return opener
