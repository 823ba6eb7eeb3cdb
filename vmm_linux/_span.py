"""Checks of an offset and a size inside a region or a buffer."""

from __future__ import annotations

from vmm_linux._core.values import index
from vmm_linux.errors import InvalidArgument


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
