"""Container healthcheck of the server: `python -m common.healthcheck [URL]` exits 0 only on PONG.

`redis-cli ping` exits 0 on NOAUTH as well (systems.md, finding 6), so it would call a server
healthy that lets nobody in. The password may come from HPT_REDIS_PASSWORD.
"""

import os

import click

from common.command import run_command
from common.open_bus import open_link, url_or_environment
from common.redis_bus import RedisBus


@click.command(help=__doc__)
@click.argument("url", required=False)
def check(url: str | None) -> None:
    bus = RedisBus(open_link(url_or_environment(url, os.environ), environment=os.environ), run_id="")
    try:
        bus.ping()
    finally:
        bus.close()
    click.echo("PONG")


if __name__ == "__main__":
    run_command(check, "healthcheck")
