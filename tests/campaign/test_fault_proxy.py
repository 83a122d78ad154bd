"""The proxy does what it says: otherwise a test that survives its faults has shown nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.faults import FaultProxy

REQUEST = b"*3\r\n$4\r\nXADD\r\n$50\r\nhpt:" + b"k" * 46 + b"\r\n$40\r\n" + bytes(range(65, 105)) + b"\r\n"
BODY = slice(REQUEST.index(b"$40\r\n") + 5, len(REQUEST) - 2)


@pytest.fixture
def echo_url() -> Iterator[str]:
    """A server that sends back what it gets; it outlives broken connections."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(client,), daemon=True).start()

    def echo(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while piece := client.recv(65536):
                client.sendall(piece)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def client_of(proxy: FaultProxy) -> socket.socket:
    return socket.create_connection(
        ("127.0.0.1", int(proxy.url.rpartition(":")[2].split("/")[0])), timeout=10
    )


def answer(client: socket.socket, request: bytes = REQUEST) -> bytes:
    """What comes back for it; shorter when the connection ends."""
    client.sendall(request)
    found = b""
    while len(found) < len(request):
        piece = client.recv(65536)
        if not piece:
            break
        found += piece
    return found


def places_changed(before: bytes, after: bytes) -> list[int]:
    assert len(before) == len(after)
    return [place for place, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]


def test_without_a_fault_all_passes_unchanged_and_nothing_is_counted(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, client_of(proxy) as client:
        assert answer(client, REQUEST * 2000) == REQUEST * 2000
        assert (proxy.fired, proxy.fired_by_kind) == (0, {})


@pytest.mark.parametrize("kind", ["damaged_request", "damaged_reply"])
def test_damage_flips_one_bit_of_the_longest_value_and_nothing_else(echo_url: str, kind: str) -> None:
    with FaultProxy(echo_url, seed=3) as proxy, client_of(proxy) as client:
        order = proxy.damage_request if kind == "damaged_request" else proxy.damage_reply
        order(b"XADD", times=2)
        for _ in range(2):
            reply = answer(client)
            (place,) = places_changed(REQUEST, reply)
            assert place in range(len(REQUEST))[BODY]
            assert (REQUEST[place] ^ reply[place]).bit_count() == 1
        assert answer(client) == REQUEST
        assert (proxy.fired, proxy.fired_by_kind) == (2, {kind: 2})


def test_damage_anywhere_reaches_the_protocol_too(echo_url: str) -> None:
    with FaultProxy(echo_url, seed=1) as proxy, client_of(proxy) as client:
        proxy.damage_reply(b"XADD", share=1.0, anywhere=True)
        places = {places_changed(REQUEST, answer(client))[0] for _ in range(200)}
        assert min(places) < BODY.start
        assert len(places) > len(REQUEST) / 2


def test_damage_to_a_value_that_comes_in_pieces_is_not_lost(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, client_of(proxy) as client:
        proxy.damage_request(b"XADD")
        head, body = REQUEST[: BODY.start], REQUEST[BODY.start :]
        assert answer(client, head) == head
        assert len(places_changed(body[:-2], answer(client, body)[:-2])) == 1


def test_share_is_kept_and_a_seed_repeats_it(echo_url: str) -> None:
    def dropped(seed: int) -> list[bool]:
        with FaultProxy(echo_url, seed=seed) as proxy:
            proxy.drop_reply(b"XADD", share=0.25)
            lost = []
            for _ in range(100):
                with client_of(proxy) as client:
                    lost.append(answer(client) == b"")
            assert sum(lost) == proxy.fired == proxy.fired_by_kind["dropped_reply"]
            return lost

    first = dropped(7)
    assert 10 <= sum(first) <= 40
    assert dropped(7) == first != dropped(8)


def test_other_commands_are_left_alone(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, client_of(proxy) as client:
        proxy.drop_reply(b"XREAD", share=1.0)
        proxy.damage_request(b"XREAD", share=1.0)
        assert answer(client) == REQUEST
        assert proxy.fired == 0


def test_delay_holds_each_piece_back_in_both_directions(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, client_of(proxy) as client:
        proxy.delay(requests_seconds=0.05, replies_seconds=0.1)
        started_seconds = time.monotonic()
        assert answer(client) == REQUEST
        assert time.monotonic() - started_seconds >= 0.15  # a lower bound: no machine is too slow for it
        assert proxy.fired_by_kind == {"delayed_request": 1, "delayed_reply": 1}


def test_throttle_bounds_the_rate_and_loses_nothing(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, client_of(proxy) as client:
        proxy.throttle(20_000)
        sent = REQUEST * 50
        started_seconds = time.monotonic()
        assert answer(client, sent) == sent
        # The last part arrives before the pause behind it, which is a twentieth of a second.
        assert time.monotonic() - started_seconds >= len(sent) / 20_000 - 0.05
        assert proxy.fired_by_kind["throttled_request"] >= 1


def test_healed_proxy_is_as_good_as_new(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy:
        proxy.drop_reply(b"XADD", share=1.0)
        proxy.delay(replies_seconds=60)
        proxy.throttle(1)
        proxy.hold_replies()
        proxy.refuse(True)
        with client_of(proxy) as client:
            assert client.recv(1) == b""
        assert proxy.fired_by_kind == {"refused_connection": 1}
        proxy.heal()
        with client_of(proxy) as client:
            assert answer(client) == REQUEST


def test_cut_request_arrives_in_part_and_the_connection_ends(echo_url: str) -> None:
    with FaultProxy(echo_url) as proxy, client_of(proxy) as client:
        proxy.cut_request(b"XADD", at=10)
        assert answer(client) in (b"", REQUEST[:10])  # the end may overtake what the server sent back
        assert proxy.fired_by_kind == {"cut_request": 1}
