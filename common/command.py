"""The shell of every command: click group whose errors are one line and an exit code; the option --redis.

0 good, 1 a failure of the environment or of a check, 2 the user's mistake.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import urlsplit

import click

from common.errors import HybridError


def _warned(context: click.Context, parameter: click.Parameter, url: str | None) -> str | None:
    with contextlib.suppress(ValueError):
        if url and urlsplit(url).password:
            warn_of_secret_in_arguments("the password in --redis", "HPT_REDIS_PASSWORD")
    return url


redis_option = click.option(
    "--redis", "redis_url", metavar="URL", callback=_warned, help="Bus address; default: HPT_REDIS_URL."
)


def warn_of_secret_in_arguments(what: str, variable: str) -> None:
    """One line on stderr. Nothing can be done any more: `ps` has shown it to everybody on this machine."""
    click.echo(f"warning: every user of this machine can see {what} (ps); put it into {variable}", err=True)


def run_command(command: Callable[..., Any], program: str) -> NoReturn:
    """Run a click command as a program. Known errors print `program: message` on stderr."""
    try:
        code = command(prog_name=program, standalone_mode=False)
    except click.exceptions.Exit as exit_request:
        code = exit_request.exit_code
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo(f"{program}: interrupted", err=True)
        code = 130
    except HybridError as error:
        click.echo(f"{program}: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
