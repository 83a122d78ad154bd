"""An address -> a Bus. What can be wrong with an address is a SettingsError that names the cure.

    redis://[user:password@]host[:port][/database]     rediss:// is the same over TLS
    redis+sentinel://[user:password@]host[:port][,host[:port]...]/service[/database]
                       the master that these Sentinels name; rediss+sentinel:// asks and talks over TLS
    unix://[user:password@]/path/to/socket[?db=N]
    memory://NAME      streams inside this process, shared by everyone who says NAME
    embedded://        a private server, started here and ended by the bus's `close`

Environment: HPT_REDIS_URL stands in for a missing address, HPT_REDIS_PASSWORD (else what is in the file
HPT_REDIS_PASSWORD_FILE) for a missing password, HPT_REDIS_USERNAME for a missing user in an address without
a password. User and password are the server's; HPT_SENTINEL_PASSWORD is the Sentinels' own.
HPT_REDIS_CA, HPT_REDIS_CERT and HPT_REDIS_KEY are files for TLS. Does not connect.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from common.bus import Bus, BusAddress
from common.errors import SettingsError
from common.memory_bus import MemoryBus, memory_server
from common.redis_bus import RedisBus
from common.redis_link import RedisAddress, RedisLink, connect

_LONGEST_PASSWORD = 4096
_SENTINEL_PORT = 26379
FORMS = (
    "redis://HOST:PORT/DB, rediss://HOST:PORT/DB, redis+sentinel://HOST:PORT,HOST:PORT/SERVICE/DB,"
    " unix:///PATH, memory://NAME or embedded://"
)


def open_bus(url: str | None, run_id: str, *, environment: Mapping[str, str] | None = None) -> Bus:
    """The bus of one run. `environment` is os.environ unless a test says otherwise."""
    environment = os.environ if environment is None else environment
    url = url_or_environment(url, environment)
    scheme, _, name = url.partition("://")
    if scheme == "memory":
        return MemoryBus(memory_server(name), run_id)
    if scheme == "embedded":
        return _open_embedded(run_id, environment)
    return RedisBus(open_link(url, environment=environment), run_id)


def open_link(url: str, *, environment: Mapping[str, str]) -> RedisLink:
    """Connections to the server at an address of a Redis, with or without Sentinel."""
    address = parse_redis_url(url, environment=environment)
    return RedisLink(address.shown, lambda socket_seconds: connect(address, socket_seconds))


def url_or_environment(url: str | None, environment: Mapping[str, str]) -> str:
    found = url or environment.get("HPT_REDIS_URL", "")
    if not found:
        raise SettingsError(f"no bus address: give --redis or set HPT_REDIS_URL; forms: {FORMS}")
    return found


def parse_redis_url(url: str, *, environment: Mapping[str, str]) -> RedisAddress:
    """Raises SettingsError; its text never holds the password."""
    shown = BusAddress(url, "").shown
    if url.partition("://")[0] in ("redis+sentinel", "rediss+sentinel"):
        return _sentinel_address(url, shown, environment)
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise SettingsError(
            f"bus address {shown}: not a valid host and port; forms: {FORMS};"
            " write / @ : # ? in a password as %2F %40 %3A %23 %3F"
        ) from None
    if parts.scheme not in ("redis", "rediss", "unix"):
        raise SettingsError(f"bus address {shown}: unknown scheme; forms: {FORMS}")
    is_socket = parts.scheme == "unix"
    if is_socket and (parts.hostname or not parts.path.startswith("/")):
        raise SettingsError(f"bus address {shown}: write the whole path, e.g. unix:///run/redis.sock")
    if not is_socket and not parts.hostname:
        raise SettingsError(f"bus address {shown}: the host is missing; forms: {FORMS}")
    username, password = _credentials(parts, environment)
    return RedisAddress(
        shown=shown,
        host="" if is_socket else str(parts.hostname),
        port=port or 6379,
        socket_path=unquote(parts.path) if is_socket else "",
        database=_database(parts, shown),
        username=username,
        password=password,
        tls=parts.scheme == "rediss",
        ca_file=_file("HPT_REDIS_CA", environment),
        certificate_file=_file("HPT_REDIS_CERT", environment),
        key_file=_file("HPT_REDIS_KEY", environment),
    )


def _sentinel_address(url: str, shown: str, environment: Mapping[str, str]) -> RedisAddress:
    """The part of the server is read as if it were at the first Sentinel's place."""
    form = "write redis+sentinel://HOST:PORT,HOST:PORT/SERVICE"
    try:
        parts = urlsplit(url)
        credentials, at, places = parts.netloc.rpartition("@")
        found = [urlsplit(f"//{place}") for place in places.split(",")]
        sentinels = tuple((place.hostname or "", place.port or _SENTINEL_PORT) for place in found)
    except ValueError:
        raise SettingsError(f"bus address {shown}: not a valid host and port; {form}") from None
    service, _, database = parts.path.strip("/").partition("/")
    if not service or not all(host for host, _ in sentinels):
        raise SettingsError(f"bus address {shown}: a host or the service's name is missing; {form}")
    server = parts._replace(
        scheme=parts.scheme.removesuffix("+sentinel"),
        netloc=f"{credentials}{at}{places.split(',')[0]}",
        path=f"/{database}",
    )
    return dataclasses.replace(
        parse_redis_url(server.geturl(), environment=environment),
        shown=shown,
        sentinels=sentinels,
        service=unquote(service),
        sentinel_password=environment.get("HPT_SENTINEL_PASSWORD") or None,
    )


def _credentials(parts: SplitResult, environment: Mapping[str, str]) -> tuple[str | None, str | None]:
    """(user, password). An address with a password is complete: the environment's user is not its."""
    username = unquote(parts.username) if parts.username else None
    if parts.password:
        return username, unquote(parts.password)
    username = username or environment.get("HPT_REDIS_USERNAME") or None
    return username, environment.get("HPT_REDIS_PASSWORD") or _password_in_file(environment)


def _password_in_file(environment: Mapping[str, str]) -> str | None:
    variable = "HPT_REDIS_PASSWORD_FILE"
    path = _file(variable, environment)
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:
            password = file.read(_LONGEST_PASSWORD).strip()
    except (OSError, UnicodeDecodeError):
        password = ""
    if not password or "\n" in password:
        raise SettingsError(f"{variable}={path}: must hold one line of text, the password")
    return password


def _database(parts: SplitResult, shown: str) -> int:
    options = parse_qs(parts.query, keep_blank_values=True)
    if set(options) - {"db"} or parts.fragment:
        raise SettingsError(f"bus address {shown}: the only option is ?db=N; the rest is decided by us")
    in_path = "" if parts.scheme == "unix" else parts.path.strip("/")
    text = options.get("db", [in_path])[-1] or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise SettingsError(f"bus address {shown}: the database must be a number, e.g. redis://host:6379/0")
    return int(text)


def _file(variable: str, environment: Mapping[str, str]) -> str | None:
    path = environment.get(variable) or None
    if path is not None and not os.access(path, os.R_OK):
        raise SettingsError(f"{variable}={path}: no such file, or not readable")
    return path


def _open_embedded(run_id: str, environment: Mapping[str, str]) -> Bus:
    from common.embedded import start_server  # only who asks for a server pays for starting one

    server = start_server()
    try:
        return RedisBus(open_link(server.url, environment=environment), run_id, on_close=server.close)
    except BaseException:
        server.close()
        raise
