"""Message <-> bytes: msgpack of [SCHEMA, {field: value}]. The only serializer of the bus.

    encode(message) -> body          decode(kind, body) -> message

Strict on both sides: exact fields, exact types, no duplicates, nothing behind the end. An int is
taken where a float is meant (and becomes one), nothing else is converted. The kind travels in the
envelope, not in the body. One plan per dataclass is derived from its type hints, once.
Never executes, never guesses: bytes that are not exactly a message raise SchemaMismatch or
BodyTooLarge, whatever they are.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import msgpack

from common.bus import Entry
from common.errors import BodyTooLarge, SchemaMismatch
from common.messages import MESSAGE_TYPES, SCHEMA, Message

MAX_BODY_BYTES = 256 * 1024  # bigger payloads go through common/blobs.py

_Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one dataclass becomes a msgpack map and back."""

    kind: type
    names: frozenset[str]
    packers: tuple[tuple[str, _Convert], ...]
    unpackers: tuple[tuple[str, _Convert], ...]


def encode(message: Message) -> bytes:
    """Body of an entry. Raises SchemaMismatch for a value of the wrong type, BodyTooLarge."""
    kind: type = type(message)
    if MESSAGE_TYPES.get(kind.__name__) is not kind:
        raise SchemaMismatch(f"{kind.__name__} is not a message")
    try:
        body = cast(bytes, msgpack.packb([SCHEMA, _pack_object(_plan(kind), message)]))
    except (ValueError, OverflowError) as error:  # lone surrogates, ints beyond 64 bits
        raise SchemaMismatch(f"{kind.__name__}: {error}") from None
    if len(body) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"{kind.__name__} takes {len(body)} bytes; the limit is {MAX_BODY_BYTES}")
    return body


def decode(kind: str, body: bytes) -> Message:
    """The message in `body`. Raises SchemaMismatch or BodyTooLarge, nothing else."""
    message_type = MESSAGE_TYPES.get(kind)
    if message_type is None:
        raise SchemaMismatch(f"unknown message kind {kind[:80]!r}")
    if len(body) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"{kind} takes {len(body)} bytes; the limit is {MAX_BODY_BYTES}")
    try:
        content = msgpack.unpackb(body, object_pairs_hook=_unique, strict_map_key=True)
    except ValueError as error:  # the base of all that msgpack raises for bad bytes
        raise SchemaMismatch(f"{kind}: not msgpack: {_one_line(error)}") from None
    if type(content) is not list or len(content) != 2 or type(content[0]) is not int:
        raise SchemaMismatch(f"{kind}: body is not [schema, fields]")
    if content[0] != SCHEMA:
        raise SchemaMismatch(f"{kind}: schema {content[0]}, this program speaks {SCHEMA}; update the older")
    return cast(Message, _unpack_object(_plan(message_type), content[1]))


def decode_entry(entry: Entry) -> Message:
    return decode(entry.kind, entry.body)


@cache
def _plan(kind: type) -> _Plan:
    hints = typing.get_type_hints(kind)
    converters = {field.name: _converters(hints[field.name]) for field in dataclasses.fields(kind)}
    return _Plan(
        kind=kind,
        names=frozenset(converters),
        packers=tuple((name, pack) for name, (pack, _) in converters.items()),
        unpackers=tuple((name, unpack) for name, (_, unpack) in converters.items()),
    )


