"""Mappings of buffers: as much as a handle and the seals allow, and shared within the process."""

from __future__ import annotations

from weakref import WeakValueDictionary

from vmm_linux._core.endpoint import held
from vmm_linux.errors import NoCapability
from vmm_linux.flags import Rights, VmmFlags
from vmm_linux.region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import SupportsIndex, TypeVar

    from vmm_linux._core.endpoint import VMM
    from vmm_linux.handles import Handle, HandleInfo

    Made = TypeVar("Made")

READ_WRITE = VmmFlags.READ | VmmFlags.WRITE


class SharedRegion:
    """A mapping that the objects of one buffer share, as long as one uses it.

    ``MAPPINGS`` names this instead of the region: another thread could get an object with a
    ``__del__`` from there while that runs, and with it a mapping that is just being freed.
    """

    __slots__ = ("__weakref__", "region")

    def __init__(self, region: Region) -> None:
        self.region = region

    def view(self, offset: int = 0, size: int | None = None) -> memoryview:
        """A memoryview that keeps this too. See ``Region.view``."""
        return held(self, self.region.view(offset, size))


MAPPINGS: WeakValueDictionary[tuple[int, ...], SharedRegion] = WeakValueDictionary()
"""The shared mappings by the identity of the VMM, the security id, the protection, the offset and
the size."""


def mapped(  # noqa: PLR0917  as ``VMM.mdl_map`` has them
    vmm: VMM, handle: Handle, offset: int, size: int, hint: SupportsIndex, prot: SupportsIndex
) -> Region:
    """Map a part that is inside the buffer."""
    return Region._made(vmm, size, vmm.mdl_map, handle, offset, size, hint, prot)  # noqa: SLF001


def mapped_most(vmm: VMM, handle: Handle, offset: int, size: int, hint: SupportsIndex) -> Region:
    """Map a part that is inside the buffer, writable where rights and seals allow it."""
    info = vmm.handle_info(handle)
    return as_most_of(info, mapped, vmm, handle, offset, size, hint)


def shared_mapping(
    vmm: VMM, handle: Handle, offset: int, size: int, prot: VmmFlags | None
) -> SharedRegion:
    """A mapping of a part that is inside, which all objects of this buffer here share.

    Objects of a handle without GET_SID do not know that their buffers are one. A handle gets no
    mapping of another one's that it could not make itself.
    """
    info = vmm.handle_info(handle)
    if prot is not None:
        return shared_as(info, vmm, handle, offset, size, prot)
    return as_most_of(info, shared_as, info, vmm, handle, offset, size)


def shared_as(  # noqa: PLR0917  the last one is the protection, as ``as_most_of`` gives it
    info: HandleInfo, vmm: VMM, handle: Handle, offset: int, size: int, prot: VmmFlags
) -> SharedRegion:
    """A shared mapping with this protection.

    Without the rights, or against a seal, one of another handle would be more than this one gives:
    ``VMM.mdl_map`` refuses then.
    """
    most = most_of(info) if Rights.MAP_READ in info.rights else VmmFlags(0)
    shares = Rights.GET_SID in info.rights and prot & ~most == 0
    key = (id(vmm), info.sid if shares else 0, int(prot), offset, size)
    shared = MAPPINGS.get(key) if shares else None
    if shared is None or shared.region.freed:
        shared = SharedRegion(mapped(vmm, handle, offset, size, 0, prot))
        if shares:
            MAPPINGS[key] = shared
    return shared


def most_of(info: HandleInfo) -> VmmFlags:
    """READ, and WRITE where a handle and the seals allow it."""
    if Rights.MAP_WRITE in info.rights and not info.seals:
        return READ_WRITE
    return VmmFlags.READ


def as_most_of(info: HandleInfo, make: Callable[..., Made], *arguments: object) -> Made:
    """Make a mapping with as much protection as rights and seals allow, the last argument.

    No closure: where memory for one is short, Python 3.11 loses what it would hold.
    """
    most = most_of(info)
    try:
        return make(*arguments, most)
    except NoCapability:
        # A seal that the whole buffer does not report: of some segments, or put on just now.
        if VmmFlags.WRITE not in most:
            raise
        return make(*arguments, VmmFlags.READ)
