"""NumPy arrays over MDL buffers. NumPy is imported here, for the first array."""

from __future__ import annotations

from vmm_linux._core import imports, kernel
from vmm_linux._core.values import counted, describe, index, is_a, one_line
from vmm_linux.errors import InvalidArgument, Unimplemented
from vmm_linux.flags import VmmFlags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType
    from typing import Any, Protocol

    import numpy as np

    from vmm_linux.region import Region

    class Mappable(Protocol):
        """An MDL buffer, of which parts can be mapped."""

        @property
        def size(self) -> int:
            """Its bytes."""

        def map(self, prot: int | None, offset: int, length: int) -> Region:
            """Map whole pages of it."""


PAGE = kernel.page_size()


def array(
    buffer: Mappable, shape: object, dtype: object, offset: object, writable: object
) -> np.ndarray[Any, Any]:
    """An array over a part of a buffer (see ``Mdl.array``)."""
    numpy = loaded()
    kind = checked_dtype(numpy, dtype)
    lengths = checked_shape(shape)
    start = index("array", "offset", offset)
    size = kind.itemsize
    for length in lengths:
        size *= length
    whole = buffer.size
    if not 0 <= start <= whole or size > whole - start:
        part = f"shape {shown(lengths)} of {counted(kind.itemsize, 'byte')} each at offset {start}"
        raise InvalidArgument("array", f"{part} is not inside the buffer of {whole} bytes")
    if start % kind.alignment:
        raise InvalidArgument(
            "array", f"offset {start} is not a multiple of {kind}'s alignment, {kind.alignment}"
        )
    prot = protection(writable)
    first = start - start % PAGE
    region = buffer.map(prot, first, -(-(start + size) // PAGE) * PAGE - first)
    try:
        made: np.ndarray[Any, Any] = numpy.ndarray(lengths, kind, region.view(), start - first)
    except ValueError as problem:  # more dimensions than this NumPy has
        raise InvalidArgument("array", f"shape {shown(lengths)}: {problem}") from problem
    return made


def loaded() -> ModuleType:
    """NumPy, if it is installed."""
    try:
        return imports.needed("array", "numpy")
    except ImportError as problem:
        raise Unimplemented(
            "array", "NumPy is not installed: pip install 'vmm-linux[numpy]'"
        ) from problem


def checked_dtype(numpy: ModuleType, dtype: object) -> np.dtype[Any]:
    """A dtype whose elements are bytes in memory, and at least one."""
    try:
        kind: np.dtype[Any] = numpy.dtype(dtype)
    except MemoryError:
        raise
    except Exception as problem:  # what NumPy asks of it may raise anything
        raise InvalidArgument(
            "array", f"dtype is {describe(dtype)}, of which NumPy makes no dtype"
        ) from problem
    if kind.hasobject:
        raise InvalidArgument(
            "array", f"dtype {kind} has Python objects: pointers mean nothing in another process"
        )
    if kind.itemsize == 0:
        raise InvalidArgument("array", f"dtype {kind} has elements of no bytes; give their size")
    return kind


def checked_shape(shape: object) -> tuple[int, ...]:
    """The lengths of an array of at least one element."""
    lengths = tuple(index("array", "shape", length) for length in items_of(shape))
    for length in lengths:
        if length < 1:
            raise InvalidArgument("array", f"shape {shown(lengths)}: each length is at least 1")
    return lengths


def items_of(shape: object) -> Iterable[object]:
    """The lengths in a shape, which may be a single length; methods of subclasses do not run."""
    if is_a(shape, tuple):
        return tuple.__iter__(shape)
    return list.__iter__(shape) if is_a(shape, list) else (shape,)


def shown(lengths: tuple[int, ...]) -> str:
    """A shape in a message."""
    return one_line(str(lengths))


def protection(writable: object) -> VmmFlags | None:
    """The protection of a mapping; ``writable`` None: writable where that is possible."""
    if writable is None:
        return None
    if not is_a(writable, bool):
        raise InvalidArgument("array", f"writable is {describe(writable)}, not True, False or None")
    return VmmFlags.READ | VmmFlags.WRITE if writable else VmmFlags.READ