def _converters(hint: Any) -> tuple[_Convert, _Convert]:
    """(pack, unpack) of one type hint. A hint we have no rule for is a mistake in messages.py."""
    if hint is float:
        return _as_float, _as_float
    if hint in (int, str, bool, bytes):
        exact = _exactly(hint)
        return exact, exact
    if dataclasses.is_dataclass(hint):
        plan = _plan(cast(type, hint))
        return (lambda value: _pack_object(plan, value)), (lambda value: _unpack_object(plan, value))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum_converters(hint)
    if typing.get_origin(hint) is tuple:
        return _tuple_converters(*typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        pack, unpack = _converters(_not_none(hint))
        return (
            lambda value: None if value is None else pack(value),
            lambda value: None if value is None else unpack(value),
        )
    raise TypeError(f"messages.py uses {hint!r}, for which the codec has no rule")


def _not_none(hint: types.UnionType) -> Any:
    (wanted,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return wanted


def _as_float(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is int or isinstance(value, float):  # numpy.float64 is a float
        return float(value)
    raise SchemaMismatch(f"must be float, not {type(value).__name__}")


def _exactly(wanted: type) -> _Convert:
    def check(value: Any) -> Any:
        if type(value) is not wanted:  # a bool is no int
            raise SchemaMismatch(f"must be {wanted.__name__}, not {type(value).__name__}")
        return value

    return check


def _enum_converters(kind: type[enum.Enum]) -> tuple[_Convert, _Convert]:
    members = {member.value: member for member in kind}

    def pack(value: Any) -> Any:
        if type(value) is not kind:
            raise SchemaMismatch(f"must be {kind.__name__}, not {type(value).__name__}")
        return value.value

    def unpack(value: Any) -> enum.Enum:
        member = members.get(value) if type(value) is str else None
        if member is None:
            raise SchemaMismatch(f"not a {kind.__name__}")
        return member

    return pack, unpack


def _tuple_converters(item: Any, ellipsis: Any) -> tuple[_Convert, _Convert]:
    if ellipsis is not Ellipsis:
        raise TypeError("messages.py may use tuple[T, ...] only")
    pack_item, unpack_item = _converters(item)
    plain = {item} if item in (float, int, str, bytes) else None

    def pack(value: Any) -> Any:
        if type(value) is not tuple:
            raise SchemaMismatch(f"must be tuple, not {type(value).__name__}")
        if set(map(type, value)) == plain:  # one pass in C: 64 features cost 1 us instead of 6
            return value
        return [pack_item(part) for part in value]

    def unpack(value: Any) -> Any:
        if type(value) is not list:
            raise SchemaMismatch(f"must be array, not {type(value).__name__}")
        if set(map(type, value)) == plain:
            return tuple(value)
        return tuple([unpack_item(part) for part in value])

    return pack, unpack


def _pack_object(plan: _Plan, value: Any) -> dict[str, Any]:
    if type(value) is not plan.kind:
        raise SchemaMismatch(f"must be {plan.kind.__name__}, not {type(value).__name__}")
    try:
        return {name: pack(getattr(value, name)) for name, pack in plan.packers}
    except SchemaMismatch:
        raise _located(plan, plan.packers, lambda name: getattr(value, name)) from None


def _unpack_object(plan: _Plan, fields: Any) -> Any:
    if type(fields) is not dict:
        raise SchemaMismatch(f"{plan.kind.__name__} must be a map, not {type(fields).__name__}")
    if fields.keys() != plan.names:
        raise SchemaMismatch(_wrong_fields(plan, fields))
    try:
        return plan.kind(**{name: unpack(fields[name]) for name, unpack in plan.unpackers})
    except SchemaMismatch:
        raise _located(plan, plan.unpackers, fields.__getitem__) from None


def _located(
    plan: _Plan, converters: tuple[tuple[str, _Convert], ...], value_of: Callable[[str], Any]
) -> SchemaMismatch:
    """The same error with the name of the field, which the fast path does not track."""
    for name, convert in converters:
        try:
            convert(value_of(name))
        except SchemaMismatch as error:
            return SchemaMismatch(f"{plan.kind.__name__}.{name}: {error}")
    return SchemaMismatch(f"{plan.kind.__name__}: wrong value")


def _wrong_fields(plan: _Plan, fields: dict[Any, Any]) -> str:
    unknown = sorted(_one_line(key) for key in fields.keys() - plan.names)
    missing = sorted(plan.names - fields.keys())
    return f"{plan.kind.__name__}: unknown fields {unknown[:5]}, missing fields {missing[:5]}"


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _one_line(thing: object) -> str:
    """Text of foreign origin, safe for a log line."""
    return ascii(str(thing)[:80])[1:-1]
