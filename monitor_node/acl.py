"""Who may do what on the server: one table of what each node does there -> the users of a Redis ACL file.

Needs Redis >= 7.0 or Valkey: a selector (...) binds commands to keys, %R~ and %W~ tell reading a key from
writing it. Redis 6.2 knows neither and refuses the file. Holds hashes of passwords, never a password. Pure.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError
from common.streams import (
    DECISIONS,
    HISTORY,
    MONITOR,
    NODES,
    ORDERS,
    PREDICTOR,
    STREAMS,
    TRAINER,
    generation_key,
    key_of,
    notes_of,
)

PAGE = "page"  # whoever only looks: `monitor-node status`, `top` and `record`, and a health check
ROLES = (*NODES, PAGE)
EVERY_RUN = "*"
# AUTH, HELLO and QUIT need no right. A refused CLIENT SETINFO, which redis-py sends, is harmless.
CONNECTION_COMMANDS = ("ping", "select", "multi", "exec")

_RUN_PATTERN = re.compile(r"[A-Za-z0-9._*?-]{1,64}")  # of run_folder.check_run_id, and * and ?


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """What RedisBus (common/redis_bus.py) sends for a kind of work, and which right to the key it needs."""

    right: str  # "%R~" to read, "%W~" to write, "~" both
    commands: tuple[str, ...]


READ = Operation(right="%R~", commands=("xread", "xrange", "xrevrange", "xlen", "xinfo|stream"))
APPEND = Operation(right="%W~", commands=("xadd",))
TRIM = Operation(right="%W~", commands=("xtrim",))
# Reading in a group keeps its books in the stream, which counts as writing; XADD and XTRIM stay forbidden.
SHARE = Operation(right="~", commands=("xgroup|create", "xreadgroup", "xack", "xautoclaim", "xpending"))
COUNT_UP = Operation(right="~", commands=("incrby", "get"))  # the fencing number of a node


def _written_by(node: str) -> tuple[str, ...]:
    return tuple(stream for stream, rule in STREAMS.items() if rule.writer == node)


# A writer also reads its own streams: their newest id tells "delivered" from "fenced".
STREAM_USE: dict[str, tuple[tuple[Operation, tuple[str, ...]], ...]] = {
    TRAINER: (
        (READ, (*_written_by(TRAINER), DECISIONS, ORDERS, notes_of(PREDICTOR), notes_of(MONITOR))),
        (APPEND, _written_by(TRAINER)),
        (TRIM, (HISTORY,)),
    ),
    PREDICTOR: (
        (READ, (*_written_by(PREDICTOR), HISTORY)),
        (APPEND, _written_by(PREDICTOR)),
        (SHARE, (HISTORY,)),
    ),
    MONITOR: (
        (READ, tuple(STREAMS)),
        (APPEND, _written_by(MONITOR)),
    ),
    PAGE: ((READ, tuple(STREAMS)),),
}


def acl_text(run_pattern: str, password_hashes: Mapping[str, str]) -> str:
    """An ACL file for the roles in `password_hashes` (role -> `hash_of` its password).

    `run_pattern` is a run id in which * and ? stand for any letters. The user `default`, who is everybody
    without a name, is switched off. Raises UserError for a pattern that is none.
    """
    if not _RUN_PATTERN.fullmatch(run_pattern):
        raise UserError(
            f"--run-id {run_pattern!r}: write a run id, in which * and ? stand for any letters, e.g. 'nano-*'"
        )
    users = [_user(role, run_pattern, digest) for role, digest in password_hashes.items()]
    return "\n".join(["user default reset off", *users]) + "\n"


def hash_of(password: str) -> str:
    """As the server keeps it. Plain SHA-256 is enough for 256 random bits, not for a word."""
    return hashlib.sha256(password.encode()).hexdigest()


def _user(role: str, run_pattern: str, digest: str) -> str:
    rights = [
        _selector(operation, [key_of(run_pattern, stream) for stream in streams])
        for operation, streams in STREAM_USE[role]
    ]
    if role in NODES:
        rights.append(_selector(COUNT_UP, [generation_key(run_pattern, role)]))
    connection = [f"+{command}" for command in CONNECTION_COMMANDS]
    return " ".join(["user", role, "reset", "on", f"#{digest}", *connection, *rights])


def _selector(operation: Operation, keys: list[str]) -> str:
    commands = [f"+{command}" for command in operation.commands]
    return f"({' '.join([*commands, *(operation.right + key for key in keys)])})"
