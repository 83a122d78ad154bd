"""Actions of a person at the page: who may, what is refused, and what becomes of what was asked."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import http.client
import io
import itertools
import json
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages as m
from common.errors import UserError
from common.log import NodeLog
from common.streams import MONITOR
from monitor_node import action_door, actions
from monitor_node.action_door import MAX_BODY_BYTES, MAX_WRONG_TOKENS_WAITING, is_empty_object, is_own_origin
from monitor_node.actions import (
    _MAX_WAITING,
    Action,
    ActionQueue,
    Operator,
    Token,
    act,
    is_readable_by_others,
    read_token,
)
from monitor_node.enforcer import VETO_SECONDS, pause_for_operator
from monitor_node.feed import Feed
from monitor_node.web import PageServer
from tests.monitor import fake_run as fake
from tests.monitor.test_enforcer import CALM, HIGH, Guard
from tests.monitor.test_monitor_node import Scene, ScriptedDevice

DEADLINE_SECONDS = 20.0
SECRET = "0123456789abcdef-secret"
GIB = 1 << 30


@dataclass
class Page:
    """A page with a token, and what it was asked."""

    feed: Feed = field(default_factory=lambda: Feed("boot"))
    queue: ActionQueue = field(default_factory=ActionQueue)
    log: io.StringIO = field(default_factory=io.StringIO)
    token: Token | None = field(default_factory=lambda: Token(SECRET.encode()))

    def __post_init__(self) -> None:
        self.feed.publish({"run": {"status": "running"}, "server": {"connected": True}, "series": {}})
        self.server = PageServer(
            self.feed,
            host="127.0.0.1",
            port=0,
            token=self.token,
            actions=self.queue,
            log=NodeLog(MONITOR, "run", self.log),
        )
        self.server.start()

    @property
    def address(self) -> str:
        return self.server.url.removeprefix("http://")

    def ask(
        self,
        action: str,
        *,
        token: str | None = SECRET,
        body: bytes | Iterator[bytes] = b"{}",
        **headers: str,
    ) -> int:
        """The status of the answer. Header names with _ for -."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None:
            sent.setdefault("Authorization", f"Bearer {token}")
        host, _, port = self.address.rpartition(":")
        with contextlib.closing(
            http.client.HTTPConnection(host, int(port), timeout=DEADLINE_SECONDS)
        ) as caller:
            caller.request("POST", f"/api/actions/{action}", body=body, headers=sent)
            answer = caller.getresponse()
            text = answer.read().decode()
            assert SECRET not in text
            assert answer.headers["content-security-policy"]
            return answer.status


