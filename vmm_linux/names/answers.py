"""What a client makes of its broker's messages. No broker is believed to keep to the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm_linux._core.values import is_a
from vmm_linux.errors import InternalError, Retcode, VmmError, error
from vmm_linux.names import protocol
from vmm_linux.names.protocol import Answer, Stat, read_answer

if TYPE_CHECKING:
    from collections.abc import Iterator


def read(data: bytes) -> Answer:
    """A message of the broker's.

    Errors:
        EOFError: it is none, and the connection of no use.
    """
    try:
        return read_answer(data)
    except protocol.BadMessageError as problem:
        raise EOFError(str(problem)) from None


def read_all(method: str, found: Answer) -> Iterator[Stat]:
    """What the broker says of names."""
    try:
        yield from protocol.read_records(found)
    except (protocol.BadMessageError, ValueError) as problem:
        raise InternalError(method, f"the broker's answer: {problem}") from None


def error_of(method: str, found: Answer) -> VmmError:
    """An error that the broker reports."""
    try:
        rc = Retcode(found.rc)
    except ValueError:
        rc = Retcode.INTERNAL_ERROR
    return error(rc, method, found.data.decode(errors="replace"), found.errno or None)


def check_kind(found: object, wants_buffer: bool) -> None:
    """Whether an answer is a buffer just where one was asked for.

    Args:
        found: a handle; an ``Answer``; None for a buffer that was not taken.
        wants_buffer: whether one was asked for.

    Errors:
        EOFError: it is not, and the connection of no use.
    """
    if found is None or (wants_buffer and is_a(found, Answer) and not found.rc):
        raise EOFError("a buffer in place of another answer, or the other way round")
