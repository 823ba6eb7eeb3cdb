"""Parts of a region or a buffer: checks of offset and size, and bytes by index and slice."""

from __future__ import annotations

from vmm_linux._core import imports, kernel
from vmm_linux._core.endpoint import held
from vmm_linux._core.typed import overload
from vmm_linux._core.values import describe, index, is_a
from vmm_linux.errors import InvalidArgument, OutOfRange, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, SupportsIndex

    import numpy as np
    from typing_extensions import Buffer

    from vmm_linux._core.typed import DtypeOf, Scalar

PAGE = kernel.page_size()
PIECE = 1 << 20
"""The most bytes of one copy that is not itself the result."""


def inside(method: str, offset: object, size: object, whole: int, name: str) -> tuple[int, int]:
    """The checked offset and size, at least one byte, of a part of a region or buffer in bytes.

    Size None is all from the offset on; ``whole`` is the size of all, called ``name``.

    Errors:
        INVALID_ARGUMENT: no integers, or not inside.
    """
    start = index(method, "offset", offset)
    if not 0 <= start < whole:
        raise InvalidArgument(method, f"offset {start} is not inside the {name} of {whole} bytes")
    length = whole - start if size is None else index(method, "size", size)
    if not 0 < length <= whole - start:
        raise InvalidArgument(
            method,
            f"size {length} at offset {start}: 1 to {whole - start} bytes of the {name} are there",
        )
    return start, length


def read_size(size: object) -> int | None:
    """The size that ``read`` was given.

    Errors:
        INVALID_ARGUMENT: no integer; or 0, as where offset and size are exchanged.
    """
    length = None if size is None else index("read", "size", size)
    if length == 0:
        raise InvalidArgument(
            "read", "size 0 is less than 1 byte: read(size, offset), the size comes first"
        )
    return length


