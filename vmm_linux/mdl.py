"""``Mdl``: a buffer of shared memory as an object."""

from __future__ import annotations

import sys
import warnings

from vmm_linux import _pickling, _span
from vmm_linux._core import imports, kernel
from vmm_linux._core.endpoint import VMM, Exporter
from vmm_linux._core.kernel import Descriptor
from vmm_linux._core.typed import final, overload
from vmm_linux._core.values import counted, describe, index, is_a
from vmm_linux._default_vmm import default_vmm, given_or_default
from vmm_linux._file_copies import copy_of_file
from vmm_linux._mappings import mapped, mapped_most, shared_mapping
from vmm_linux.errors import (
    Busy,
    InvalidArgument,
    InvalidOperation,
    ResourceNotFound,
    SecurityDisallow,
    Unimplemented,
    VmmError,
)
from vmm_linux.flags import Rights, Seal, VmmFlags

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from types import ModuleType
    from typing import Any, Literal, Self, SupportsIndex, TypeVar

    import numpy as np
    from _typeshed import HasFileno
    from numpy.typing import ArrayLike
    from typing_extensions import Buffer

    from vmm_linux._core.typed import DtypeOf, Scalar
    from vmm_linux._mappings import SharedRegion
    from vmm_linux.handles import Handle
    from vmm_linux.region import Region
    from vmm_linux.shared_array import SharedArray

    Made = TypeVar("Made")

__all__ = ["Mdl"]

PAGE = kernel.page_size()
SIZE_WANTED = "a number of bytes; Mdl.from_bytes(data) and Mdl.from_array(array) copy data"
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE


