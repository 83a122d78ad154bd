"""TLS: the server's certificate and name are checked; a wrong one is refused with the cure."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.bus import EntryId
from common.errors import BusRefused, BusUnavailable
from common.open_bus import open_bus
from common.streams import HISTORY
from tests.faults import wait_until


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """Of a TLS server whose certificate says "localhost"."""
    binary = shutil.which("redis-server")
    if binary is None or shutil.which("openssl") is None:
        pytest.skip("redis-server or openssl is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        free_port: int = free.getsockname()[1]
    certificate = make_certificate(folder, "localhost")
    server = subprocess.Popen(
        [binary, "--bind", "127.0.0.1", "--port", "0", "--tls-port", str(free_port), "--save", "",
         "--tls-cert-file", certificate, "--tls-key-file", certificate.with_suffix(".key"),
         "--tls-ca-cert-file", certificate, "--tls-auth-clients", "no", "--dir", folder],
        stdout=subprocess.DEVNULL,
    )  # fmt: skip

    def is_up() -> bool:
        if server.poll() is not None:
            pytest.skip("this redis-server has no TLS")
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", free_port)) == 0

    try:
        wait_until(is_up)
        yield free_port
    finally:
        server.kill()
        server.wait()


def newest(url: str, ca_file: Path) -> EntryId:
    bus = open_bus(url, "run", environment={"HPT_REDIS_CA": str(ca_file)})
    try:
        return bus.last_id(HISTORY)
    finally:
        bus.close()


def test_server_with_the_right_certificate_is_used(port: int, folder: Path) -> None:
    assert newest(f"rediss://localhost:{port}", folder / "localhost.pem") == EntryId(0, 0)


def test_server_with_an_unknown_certificate_is_refused_with_the_cure(port: int, folder: Path) -> None:
    with pytest.raises(BusRefused, match="HPT_REDIS_CA"):
        newest(f"rediss://localhost:{port}", make_certificate(folder, "stranger"))


def test_server_with_another_name_is_refused(port: int, folder: Path) -> None:
    with pytest.raises(BusRefused, match="HPT_REDIS_CA"):
        newest(f"rediss://127.0.0.1:{port}", folder / "localhost.pem")


def test_plain_address_of_a_tls_server_is_unavailable(port: int, folder: Path) -> None:
    with pytest.raises(BusUnavailable):
        newest(f"redis://localhost:{port}", folder / "localhost.pem")
