from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from vmm_linux.flags import Rights, Seal, VmmFlags
from vmm_linux.limits import Usage

class Kind(Enum):
    NUMBER = "number"
    SIZE = "size"
    FLAGS = "flags"
    HANDLE = "handle"
    RIGHTS = "rights"
    SEALS = "seals"
    MOST = "most"
    MAYBE = "maybe"
    SWITCH = "switch"
    TRISTATE = "tristate"
    IGNORED = "ignored"
    DATA = "data"
    RANGES = "ranges"
    SOCKET = "socket"
    LIMITS = "limits"

class Method(NamedTuple):
    name: str
    arguments: tuple[tuple[str, Kind], ...]
    flags: int = 0
    def has(self, kind: Kind) -> bool: ...

METHODS: tuple[Method, ...]

class Question:
    @property
    def method(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, int | None]: ...
    @property
    def flags(self) -> VmmFlags: ...
    @property
    def size(self) -> int: ...
    @property
    def rights(self) -> Rights: ...
    @property
    def seals(self) -> Seal: ...
    @property
    def peer(self) -> tuple[int, int | None, int | None] | None: ...
    @property
    def usage(self) -> Usage: ...