@final
class Mdl(Exporter, _span.ByteAccess):
    """An MDL buffer: memory without a name, shared by the owners of its handles.

    ``Mdl(size)`` makes one, in a VMM of the process's own if none is given; ``from_bytes``,
    ``from_array``, ``from_fd``, ``from_handle``, ``recv`` and unpickling too. Its length is exact
    to the byte (``nbytes``, ``len``), here and at every receiver. Dropping the object, or leaving
    its ``with``, closes its handle; mappings, arrays, clones, and other processes' handles and
    mappings, live on.

    It is a buffer of bytes: ``memoryview(mdl)``, ``mdl.buf``, ``numpy.frombuffer(mdl)``,
    ``mdl[3:9]``, ``mdl[3:9] = b"..."``; read-only where rights or seals forbid writing. The
    memory is mapped at the first use, and stays as long as anything looks at it, whatever is
    closed: ``numpy.ndarray(shape, dtype, buffer=mdl)`` too, which keeps it until the ``Mdl`` goes.
    Memory that was made without LOCKED is taken when it is touched: where the machine has none
    left, ``read``, ``write`` and slices are OUT_OF_MEMORY, and a view ends in SIGBUS.

    Methods of ``VMM`` take it where they take a handle. ``multiprocessing`` carries it unchanged:
    as an argument of a ``Process``, through a ``Queue``, a ``Pipe``, a pool. The other side gets
    an ``Mdl`` with the same rights. The memory is not copied and has no name that could be left
    behind. ``Queue.put`` pickles later, in a thread: a buffer that is closed before that arrives
    as an error that ``get`` raises. ``copy.copy`` makes another handle, ``copy.deepcopy`` another
    buffer.

    The errors are those of the ``VMM``'s method named with each; on a closed ``Mdl`` they are
    RESOURCE_NOT_FOUND.
    """

    __slots__ = ("__weakref__", "_closed", "_descriptor", "_handle", "_nbytes", "_region", "_vmm")

    __reduce__ = _pickling.refusal(
        "Elsewhere use mdl.send(sock) and Mdl.recv(sock), or mdl.fileno() and Mdl.from_fd(fd)"
    )

    def __init__(
        self,
        size: SupportsIndex,
        prot: SupportsIndex = READ_WRITE,
        *,
        segment_size: SupportsIndex = 0,
        vmm: VMM | None = None,
    ) -> None:
        """Make a buffer.

        Args:
            size: bytes, one or more. Memory is mapped and counted in whole pages.
            prot: ``VmmFlags``: the most that the handle allows, READ at least. With LOCKED the
                buffer has all its memory on return.
            segment_size: bytes of each memory file of the buffer, a page multiple; 0 for a single
                one. A receiver of a clone on their boundaries reaches only the clone.
            vmm: that it is to belong to; None for the default one.

        Errors:
            As of ``VMM.mdl_create``.
            INVALID_OPERATION: this object has a buffer already.

        Source: MdlCreate.
        """
        if hasattr(self, "_handle"):
            raise InvalidOperation("Mdl", "an Mdl does not change; make another one")
        if is_a(size, VMM):
            warnings.warn(
                "Mdl(vmm, handle) is Mdl.from_handle(vmm, handle); Mdl(size) makes a buffer",
                DeprecationWarning,
                stacklevel=2,
            )
            if prot is READ_WRITE:
                raise InvalidArgument("Mdl", "no size: Mdl(size, vmm=vmm) makes a buffer")
            self._begin(size)
            self._handle: Handle = plain(prot)
        else:
            nbytes = index("mdl_create", "size", size, SIZE_WANTED)
            if nbytes < 1:
                raise InvalidArgument("mdl_create", f"size {nbytes}: at least one byte is needed")
            vmm = given_or_default("mdl_create", vmm)
            self._begin(vmm)
            pages = -(-nbytes // PAGE) * PAGE
            self._handle = vmm.mdl_create(pages, prot, segment_size, nbytes)
        self._closed = False
        _pickling.enable(Mdl, _reduce)

    @classmethod
    def _made(cls, vmm: VMM, make: Callable[..., Handle], *arguments: object) -> Self:
        """An Mdl of the handle that a method of ``vmm`` makes.

        The object exists before the handle, which so has an owner from the start: no shortage of
        memory can come between them.
        """
        mdl = cls.__new__(cls)
        mdl._begin(vmm)  # noqa: SLF001
        mdl._handle = make(*arguments)  # noqa: SLF001
        mdl._closed = False  # noqa: SLF001
        _pickling.enable(Mdl, _reduce)
        return mdl

    def _begin(self, vmm: VMM) -> None:
        """Begin without a handle, as a closed one."""
        self._closed = True
        self._vmm = vmm
        self._descriptor: dict[str, Descriptor] = {}
        self._nbytes: int | None = None
        self._region: SharedRegion | None = None

    @classmethod
    def from_bytes(
        cls, data: Buffer, prot: SupportsIndex = VmmFlags.READ, *, vmm: VMM | None = None
    ) -> Self:
        """Make a buffer of these bytes, frozen unless ``prot`` has WRITE.

        Args:
            data: a contiguous buffer of at least one byte; zeros fill its last page.
            prot: ``VmmFlags``: the most that the handle allows, READ at least.
            vmm: that it is to belong to; None for the default one.

        Returns:
            An ``Mdl`` of the data's length.

        Errors:
            As of ``VMM.mdl_create_from_buf``.
        """
        vmm = given_or_default("mdl_create_from_buf", vmm)
        return cls._made(vmm, vmm.mdl_create_from_buf, data, prot)

    @classmethod
    def from_array(cls, array: ArrayLike, *, vmm: VMM | None = None) -> Mdl:
        """Make a buffer with a copy of an array's elements: ``vmm_linux.share(array).mdl``.

        Errors:
            As of ``vmm_linux.share``.
            UNIMPLEMENTED: NumPy is not installed.
        """
        made: Mdl = arrays("from_array").share(array, vmm=vmm).mdl
        return made

    @classmethod
    def from_fd(
        cls,
        fd: SupportsIndex,
        require: SupportsIndex = 0,
        max_size: SupportsIndex | None = None,
        *,
        copy: bool = False,
        vmm: VMM | None = None,
    ) -> Self:
        """Make a buffer of a foreign descriptor, without trust in it.

        Memory of any program will do, to the byte, if it is sealed against shrinking: memfds of
        this package, of Chromium, of Wayland. Otherwise its owner could cut it, and a process that
        touches what was cut ends with SIGBUS: such memory (``/dev/shm``, ``SharedMemory``), and
        any other file, can be copied.

        Args:
            fd: descriptor of a memfd, as ``fileno`` gives; it stays the caller's.
            require: ``Seal`` that the memory must have; of a copy none.
            max_size: bytes that the buffer may have at most, or None.
            copy: whether to make a new buffer with a copy of the file's bytes.
            vmm: that it is to belong to; None for the default one.

        Errors:
            As of ``VMM.handle_from_fd``; of a copy as of ``VMM.mdl_create``, ``VMM.write``, and
            INVALID_ARGUMENT: not open for reading, no file with a size, no bytes.
            FAIL: the file became shorter meanwhile, or cannot be read.
        """
        vmm = given_or_default("handle_from_fd", vmm)
        if copy:
            return copy_of_file(cls, vmm, fd, require, max_size)
        return cls._made(vmm, vmm.handle_from_fd, fd, require, max_size)

    @classmethod
    def from_handle(cls, vmm: VMM, handle: Handle) -> Self:
        """An ``Mdl`` of a handle, which is closed with it.

        Args:
            vmm: the VMM of the handle.
            handle: of the buffer.

        Errors:
            As of ``VMM.mdl_get_size``.
        """
        if not is_a(vmm, VMM):
            raise InvalidArgument("from_handle", f"vmm is {describe(vmm)}, not a VMM")
        own = plain(handle)
        vmm.mdl_get_size(own)
        mdl = cls.__new__(cls)
        mdl._begin(vmm)  # noqa: SLF001
        _pickling.enable(Mdl, _reduce)
        # From here on it closes the handle: nothing can fail any more.
        mdl._handle = own  # noqa: SLF001
        mdl._closed = False  # noqa: SLF001
        return mdl

    @classmethod
    def recv(
        cls,
        sock: HasFileno,
        require: SupportsIndex = 0,
        max_size: SupportsIndex | None = None,
        peer_uid: SupportsIndex | None = None,
        *,
        vmm: VMM | None = None,
    ) -> Self:
        """Receive a buffer that another process sent, without trust. See ``VMM.recv_handle``.

        Args:
            sock: a connected AF_UNIX socket.
            require: ``Seal`` that the memory must have.
            max_size: bytes that the buffer may have at most, or None.
            peer_uid: the user that must be at the other end, or None.
            vmm: that it is to belong to; None for the default one.
        """
        vmm = given_or_default("recv_handle", vmm)
        return cls._made(vmm, vmm.recv_handle, sock, require, max_size, peer_uid)

    def send(self, sock: HasFileno, rights: SupportsIndex | None = None) -> None:
        """Send the buffer to another process. See ``VMM.send_handle``.

        Args:
            sock: a connected AF_UNIX socket.
            rights: ``Rights`` that the receiver gets, or None for all that this handle has.
        """
        self._vmm.send_handle(sock, self._handle, rights)

    # ---- properties ---------------------------------------------------------------------------

    @property
    def vmm(self) -> VMM:
        """The VMM that the handle belongs to."""
        return self._vmm

    @property
    def handle(self) -> Handle:
        """The handle. It is closed with this object."""
        return self._handle

    @property
    def size(self) -> int:
        """The size of the buffer's pages in bytes (``VMM.mdl_get_size``)."""
        return self._vmm.mdl_get_size(self._handle)

    @property
    def rights(self) -> Rights:
        """The rights of the handle (``VMM.handle_info``)."""
        return self._vmm.handle_info(self._handle).rights

    @property
    def seals(self) -> Seal:
        """The seals of the memory (``VMM.handle_info``)."""
        return self._vmm.handle_info(self._handle).seals

    @property
    def sid(self) -> int:
        """The kernel's identity of the buffer, the same in every process (``VMM.handle_info``)."""
        return self._vmm.handle_info(self._handle).sid

    @property
    def closed(self) -> bool:
        """Whether it was closed, here or with its VMM."""
        return self._closed or self._vmm.closed

    @property
    def nbytes(self) -> int:
        """The length of the buffer to the byte, the same at every receiver."""
        if self._nbytes is None:
            self._nbytes = self._vmm.handle_info(self._handle).nbytes
        elif self.closed:
            raise closed("nbytes")
        return self._nbytes

    @property
    def buf(self) -> memoryview:
        """The memory itself, as ``memoryview(mdl)`` gives it."""
        return memoryview(self)

    def __len__(self) -> int:
        return self.nbytes

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        try:
            info = self._vmm.handle_info(self._handle)
        except VmmError as problem:
            return f"<Mdl, {'closed' if self.closed else problem.message}>"
        seals = f", sealed {info.seals.name}" if info.seals else ""
        return f"<Mdl of {counted(info.nbytes, 'byte')}: {info.rights.name or 'no rights'}{seals}>"

    # ---- use ----------------------------------------------------------------------------------

    def map(
        self,
        prot: SupportsIndex | None = None,
        offset: SupportsIndex = 0,
        length: SupportsIndex | None = None,
        hint: SupportsIndex = 0,
    ) -> Region:
        """Map a part of the buffer. See ``VMM.mdl_map``.

        Args:
            prot: ``VmmFlags`` of the mapping; None for READ, and WRITE where rights and seals
                allow it. EXECUTE comes only when asked for.
            offset: bytes from the buffer's start, a page multiple.
            length: bytes, a page multiple, or None for all from there on.
            hint: preferred address, a page multiple, or 0.

        Returns:
            A ``Region``, which outlives this object.
        """
        start, size = _span.inside("mdl_map", offset, length, self.size, "buffer")
        if prot is None:
            return mapped_most(self._vmm, self._handle, start, size, hint)
        return mapped(self._vmm, self._handle, start, size, hint, prot)

    def _memory(self, method: str) -> SharedRegion:
        """The mapping of the whole buffer, made at the first use."""
        if self.closed:
            raise closed(method)
        shared = self._region
        if shared is None:
            shared = self._region = shared_mapping(self._vmm, self._handle, 0, self.size, None)
        return shared

    def _pinned(self) -> memoryview:
        return self._memory("memoryview").view(0, self.nbytes)

    def _length(self, method: str) -> int:
        if self.closed:
            raise closed(method)
        return self.nbytes

    def _as_handle(self) -> Handle:
        return self._handle

    def read(self, size: SupportsIndex | None = None, offset: SupportsIndex = 0) -> bytes:
        """Copy bytes out, with the kernel's checks. See ``VMM.read``.

        Args:
            size: bytes, or None for all from the offset on.
            offset: of the first byte.
        """
        start, length = _span.inside("read", offset, _span.read_size(size), self.nbytes, "buffer")
        return self._memory("read").region.read(length, start)

    def write(self, data: Buffer, offset: SupportsIndex = 0) -> int:
        """Copy bytes in, with the kernel's checks. See ``VMM.write``.

        Args:
            data: a contiguous buffer of at least one byte that fits into this one.
            offset: of the first byte.

        Returns:
            The number of bytes written, all of them.
        """
        start, there = _span.inside("write", offset, None, self.nbytes, "buffer")
        with _span.bytes_of("write", "data", data) as given:
            if len(given) > there:
                raise InvalidArgument(
                    "write", f"{len(given)} bytes at offset {start}: {there} bytes are there"
                )
            try:
                return self._memory("write").region.write(given, start)
            except InvalidOperation as problem:
                raise self._unwritable(problem) from problem

    def _unwritable(self, problem: InvalidOperation) -> VmmError:
        """The exception for a buffer that cannot be written here."""
        info = self._vmm.handle_info(self._handle)
        if Rights.MAP_WRITE not in info.rights:
            why = "its handle lacks MAP_WRITE"
        elif info.seals:
            why = f"it is sealed with {info.seals.name}"
        elif info.segments > 1:
            why = "some of its segments are sealed"
        else:
            return problem
        return InvalidOperation("write", f"the buffer is read-only here: {why}")

    @overload
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: Literal["float64"] | None = "float64",
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> SharedArray[np.dtype[np.float64]]: ...
    @overload
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DtypeOf[Scalar],
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> SharedArray[np.dtype[Scalar]]: ...
    @overload
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: Any,  # noqa: ANN401  whatever numpy.dtype takes
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> SharedArray[np.dtype[Any]]: ...
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: Any = "float64",
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> SharedArray[Any]:
        """A NumPy array over the buffer, without a copy: a ``SharedArray``.

        Its memory stays as long as the array, or anything made of it, even if all else is closed.

        Args:
            shape: numbers of elements, each at least 1: a tuple or a list, or one number.
            dtype: what ``numpy.dtype`` takes, but for Python objects.
            offset: of the first element, bytes from the buffer's start; a multiple of the dtype's
                alignment.
            writable: True, False, or None for writable where rights and seals allow it.

        Errors:
            INVALID_ARGUMENT: no such dtype or shape; not inside the buffer; an unaligned offset.
            UNIMPLEMENTED: NumPy is not installed.
            Others as of ``VMM.mdl_map``.
        """
        made: SharedArray[Any] = arrays("array").array_of(self, shape, dtype, offset, writable)
        return made

    def clone(self, offset: SupportsIndex = 0, length: SupportsIndex | None = None) -> Mdl:
        """Make a buffer that is a window on this one. See ``VMM.mdl_clone``.

        Args:
            offset: bytes from this buffer's start, a page multiple.
            length: bytes, a page multiple, or None for all from there on.
        """
        start, size = _span.inside("mdl_clone", offset, length, self.size, "buffer")
        return Mdl._made(self._vmm, self._vmm.mdl_clone, self._handle, start, size)

    def read_only(self) -> Mdl:
        """Another handle of the buffer, which lacks MAP_WRITE. See ``VMM.handle_copy``."""
        rights = self.rights & ~Rights.MAP_WRITE
        return Mdl._made(self._vmm, self._vmm.handle_copy, self._handle, rights)

    def publish(self) -> None:
        """Forbid new writers; writable mappings that exist go on. See ``VMM.mdl_seal``."""
        self._vmm.mdl_seal(self._handle, Seal.PUBLISH)

    def freeze(self) -> None:
        """Forbid all writes from now on. See ``VMM.mdl_seal``.

        Errors:
            BUSY: while anything can still write; drop writable regions and arrays first, and other
                ``Mdl``s of the buffer that were written or read here.
        """
        # The mapping of this object's own: what looks at it keeps it, and is in the way.
        self._region = None
        try:
            self._vmm.mdl_seal(self._handle, Seal.FREEZE)
        except Busy as problem:
            if self._kept is None or self._kept.readonly:
                raise
            raise Busy(
                problem.method,
                "numpy.ndarray(buffer=...) of this Mdl can write to the buffer, and does not say "
                "when it is gone: drop it and the Mdl, and seal the buffer by a copy.copy(mdl)",
                completed=problem.completed,
            ) from problem

    def publish_as(
        self,
        name: str,
        *,
        lifetime: str = "connection",
        rights: SupportsIndex | None = None,
        broker: str | os.PathLike[str] | None = None,
    ) -> None:
        """Put the buffer under a name, by which any program opens it: ``vmm_linux.attach``.

        Args:
            name: 1 to 255 bytes in UTF-8, without NUL and '/'.
            lifetime: how long the name lives, unless it is unlinked: ``"connection"``, as long as
                this process; ``"family"``, as long as a process of this program does that
                ``multiprocessing`` knows; or ``"kept"``.
            rights: ``Rights`` that the name allows at most, or None for all that this handle has.
            broker: path of a broker's socket; None for ``VMM_LINUX_BROKER``, or this user's own.

        Errors:
            ALREADY_EXISTS: the name is taken.
            NO_CAPABILITY: the handle lacks TRANSFER, or some of ``rights``.
            QUOTA_EXCEEDED: the broker's limits.
            Others as of ``vmm_linux.attach``.
        """
        names("publish_as").client_of(broker).publish(self, name, lifetime=lifetime, rights=rights)

    def fileno(self) -> int:
        """A descriptor of the buffer's memory, for ``Popen(pass_fds=...)``.

        It belongs to this object, which closes it. If the program closed it, this makes another.
        See ``VMM.handle_fileno``.
        """
        kept = self._descriptor.get("fd")
        if kept is not None:
            # An earlier one must not outlast the handle.
            self._vmm.mdl_get_size(self._handle)
            if kept.is_open:
                return kept.number
            self._descriptor.pop("fd", None)
        made = Descriptor()
        made.take(self._vmm.handle_fileno(self._handle))
        number = made.number
        # Concurrent threads all get the same one.
        kept = self._descriptor.setdefault("fd", made)
        return number if kept is made else kept.number

    def close(self) -> None:
        """Close the handle and the descriptor. Mappings and arrays live on; twice is fine."""
        try:
            if not self.closed:
                self._closed = True
                self._vmm.handle_close(self._handle)
        except (MemoryError, SecurityDisallow):  # nothing happened
            self._closed = False
            raise
        finally:
            if self.closed:
                self._descriptor.clear()
                self._region = None

    def __enter__(self) -> Self:
        self._vmm.mdl_get_size(self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # No caller could catch an error. At interpreter exit this module may lack its names.
        try:
            try:
                self.close()
            except MemoryError:  # a moment later there may be some
                self.close()
        except Exception:  # noqa: BLE001, S110
            pass

    def __copy__(self) -> Mdl:
        return Mdl._made(self._vmm, self._vmm.handle_copy, self._handle, self.rights)

    def __deepcopy__(self, memo: dict[int, Any] | None = None, /) -> Mdl:
        return Mdl.from_bytes(self.buf, READ_WRITE, vmm=self._vmm)

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> Any:  # noqa: ANN401
        if _pickling.is_multiprocessing(sys._getframe(1)):  # noqa: SLF001
            return _reduce(self)
        return self.__reduce__()


def plain(handle: object) -> Handle:
    """A handle that no other object closes."""
    if is_a(handle, Mdl):
        raise InvalidArgument(
            "from_handle", "handle is an Mdl, which closes its own; copy.copy(mdl) makes another"
        )
    return handle  # type: ignore[return-value]


def closed(method: str) -> ResourceNotFound:
    """The exception for a closed ``Mdl``."""
    return ResourceNotFound(method, "this Mdl is closed")


def arrays(method: str) -> ModuleType:
    """The module of arrays, which needs NumPy."""
    try:
        imports.needed(method, "numpy")
        return imports.needed(method, "vmm_linux.shared_array")
    except ImportError as problem:
        raise Unimplemented(
            method, "NumPy is not installed: pip install 'vmm-linux[numpy]'"
        ) from problem


def names(method: str) -> ModuleType:
    """The module of names, which is loaded when it is first used."""
    return imports.needed(method, "vmm_linux.names")


def _reduce(mdl: Mdl) -> tuple[Any, ...]:
    """An Mdl on its way through ``multiprocessing``."""
    return _pickling.reduced(mdl, _packed, mdl)


def _packed(mdl: Mdl) -> tuple[Any, ...]:
    """An Mdl in a form that ``multiprocessing`` can pickle."""
    return _received, _pickling.pack(mdl.vmm, mdl.handle)


def received_mdl(sent: _pickling.Sent, inode: int) -> Mdl:
    """The Mdl of a pickle, in the default VMM."""
    vmm = default_vmm()
    return Mdl._made(vmm, _pickling.unpack, vmm, sent, inode)  # noqa: SLF001


def _received(sent: _pickling.Sent, inode: int) -> Any:  # noqa: ANN401
    """The Mdl of a pickle, or what stands in for it."""
    return _pickling.delivered(received_mdl, sent, inode)
