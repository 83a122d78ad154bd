"""Where the page's buttons arrive: POST /api/actions/{action}, for who has the token and comes from the page.

    204  asked for        400  the body is not {}      409  the run has ended
    401  no or another token, after a pause            413  a body above 1 KiB
    403  sent by a page of another origin              503  the message server is away, or too many wait
    404  no such action, or the page was started without a token          429  too many wrong tokens at once

Checked in the order 404, 403, 429, 401, 413, 400, 409, 503, so that a foreign page cannot try tokens. Wrong
tokens wait, a few at a time, and further ones are not even looked at: at most MAX_WAITING / PAUSE_SECONDS
guesses a second. Logs how often it refused, never what it was shown. Carries nothing out: see actions.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from common.log import NodeLog
from monitor_node.actions import Action, ActionQueue, Token
from monitor_node.feed import Feed

MAX_BODY_BYTES = 1024
WRONG_TOKEN_PAUSE_SECONDS = 0.5
MAX_WRONG_TOKENS_WAITING = 4
_NOT_FOUND = (404, "no such action; actions need a page that was started with --token-file")


class ActionDoor:
    def __init__(self, feed: Feed, token: Token | None, queue: ActionQueue, log: NodeLog | None) -> None:
        self._feed = feed
        self._token = token
        self._queue = queue
        self._log = log
        self._refused = 0
        self._wrong_tokens_waiting = 0  # of the server's one event loop

    def route(self) -> Route:
        return Route("/api/actions/{action}", self._answer, methods=["POST"])

    async def _answer(self, request: Request) -> Response:
        status, text = await self._judged(request)
        if status == 204:
            return Response(status_code=204)
        if status in (401, 403, 429):
            self._tell_refusal(status)
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        # The body of a refused request is left unread: nothing may be sent after it on this connection.
        return PlainTextResponse(text, status_code=status, headers=headers | {"Connection": "close"})

    async def _judged(self, request: Request) -> tuple[int, str]:
        name = request.path_params["action"]
        if self._token is None or name not in list(Action):
            return _NOT_FOUND
        if not is_own_origin(request.headers):
            return 403, "actions are taken from this page only"
        if self._wrong_tokens_waiting >= MAX_WRONG_TOKENS_WAITING:
            return 429, "too many wrong tokens; try again in a second"
        if not self._token.admits(request.headers.get("authorization")):
            await self._pause()
            return 401, "this needs the token of the page"
        body = await _body_of(request)
        if body is None:
            return 413, f"the body may have {MAX_BODY_BYTES} bytes"
        if not is_empty_object(body):
            return 400, "the body must be {}"
        refusal = why_not_now(self._feed.snapshot())
        if refusal is None and not self._queue.offer(Action(name)):
            refusal = 503, "too many actions wait; try again in a second"
        return refusal or (204, "")

    async def _pause(self) -> None:
        self._wrong_tokens_waiting += 1
        try:
            await asyncio.sleep(WRONG_TOKEN_PAUSE_SECONDS)
        finally:
            self._wrong_tokens_waiting -= 1

    def _tell_refusal(self, status: int) -> None:
        self._refused += 1
        if self._log is not None and self._refused & (self._refused - 1) == 0:  # the 1st, 2nd, 4th, 8th ...
            self._log.event("action_refused", level="warning", status=status, refused=self._refused)


def is_own_origin(headers: Mapping[str, str]) -> bool:
    """A browser says where a POST comes from; a script says nothing, and has the token to prove itself.

    `Host` has been checked before (web.py), so an Origin with the same host and port is ours.
    """
    site = headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    if origin is None:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == headers.get("host", "").lower()


def is_empty_object(body: bytes) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        return not body or json.loads(body) == {}
    return False


def why_not_now(snapshot: Mapping[str, Any]) -> tuple[int, str] | None:
    """An order that cannot be delivered now would be carried out some time later, to everybody's surprise."""
    if snapshot.get("run", {}).get("status") == "finished":
        return 409, "the run has ended"
    if not snapshot.get("server", {}).get("connected", True):
        return 503, "the message server is away; try again when it is back"
    return None


async def _body_of(request: Request) -> bytes | None:
    """None when it is too long, or its sender went away. Holds at most one chunk above the limit."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                return None
    except ClientDisconnect:
        return None
    return body
