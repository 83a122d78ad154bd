"""The targets of tests/fuzz for some seconds: seeds, mutated seeds, and what the long form has found."""

from __future__ import annotations

import struct

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec import MAX_BODY_BYTES
from common.config import MAX_DOTS_A_LINE, MAX_TOML_BYTES, parse_toml
from common.errors import SettingsError
from tests.fuzz.targets import KINDS, SEEDS, TARGETS

BODY = bytes([KINDS.index("RunEnded")])


def framed(*payloads: bytes) -> bytes:
    return b"\x01" + b"".join(bytes([len(payload)]) + payload for payload in payloads)


# One line each: what it is. Those with a date came through once, as a stack trace or as minutes of work.
FOUND: dict[str, list[bytes]] = {
    "codec": [
        b"",
        BODY + b"\xdd\x00\x03\xff\xff" * 500 + bytes(MAX_BODY_BYTES - 2500),  # 1 GB of list slots
        BODY + b"\xdd\x00\x03\xff\xf0" + b"\x80" * (MAX_BODY_BYTES - 20),  # a quarter of a million maps
        BODY + b"\x81" * MAX_BODY_BYTES,  # nesting
        BODY + b"\xc6\xff\xff\xff\xff",  # bytes, arrays, maps and extensions that declare 4 GiB
        BODY + b"\xdd\xff\xff\xff\xff",
        BODY + b"\xdf\xff\xff\xff\xff",
        BODY + b"\xc9\xff\xff\xff\xff\xff",
        BODY + b"\x92\x03\xd7\xff" + b"\xff" * 8,  # a time stamp of more nanoseconds than a second has
        BODY + b"\x92\x03\xc7\x00\xff",
        BODY + msgpack.packb([3, {"step": 2**64 - 1, "reason": "x" * 250_000}]),
        BODY + bytes(MAX_BODY_BYTES + 1),
    ],
    "recording": [
        framed(msgpack.packb(["hist\n\x1b[2J", 0, 0, "k", b"", 0.0])),  # 2026-11-21: two lines
        framed(msgpack.packb([["footer"], 0, b""]), b"\x80", b"\xc1", b""),
        framed(b"\xdc\xff\xff", b"\x91" * 200, msgpack.packb(["footer", float("nan"), 1])),
        framed(*[msgpack.packb(["s", 1, n, "k", b"", 0.0]) for n in range(1, 2000)]),
        framed(msgpack.packb(["s", 2**64 - 1, -(2**63), "k", b"", float("nan")])),
    ],
    "manifest": [
        b'{"format":1,"files":{"f":{"bytes":Infinity,"sha256":""}}}',  # 2026-11-21: OverflowError
        b'{"format":1,"files":{"' + b"a" * 5000 + b'":{"bytes":1,"sha256":""}}}',  # 2026-11-21: OSError
        b"[" * 100_000,  # 2026-11-21: RecursionError
        b'{"a":' * 100_000,
        b'{"format":1,"files":{"a\\nb":{"bytes":1,"sha256":""}}}',  # 2026-11-21: two lines
        b'{"format":"' + b"x" * 5000 + b'","files":{}}',  # 2026-11-21: a long one
        b'{"format":1,"files":{"../f":{"bytes":1,"sha256":""}}}',
        b'{"format":1,"files":{"/etc/passwd":{"bytes":1,"sha256":""},"..":{"bytes":1,"sha256":""}}}',
        b'{"format":1,"files":{"a\\u0000":{"bytes":1,"sha256":""},"\\ud800":{"bytes":1,"sha256":""}}}',
        b'{"format":1,"format":2,"files":[]}',
        b'{"format":NaN,"files":{"f":{"bytes":' + b"9" * 5000 + b',"sha256":1}}}',
        b"\xff\xfe",
        b"",
    ],
    "config": [
        b"a=" + b"[" * 20_000,  # 2026-11-21: RecursionError
        b"a=" + b"{a=" * 20_000,
        b"\na.b=" + b"[" * 20_000,
        b"a=" + b"1" * 5000,  # 2026-11-21: ValueError
        b"[trainer]\nsteps=0x" + b"f" * 5000,  # 2026-11-21: ValueError
        b"\ntrainer.steps=0x" + b"f" * 5000,
        b"[trainer.optimizer]\nrate=" + b"9" * 400,  # 2026-11-21: OverflowError
        b"trainer.steps." + b"a." * 5000 + b"a=1",  # 2026-11-21: 40 s, then RecursionError
        b"[" + b"a." * (MAX_DOTS_A_LINE - 1) + b"a]\n" + b"a." * (MAX_DOTS_A_LINE - 1) + b"a=1",
        b'"a\\nb\\u001b[2J"=1',  # 2026-11-21: two lines
        b'"' + b"a" * 100_000 + b'"=1',  # 2026-11-21: 100,000 characters
        b"[trainer]\ntask='\x1b[31m" + b"x" * 5000 + b"'",
        b"[trainer]\nsteps=1979-05-27T07:32:00+23:59\n",
        b"[trainer]\nsteps=" + b"[" * 200 + b"]" * 200,
        b"[trainer.optimizer]\nrate=nan\n",
        b"[predictor]\nhorizon_steps=[[[1]]]",
        b"[monitor]\nhttp='a:" + b"9" * 5000 + b"'",  # 2026-11-21: ValueError
        b"#" * (MAX_TOML_BYTES + 1),
        b"trainer=1\n[trainer]\n",
        b"\n\xf0\x9f\x92\xa9.\xf0\x9f\x92\xa9=\xf0\x9f\x92\xa9",
    ],
    "page": [
        b"GET /metrics\nAccept: application/openmetrics-text; version=abc",  # 2026-11-21: 500
        b"GET /metrics\nAccept: text/plain;version=" + b"9" * 5000,  # 2026-11-21: 500
        b"GET /metrics\nAccept: application/openmetrics-text;version=1.0.0;escaping=\xff",
        b"GET /api/events\nLast-Event-ID: boot." + b"9" * 5000,
        b"GET /api/events\nLast-Event-ID: boot.\xb2",
        b"GET /static/../../../etc/passwd",
        b"GET /static/%2e%2e/%00?" + b"a=%ff&" * 500,
        b"POST /api/actions/stop\nOrigin: http://[::1\nAuthorization: Bearer \xff\xfe",
        b"POST /api/actions/stop\nAuthorization: Bearer 0123456789abcdef\n\n" + b"[" * 1024,
        b"POST /api/actions/stop\nAuthorization: Bearer 0123456789abcdef\nExpect: 9\n\n" + b"x" * 2000,
        b"POST /api/actions/../stop\nSec-Fetch-Site: \x80",
        b"PROPFIND /api/snapshot\nTransfer-Encoding: chunked",
        b"HEAD /\nRange: bytes=99999999999999999999-,-,0-",
        b"GET http://evil.example/\nHost: evil.example",
        b"GET *",
        b"",
    ],
    "forecaster": [
        b'{"head":{"dtype":"F4","shape":[0],"data_offsets":[0,0]}}',  # 2026-11-21: KeyError, in the trainer
        b'{"head":{"dtype":"F32","shape":[0,9223372036854775808],"data_offsets":[0,0]}}',  # TypeError
        b'{"head":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}',
        b'{"head":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}',  # 4 TiB
        b'{"head":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]}}\0\x07\x07\x07\x07',
        b"[" * 1000,
        b"",
    ],
}  # fmt: skip
CASES = [pytest.param(name, data, id=f"{name}-{n}") for name in FOUND for n, data in enumerate(FOUND[name])]


