"""The rule by which guards are taken, set for one test."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from vmm_linux._core import memory

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def rule(in_chunk: int, in_vmm: int) -> Iterator[None]:
    """Take guards where a chunk, or a VMM, has this many runs."""
    memory.set_rule(in_chunk, in_vmm)
    try:
        yield
    finally:
        memory.set_rule()


#: Every rule worth a test: guards wherever they can be, where it is crowded, nowhere.
RULES = {"always": (0, 0), "crowded": (2, 40), "never": (1 << 40, 1 << 40)}
