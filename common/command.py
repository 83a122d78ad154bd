"""The shell of every command: click group whose errors are one line and an exit code.

0 good, 1 a failure of the environment or of a check, 2 the user's mistake.
"""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from common.errors import HybridError


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
