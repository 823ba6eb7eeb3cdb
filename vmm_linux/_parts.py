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


class SharedMdl:
    """The ``Mdl`` of arrays, which lives as long as one of them does.

    ``TRAVELLED`` names this instead of the ``Mdl``: another thread could get an object with a
    ``__del__`` from there while that runs, and with it a handle that is just being closed.
    """

    __slots__ = ("__weakref__", "mdl")

    def __init__(self, mdl: Mdl) -> None:
        self.mdl = mdl


TRAVELLED: WeakValueDictionary[tuple[int | None, ...], SharedMdl] = WeakValueDictionary()
"""What the arrays of one buffer share, as ``known`` finds it. However often arrays of it are sent
and received, a process has it once."""
PARTS: WeakValueDictionary[tuple[int | None, ...], Part] = WeakValueDictionary()
"""The parts that are on their way, which arrays in one pickle share."""


@final
class Part:
    """A part of a buffer on its way through ``multiprocessing``.

    A pickle holds each object once: however many arrays of a part are in it, as the rows of an
    array that a pool maps are, they take one descriptor.
    """

    __slots__ = ("__weakref__", "first", "rights", "shared", "size")

    def __init__(self, shared: SharedMdl, rights: Rights, first: int | None, size: int) -> None:
        self.shared = shared
        self.rights = rights
        self.first = first
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return _pickling.reduced(self.shared.mdl, self._packed)

    def _packed(self) -> tuple[Any, ...]:
        mdl = self.shared.mdl
        if self.first is None:
            sent = _pickling.pack(mdl.vmm, mdl.handle, self.rights)
            return received_part, (*sent, None)
        with self._clone(self.first) as clone:
            sent = _pickling.pack(mdl.vmm, clone.handle, self.rights)
            return received_part, (*sent, self.first)

    def _clone(self, first: int) -> Mdl:
        try:
            return self.shared.mdl.clone(first, self.size)
        except VmmError as problem:
            raise _pickling.not_pickled(problem) from None


def part_of(shared: SharedMdl, rights: Rights, first: int | None, size: int) -> Part:
    """A part of a buffer to pickle: one object as long as a pickler has it.

    Args:
        shared: the buffer.
        rights: that the receiver gets.
        first: where the part begins, a page multiple, or None for the whole buffer.
        size: of the part in bytes, a page multiple; not needed for the whole buffer.
    """
    if first is None:
        size = 0
        known(shared)
    part = Part(shared, rights, first, size)
    return PARTS.setdefault((id(shared.mdl), int(rights), first, size), part)


def info_of(mdl: Mdl) -> HandleInfo:
    """What ``handle_info`` says of a buffer that is being pickled."""
    try:
        return mdl.vmm.handle_info(mdl.handle)
    except VmmError as problem:
        raise _pickling.not_pickled(problem) from None


def received_part(sent: _pickling.Sent, inode: int, first: int | None) -> Any:  # noqa: ANN401
    """The buffer of a pickle, or what stands in for it."""
    return _pickling.delivered(shared_part, sent, inode, first)


def shared_part(sent: _pickling.Sent, inode: int, first: int | None) -> SharedMdl:
    """The buffer of a pickle, as arrays share it."""
    return known(SharedMdl(received_mdl(sent, inode)), first)


def known(shared: SharedMdl, first: int | None = None) -> SharedMdl:
    """What arrays of this buffer have already, with the same rights; or this.

    Args:
        shared: the buffer.
        first: where it begins in the buffer that it was cloned from to be sent, or None: a clone
            has an identity of its own each time.
    """
    mdl = shared.mdl
    info = mdl.vmm.handle_info(mdl.handle)
    if Rights.GET_SID not in info.rights:
        return shared
    sid = info.sid if first is None else info.origin_sid
    # Memory of another program that grew can have several lengths.
    key = id(mdl.vmm), sid, first, info.nbytes, int(info.rights)
    earlier = TRAVELLED.get(key)
    if earlier is None or earlier.mdl.vmm is not mdl.vmm or not is_open(earlier.mdl):
        TRAVELLED[key] = earlier = shared
    return earlier


def is_open(mdl: Mdl) -> bool:
    """Whether its handle is neither closed nor revoked, by its number either."""
    try:
        mdl.vmm.mdl_get_size(mdl.handle)
    except VmmError:
        return False
    return True
