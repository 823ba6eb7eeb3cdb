"""The endpoint with the names and the shape of the reference."""

from __future__ import annotations

from vmm_linux._core.endpoint import outcome
from vmm_linux.errors import Retcode, refuse_copies
from vmm_linux.handles import INVALID_HANDLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm_linux._core.endpoint import VMM, PageInfo

__all__ = ["Endpoint"]


class Endpoint:
    """One ``VMM`` in the reference's form: methods return their out parameters and a return code.

    They never raise for any argument, even if the argument's own code raises; a failed call's out
    values are 0, ``None`` or ``INVALID_HANDLE``. Exceptions that end a program or a task pass
    through: ``KeyboardInterrupt``, ``SystemExit``, and every other that is no ``Exception``.
    """

    __slots__ = ("_vmm",)

    __reduce__ = refuse_copies("each is a face of one VMM; ask for vmm.endpoint again")

    def __init__(self, vmm: VMM) -> None:
        self._vmm = vmm

    def Allocate(self, addr: object, size: object, flags: object) -> tuple[int, Retcode]:
        """Reserve a region, and commit it if asked to: ``(va, rc)``. See ``VMM.allocate``."""
        return outcome(self._vmm.allocate, 0, addr, size, flags)

    def Commit(self, va: object, size: object, flags: object) -> Retcode:
        """Make reserved pages usable: ``rc``. See ``VMM.commit``."""
        return outcome(self._vmm.commit, None, va, size, flags)[1]

    def Decommit(self, va: object, size: object) -> Retcode:
        """Give the memory of pages back: ``rc``. See ``VMM.decommit``."""
        return outcome(self._vmm.decommit, None, va, size)[1]

    def Protect(self, va: object, size: object, flags: object) -> Retcode:
        """Change the protection of pages: ``rc``. See ``VMM.protect``."""
        return outcome(self._vmm.protect, None, va, size, flags)[1]

    def Free(self, va: object, size: object) -> Retcode:
        """Give addresses and memory back: ``rc``. See ``VMM.free``."""
        return outcome(self._vmm.free, None, va, size)[1]

    def Query(self, va: object) -> tuple[PageInfo | None, Retcode]:
        """Describe a page: ``(info, rc)``. See ``VMM.query``."""
        return outcome(self._vmm.query, None, va)

    def MdlCreate(self, size: object, prot: object) -> tuple[int, Retcode]:
        """Make an MDL buffer: ``(handle, rc)``. See ``VMM.mdl_create``."""
        return outcome(self._vmm.mdl_create, INVALID_HANDLE, size, prot)

    def MdlCreateFromVm(self, va: object, size: object, flags: object) -> tuple[int, Retcode]:
        """Make an MDL buffer of pages: ``(handle, rc)``. See ``VMM.mdl_create_from_vm``."""
        return outcome(self._vmm.mdl_create_from_vm, INVALID_HANDLE, va, size, flags)

    def MdlGetSize(self, handle: object) -> tuple[int, Retcode]:
        """Return a buffer's size in bytes: ``(size, rc)``. See ``VMM.mdl_get_size``."""
        return outcome(self._vmm.mdl_get_size, 0, handle)

    def MdlMap(
        self, handle: object, offset: object, length: object, hint: object, prot: object
    ) -> tuple[int, Retcode]:
        """Map a part of a buffer: ``(address, rc)``. See ``VMM.mdl_map``."""
        return outcome(self._vmm.mdl_map, 0, handle, offset, length, hint, prot)

    def MdlClone(self, originHandle: object, offset: object, length: object) -> tuple[int, Retcode]:
        """Make a window on a buffer: ``(cloneHandle, rc)``. See ``VMM.mdl_clone``."""
        return outcome(self._vmm.mdl_clone, INVALID_HANDLE, originHandle, offset, length)
