"""Makes passwords and writes them and the ACL file, for their owner only; overwrites nothing.

What an ACL file says is decided in acl.py.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import EnvironmentFault, UserError
from monitor_node.acl import acl_text, hash_of

PASSWORD_BYTES = 32


def make_users(
    run_pattern: str, roles: Sequence[str], *, out_file: Path | None, password_folder: Path | None
) -> list[str]:
    """Lines for the terminal: the passwords unless they went to files, and what to do next.

    Without `out_file` the ACL file goes to stdout. Raises UserError for a wrong pattern and for a file that
    is there already, EnvironmentFault for one that cannot be written; then nothing was written.
    """
    passwords = {role: secrets.token_urlsafe(PASSWORD_BYTES) for role in dict.fromkeys(roles)}
    text = acl_text(run_pattern, {role: hash_of(password) for role, password in passwords.items()})
    files = {} if out_file is None else {out_file: text}
    if password_folder is not None:
        files |= {password_folder / role: f"{password}\n" for role, password in passwords.items()}
    _write_all(files)
    if out_file is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    if password_folder is None:
        told = ["Passwords, shown this once. Give each node its two variables:"]
        told += [f"  HPT_REDIS_USERNAME={role} HPT_REDIS_PASSWORD={passwords[role]}" for role in passwords]
    else:
        told = ["Give each node its two variables:"]
        told += [
            f"  HPT_REDIS_USERNAME={role} HPT_REDIS_PASSWORD_FILE={password_folder / role}"
            for role in passwords
        ]
    shown = "this text, saved as users.acl," if out_file is None else str(out_file)
    return [
        *told,
        f"Give the server {shown} by `aclfile PATH` in redis.conf instead of requirepass, and restart it.",
        "From then on nobody enters without a name. Redis 7.0 or newer, or Valkey.",
    ]


def _write_all(files: dict[Path, str]) -> None:
    """All or none, as far as a file system allows: what was made is removed when a later one fails."""
    made: list[Path] = []
    try:
        for file, text in files.items():
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            made.append(file)
            with os.fdopen(number, "w", encoding="ascii") as opened:
                opened.write(text)
    except FileExistsError:
        _remove(made)
        raise UserError(f"{file}: is there already and is not overwritten; choose another name") from None
    except OSError as error:
        _remove(made)
        raise EnvironmentFault(f"{file}: cannot be written: {error.strerror}") from None


def _remove(files: list[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
