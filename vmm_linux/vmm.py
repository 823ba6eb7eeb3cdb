"""``VMM`` as users get it: the endpoint, and the conveniences built on it."""

from __future__ import annotations

from vmm_linux import aio
from vmm_linux._core import endpoint
from vmm_linux._core.values import index
from vmm_linux.endpoint import Endpoint
from vmm_linux.flags import VmmFlags
from vmm_linux.mdl import Mdl
from vmm_linux.region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

    from _typeshed import HasFileno

    from vmm_linux.handles import Handle

__all__ = ["VMM"]

READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
RESERVE = int(VmmFlags.RESERVE)
"""A plain int: an ``IntFlag`` would turn a negative number into a flag."""


class VMM(endpoint.VMM):
    """One client of the endpoint: it sees, changes and frees only its own regions and buffers.

    A context manager: leaving it closes it. A VMM that is dropped, or still open when the
    interpreter exits, warns (``ResourceWarning``) and says where it was made.

    Every method raises a subclass of ``VmmError``, with the return code in ``.rc``, and then has
    changed nothing, except what ``completed`` reports of ``write`` and ``mdl_seal``. On a closed
    VMM every method but ``close`` and ``history`` is ``INVALID_OPERATION``. A VMM with a policy
    (``vmm_linux.policy``) asks it before every method but ``close``, ``usage`` and ``history``,
    each of which can be ``SECURITY_DISALLOW``. Integers are ``int`` and objects with
    ``__index__``, except bools; others are ``INVALID_ARGUMENT``. Methods may be called from any
    thread.

    ``VMM(limits=...)`` sets its limits; without it, defaults end a runaway loop (``limits``).
    """

    __slots__ = ()

    @property
    def endpoint(self) -> Endpoint:
        """This VMM in the reference's form: an ``Endpoint``."""
        return Endpoint(self)

    # ---- objects ------------------------------------------------------------------------------

    def region(
        self, size: SupportsIndex, flags: SupportsIndex = READ_WRITE, addr: SupportsIndex = 0
    ) -> Region:
        """Reserve a region of memory as an object, which frees the region when it is dropped.

        Args:
            size: bytes, a page multiple.
            flags: ``VmmFlags`` as for ``allocate``; RESERVE is optional. COMMIT makes
                the pages usable at once.
            addr: preferred base address in bytes, a page multiple, or 0.

        Returns:
            A ``Region``.

        Errors:
            As of ``allocate``.

        Source: Allocate.
        """
        bits = index("allocate", "flags", flags) | RESERVE
        length = index("allocate", "size", size)
        return Region._made(self, length, self.allocate, addr, length, bits)  # noqa: SLF001

    def mdl(
        self, size: SupportsIndex, prot: SupportsIndex = READ_WRITE, segment_size: SupportsIndex = 0
    ) -> Mdl:
        """Make an MDL buffer as an object, which closes its handle when it is dropped.

        Args:
            size: bytes, one or more: the length of the buffer, which is mapped in whole pages.
            prot: ``VmmFlags``: the most that the handle allows, READ at least. With LOCKED the
                buffer has all its memory on return.
            segment_size: bytes of each memory file of the buffer, a page multiple; 0 for a single
                one. A receiver of a clone on their boundaries reaches only the clone.

        Returns:
            An ``Mdl``.

        Errors:
            As of ``mdl_create``.

        Source: MdlCreate.
        """
        return Mdl(size, prot, segment_size=segment_size, vmm=self)

    # ---- event loops --------------------------------------------------------------------------

    async def send_handle_async(
        self, sock: HasFileno, handle: SupportsIndex | Mdl, rights: SupportsIndex | None = None
    ) -> None:
        """Send a handle as ``send_handle`` does, and let other tasks run while the socket is full.

        The event loop is asyncio's, uvloop's or trio's; anyio runs on these. A cancelled task has
        sent all or nothing. Several tasks may wait on one socket; their order is not specified. End
        them before you close the socket.

        Args:
            sock: a connected AF_UNIX socket that does not block, as for ``send_handle``. One that
                a transport uses (``TransportSocket``) is refused.
            handle: to send; it needs TRANSFER, and every right that is sent.
            rights: ``Rights`` that the receiver's handle gets, or None for all that this one has.

        Errors:
            Those of ``send_handle``, and
            INVALID_ARGUMENT: the socket blocks, or a transport uses it.
            INVALID_OPERATION: no event loop of asyncio or trio runs.
            QUOTA_EXCEEDED: RLIMIT_NOFILE; a task that waits holds one descriptor more.
            UNIMPLEMENTED: the event loop has no ``add_writer``.

        Source: ``VMM.send_handle``, ``loop.add_writer``, ``trio.lowlevel.wait_writable``.
        """
        await aio.send_handle(self, sock, handle, rights)

    async def recv_handle_async(
        self,
        sock: HasFileno,
        require: SupportsIndex = 0,
        max_size: SupportsIndex | None = None,
        peer_uid: SupportsIndex | None = None,
    ) -> Handle:
        """Receive a handle as ``recv_handle`` does, and let other tasks run while none is there.

        The event loop is asyncio's, uvloop's or trio's; anyio runs on these. A cancelled task has
        received nothing: the message stays for the next one. Several tasks may wait on one socket;
        which of them gets a message is not specified. End them before you close the socket.

        Args:
            sock: a connected AF_UNIX socket that does not block, as for ``recv_handle``. One that
                a transport uses (``TransportSocket``) is refused.
            require: ``Seal`` that the memory must have. FREEZE includes PUBLISH.
            max_size: bytes that the buffer may have at most, or None.
            peer_uid: the user that must be at the other end, or None. A user that this process's
                user namespace does not map is unknown, and refused.

        Returns:
            A ``Handle``.

        Errors:
            Those of ``recv_handle``, and
            INVALID_ARGUMENT: the socket blocks, or a transport uses it.
            INVALID_OPERATION: no event loop of asyncio or trio runs.
            QUOTA_EXCEEDED: RLIMIT_NOFILE; a task that waits holds one descriptor more.
            UNIMPLEMENTED: the event loop has no ``add_reader``.

        Source: ``VMM.recv_handle``, ``loop.add_reader``, ``trio.lowlevel.wait_readable``.
        """
        return await aio.recv_handle(self, sock, require, max_size, peer_uid)
