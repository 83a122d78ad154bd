"""A real server with an ACL file, and with TLS when told so, for the tests of access.

    with secured_server(binary, folder, acl=text, tls=Certificates(...)) as server:
        server.url        holds no password: it travels by the environment

The test's own user is `admin`, whom the product's ACL file does not know.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.faults import wait_until

ADMIN_PASSWORD = "only-the-tests-know-this"


@dataclass(frozen=True, kw_only=True)
class Certificates:
    server: Path  # with its key beside it, as NAME.key
    clients: Path | None = None  # whose clients are let in; None: everybody


@dataclass(frozen=True, kw_only=True)
class SecuredServer:
    port: int
    scheme: str
    admin: redis.Redis

    @property
    def url(self) -> str:
        return f"{self.scheme}://localhost:{self.port}/0"


def make_certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for `name` with its key beside it."""
    certificate = folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}",
         "-keyout", certificate.with_suffix(".key"), "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate


@contextlib.contextmanager
def secured_server(
    binary: str, folder: Path, *, acl: str = "", tls: Certificates | None = None
) -> Iterator[SecuredServer]:
    """Started on a free port of 127.0.0.1. Skips the test where this server has no TLS."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    arguments = ["--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    if acl:
        users = folder / "users.acl"
        users.write_text(f"{acl}user admin on >{ADMIN_PASSWORD} ~* &* +@all\n", encoding="ascii")
        arguments += ["--aclfile", str(users)]
    arguments += ["--port", str(port)] if tls is None else ["--port", "0", *_tls_options(tls, port)]
    said = folder / "server.log"
    with said.open("wb") as log:
        process = subprocess.Popen([binary, *arguments], stdout=log, stderr=log)
    try:
        wait_until(lambda: _is_up(process, port, said))
        options: dict[str, Any] = {"username": "admin", "password": ADMIN_PASSWORD} if acl else {}
        if tls is not None:
            options |= _tls_of_admin(tls)
        with contextlib.closing(redis.Redis("localhost", port, protocol=2, **options)) as admin:
            yield SecuredServer(port=port, scheme="redis" if tls is None else "rediss", admin=admin)
    finally:
        process.kill()
        process.wait()


def _tls_of_admin(tls: Certificates) -> dict[str, Any]:
    options: dict[str, Any] = {"ssl": True, "ssl_ca_certs": str(tls.server)}
    if tls.clients is not None:
        options |= {"ssl_certfile": str(tls.clients), "ssl_keyfile": str(tls.clients.with_suffix(".key"))}
    return options


def _tls_options(tls: Certificates, port: int) -> list[str]:
    return [
        "--tls-port", str(port), "--tls-cert-file", str(tls.server),
        "--tls-key-file", str(tls.server.with_suffix(".key")),
        "--tls-ca-cert-file", str(tls.clients or tls.server),
        "--tls-auth-clients", "no" if tls.clients is None else "yes",
    ]  # fmt: skip


def _is_up(process: subprocess.Popen[bytes], port: int, said: Path) -> bool:
    if process.poll() is not None:
        text = said.read_text(encoding="utf-8", errors="replace")
        if "tls" in text.lower():
            pytest.skip("this server has no TLS")
        raise AssertionError(f"the server did not start: {text}")
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
