"""How a command refuses: a line on standard error, and its exit code."""

import sys
from collections.abc import Callable, Sequence

from vmm_linux._tools.text import escaped
from vmm_linux.errors import VmmError

CANNOT_TRY = 2


class CannotTryError(Exception):
    """A command cannot be tried; the text has the reason, in a line."""


def run(name: str, command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit code of a command; its refusal is printed after the name, and the code is 2."""
    try:
        return command(arguments)
    except CannotTryError as error:
        message = str(error)
    except VmmError as error:
        message = escaped(str(error))
    sys.stderr.write(f"{name}: {message}\n")
    return CANNOT_TRY
