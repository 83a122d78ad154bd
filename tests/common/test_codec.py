"""The codec: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import messages as m
from common.bus import Entry, EntryId
from common.codec import MAX_BODY_BYTES, decode, decode_entry, encode
from common.errors import BodyTooLarge, SchemaMismatch
from tests.common.message_samples import messages, sample

KINDS = sorted(m.MESSAGE_TYPES)
GOLDEN_FILE = Path(__file__).with_name("golden_messages.json")
OBSERVATION = m.Observation(
    step=3, attempt=0, phase=m.Phase.FULL, features=(1.0, 2.0), gradient_norms=(0.5,), decision_point=None
)


def fields_of(message: m.Message) -> dict[str, Any]:
    schema, fields = msgpack.unpackb(encode(message))
    assert schema == m.SCHEMA
    return fields


def body_of(fields: object, schema: object = m.SCHEMA) -> bytes:
    return msgpack.packb([schema, fields])


def observation_with(**changes: object) -> bytes:
    return body_of(fields_of(OBSERVATION) | changes)


def golden_bodies() -> dict[str, str]:
    """What the file must hold; run this file as a program to write it after raising SCHEMA."""
    return {kind: encode(sample(m.MESSAGE_TYPES[kind])).hex() for kind in KINDS}


# What goes in comes out


@given(messages())
@settings(max_examples=400, deadline=None)
def test_every_message_comes_back_equal(message: m.Message) -> None:
    kind, body = type(message).__name__, encode(message)
    again = decode(kind, body)
    assert repr(again) == repr(message)  # repr, because nan is not equal to nan
    assert encode(again) == body
    assert decode_entry(Entry("history", EntryId(1, 1), kind, body, 0.0)).__class__ is type(message)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_this_schema_are_frozen(kind: str) -> None:
    """Fails when a field, its type or its encoding changed: then raise SCHEMA and write the file anew."""
    frozen = json.loads(GOLDEN_FILE.read_text(encoding="ascii"))
    assert frozen["schema"] == m.SCHEMA
    message = sample(m.MESSAGE_TYPES[kind])
    assert encode(message).hex() == frozen["bodies"][kind]
    assert decode(kind, bytes.fromhex(frozen["bodies"][kind])) == message


def test_golden_file_has_every_kind_and_no_other() -> None:
    assert sorted(json.loads(GOLDEN_FILE.read_text(encoding="ascii"))["bodies"]) == KINDS


def test_non_finite_numbers_survive() -> None:
    sent = dataclasses.replace(OBSERVATION, features=(math.nan, math.inf, -math.inf, -0.0))
    got = decode("Observation", encode(sent))
    assert isinstance(got, m.Observation)
    assert repr(got.features) == "(nan, inf, -inf, -0.0)"


@pytest.mark.parametrize("number", [1, np.float64(1.0)])
def test_int_and_numpy_double_become_the_same_float(number: float) -> None:
    sent = dataclasses.replace(OBSERVATION, features=(number, 2.0))
    assert encode(sent) == encode(OBSERVATION)
    got = decode("Observation", observation_with(features=[1, 2]))
    assert got == OBSERVATION
    assert isinstance(got, m.Observation)
    assert [type(feature) for feature in got.features] == [float, float]


# Nothing else comes out


@given(st.sampled_from([*KINDS, "NoSuchKind", ""]), st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes_are_refused_cleanly(kind: str, body: bytes) -> None:
    with pytest.raises(SchemaMismatch):
        decode(kind, body)


@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    st.sampled_from(["set", "insert", "delete", "cut"]),
)
@settings(max_examples=600, deadline=None)
def test_damaged_bodies_are_refused_cleanly_or_are_another_message(
    kind: str, damages: list[tuple[float, int]], how: str
) -> None:
    body = bytearray(encode(sample(m.MESSAGE_TYPES[kind])))
    for share, byte in damages:
        place = int(share * len(body))
        if how == "cut":
            del body[place:]
        elif how == "delete":
            del body[place : place + 1]
        elif how == "insert":
            body.insert(place, byte)
        elif body:
            body[place] = byte
    try:
        message = decode(kind, bytes(body))
    except (SchemaMismatch, BodyTooLarge) as error:
        told_lines = str(error).splitlines()
    else:
        told_lines = [""]
        assert repr(decode(kind, encode(message))) == repr(message)
    assert len(told_lines) == 1


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (observation_with(step=1.0), "Observation.step: must be int, not float"),
        (observation_with(step=True), "must be int, not bool"),
        (observation_with(step="1"), "must be int, not str"),
        (observation_with(step=None), "must be int, not NoneType"),
        (observation_with(features=[1.0, None]), "Observation.features: must be float, not NoneType"),
        (observation_with(features=[1.0, True]), "must be float, not bool"),
        (observation_with(features=[1.0, "1"]), "must be float, not str"),
        (observation_with(features=1.0), "must be array, not float"),
        (observation_with(features={}), "must be array, not dict"),
        (observation_with(phase="nap"), "not a Phase"),
        (observation_with(phase=1), "not a Phase"),
        (observation_with(phase=["full"]), "not a Phase"),
        (observation_with(decision_point=[]), "DecisionPoint must be a map"),
        (observation_with(decision_point={}), "missing fields"),
        (observation_with(extra=1), r"unknown fields \['extra'\]"),
        (body_of({**fields_of(OBSERVATION), "step\n": 1}), r"step\\\\n"),
        (body_of(dict.fromkeys(list(fields_of(OBSERVATION))[1:], 0)), r"missing fields \['step'\]"),
        (body_of(fields_of(OBSERVATION), schema=m.SCHEMA + 1), f"schema {m.SCHEMA + 1}"),
        (body_of(fields_of(OBSERVATION), schema=True), "not \\[schema, fields\\]"),
        (body_of(fields_of(OBSERVATION), schema=None), "not \\[schema, fields\\]"),
        (body_of([1, 2]), "must be a map"),
        (msgpack.packb([m.SCHEMA]), "not \\[schema, fields\\]"),
        (msgpack.packb({}), "not \\[schema, fields\\]"),
        (encode(OBSERVATION) + b"\x00", "not msgpack"),
        (encode(OBSERVATION)[:-1], "not msgpack"),
        (b"", "not msgpack"),
        (b"\x92" * 5000, "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),
        (msgpack.packb([m.SCHEMA, {b"step": 1}]), "unknown fields"),
        (msgpack.packb([m.SCHEMA, {1: 1}]), "not msgpack"),
        (msgpack.packb([m.SCHEMA, msgpack.ExtType(5, b"x")]), "must be a map"),
        (b"\x92\x01\x81\x90\x01", "not msgpack"),
        (b"\x92\x01\x82\xa1a\x01\xa1a\x01", "not msgpack"),
        (b"\x92\x01\xa1\xff", "not msgpack"),
    ],
)
def test_refusal_names_the_field_and_the_reason(body: bytes, told: str) -> None:
    with pytest.raises(SchemaMismatch, match=told):
        decode("Observation", body)


def test_field_given_twice_is_refused() -> None:
    fields = list(fields_of(OBSERVATION).items())
    packer = msgpack.Packer()
    twice = packer.pack_map_pairs([*fields, fields[0]])
    with pytest.raises(SchemaMismatch, match="twice"):
        decode("Observation", b"\x92\x01" + twice)


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(SchemaMismatch, match="unknown message kind 'Forecast'"):
        decode("Forecast", encode(OBSERVATION))


@pytest.mark.parametrize(
    "wrong",
    [
        dataclasses.replace(OBSERVATION, step=1.0),
        dataclasses.replace(OBSERVATION, step=True),
        dataclasses.replace(OBSERVATION, step=2**64),
        dataclasses.replace(OBSERVATION, phase="full"),
        dataclasses.replace(OBSERVATION, phase=m.Verdict.REST),
        dataclasses.replace(OBSERVATION, features=[1.0]),
        dataclasses.replace(OBSERVATION, features=("1",)),
        dataclasses.replace(OBSERVATION, features=(np.float32(1.0),)),
        dataclasses.replace(OBSERVATION, decision_point=OBSERVATION),
        m.RunEnded(step=1, reason="\ud800"),
        m.Controls(),
        "RunEnded",
    ],
)
def test_wrong_value_is_refused_where_it_is_sent(wrong: Any) -> None:
    with pytest.raises(SchemaMismatch):
        encode(wrong)


def test_size_cap_holds_on_both_sides() -> None:
    overhead = len(encode(m.RunEnded(step=1, reason="x" * 70_000))) - 70_000
    largest = m.RunEnded(step=1, reason="x" * (MAX_BODY_BYTES - overhead))
    body = encode(largest)
    assert len(body) == MAX_BODY_BYTES
    assert decode("RunEnded", body) == largest
    with pytest.raises(BodyTooLarge, match=str(MAX_BODY_BYTES)):
        encode(m.RunEnded(step=1, reason="x" * (MAX_BODY_BYTES - overhead + 1)))
    with pytest.raises(BodyTooLarge):
        decode("RunEnded", body + b"\x00")


if __name__ == "__main__":
    frozen = {"schema": m.SCHEMA, "bodies": golden_bodies()}
    GOLDEN_FILE.write_text(json.dumps(frozen, indent=1) + "\n", encoding="ascii")
