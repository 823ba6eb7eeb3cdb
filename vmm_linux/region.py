"""``Region``: one region of memory as an object with a length, a buffer and an end."""

from __future__ import annotations

from vmm_linux import _span
from vmm_linux._core import imports
from vmm_linux._core.endpoint import Exporter, held
from vmm_linux._core.typed import final
from vmm_linux.errors import InvalidOperation, ResourceNotFound, VmmError, refuse_copies

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self, SupportsIndex

    from typing_extensions import Buffer

    from vmm_linux._core.endpoint import VMM, PageInfo

__all__ = ["Region"]

NOT_FREED = (VmmError, MemoryError)
"""What ``VMM.free`` raises when it has done nothing."""


@final
class Region(Exporter):
    """A region of memory, which is freed when this object is dropped or its ``with`` is left.

    Leaving it while something made of it is alive is BUSY, as ``free`` is; dropping it is not.

    ``VMM.region`` and ``Mdl.map`` make them. Offsets count in bytes from ``base``; they and sizes
    are page multiples where those of the ``VMM`` method of that name are. The errors are that
    method's, and INVALID_ARGUMENT for what is not inside the region, RESOURCE_NOT_FOUND once it is
    freed. Free it here, not with ``VMM.free``, which this object does not hear of.

    A buffer of bytes: ``memoryview(region)``, ``numpy.asarray(region)``. It is read-only unless
    every page is writable, pins the pages, and keeps the region from being freed until everything
    made of it is gone (``numpy.ndarray(buffer=...)``, which keeps the object alone, is to be given
    a memoryview of it). All pages must be committed. In a forked child a private region is a copy,
    and dropping it frees the child's alone.
    """

    __slots__ = ("__weakref__", "_base", "_sizes", "_vmm")

    __reduce__ = refuse_copies(
        "each owns memory of this process; send the Mdl and map it there, or copy the bytes"
    )

    def __init__(self, vmm: VMM, base: int, size: int) -> None:
        """Take charge of a region that ``vmm`` made.

        Args:
            vmm: its maker.
            base: address of its first byte.
            size: its bytes, all of them.

        Errors:
            INVALID_OPERATION: this object has charge of a region already.
        """
        if hasattr(self, "_sizes"):
            raise InvalidOperation("Region", "a Region does not change; make another one")
        self._vmm = vmm
        self._base = base
        # One size or none: who takes it out, which is one step, is the only one to free.
        self._sizes = [size]

    @classmethod
    def _made(cls, vmm: VMM, size: int, make: Callable[..., int], *arguments: object) -> Self:
        """A region that a method of ``vmm`` makes, of this size.

        The object is there before the region, so that this has an owner from birth: no shortage
        of memory can come in between.
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
        # Nobody is there to be told: what cannot be freed now goes with its VMM. At the
        # interpreter's end this module may have lost its names already.
        try:
            if not self.freed:
                self.free()
        except Exception:  # noqa: BLE001, S110
            pass

    def _inside(self, method: str, offset: object, size: object) -> tuple[int, int]:
        """The address and the size of a part; ``size`` None: all from the offset on."""
        whole = self.size
        if whole == 0:
            raise ResourceNotFound(method, "this region was freed")
        start, length = _span.inside(method, offset, size, whole, "region")
        return self._base + start, length

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
        self._vmm.decommit(*self._inside("decommit", offset, size))

    def protect(
        self, flags: SupportsIndex, offset: SupportsIndex = 0, size: SupportsIndex | None = None
    ) -> None:
        """Change the protection of pages. See ``VMM.protect``.

        Args:
            flags: ``VmmFlags``: the protection.
            offset: of the first page, bytes.
            size: bytes, or None for all from there on.
        """
        self._vmm.protect(*self._inside("protect", offset, size), flags)

    def query(self, offset: SupportsIndex = 0, smaps: bool = True) -> PageInfo:
        """Tell about the page at an offset. See ``VMM.query``.

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
        """Look at committed memory as it is. See ``VMM.view``.

        Args:
            offset: of the first byte.
            size: bytes, or None for all from there on.
            writable: True, False, or None for writable where every page is.

        Returns:
            A memoryview, which keeps the region from being freed too.
        """
        return held(self, self._vmm.view(*self._inside("view", offset, size), writable))

    def read(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> bytes:
        """Copy bytes out, with the kernel's checks. See ``VMM.read``.

        Args:
            offset: of the first byte.
            size: bytes, or None for all from there on.
        """
        return self._vmm.read(*self._inside("read", offset, size))

    def write(self, data: Buffer, offset: SupportsIndex = 0) -> int:
        """Copy bytes in, with the kernel's checks. See ``VMM.write``.

        Args:
            data: a contiguous buffer, at least one byte and none beyond the region.
            offset: of the first byte.

        Returns:
            The number of bytes written, all of them.
        """
        return self._vmm.write(self._inside("write", offset, None)[0], data)

    def free(self, offset: SupportsIndex = 0) -> None:
        """Give addresses and memory back: all of them, or all from an offset on.

        What lies before the offset stays, and is the region from then on. Pages at the start or in
        the middle are no matter for one object: ``VMM.free`` does it for regions without one.

        Args:
            offset: of the first page that goes, bytes.

        Errors:
            As ``VMM.free``: BUSY while something holds the memory.
        """
        self._inside("free", 0, None)
        # Before the call: neither an interrupt nor another thread must have this object free the
        # addresses once more, when somebody else has them.
        try:
            size = self._sizes.pop()
        except IndexError:
            raise ResourceNotFound("free", "this region was freed") from None
        kept = size
        try:
            start, length = _span.inside("free", offset, None, size, "region")
            base = self._base + start
            kept = start
            self._vmm.free(base, length)
        except NOT_FREED:
            kept = size
            raise
        finally:
            if kept:
                self._sizes.append(kept)

    def _pinned(self) -> memoryview:
        return self._vmm.view(*self._inside("view", 0, None))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:  # noqa: ANN401
        """What NumPy asks for when it got no buffer, whose error it does not show: raises that."""
        np: Any = imports.needed("__array__", "numpy")
        view = memoryview(self)
        return np.array(view, dtype) if copy else np.asarray(view, dtype)
