"""``Mdl``: a handle of an MDL buffer as an object."""

from __future__ import annotations

import sys

from vmm_linux import _arrays, _pickling, _span
from vmm_linux._core.endpoint import VMM
from vmm_linux._core.kernel import Descriptor
from vmm_linux._core.typed import final, overload
from vmm_linux._core.values import describe, is_a
from vmm_linux._default_vmm import default_vmm
from vmm_linux.errors import InvalidArgument, InvalidOperation, NoCapability, VmmError
from vmm_linux.flags import Rights, Seal, VmmFlags
from vmm_linux.region import Region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Literal, Self, SupportsIndex

    import numpy as np
    from typing_extensions import Buffer

    from vmm_linux._core.typed import DtypeOf, Scalar
    from vmm_linux.handles import Handle

__all__ = ["Mdl"]


@final
class Mdl:
    """An MDL buffer: memory without a name, shared by the owners of its handles.

    ``VMM.mdl`` makes one; ``from_bytes``, ``from_fd`` and unpickling too, in the default VMM if
    none is given. Dropping the object, or leaving its ``with``, closes its handle; mappings,
    arrays, clones, and other processes' handles and mappings, live on.

    ``multiprocessing`` carries it unchanged: as an argument of a ``Process``, through a ``Queue``,
    a ``Pipe``, a pool. The other side gets an ``Mdl`` with the same rights. The memory is not
    copied and has no name that could be left behind. ``Queue.put`` pickles later, in a thread: a
    buffer that is closed before that arrives as an error that ``get`` raises.

    The errors are those of the ``VMM``'s method named with each; on a closed ``Mdl`` they are
    RESOURCE_NOT_FOUND.
    """

    __slots__ = ("__weakref__", "_closed", "_descriptor", "_handle", "_vmm")

    __reduce__ = _pickling.REFUSAL

    def __init__(self, vmm: VMM, handle: Handle) -> None:
        """Own a handle.

        Args:
            vmm: the VMM of the handle.
            handle: closed with this object.

        Errors:
            INVALID_OPERATION: this object owns a handle already.
        """
        if hasattr(self, "_handle"):
            raise InvalidOperation("Mdl", "an Mdl does not change; make another one")
        self._begin(vmm)
        self._handle = handle
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
            An ``Mdl``, whose size is the data's rounded up to pages.

        Errors:
            As of ``VMM.mdl_create_from_buf``.
        """
        vmm = given_or_default("mdl_create_from_buf", vmm)
        return cls._made(vmm, vmm.mdl_create_from_buf, data, prot)

    @classmethod
    def from_fd(
        cls,
        fd: SupportsIndex,
        require: SupportsIndex = 0,
        max_size: SupportsIndex | None = None,
        *,
        vmm: VMM | None = None,
    ) -> Self:
        """Make a buffer of a foreign descriptor, without trust in it.

        Args:
            fd: descriptor of a memfd, as ``fileno`` gives; it stays the caller's.
            require: ``Seal`` that the memory must have.
            max_size: bytes that the buffer may have at most, or None.
            vmm: that it is to belong to; None for the default one.

        Errors:
            As of ``VMM.handle_from_fd``.
        """
        vmm = given_or_default("handle_from_fd", vmm)
        return cls._made(vmm, vmm.handle_from_fd, fd, require, max_size)

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
        """The size of the buffer in bytes (``VMM.mdl_get_size``)."""
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

    def __len__(self) -> int:
        return self.size

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        try:
            info = self._vmm.handle_info(self._handle)
        except VmmError as problem:
            return f"<Mdl, {'closed' if self.closed else problem.message}>"
        seals = f", sealed {info.seals.name}" if info.seals else ""
        return f"<Mdl of {info.size} bytes: {info.rights.name or 'no rights'}{seals}>"

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
        if prot is not None:
            return self._mapped(start, size, hint, prot)
        most = self._most()
        try:
            return self._mapped(start, size, hint, most)
        except NoCapability:
            # A seal that the whole buffer does not report: of some segments, or put on just now.
            if VmmFlags.WRITE not in most:
                raise
            return self._mapped(start, size, hint, VmmFlags.READ)

    def _mapped(self, offset: int, size: int, hint: SupportsIndex, prot: SupportsIndex) -> Region:
        """Map a part that is inside the buffer."""
        vmm, handle = self._vmm, self._handle
        return Region._made(vmm, size, vmm.mdl_map, handle, offset, size, hint, prot)  # noqa: SLF001

    def _most(self) -> VmmFlags:
        """READ, and WRITE where the handle and the seals allow it."""
        info = self._vmm.handle_info(self._handle)
        if Rights.MAP_WRITE in info.rights and not info.seals:
            return VmmFlags.READ | VmmFlags.WRITE
        return VmmFlags.READ

    @overload
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: Literal["float64"] | None = "float64",
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> np.ndarray[Any, np.dtype[np.float64]]: ...
    @overload
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DtypeOf[Scalar],
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> np.ndarray[Any, np.dtype[Scalar]]: ...
    @overload
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: Any,  # noqa: ANN401  whatever numpy.dtype takes
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> np.ndarray[Any, np.dtype[Any]]: ...
    def array(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: Any = "float64",
        offset: SupportsIndex = 0,
        writable: bool | None = None,
    ) -> np.ndarray[Any, Any]:
        """A NumPy array over the buffer, without a copy.

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
        return _arrays.array(self, shape, dtype, offset, writable)

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
            BUSY: while anything can still write; drop writable regions and arrays first.
        """
        self._vmm.mdl_seal(self._handle, Seal.FREEZE)

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
        except MemoryError:  # nothing happened
            self._closed = False
            raise
        finally:
            if self.closed:
                self._descriptor.clear()

    def __enter__(self) -> Self:
        self._vmm.mdl_get_size(self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # No caller could catch an error. At interpreter exit this module may lack its names.
        try:  # noqa: SIM105
            self.close()
        except Exception:  # noqa: BLE001, S110
            pass

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> Any:  # noqa: ANN401
        if _pickling.is_multiprocessing(sys._getframe(1)):  # noqa: SLF001
            return _reduce(self)
        return self.__reduce__()


def given_or_default(method: str, vmm: VMM | None) -> VMM:
    """The caller's VMM, or the default one."""
    if vmm is None:
        return default_vmm()
    if not is_a(vmm, VMM):
        raise InvalidArgument(method, f"vmm is {describe(vmm)}, not a VMM or None")
    return vmm


def _reduce(mdl: Mdl) -> tuple[Any, ...]:
    """An Mdl on its way through ``multiprocessing``."""
    return _pickling.reduced(mdl, lambda: (_received, _pickling.pack(mdl.vmm, mdl.handle)))


def _received(sent: _pickling.Sent, inode: int) -> Any:  # noqa: ANN401
    """The Mdl of a pickle."""

    def load() -> Mdl:
        vmm, handle = _pickling.unpack(sent, inode)
        try:
            return Mdl(vmm, handle)
        except BaseException:
            vmm.handle_close(handle)
            raise

    return _pickling.delivered(load)
