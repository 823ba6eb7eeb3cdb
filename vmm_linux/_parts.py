"""Parts of buffers on their way through ``multiprocessing``, for the arrays that lie in them."""

from __future__ import annotations

from weakref import WeakValueDictionary

from vmm_linux import _pickling
from vmm_linux._core.typed import final
from vmm_linux.errors import VmmError
from vmm_linux.flags import Rights
from vmm_linux.mdl import received_mdl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm_linux.handles import HandleInfo
    from vmm_linux.mdl import Mdl

TRAVELLED: WeakValueDictionary[tuple[int | None, ...], Mdl] = WeakValueDictionary()
"""The ``Mdl`` that the arrays of one buffer share, as ``known`` finds it. However often arrays of
it are sent and received, a process has it once."""
PARTS: WeakValueDictionary[tuple[int | None, ...], Part] = WeakValueDictionary()
"""The parts that are on their way, which arrays in one pickle share."""


@final
class Part:
    """A part of a buffer on its way through ``multiprocessing``.

    A pickle holds each object once: however many arrays of a part are in it, as the rows of an
    array that a pool maps are, they take one descriptor.
    """

    __slots__ = ("__weakref__", "first", "mdl", "rights", "size")

    def __init__(self, mdl: Mdl, rights: Rights, first: int | None, size: int) -> None:
        self.mdl = mdl
        self.rights = rights
        self.first = first
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return _pickling.reduced(self.mdl, lambda: (received_part, self._packed()))

    def _packed(self) -> tuple[Any, ...]:
        vmm, handle = self.mdl.vmm, self.mdl.handle
        if self.first is None:
            return *_pickling.pack(vmm, handle, self.rights), None
        with self._clone(self.first) as clone:
            return *_pickling.pack(vmm, clone.handle, self.rights), self.first

    def _clone(self, first: int) -> Mdl:
        try:
            return self.mdl.clone(first, self.size)
        except VmmError as problem:
            raise _pickling.not_pickled(problem) from None


def part_of(mdl: Mdl, rights: Rights, first: int | None, size: int) -> Part:
    """A part of a buffer to pickle: one object as long as a pickler has it.

    Args:
        mdl: the buffer.
        rights: that the receiver gets.
        first: where the part begins, a page multiple, or None for the whole buffer.
        size: of the part in bytes, a page multiple; not needed for the whole buffer.
    """
    if first is None:
        size = 0
        known(mdl)
    part = Part(mdl, rights, first, size)
    return PARTS.setdefault((id(mdl), int(rights), first, size), part)


def info_of(mdl: Mdl) -> HandleInfo:
    """What ``handle_info`` says of a buffer that is being pickled."""
    try:
        return mdl.vmm.handle_info(mdl.handle)
    except VmmError as problem:
        raise _pickling.not_pickled(problem) from None


def received_part(sent: _pickling.Sent, inode: int, first: int | None) -> Any:  # noqa: ANN401
    """The buffer of a pickle, or what stands in for it."""
    return _pickling.delivered(lambda: known(received_mdl(sent, inode), first))


def known(mdl: Mdl, first: int | None = None) -> Mdl:
    """The ``Mdl`` that arrays of this buffer have already, with the same rights; or this one.

    Args:
        mdl: the buffer.
        first: where it begins in the buffer that it was cloned from to be sent, or None: a clone
            has an identity of its own each time.
    """
    info = mdl.vmm.handle_info(mdl.handle)
    if Rights.GET_SID not in info.rights:
        return mdl
    sid = info.sid if first is None else info.origin_sid
    key = id(mdl.vmm), sid, first, info.nbytes, int(info.rights)
    earlier = TRAVELLED.get(key)
    if earlier is None or earlier.vmm is not mdl.vmm or not is_open(earlier):
        TRAVELLED[key] = earlier = mdl
    return earlier


def is_open(mdl: Mdl) -> bool:
    """Whether its handle is neither closed nor revoked, by its number either."""
    try:
        mdl.vmm.mdl_get_size(mdl.handle)
    except VmmError:
        return False
    return True
