"""Messages made from the type hints of common/messages.py: fixed samples and hypothesis strategies."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from hypothesis import strategies as st

from common.messages import MESSAGE_TYPES, Message

_FIXED: dict[Any, Any] = {int: 7, float: 0.5, str: "text", bool: True, bytes: b"\x00\xff"}
_ANY: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(),
    str: st.text(max_size=20),
    bool: st.booleans(),
    bytes: st.binary(max_size=20),
}


def sample(hint: Any) -> Any:
    """The same value every time: numbers 7 and 0.5, "text", first member, one-item tuples, no None."""
    if hint in _FIXED:
        return _FIXED[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return typing.cast(Any, hint)(**{f.name: sample(hints[f.name]) for f in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return next(iter(hint))
    if typing.get_origin(hint) is tuple:
        return (sample(typing.get_args(hint)[0]),)
    return sample(_optional_of(hint))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Every value that the hint allows."""
    if hint in _ANY:
        return _ANY[hint]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = {f.name: values(hints[f.name]) for f in dataclasses.fields(hint)}
        return st.builds(typing.cast(Any, hint), **fields)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), max_size=4).map(tuple)
    return st.none() | values(_optional_of(hint))


def messages() -> st.SearchStrategy[Message]:
    return st.one_of([values(kind) for kind in MESSAGE_TYPES.values()])


def _optional_of(hint: Any) -> Any:
    assert isinstance(hint, types.UnionType), hint
    (wanted,) = (part for part in typing.get_args(hint) if part is not types.NoneType)
    return wanted
