"""``VMM`` as users get it: the endpoint, and the comfort that is built upon it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm_linux import _own_vmm, _vmm
from vmm_linux._arguments import index
from vmm_linux.flags import VmmFlags
from vmm_linux.mdl import Mdl
from vmm_linux.region import Region

if TYPE_CHECKING:
    from typing import SupportsIndex

__all__ = ["VMM"]

READ_WRITE = VmmFlags.READ | VmmFlags.WRITE


class VMM(_vmm.VMM):
    """One client of the endpoint: it sees, changes and frees only what it made itself.

    A context manager: leaving it closes it. A VMM that is dropped, or still open when the
    interpreter exits, warns (``ResourceWarning``) and says where it was made.

    Every method raises a subclass of ``VmmError``, with the return code in ``.rc``, and then has
    changed nothing. On a closed VMM every method but ``close`` is ``INVALID_OPERATION``. Integers
    are ``int`` and whatever has ``__index__``, bools excepted; others are ``INVALID_ARGUMENT``.
    Methods may be called from any thread.
    """

    __slots__ = ()

    def region(
        self, size: SupportsIndex, flags: SupportsIndex = READ_WRITE, addr: SupportsIndex = 0
    ) -> Region:
        """Reserve a region of memory as an object, which frees it when it is dropped.

        Args:
            size: bytes, a page multiple.
            flags: ``VmmFlags`` as for ``allocate``; RESERVE need not be among them. COMMIT makes
                the pages usable at once.
            addr: preferred base address in bytes, a page multiple, or 0.

        Returns:
            A ``Region``.

        Errors:
            As of ``allocate``.

        Source: Allocate.
        """
        bits = index("allocate", "flags", flags) | VmmFlags.RESERVE
        base = self.allocate(addr, size, bits)
        return Region(self, base, index("allocate", "size", size))

    def mdl(self, size: SupportsIndex, prot: SupportsIndex = READ_WRITE) -> Mdl:
        """Make an MDL buffer as an object, which closes its handle when it is dropped.

        Args:
            size: bytes, a page multiple.
            prot: ``VmmFlags``: the most that the handle allows, READ at least. With LOCKED the
                buffer has all its memory on return.

        Returns:
            An ``Mdl``.

        Errors:
            As of ``mdl_create``.

        Source: MdlCreate.
        """
        return Mdl(self, self.mdl_create(size, prot))


class OwnVMM(VMM):
    """The package's own: there is nobody who could have closed it."""

    __slots__ = ()
    _warns = False


_own_vmm.MAKERS.append(OwnVMM)
