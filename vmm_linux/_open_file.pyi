"""Types of ``_open_file.pyx``."""

from typing import final

@final
class Descriptor:
    def __init__(self, fd: int) -> None: ...
    @property
    def number(self) -> int: ...
