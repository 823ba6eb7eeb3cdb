from collections.abc import Callable
from typing import TypeVar

from vmm_linux.errors import Retcode

_Out = TypeVar("_Out")

def outcome(
    method: Callable[..., _Out], value: _Out, *arguments: object
) -> tuple[_Out, Retcode]: ...
