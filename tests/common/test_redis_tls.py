"""TLS: each side checks the other's certificate, we its name too; what is wrong is one line."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.bus import EntryId
from common.errors import BusError, BusRefused, BusUnavailable
from common.open_bus import open_bus
from common.streams import HISTORY
from tests.secured_server import Certificates, SecuredServer, make_certificate, secured_server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates: of the server ("localhost"), of a node that it knows, and of a stranger."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    for name in ("localhost", "node", "stranger"):
        make_certificate(folder, name)
    return folder


def started(folder: Path, clients: Path | None) -> contextlib.AbstractContextManager[SecuredServer]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    return secured_server(binary, folder, tls=Certificates(server=folder / "localhost.pem", clients=clients))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[SecuredServer]:
    """Its certificate says "localhost"; it takes everybody."""
    with started(folder, None) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(folder: Path) -> Iterator[SecuredServer]:
    """It takes only who shows the certificate of the node."""
    with started(folder, folder / "node.pem") as server:
        yield server


def newest(url: str, folder: Path, *, ca: str = "localhost", own: str = "") -> EntryId:
    environment = {"HPT_REDIS_CA": str(folder / f"{ca}.pem")}
    if own:
        environment |= {
            "HPT_REDIS_CERT": str(folder / f"{own}.pem"),
            "HPT_REDIS_KEY": str(folder / f"{own}.key"),
        }
    with contextlib.closing(open_bus(url, "run", environment=environment)) as bus:
        return bus.last_id(HISTORY)


def test_server_with_the_right_certificate_is_used(server: SecuredServer, folder: Path) -> None:
    assert newest(server.url, folder) == EntryId(0, 0)


def test_server_with_an_unknown_certificate_is_refused_with_the_cure(
    server: SecuredServer, folder: Path
) -> None:
    with pytest.raises(BusRefused, match="HPT_REDIS_CA"):
        newest(server.url, folder, ca="stranger")


def test_server_with_another_name_is_refused(server: SecuredServer, folder: Path) -> None:
    with pytest.raises(BusRefused, match="HPT_REDIS_CA"):
        newest(server.url.replace("localhost", "127.0.0.1"), folder)


def test_plain_address_of_a_tls_server_is_unavailable(server: SecuredServer, folder: Path) -> None:
    with pytest.raises(BusUnavailable):
        newest(server.url.replace("rediss", "redis"), folder)


def test_a_node_that_shows_its_certificate_is_let_in(mutual: SecuredServer, folder: Path) -> None:
    assert newest(mutual.url, folder, own="node") == EntryId(0, 0)


@pytest.mark.parametrize("own", ["", "stranger"])
def test_a_node_without_a_known_certificate_is_told_which_files_are_missing(
    mutual: SecuredServer, folder: Path, own: str
) -> None:
    # BusUnavailable where the server closed before its reason came through: the line is as useful.
    with pytest.raises(BusError, match=r"HPT_REDIS_CERT.*HPT_REDIS_KEY") as refusal:
        newest(mutual.url, folder, own=own)
    assert "\n" not in str(refusal.value)


def test_a_certificate_file_that_is_none_is_one_line(mutual: SecuredServer, folder: Path) -> None:
    (folder / "none.pem").write_text("no certificate")
    (folder / "none.key").write_text("no key")
    with pytest.raises(BusError, match="HPT_REDIS_CERT") as refusal:
        newest(mutual.url, folder, own="none")
    assert "\n" not in str(refusal.value)
