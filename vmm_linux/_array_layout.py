"""Where the elements of an array are in memory, and checks of what callers say of that."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from vmm_linux._core import kernel
from vmm_linux._core.values import describe, index, is_a, one_line
from vmm_linux.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PAGE = kernel.page_size()


class Layout:
    """Where the elements of an array are in a buffer."""

    __slots__ = ("kind", "offset", "shape", "strides")

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: np.dtype[Any],
        offset: int,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.shape = shape
        self.kind = kind
        self.offset = offset
        self.strides = strides

    def extent(self) -> tuple[int, int]:
        """The first byte, and the one after the last."""
        low = high = self.offset
        if 0 in self.shape:
            return low, high
        strides = self.strides or packed_strides(
            self.shape, self.kind, range(len(self.shape))[::-1]
        )
        for length, stride in zip(self.shape, strides, strict=True):
            reach = (length - 1) * stride
            low += min(reach, 0)
            high += max(reach, 0)
        return low, high + self.kind.itemsize


def pages_of(layout: Layout, nbytes: int) -> tuple[int, int]:
    """Offset and size of the pages that an array in a buffer of this length needs: at least one."""
    low, high = layout.extent()
    first = min(low, nbytes - 1) // PAGE * PAGE
    return first, -(-max(high, first + 1) // PAGE) * PAGE - first


def axes_of(array: np.ndarray[Any, Any]) -> list[int]:
    """The axes of an array, from the one whose elements are nearest to each other."""
    if array.flags.forc:  # also where the stride of a length of 1 says something else
        return list(range(array.ndim))[:: -1 if array.flags.c_contiguous else 1]
    nearest = sorted((abs(stride), -axis) for axis, stride in enumerate(array.strides))
    return [-axis for _, axis in nearest]


def packed_strides(
    shape: tuple[int, ...], kind: np.dtype[Any], axes: Sequence[int]
) -> tuple[int, ...]:
    """The strides of an array without gaps, the first of the axes innermost."""
    strides = [0] * len(shape)
    step = kind.itemsize
    for axis in axes:
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def as_array(method: str, value: object) -> np.ndarray[Any, Any]:
    """What NumPy makes of a value, an ordinary array."""
    masked: Any = getattr(sys.modules.get("numpy.ma"), "MaskedArray", None)
    if masked is not None and is_a(value, masked):
        raise InvalidArgument(method, "a masked array: share its data and its mask, two arrays")
    try:
        array: np.ndarray[Any, Any] = np.asarray(value)
    except MemoryError:
        raise
    except Exception as problem:  # what NumPy asks of it may raise anything
        raise InvalidArgument(
            method, f"{describe(value)}, of which NumPy makes no array: {one_line(str(problem))}"
        ) from problem
    return array.view(np.ndarray)


# ---- checks -------------------------------------------------------------------------------------


def checked_layout(shape: object, kind: object, offset: object, strides: object) -> Layout:
    """The layout that a pickle says, which NumPy alone would believe.

    NumPy takes a length of -1 for as many elements as fit, and then does not look at the strides;
    and it takes elements that are pointers from any memory.
    """
    lengths = checked_shape("unpickle", shape)
    steps = tuple(index("unpickle", "strides", step) for step in items_of(strides))
    if len(steps) != len(lengths):
        raise InvalidArgument("unpickle", f"shape {shown(lengths)} with {len(steps)} strides")
    start = index("unpickle", "offset", offset)
    return Layout(lengths, checked_dtype("unpickle", kind), start, steps)


def checked_dtype(method: str, dtype: object) -> np.dtype[Any]:
    """A dtype whose elements are bytes in memory, and at least one."""
    try:
        kind: np.dtype[Any] = np.dtype(dtype)  # type: ignore[call-overload]
    except MemoryError:
        raise
    except Exception as problem:  # what NumPy asks of it may raise anything
        raise InvalidArgument(
            method, f"dtype is {describe(dtype)}, of which NumPy makes no dtype"
        ) from problem
    if kind.hasobject:
        raise InvalidArgument(
            method, f"dtype {kind} has Python objects: pointers mean nothing in another process"
        )
    if kind.itemsize == 0:
        raise InvalidArgument(method, f"dtype {kind} has elements of no bytes; give their size")
    return kind


def checked_shape(method: str, shape: object) -> tuple[int, ...]:
    """The lengths of an array."""
    lengths = tuple(index(method, "shape", length) for length in items_of(shape))
    for length in lengths:
        if length < 0:
            raise InvalidArgument(method, f"shape {shown(lengths)}: no length is negative")
    return lengths


def items_of(shape: object) -> Iterable[object]:
    """The lengths in a shape, which may be a single length; methods of subclasses do not run."""
    if is_a(shape, tuple):
        return tuple.__iter__(shape)
    return list.__iter__(shape) if is_a(shape, list) else (shape,)


def shown(lengths: tuple[int, ...]) -> str:
    """A shape in a message."""
    return one_line(str(lengths))