class ByteAccess:
    """Bytes by index and slice, as of ``bytearray``, for a class with ``read`` and ``write``.

    The length does not change. Each copy has the kernel's checks, as ``read`` and ``write`` have.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        def read(self, size: int, offset: int) -> bytes:
            """Copy bytes out: at least one."""

        def write(self, data: Buffer, offset: int) -> int:
            """Copy bytes in: at least one."""

    def _length(self, method: str) -> int:
        """The number of bytes; the error is that of ``method`` where there are none any more."""
        raise NotImplementedError

    @overload
    def __getitem__(self, key: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> bytes: ...
    def __getitem__(self, key: SupportsIndex | slice, /) -> int | bytes:
        """Copy one byte out, or those of a slice.

        Args:
            key: an index, or a slice with any step; negative ones count from the end.

        Returns:
            An int of 0 to 255; of a slice, bytes.

        Errors:
            INVALID_ARGUMENT: no integer; an index outside, which is an ``IndexError`` too.
            Others as of ``read``.
        """
        length = self._length("__getitem__")
        if not is_a(key, slice):
            return self.read(1, position("__getitem__", key, length))[0]
        span, forward = positions("__getitem__", key, length)
        if not span:
            return b""
        if span.step == 1:
            data = self.read(len(span), span.start)
        else:
            data = b"".join(
                self.read(part[-1] - part[0] + 1, part[0])[:: span.step] for part in pieces(span)
            )
        return data if forward else data[::-1]

    @overload
    def __setitem__(self, key: SupportsIndex, value: SupportsIndex, /) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Buffer, /) -> None: ...
    def __setitem__(self, key: SupportsIndex | slice, value: SupportsIndex | Buffer, /) -> None:
        """Copy one byte in, or those of a slice.

        Bytes between those of a slice with a step are not written, also not as they are.

        Args:
            key: an index, or a slice with any step; negative ones count from the end.
            value: an int of 0 to 255; for a slice, a contiguous buffer of just as many bytes.

        Errors:
            INVALID_ARGUMENT: no integer; no byte; an index outside, which is an ``IndexError`` too;
                no contiguous buffer, or one of another length than the slice.
            Others as of ``write``. Steps of more than one byte are written one by one, and
            ``completed`` is how many were.
        """
        method = "__setitem__"
        length = self._length(method)
        if not is_a(key, slice):
            place = position(method, key, length)
            self.write(one_byte(method, value), place)
            return
        span, forward = positions(method, key, length)
        with bytes_of(method, "value", value) as data:
            if len(data) != len(span):
                raise InvalidArgument(
                    method,
                    f"{len(data)} bytes for a slice of {len(span)}: the length does not change",
                )
            if span:
                self._spread(data if forward else data.tobytes()[::-1], span)

    def _spread(self, data: bytes | memoryview, span: range) -> None:
        """Write bytes to ascending places, and nothing in between."""
        if span.step == 1:
            self.write(data, span.start)
            return
        for done, place in enumerate(span):
            try:
                self.write(data[done : done + 1], place)
            except VmmError as problem:
                problem.completed = done
                raise

    def readinto(self, buffer: Buffer, offset: SupportsIndex = 0) -> int:
        """Fill a buffer with bytes, with the kernel's checks, at most 1 MiB a copy.

        Args:
            buffer: writable and contiguous. What is there fills its beginning, if it is longer.
            offset: of the first byte.

        Returns:
            The number of bytes that were copied.

        Errors:
            INVALID_ARGUMENT: an offset outside; no such buffer.
            Others as of ``read``; ``completed`` is the number of bytes that were copied.
        """
        start, there = inside("readinto", offset, None, self._length("readinto"), "memory")
        with bytes_of("readinto", "buffer", buffer) as room:
            if room.readonly:
                raise InvalidArgument("readinto", f"buffer is {describe(buffer)}, not writable")
            end = min(len(room), there)
            for done in range(0, end, PIECE):
                size = min(PIECE, end - done)
                try:
                    room[done : done + size] = self.read(size, start + done)
                except VmmError as problem:
                    problem.completed = done
                    raise
        return end

    @overload
    def __array__(
        self, dtype: None = None, copy: bool | None = None
    ) -> np.ndarray[Any, np.dtype[np.uint8]]: ...
    @overload
    def __array__(
        self, dtype: DtypeOf[Scalar], copy: bool | None = None
    ) -> np.ndarray[Any, np.dtype[Scalar]]: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """Raise the error of a missing buffer, which NumPy hides before it calls this."""
        numpy: Any = imports.needed("__array__", "numpy")
        view = memoryview(self)  # type: ignore[arg-type]
        return numpy.array(view, dtype) if copy else numpy.asarray(view, dtype)


def position(method: str, key: object, length: int) -> int:
    """The place that an index names."""
    place = index(method, "index", key, "an integer or a slice")
    if not -length <= place < length:
        raise OutOfRange(method, f"index {place} is outside, there are {length} bytes")
    return place % length


def positions(method: str, key: slice, length: int) -> tuple[range, bool]:
    """The places that a slice names, ascending, and whether that is their order in the slice."""
    start, stop, step = (
        None if part is None else index(method, name, part)
        for name, part in (("start", key.start), ("stop", key.stop), ("step", key.step))
    )
    if step == 0:
        raise InvalidArgument(method, "a slice's step cannot be 0")
    span = range(length)[start:stop:step]
    return (span, True) if span.step > 0 else (span[::-1], False)


def pieces(span: range) -> Iterator[range]:
    """Ascending places in parts, each to be copied with what is in between.

    A part has a place in every page that it reaches over: others need not be readable.
    """
    count = PIECE // span.step if span.step <= PAGE else 1
    return (span[first : first + count] for first in range(0, len(span), count))


def one_byte(method: str, value: object) -> bytes:
    """The byte of this number."""
    number = index(method, "value", value)
    if not 0 <= number <= 255:
        raise InvalidArgument(method, f"value {number} is no byte: 0 to 255 are")
    return bytes((number,))


def bytes_of(method: str, name: str, buffer: Any) -> memoryview:  # noqa: ANN401
    """The bytes of a caller's buffer, whatever its items are."""
    try:
        return held(None, buffer)
    except MemoryError:
        raise
    except Exception as problem:  # a class's own buffer may raise anything
        raise InvalidArgument(
            method, f"{name} is {describe(buffer)}, not a contiguous buffer"
        ) from problem