@pytest.mark.parametrize(("target", "data"), CASES)
def test_what_came_through_once_is_refused_in_one_line(target: str, data: bytes) -> None:
    TARGETS[target](data)


def test_a_key_that_would_take_minutes_is_refused_by_its_dots() -> None:
    with pytest.raises(SettingsError, match=f"more than {MAX_DOTS_A_LINE} dots"):
        parse_toml("a." * (MAX_DOTS_A_LINE + 1) + "a=1")


@pytest.mark.parametrize("target", TARGETS)
def test_the_seeds_reach_what_they_should(target: str) -> None:
    for data in SEEDS[target]:
        TARGETS[target](data)


@pytest.mark.parametrize("target", TARGETS)
def test_any_bytes_are_taken_or_refused_in_one_line(target: str) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        seed = data.draw(st.sampled_from([*SEEDS[target], b""]))
        start = data.draw(st.integers(0, len(seed)))
        end = data.draw(st.integers(start, min(len(seed), start + 8)))
        put = st.binary(max_size=12) | st.sampled_from(LOADED)
        TARGETS[target](seed[:start] + data.draw(put) + seed[end:])

    run()


# Pieces that mean something to one parser or another.
LOADED = [
    b"\xff" * 8, b"\0", b"\n", b"\r\n", b'"', b"{", b"[" * 100, b"1e999", b"NaN", b"-0", b"../",
    b"%00", b"\xc3", b"=", b"." * 50, b"\xdd\x7f\xff\xff\xff", b"\xc7\x00\xff",
    struct.pack("<Q", 2**63), b"\xed\xa0\x80",
]  # fmt: skip
