"""``Region``: one region of memory as an object with a length and a buffer."""

from __future__ import annotations

from vmm_linux import _span
from vmm_linux._core.endpoint import Exporter, held
from vmm_linux._core.typed import final
from vmm_linux.errors import Busy, InvalidOperation, ResourceNotFound, VmmError, refuse_copies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self, SupportsIndex

    from typing_extensions import Buffer

    from vmm_linux._core.endpoint import VMM, PageInfo

__all__ = ["Region"]

NOT_FREED = (VmmError, MemoryError)
"""The errors of a ``VMM.free`` that has done nothing."""


@final
class Region(Exporter, _span.ByteAccess):
    """A region of memory, freed when this object is dropped or its ``with`` is left.

    Leaving the ``with`` while something made of the region is alive is BUSY, as ``free`` is;
    dropping the object is not.

    ``VMM.region`` and ``Mdl.map`` make them. Offsets count in bytes from ``base``; they and sizes
    are page multiples where those of the ``VMM`` method of that name are. The errors are that
    method's, and INVALID_ARGUMENT for a part outside the region, RESOURCE_NOT_FOUND once it is
    freed. Free it here, not with ``VMM.free``, which this object does not notice.

    Bytes are copied as those of a file: ``read(size, offset)``, ``write(data, offset)``; and as
    those of a ``bytearray``: ``region[a:b]``, ``region[a:b] = data``. Methods for pages take
    ``(offset, size)``, as those of ``VMM`` take the address first.

    A buffer of bytes: ``memoryview(region)``, ``numpy.asarray(region)``. It is read-only unless
    every page is writable, pins the pages, and keeps the region from being freed until everything
    made of it is gone. ``numpy.ndarray(buffer=region)`` does not say when it is gone: its pages are
    pinned until this object is dropped too. All pages must be committed. In a forked child a
    private region is a copy, and dropping it frees the child's alone.
    """

    __slots__ = ("__weakref__", "_base", "_sizes", "_vmm")

    __reduce__ = refuse_copies(
        "each owns memory of this process; send the Mdl and map it there, or copy the bytes"
    )

    def __init__(self, vmm: VMM, base: int, size: int) -> None:
        """Own a region that ``vmm`` made.

        Args:
            vmm: the VMM that made it.
            base: the address of its first byte.
            size: its whole size in bytes.

        Errors:
            INVALID_OPERATION: this object owns a region already.
        """
        if hasattr(self, "_sizes"):
            raise InvalidOperation("Region", "a Region does not change; make another one")
        self._vmm = vmm
        self._base = base
        # One size or none: the thread that takes it out, in one step, frees.
        self._sizes = [size]

    @classmethod
    def _made(cls, vmm: VMM, size: int, make: Callable[..., int], *arguments: object) -> Self:
        """A region that a method of ``vmm`` makes, of this size.

        The object exists before the region, which so has an owner from the start: no shortage of
        memory can come between them.
        """
        region = cls(vmm, 0, size)
        sizes, region._sizes = region._sizes, []
        region._base = make(*arguments)
        region._sizes = sizes
        return region

    @property
    def vmm(self) -> VMM:
        """The VMM that the region belongs to."""
        return self._vmm

    @property
    def base(self) -> int:
        """The address of the first byte."""
        return self._base

    @property
    def size(self) -> int:
        """Bytes; 0 when freed."""
        sizes = self._sizes[:]
        return sizes[0] if sizes and not self._vmm.closed else 0

    @property
    def freed(self) -> bool:
        """Whether it was freed, here or with its VMM."""
        return self.size == 0

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"<Region at 0x{self._base:x}, {self._described()}>"

    def _described(self) -> str:
        """Size, state and protection in words."""
        size = self.size
        if size == 0:
            return "freed"
        try:
            first = self._vmm.query(self._base, smaps=False)
        except VmmError as problem:
            return f"{size} bytes, {problem}"
        alike = "" if first.run_end >= self._base + size else " at first"
        return f"{size} bytes: {first.state.name}, {first.protection.name or 'no access'}{alike}"

    def __enter__(self) -> Self:
        self._inside("__enter__", 0, None)
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.freed:
            self.free()

    def __del__(self) -> None:
        # No caller could catch an error: the region is freed with its VMM. At interpreter exit
        # this module may lack its names.
        try:
            try:
                self._end()
            except MemoryError:  # a moment later there may be some
                self._end()
        except Exception:  # noqa: BLE001, S110
            pass

    def _end(self) -> None:
        """Free what is left, as the object ends."""
        if self.freed:
            return
        if self._kept is None:
            self.free()
        else:  # another object frees it, after the pin that ends with this one
            heir = Region(self._vmm, self._base, self._sizes.pop())
            self._kept = held(heir, self._kept)

    def _inside(self, method: str, offset: object, size: object) -> tuple[int, int]:
        """The address and the size of a part; ``size`` None: all from the offset on."""
        whole = self.size
        if whole == 0:
            raise ResourceNotFound(method, "this region was freed")
        start, length = _span.inside(method, offset, size, whole, "region")
        return self._base + start, length

    def _length(self, method: str) -> int:
        return self._inside(method, 0, None)[1]

    def _take(self, method: Callable[..., None], *arguments: SupportsIndex) -> None:
        """Call a method of the VMM that takes something away from pages."""
        try:
            method(*arguments)
        except Busy as problem:
            if self._kept is None:
                raise
            raise Busy(
                problem.method,
                "numpy.ndarray(buffer=...) holds this region, and does not say for how long: drop "
                "the region object and what was made of it, which gives the memory back; "
                "memoryview(region) or numpy.asarray(region) holds it no longer than is needed",
            ) from problem

    def commit(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> None:
        """Make reserved pages usable. See ``VMM.commit``.

        Args:
            offset: of the first page, bytes.
            size: bytes, or None for all from there on.
        """
        self._vmm.commit(*self._inside("commit", offset, size))

    def decommit(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> None:
        """Give the memory of pages back; the addresses stay reserved. See ``VMM.decommit``.

        Args:
            offset: of the first page, bytes.
            size: bytes, or None for all from there on.
        """
        self._take(self._vmm.decommit, *self._inside("decommit", offset, size))

    def protect(
        self, flags: SupportsIndex, offset: SupportsIndex = 0, size: SupportsIndex | None = None
    ) -> None:
        """Change the protection of pages. See ``VMM.protect``.

        Args:
            flags: ``VmmFlags``: the protection.
            offset: of the first page, bytes.
            size: bytes, or None for all from there on.
        """
        self._take(self._vmm.protect, *self._inside("protect", offset, size), flags)

    def query(self, offset: SupportsIndex = 0, smaps: bool = True) -> PageInfo:
        """Describe the page at an offset. See ``VMM.query``.

        Args:
            offset: of any byte.
            smaps: whether to read the whole record of the mapping.
        """
        return self._vmm.query(self._inside("query", offset, None)[0], smaps)

    def view(
        self,
        offset: SupportsIndex = 0,
        size: SupportsIndex | None = None,
        writable: bool | None = None,
    ) -> memoryview:
        """View committed memory itself. See ``VMM.view``.

        Args:
            offset: of the first byte.
            size: bytes, or None for all from there on.
            writable: True, False, or None for writable where every page is.

        Returns:
            A memoryview, which also keeps the region from being freed.
        """
        return held(self, self._vmm.view(*self._inside("view", offset, size), writable))

    def read(self, size: SupportsIndex | None = None, offset: SupportsIndex = 0) -> bytes:
        """Copy bytes out, with the kernel's checks. See ``VMM.read``.

        Args:
            size: bytes, or None for all from the offset on.
            offset: of the first byte.
        """
        return self._vmm.read(*self._inside("read", offset, _span.read_size(size)))

    def write(self, data: Buffer, offset: SupportsIndex = 0) -> int:
        """Copy bytes in, with the kernel's checks. See ``VMM.write``.

        Args:
            data: a contiguous buffer of at least one byte that fits into the region.
            offset: of the first byte.

        Returns:
            The number of bytes written, all of them.
        """
        return self._vmm.write(self._inside("write", offset, None)[0], data)

    def free(self, offset: SupportsIndex = 0) -> None:
        """Give addresses and memory back: all, or all from an offset on.

        The part before the offset stays, and is the region from then on. Pages at the start or in
        the middle cannot be freed here: ``VMM.free`` does it for regions without an object.

        Args:
            offset: of the first page to free, in bytes.

        Errors:
            As ``VMM.free``: BUSY while something holds the memory, and from the first
            ``numpy.ndarray(buffer=region)`` on: dropping this object frees it then.
        """
        self._inside("free", 0, None)
        # Before the call: neither an interrupt nor another thread may make this object free the
        # addresses again, when they belong to another region.
        try:
            size = self._sizes.pop()
        except IndexError:
            raise ResourceNotFound("free", "this region was freed") from None
        kept = size
        try:
            start, length = _span.inside("free", offset, None, size, "region")
            base = self._base + start
            kept = start
            self._take(self._vmm.free, base, length)
        except NOT_FREED:
            kept = size
            raise
        finally:
            if kept:
                self._sizes.append(kept)

    def _pinned(self) -> memoryview:
        return self._vmm.view(*self._inside("view", 0, None))
