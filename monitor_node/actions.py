"""What a person may ask for on the page, and what becomes of it: orders for the trainer, a pause, a note.

The page's thread puts actions into a bounded queue, the node's thread takes them out and publishes what `act`
says. A pause is no message: the enforcer turns it into a veto that it renews while the pause lasts, so that
it ends with the monitor that was asked. Also owns the token: who it is that asks. Knows no HTTP and no bus.
"""

from __future__ import annotations

import enum
import hmac
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.messages import Alert, CheckpointRequest, Message, StopRequest
from common.streams import MONITOR

TOKEN_VARIABLE = "HPT_PAGE_TOKEN"
MIN_TOKEN_CHARACTERS, MAX_TOKEN_CHARACTERS = 16, 1024
PAUSE_REASON = "a person paused prediction"
_MAX_WAITING = 16  # clicks that the node has not taken; it takes them all several times a second


class Action(enum.StrEnum):
    CHECKPOINT = "checkpoint"
    STOP = "stop"
    PAUSE = "pause"
    RESUME = "resume"


class ActionQueue:
    """From the page's thread to the node's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Action] = deque()

    def offer(self, action: Action) -> bool:
        """False when the node has not taken the last ones: nothing was asked."""
        with self._lock:
            if len(self._waiting) >= _MAX_WAITING:
                return False
            self._waiting.append(action)
            return True

    def take(self) -> list[Action]:
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
            return taken


@dataclass(frozen=True, kw_only=True)
class Operator:
    """What the person at the page has asked of this monitor."""

    is_paused: bool = False
    orders: int = 0  # given so far; numbers the ids


def act(
    operator: Operator, actions: Sequence[Action], *, generation: int, step: int
) -> tuple[Operator, tuple[Message, ...]]:
    """The next state and what to publish. The same wish twice in one go is one wish; the later of pause and
    resume counts. `generation`: of the monitor, so that ids stay unique when it restarts.
    """
    messages: list[Message] = []
    for wish in (Action.CHECKPOINT, Action.STOP):  # a stopped trainer writes no more checkpoints
        if wish in actions:
            operator = replace(operator, orders=operator.orders + 1)
            request_id = f"{generation}.page.{operator.orders}"
            messages.append(
                CheckpointRequest(request_id=request_id, emergency=False, reason="asked for on the page")
                if wish is Action.CHECKPOINT
                else StopRequest(request_id=request_id, reason="asked for on the page")
            )
    is_paused = operator.is_paused
    for wish in actions:
        is_paused = wish is Action.PAUSE if wish in (Action.PAUSE, Action.RESUME) else is_paused
    if is_paused != operator.is_paused:
        operator = replace(operator, is_paused=is_paused)
        text = f"{PAUSE_REASON}; training goes on" if is_paused else "a person resumed prediction"
        kind = "prediction_paused" if is_paused else "prediction_resumed"
        messages.append(Alert(node=MONITOR, severity="info", kind=kind, text=text, step=step))
    return operator, tuple(messages)


@dataclass(frozen=True, slots=True, repr=False)
class Token:
    """A secret that is compared, never shown: it has no readable text form."""

    secret: bytes

    def admits(self, authorization: str | None) -> bool:
        """Whether an Authorization header carries it. Takes as long for a near miss as for a far one."""
        scheme, _, given = (authorization or "").partition(" ")
        is_same = hmac.compare_digest(given.strip().encode(), self.secret)
        return is_same and scheme.lower() == "bearer"

    def __repr__(self) -> str:
        return "Token(...)"


def read_token(file: Path | None, environment: Mapping[str, str]) -> Token | None:
    """From the file, else from HPT_PAGE_TOKEN, else None. Raises UserError, which never shows the token; also
    for a file that others may write: they could choose the token.
    """
    if file is None and not environment.get(TOKEN_VARIABLE):
        return None
    where = TOKEN_VARIABLE if file is None else f"--token-file {file}"
    cure = f"write {MIN_TOKEN_CHARACTERS} characters or more, e.g. by `openssl rand -hex 24`"
    if file is None:
        text = environment[TOKEN_VARIABLE]
    else:
        try:
            with file.open("rb") as opened:
                if os.fstat(opened.fileno()).st_mode & 0o022:
                    raise UserError(f"{where}: others may write this file; `chmod 600 {file}`")
                text = opened.read(4 * MAX_TOKEN_CHARACTERS).decode("ascii", errors="replace")
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; {cure}") from None
    text = text.strip()
    if not text.isascii() or not text.isprintable() or " " in text:
        raise UserError(f"{where}: a token is one line of ASCII letters, digits and signs; {cure}")
    if not MIN_TOKEN_CHARACTERS <= len(text) <= MAX_TOKEN_CHARACTERS:
        raise UserError(f"{where}: the token has {len(text)} characters; {cure}")
    return Token(text.encode())


def is_readable_by_others(file: Path) -> bool:
    """Worth a warning only: a mounted secret of a container is."""
    return bool(file.stat().st_mode & 0o044)
