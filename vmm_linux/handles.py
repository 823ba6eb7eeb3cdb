"""Handles of MDL buffers, and the information about them."""

from __future__ import annotations

from vmm_linux.errors import InvalidOperation, NoCapability
from vmm_linux.flags import Rights, Seal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final, Self

__all__ = ["INVALID_HANDLE", "Handle", "HandleInfo"]

INVALID_HANDLE: Final = 2**64 - 1
"""No handle has this value."""


class Handle(int):
    """Names an MDL buffer in one VMM. The VMM's table gives it a meaning, not its bits."""

    __slots__ = ()

    @property
    def number(self) -> int:
        """Bits 0-31."""
        return self & 0xFFFFFFFF

    @property
    def rights(self) -> Rights:
        """The permissions mask, bits 32-47."""
        return Rights(self >> 32 & 0xFFFF)

    @property
    def generation(self) -> int:
        """Bits 48-62: how often the number had been used up before."""
        return self >> 48 & 0x7FFF

    def __repr__(self) -> str:
        return f"<Handle 0x{self:x}: {self.rights!r}>"


class HandleInfo:
    """The result of ``VMM.handle_info``. Immutable."""

    __slots__ = ("_nbytes", "_origin_sid", "_rights", "_seals", "_segments", "_sid", "_size")

    def __init__(  # noqa: PLR0917  as pickles have them
        self,
        rights: Rights,
        size: int,
        sid: int,
        origin_sid: int | None,
        seals: Seal,
        nbytes: int | None = None,
        segments: int = 1,
    ) -> None:
        if hasattr(self, "_rights"):
            raise InvalidOperation("HandleInfo", "a HandleInfo does not change")
        self._rights = rights
        self._size = size
        self._sid = sid
        self._origin_sid = origin_sid
        self._seals = seals
        self._nbytes = size if nbytes is None else nbytes
        self._segments = segments

    @property
    def rights(self) -> Rights:
        """The rights of the handle."""
        return self._rights

    @property
    def size(self) -> int:
        """The size of the buffer in bytes: that of its pages."""
        return self._size

    @property
    def nbytes(self) -> int:
        """The length of the buffer to the byte, which ends in its last page."""
        return self._nbytes

    @property
    def segments(self) -> int:
        """How many memory files the buffer lies in."""
        return self._segments

    @property
    def seals(self) -> Seal:
        """The seals of the memory."""
        return self._seals

    @property
    def sid(self) -> int:
        """The security id: the kernel's own identity of the buffer, the same in every process.

        Errors:
            NO_CAPABILITY: the handle lacks GET_SID.
        """
        self._check_sid()
        return self._sid

    @property
    def origin_sid(self) -> int | None:
        """The security id of the buffer that this one was cloned from, None for no clone.

        Errors:
            NO_CAPABILITY: the handle lacks GET_SID.
        """
        self._check_sid()
        return self._origin_sid

    def _check_sid(self) -> None:
        if Rights.GET_SID not in self._rights:
            raise NoCapability("handle_info", "the handle lacks GET_SID")

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        return type(self), tuple(getattr(self, name) for name in FIELDS)

    def __repr__(self) -> str:
        return f"HandleInfo(rights={self._rights!r}, nbytes={self._nbytes}, seals={self._seals!r})"


FIELDS: Final = ("_rights", "_size", "_sid", "_origin_sid", "_seals", "_nbytes", "_segments")
"""What makes a ``HandleInfo``, in the order of its arguments."""
