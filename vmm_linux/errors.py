"""Return codes, the exceptions that carry them, and the return code of each errno."""

from __future__ import annotations

import errno as _errno
from enum import IntEnum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import ClassVar, NoReturn, Self

__all__ = ["Retcode", "VmmError"]


class Retcode(IntEnum):
    """How a call ended. 0 is success; ``str()`` gives the KasperskyOS name (``rcOk``)."""

    OK = 0
    """Done."""
    INVALID_ARGUMENT = 1
    """Unaligned, zero, overflowing, of a wrong type, an illegal protection or an unknown flag."""
    RESOURCE_NOT_FOUND = 2
    """The range is not wholly inside one region of this VMM, or the handle is closed."""
    INVALID_OPERATION = 3
    """The right range in the wrong state, or a closed VMM."""
    ALREADY_EXISTS = 4
    """FIXED, and the address is taken."""
    OUT_OF_MEMORY = 5
    """The kernel has no memory, address space, map count or commit charge left."""
    QUOTA_EXCEEDED = 6
    """A bound of this VMM's ``Limits``, or a resource limit of this process."""
    NO_CAPABILITY = 7
    """The handle's rights do not cover the call."""
    SECURITY_DISALLOW = 8
    """The policy denied the call."""
    HANDLE_REVOKED = 9
    """The handle was revoked."""
    BUSY = 10
    """Something holds the pages that the call would take away or change."""
    UNIMPLEMENTED = 11
    """Linux, or this kernel, does not offer it."""
    FAIL = 12
    """The kernel refused for another reason: see ``errno``."""
    INTERNAL_ERROR = 13
    """A defect of this package."""

    def __str__(self) -> str:
        return "rc" + self.name.title().replace("_", "")


class VmmError(Exception):
    """A call of the endpoint failed. There is one subclass for each return code.

    Attributes:
        rc: the return code.
        method: the method that failed, by its Python name (``"commit"``).
        errno: the kernel's error number where the kernel refused, else None.
        completed: bytes done before the failure; only ``write`` and ``readinto``, slices with a
            step that are written, and ``mdl_seal`` of a buffer in segments, can leave more than 0.
    """

    rc: ClassVar[Retcode]

    def __init_subclass__(cls, rc: Retcode | None = None) -> None:
        if rc is not None:  # else that of the base class
            cls.rc = rc

    def __init__(
        self, method: str, message: str, errno: int | None = None, completed: int = 0
    ) -> None:
        cause = f" [{_errno.errorcode.get(errno, errno)}]" if errno else ""
        super().__init__(f"{method}: {message}{cause}")
        self.method = method
        self.message = message
        self.errno = errno
        self.completed = completed

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, int | None, int]]:
        return type(self), (self.method, self.message, self.errno, self.completed)


class InvalidArgument(VmmError, ValueError, rc=Retcode.INVALID_ARGUMENT):
    """``INVALID_ARGUMENT``."""


class ResourceNotFound(VmmError, LookupError, rc=Retcode.RESOURCE_NOT_FOUND):
    """``RESOURCE_NOT_FOUND``."""


class InvalidOperation(VmmError, RuntimeError, rc=Retcode.INVALID_OPERATION):
    """``INVALID_OPERATION``."""


class NotCopyable(InvalidOperation, TypeError):
    """An object that exists once, and can be neither copied nor pickled.

    Code that copies any object, as Python's own library does, catches ``TypeError``.
    """


class OutOfRange(InvalidArgument, IndexError):
    """An index outside a region or a buffer.

    Code that counts up to the end, as Python's own loops do, catches ``IndexError``.
    """


class AlreadyExists(VmmError, FileExistsError, rc=Retcode.ALREADY_EXISTS):
    """``ALREADY_EXISTS``."""


class OutOfMemory(VmmError, MemoryError, rc=Retcode.OUT_OF_MEMORY):
    """``OUT_OF_MEMORY``."""


class QuotaExceeded(VmmError, MemoryError, rc=Retcode.QUOTA_EXCEEDED):
    """``QUOTA_EXCEEDED``."""


class NoCapability(VmmError, PermissionError, rc=Retcode.NO_CAPABILITY):
    """``NO_CAPABILITY``."""


class SecurityDisallow(VmmError, PermissionError, rc=Retcode.SECURITY_DISALLOW):
    """``SECURITY_DISALLOW``."""


class HandleRevoked(VmmError, LookupError, rc=Retcode.HANDLE_REVOKED):
    """``HANDLE_REVOKED``."""


class Busy(VmmError, BufferError, rc=Retcode.BUSY):
    """``BUSY``."""


class Unimplemented(VmmError, NotImplementedError, rc=Retcode.UNIMPLEMENTED):
    """``UNIMPLEMENTED``."""


class Fail(VmmError, OSError, rc=Retcode.FAIL):
    """``FAIL``: the kernel refused, ``errno`` says how."""


class InternalError(VmmError, RuntimeError, rc=Retcode.INTERNAL_ERROR):
    """``INTERNAL_ERROR``: please report it."""


EXCEPTIONS: dict[Retcode, type[VmmError]] = {
    subclass.rc: subclass for subclass in VmmError.__subclasses__()
}
"""The exception of every return code but OK."""

RETCODES: dict[int, Retcode] = {
    _errno.ENOMEM: Retcode.OUT_OF_MEMORY,
    _errno.ENOSPC: Retcode.OUT_OF_MEMORY,
    _errno.EAGAIN: Retcode.QUOTA_EXCEEDED,
    _errno.EMFILE: Retcode.QUOTA_EXCEEDED,
    _errno.ENFILE: Retcode.OUT_OF_MEMORY,
    _errno.EEXIST: Retcode.ALREADY_EXISTS,
    _errno.EBUSY: Retcode.BUSY,
    _errno.EBADF: Retcode.INVALID_OPERATION,
    _errno.ENOSYS: Retcode.UNIMPLEMENTED,
    _errno.EOPNOTSUPP: Retcode.UNIMPLEMENTED,
}
"""The return code of each errno; all others are FAIL."""


def error(
    rc: Retcode, method: str, message: str, errno: int | None = None, completed: int = 0
) -> VmmError:
    """The exception of ``rc``, ready to be raised."""
    return EXCEPTIONS[rc](method, message, errno, completed)


def refuse_copies(reason: str) -> Callable[[object], NoReturn]:
    """A ``__reduce__`` for a class whose objects are neither copied nor pickled.

    ``copy`` and every protocol of ``pickle`` call it. (``__reduce_ex__`` alone would leave
    ``object.__reduce_ex__``, which copies any object without a ``__reduce__``.)

    Args:
        reason: why not, and what to do instead.

    Returns:
        A function that always raises ``NotCopyable``, INVALID_OPERATION and a ``TypeError`` too.
    """

    def refuse(self: object) -> NoReturn:
        raise NotCopyable(
            "pickle", f"{type(self).__name__} objects are neither copied nor pickled: {reason}"
        )

    return refuse