@pytest.fixture(scope="module")
def shared() -> Iterator[Page]:
    page = Page()
    yield page
    page.server.stop()


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pause after a wrong token has tests of its own."""
    monkeypatch.setattr(action_door, "WRONG_TOKEN_PAUSE_SECONDS", 0.0)


@pytest.fixture
def page(shared: Page) -> Iterator[Page]:
    shared.queue.take()
    yield shared
    shared.feed.publish({"run": {"status": "running"}, "server": {"connected": True}, "series": {}})


@pytest.mark.parametrize("action", list(Action))
def test_who_has_the_token_is_obeyed(page: Page, action: Action) -> None:
    assert page.ask(action, Origin=page.server.url) == 204
    assert page.queue.take() == [action]


WRONG = ["", "x", SECRET[:-1], SECRET + "x", SECRET.upper(), "ä" * 23, " "]


@pytest.mark.parametrize("token", [None, *WRONG])
def test_a_refused_token_changes_nothing(page: Page, token: str | None) -> None:
    sent = None if token is None else token.encode().decode("latin-1")
    assert page.ask("stop", token=sent) == 401
    assert page.queue.take() == []


@pytest.mark.parametrize("scheme", ["Basic", "", "Bearer2", SECRET])
def test_the_token_counts_only_as_a_bearers(page: Page, scheme: str) -> None:
    assert page.ask("stop", Authorization=f"{scheme} {SECRET}".strip()) == 401
    assert page.queue.take() == []


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": ""},
        {"Origin": "file://"},
        {"Origin": "http://[bad"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_a_foreign_page_changes_nothing_even_with_the_token(page: Page, headers: dict[str, str]) -> None:
    assert page.ask("stop", **headers) == 403
    assert page.queue.take() == []


def test_a_foreign_page_cannot_try_tokens(page: Page) -> None:
    assert {page.ask("stop", token=token, Origin="https://evil.example") for token in ("x", SECRET)} == {403}


def test_a_foreign_host_name_changes_nothing(page: Page) -> None:
    assert page.ask("stop", Host="evil.example", Origin="http://evil.example") == 421
    assert page.queue.take() == []


@pytest.mark.parametrize("action", ["halt", "STOP", "", "stop/", "checkpoint/../stop", "stop%00"])
def test_nothing_else_can_be_asked(page: Page, action: str) -> None:
    assert page.ask(action) == 404
    assert page.queue.take() == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_an_action_is_a_post(page: Page, method: str) -> None:
    host, _, port = page.address.rpartition(":")
    with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=DEADLINE_SECONDS)) as caller:
        caller.request(method, "/api/actions/stop", headers={"Authorization": f"Bearer {SECRET}"})
        answer = caller.getresponse()
        assert answer.status == 405
        assert "access-control-allow-origin" not in answer.headers
    assert page.queue.take() == []


def test_a_large_body_is_refused_whether_or_not_it_says_so(page: Page) -> None:
    large = b"{" + b" " * MAX_BODY_BYTES + b"}"
    assert page.ask("stop", body=large) == 413
    assert page.ask("stop", body=iter([large[:600], large[600:]])) == 413  # chunked: no length before it
    assert page.ask("stop", body=b"{" + b" " * (MAX_BODY_BYTES - 2) + b"}") == 204
    assert page.queue.take() == [Action.STOP]


@pytest.mark.parametrize("body", [b"[]", b"null", b"{", b'{"reason": "x"}', b"\xff", b"[" * 1000, b"stop"])
def test_a_body_that_is_not_empty_is_refused(page: Page, body: bytes) -> None:
    assert page.ask("stop", body=body) == 400
    assert page.queue.take() == []


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_no_body_breaks_the_door(body: bytes) -> None:
    assert is_empty_object(body) in (True, False)


def test_a_run_that_has_ended_takes_no_orders(page: Page) -> None:
    page.feed.publish({"run": {"status": "finished"}, "server": {"connected": True}, "series": {}})
    assert page.ask("stop") == 409
    assert page.queue.take() == []


def test_what_cannot_be_delivered_now_is_not_asked(page: Page) -> None:
    page.feed.publish({"run": {"status": "running"}, "server": {"connected": False}, "series": {}})
    assert page.ask("stop") == 503
    assert page.queue.take() == []


def test_a_node_that_takes_nothing_fills_no_memory(page: Page) -> None:
    answers = [page.ask("checkpoint") for _ in range(_MAX_WAITING + 3)]
    assert answers == [204] * _MAX_WAITING + [503] * 3
    assert len(page.queue.take()) == _MAX_WAITING


def test_the_token_is_never_logged_and_refusals_are_counted(page: Page) -> None:
    page.log.truncate(0)
    for _ in range(20):
        page.ask("stop", token=SECRET[:-1])
    page.ask("stop")
    log = page.log.getvalue()
    assert SECRET[:-1] not in log
    assert 1 <= log.count("action_refused") <= 6  # a storm of tries is no storm of lines
    assert SECRET not in repr(page.token)
    assert SECRET not in f"{page.token}"


def test_guessers_wait_a_few_at_a_time_and_the_rest_is_not_looked_at(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, leave = threading.Semaphore(0), threading.Event()

    async def pause(seconds: float) -> None:
        assert seconds == 0.5
        entered.release()
        while not leave.is_set():
            await real_sleep(0.001)

    real_sleep = asyncio.sleep
    monkeypatch.setattr(action_door, "WRONG_TOKEN_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(action_door, "asyncio", types.SimpleNamespace(sleep=pause))
    answers: list[int] = []
    guessers = [
        threading.Thread(target=lambda: answers.append(page.ask("stop", token="x")))
        for _ in range(MAX_WRONG_TOKENS_WAITING)
    ]
    try:
        for guesser in guessers:
            guesser.start()
            assert entered.acquire(timeout=DEADLINE_SECONDS)
        assert answers == []  # all of them wait
        assert {page.ask("stop", token=token) for token in ("y", SECRET)} == {
            429
        }  # a right guess shows nothing
    finally:
        leave.set()
        for guesser in guessers:
            guesser.join(DEADLINE_SECONDS)
    assert answers == [401] * MAX_WRONG_TOKENS_WAITING
    assert page.queue.take() == []
    assert page.ask("stop") == 204  # and then whoever has the token is obeyed again
    assert page.queue.take() == [Action.STOP]


def test_a_near_miss_and_a_far_one_are_compared_in_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison that is made for it, which always sees both whole."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, secret: bytes) -> bool:
        compared.append((given, secret))
        return hmac.compare_digest(given, secret)

    monkeypatch.setattr(actions, "hmac", types.SimpleNamespace(compare_digest=compare))
    token, secret = Token(SECRET.encode()), SECRET.encode()
    for header in (f"Bearer {SECRET}", f"Bearer {SECRET[:-1]}", "Bearer x", f"Basic {SECRET}", "", None):
        token.admits(header)
    assert [given for given, _ in compared] == [secret, secret[:-1], b"x", secret, b"", b""]
    assert {against for _, against in compared} == {secret}


@pytest.mark.parametrize("action", list(Action))
def test_a_page_without_a_token_has_no_actions(action: str) -> None:
    page = Page(token=None)
    try:
        assert page.ask(action) == 404
        assert page.queue.take() == []
    finally:
        page.server.stop()


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8080", "localhost:8080"),
        ("http://LOCALHOST:80", "localhost:80"),
        ("https://h", "h"),
    ],
)
def test_our_own_page_may_be_behind_tls_and_named_in_any_case(origin: str, host: str) -> None:
    assert is_own_origin({"origin": origin, "host": host})


# --- the token ---------------------------------------------------------------------------------


def test_a_token_is_read_from_a_file_or_from_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {SECRET}\n")
    assert read_token(file, {"HPT_PAGE_TOKEN": "another-token-of-16"}) == Token(SECRET.encode())
    assert read_token(None, {"HPT_PAGE_TOKEN": SECRET}) == Token(SECRET.encode())
    assert read_token(None, {}) is None
    assert read_token(None, {"HPT_PAGE_TOKEN": ""}) is None


@pytest.mark.parametrize(
    "text", ["", "0123456789abcde", f"{SECRET} two", f"{SECRET}\n{SECRET}", "ä" * 20, "x" * 1025]
)
def test_a_token_that_is_none_is_one_line_with_a_cure(tmp_path: Path, text: str) -> None:
    file = tmp_path / "token"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="openssl rand") as caught:
        read_token(file, {})
    assert "\n" not in str(caught.value)
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "refused", "warned"),
    [(0o600, False, False), (0o400, False, False), (0o644, False, True), (0o440, False, True),
     (0o620, True, False), (0o602, True, False), (0o666, True, True)],
)  # fmt: skip
def test_a_token_file_that_others_write_is_refused_and_one_they_read_is_warned_of(
    tmp_path: Path, mode: int, refused: bool, warned: bool
) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    file.chmod(mode)
    assert is_readable_by_others(file) == warned
    if refused:
        with pytest.raises(UserError, match="chmod 600"):
            read_token(file, {})
    else:
        assert read_token(file, {}) == Token(SECRET.encode())


def test_a_token_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_token(tmp_path / "none", {})
    with pytest.raises(UserError, match="directory"):
        read_token(tmp_path, {})


# --- what becomes of it --------------------------------------------------------------------------


def test_a_checkpoint_and_a_stop_are_orders_with_ids_of_their_own() -> None:
    operator, orders = act(Operator(), [Action.STOP, Action.CHECKPOINT], generation=3, step=7)
    checkpoint, stop = orders
    assert isinstance(checkpoint, m.CheckpointRequest)
    assert not checkpoint.emergency
    assert isinstance(stop, m.StopRequest)
    _, (again,) = act(operator, [Action.STOP], generation=3, step=8)
    assert isinstance(again, m.StopRequest)
    assert len({checkpoint.request_id, stop.request_id, again.request_id}) == 3


def test_a_double_click_is_one_wish() -> None:
    _, orders = act(Operator(), [Action.CHECKPOINT] * 5, generation=1, step=0)
    assert len(orders) == 1


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from([Action.PAUSE, Action.RESUME]), max_size=4), max_size=10))
def test_the_last_of_pause_and_resume_counts_and_each_change_is_told_once(turns: list[list[Action]]) -> None:
    operator, told = Operator(), []
    for turn in turns:
        operator, messages = act(operator, turn, generation=1, step=0)
        told += [message.kind for message in messages if isinstance(message, m.Alert)]
    wishes = [wish for turn in turns for wish in turn]
    assert operator.is_paused == bool(wishes and wishes[-1] is Action.PAUSE)
    assert all(early != late for early, late in itertools.pairwise(told))
    assert not told or told[0] == "prediction_paused"


class PausedGuard(Guard):
    def pause(self, reason: str) -> list[m.Message]:
        self.state, messages = pause_for_operator(
            self.state, reason, self.setting, now_seconds=self.now_seconds
        )
        self.said += [(self.now_seconds, message) for message in messages]
        self.now_seconds += 1.0
        return list(messages)


def vetoes_of(guard: Guard) -> list[m.PhaseVeto]:
    return [message for _, message in guard.said if isinstance(message, m.PhaseVeto)]


def test_a_pause_vetoes_at_once_is_renewed_before_it_lapses_and_lifted_by_resume() -> None:
    guard = PausedGuard()
    given = [at for at in range(40) if guard.pause("a person")]
    assert given[0] == 0
    assert max(late - early for early, late in itertools.pairwise(given)) <= VETO_SECONDS / 2
    (lifted,) = guard.pause("")
    assert isinstance(lifted, m.PhaseVeto)
    assert not lifted.active
    assert guard.pause("") == []


def test_a_pause_memory_and_divergence_do_not_lift_each_others_veto() -> None:
    guard = PausedGuard()
    guard.feed(CALM, HIGH)
    guard.object_to("the loss is not finite")
    guard.pause("a person")
    guard.feed(*[CALM] * 20)  # memory is calm again
    guard.object_to("")  # and so is the loss
    assert all(veto.active for veto in vetoes_of(guard))
    guard.feed(HIGH)
    guard.pause("")
    assert all(veto.active for veto in vetoes_of(guard))
    guard.feed(*[CALM] * 20)
    assert not vetoes_of(guard)[-1].active


def acting_scene() -> tuple[Scene, ActionQueue]:
    scene = Scene(ScriptedDevice([fake.sample(2 * GIB, source="nvml")], is_gpu=True))
    queue = ActionQueue()
    scene.node._actions = queue
    scene.say(fake.started("run"), fake.heartbeat())
    scene.turn(0.3, times=3)
    scene.outbox.take()
    return scene, queue


def test_the_node_gives_the_orders_and_the_page_shows_them_with_the_trainers_answer() -> None:
    scene, queue = acting_scene()
    queue.offer(Action.CHECKPOINT)
    scene.turn(0.3)
    (order,) = scene.outbox.take(m.CheckpointRequest)
    scene.say(order, writer=MONITOR)
    scene.turn(0.3, times=2)
    (row,) = scene.page["orders"]
    assert (row["action"], row["done"]) == ("checkpoint", False)
    scene.say(
        m.OrderDone(order_id=order.request_id, done=True, bytes_before=1, bytes_after=1, detail="written")
    )
    scene.turn(0.3, times=2)
    (row,) = scene.page["orders"]
    assert (row["done"], row["refused"], row["detail"]) == (True, False, "written")


def test_a_pause_shows_on_the_page_and_is_renewed_until_the_monitor_dies() -> None:
    scene, queue = acting_scene()
    assert scene.page["actions"] == {"enabled": True, "paused": False}
    queue.offer(Action.PAUSE)
    scene.turn(0.3)
    assert scene.page["actions"] == {"enabled": True, "paused": True}
    scene.turn(0.5, times=60)
    vetoes = scene.outbox.take(m.PhaseVeto)
    assert len(vetoes) >= 30 / (VETO_SECONDS / 2)
    assert all(veto.active and veto.valid_seconds == VETO_SECONDS for veto in vetoes)
    # A monitor that dies says nothing more: the veto's own seconds end the pause (test_inbox.py).
    queue.offer(Action.RESUME)
    scene.turn(0.3)
    (lifted,) = scene.outbox.take(m.PhaseVeto)
    assert not lifted.active
    assert scene.page["actions"]["paused"] is False


def test_a_run_that_has_ended_is_neither_paused_nor_ordered() -> None:
    scene, queue = acting_scene()
    queue.offer(Action.PAUSE)
    scene.turn(0.3)
    scene.say(m.RunEnded(step=9, reason="finished"))
    scene.turn(0.3, times=2)
    scene.outbox.take()
    queue.offer(Action.STOP)
    scene.turn(1.0, times=30)
    assert scene.outbox.take(m.PhaseVeto, m.StopRequest) == []
    assert queue.take() == []


def test_a_page_without_actions_says_so(tmp_path: Path) -> None:
    scene = Scene(ScriptedDevice([fake.sample(2 * GIB, source="nvml")], is_gpu=True))
    scene.turn(0.3, times=3)
    assert scene.page["actions"] == {"enabled": False, "paused": False}
    shown: dict[str, Any] = json.loads(json.dumps(scene.page))
    assert "token" not in json.dumps(shown["actions"])
