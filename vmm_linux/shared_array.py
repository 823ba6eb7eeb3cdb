"""``SharedArray``: a NumPy array in memory that other processes can have too.

``import vmm_linux`` loads neither this module nor NumPy. The names here come from there when they
are asked for: ``vmm_linux.share``, ``vmm_linux.zeros``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from vmm_linux import _parts, _pickling
from vmm_linux._array_layout import (
    Layout,
    as_array,
    axes_of,
    checked_dtype,
    checked_layout,
    checked_shape,
    packed_strides,
    pages_of,
    shown,
)
from vmm_linux._core import kernel
from vmm_linux._core.endpoint import address_of
from vmm_linux._core.typed import final
from vmm_linux._core.values import counted, describe, index, is_a
from vmm_linux._default_vmm import given_or_default
from vmm_linux._mappings import shared_mapping
from vmm_linux._parts import SharedMdl
from vmm_linux.errors import InvalidArgument, InvalidOperation
from vmm_linux.flags import Rights, Seal, VmmFlags
from vmm_linux.mdl import Mdl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self, SupportsIndex

    from numpy.typing import ArrayLike, DTypeLike

    from vmm_linux._core.endpoint import VMM

    Shape = SupportsIndex | Sequence[SupportsIndex]

__all__ = ["SharedArray", "empty", "empty_like", "full", "share", "zeros", "zeros_like"]

Element = TypeVar("Element", bound=np.dtype[Any])

PAGE = kernel.page_size()
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE


@final
class SharedArray(np.ndarray[Any, Element], Generic[Element]):
    """A NumPy array over an MDL buffer, as ``numpy.memmap`` is one over a file.

    ``share``, ``empty``, ``zeros``, ``full`` and ``Mdl.array`` make them. A view of one (a slice, a
    transpose, a field) is a ``SharedArray`` of the same memory; what NumPy computes from one is an
    ordinary array. The memory stays as long as any array of it in any process, whatever is closed.
    Where NumPy is asked for copies of this very class, ``numpy.array(a, subok=True)``, they have
    memory of their own: ``mdl`` says so, and a pickle of one is an ordinary array.

    ``multiprocessing`` and ``concurrent.futures`` carry it without a copy, as an argument, through
    queues, pipes and pools: the other side gets the same memory, with shape, dtype, strides and
    rights. Where the array cannot be written, the other side cannot write the memory either. Each
    write is seen by all sides at once; nothing orders them. Every other pickler is refused with an
    error: ``pickle``, ``cloudpickle``, joblib's processes (its threads have the array as it is).

    ``copy.copy`` gives a view, ``copy.deepcopy`` an array of a buffer of its own.
    """

    __slots__ = ("_mapping", "_shared")

    # NumPy never makes the result of a calculation of this class.
    __array_priority__ = -100.0
    # What numpy.ma makes of the elements of its arrays, copies too.
    _baseclass = np.ndarray
    __reduce__ = _pickling.refusal(
        "Elsewhere send the buffer, array.mdl.send(sock), and make an array of it there: "
        "Mdl.recv(sock).array(shape, dtype)"
    )

    _shared: SharedMdl | None
    _mapping: tuple[int, int, int]
    """Of the pages that it lies in: their address, where they begin in the buffer, their size."""

    def __new__(
        cls,
        shape: Shape,
        dtype: DTypeLike = "float64",
        order: str = "C",
        *,
        vmm: VMM | None = None,
    ) -> Self:
        """Make an array of zeros, as ``zeros``."""
        return zeros(shape, dtype, order, vmm=vmm)

    def __array_finalize__(self, source: object) -> None:
        # Of a view the memory is the source's; a copy has memory of its own.
        self._shared = None
        if type(source) is SharedArray and source._shared is not None:
            address, _, size = source._mapping
            if 0 <= address_of(self) - address <= size:
                self._shared = source._shared
                self._mapping = source._mapping

    def __array_wrap__(
        self, array: Any, context: object = None, return_scalar: bool | None = None
    ) -> Any:
        if array is self:
            return self
        if return_scalar or (return_scalar is None and array.shape == ()):
            return array[()]
        return array.view(np.ndarray)

    def __array_function__(self, *arguments: Any) -> Any:
        return ordinary(super().__array_function__(*arguments))

    def __getitem__(self, index: Any) -> Any:
        return ordinary(super().__getitem__(index))

    @property
    def imag(self) -> Any:
        """The imaginary parts: of real numbers an ordinary array of zeros."""
        return ordinary(super().imag)

    @imag.setter
    def imag(self, value: Any) -> None:
        self.view(np.ndarray).imag = value

    @property
    def flat(self) -> Any:
        """As of an ordinary array, so that the copies which it makes are ordinary ones."""
        return self.view(np.ndarray).flat

    @flat.setter
    def flat(self, value: Any) -> None:
        self.view(np.ndarray).flat = value  # type: ignore[misc]

    @property
    def mdl(self) -> Mdl:
        """The buffer: an ``Mdl``, which all arrays of this memory here may share.

        Closing it leaves the arrays as they are; they cannot be sent any more.

        Errors:
            INVALID_OPERATION: the array has memory of its own, which no other process can have.
        """
        if self._shared is None:
            raise InvalidOperation(
                "mdl", "this array is not in shared memory; vmm_linux.share(array) copies it there"
            )
        return self._shared.mdl

    def read_only(self) -> SharedArray[Element]:
        """An array of the same memory that cannot write it, here and wherever it is sent.

        Its pages are mapped from a read-only descriptor: the kernel refuses to make them writable.
        Others that can write the memory go on; ``freeze`` is for memory that never changes.

        Errors:
            INVALID_OPERATION: the array is not in shared memory.
            Others as of ``Mdl.read_only`` and ``Mdl.map``.
        """
        mdl = self.mdl
        if Rights.MAP_WRITE in mdl.rights:
            mdl = mdl.read_only()
        return self._over(SharedMdl(mdl), writable=False)

    def freeze(self) -> SharedArray[Element]:
        """An array of these values in memory that nothing can ever write: the kernel seals it.

        Where the memory is frozen already, it is the same memory; else a copy. An array that can
        write, as this one may, keeps the kernel from sealing its memory; to seal that very memory,
        drop all such arrays and call ``mdl.freeze()``.

        Errors:
            As of ``VMM.mdl_create_from_buf``.
        """
        if Seal.FREEZE in self.mdl.seals:
            return self.read_only()
        return copied("freeze", self, self.mdl.vmm, VmmFlags.READ)

    def _over(self, shared: SharedMdl, writable: bool) -> SharedArray[Element]:
        """An array of the same part of another handle's buffer."""
        _, first, size = self._mapping
        return over(
            "array",
            shared,
            Layout(self.shape, self.dtype, self._offset(), self.strides),
            writable,
            (first, size),
        )

    def _offset(self) -> int:
        """Where the first element is, in bytes from the buffer's start."""
        address, first, size = self._mapping
        at = address_of(self) - address
        low, high = Layout(self.shape, self.dtype, at, self.strides).extent()
        if not 0 <= low <= high <= size:
            raise InvalidOperation("pickle", "this array no longer is in the memory of its buffer")
        return first + at

    def __copy__(self) -> SharedArray[Element]:
        view: SharedArray[Element] = self.view()
        return view

    def __deepcopy__(self, memo: dict[int, Any] | None = None, /) -> SharedArray[Element]:
        return share(self, vmm=None if self._shared is None else self._shared.mdl.vmm)

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> Any:
        if self._shared is None:
            return self.view(np.ndarray).__reduce_ex__(protocol)
        if _pickling.is_multiprocessing(sys._getframe(1)):
            return reduce(self)
        return self.__reduce__()


def ordinary(result: Any) -> Any:
    """What NumPy returned, with ordinary arrays for those that are not in shared memory."""
    if type(result) is SharedArray and result._shared is None:
        return result.view(np.ndarray)
    if type(result) in {tuple, list}:
        return type(result)(ordinary(each) for each in result)
    return result


def without_sharing(name: str) -> Callable[..., Any]:
    """A method of ``ndarray`` that may return a copy, which then is an ordinary array."""
    inherited = getattr(np.ndarray, name)

    def method(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return ordinary(inherited(self, *arguments, **keywords))

    method.__name__ = name
    method.__qualname__ = f"SharedArray.{name}"
    method.__doc__ = inherited.__doc__
    return method


# NumPy calls ``__array_wrap__`` for results of ufuncs alone.
COPYING = (
    *("argmax", "argmin", "argpartition", "argsort", "astype", "byteswap", "choose", "clip"),
    *("compress", "conj", "conjugate", "copy", "cumprod", "cumsum", "diagonal", "dot", "flatten"),
    *("nonzero", "ravel", "repeat", "reshape", "round", "searchsorted", "take"),
)
for _name in COPYING:
    setattr(SharedArray, _name, without_sharing(_name))


# ---- making -------------------------------------------------------------------------------------


def share(array: ArrayLike, *, vmm: VMM | None = None) -> SharedArray[Any]:
    """Copy an array into shared memory.

    Args:
        array: an array, or anything that NumPy makes one of, but for Python objects.
        vmm: the VMM of the buffer; None for the default one.

    Returns:
        A ``SharedArray`` with the same shape, dtype, byte order and order of elements in memory.

    Errors:
        INVALID_ARGUMENT: Python objects, elements of no bytes, a masked array, no array.
        OUT_OF_MEMORY, QUOTA_EXCEEDED: as of ``VMM.mdl_create_from_buf``.
    """
    return copied("share", array, given_or_default("share", vmm), READ_WRITE)


def empty(
    shape: Shape, dtype: DTypeLike = "float64", order: str = "C", *, vmm: VMM | None = None
) -> SharedArray[Any]:
    """As ``zeros``: new memory of the kernel's is zeroed."""
    return made("empty", shape, dtype, order, vmm)


def zeros(
    shape: Shape, dtype: DTypeLike = "float64", order: str = "C", *, vmm: VMM | None = None
) -> SharedArray[Any]:
    """Make an array of zeros in shared memory. Pages get memory when they are touched.

    Args:
        shape: numbers of elements: a tuple or a list, or one number.
        dtype: what ``numpy.dtype`` takes, but for Python objects.
        order: "C" or "F": whether the last or the first index is of neighbours in memory.
        vmm: the VMM of the buffer; None for the default one.

    Returns:
        A ``SharedArray``.

    Errors:
        INVALID_ARGUMENT: no such shape, dtype or order.
        Others as of ``VMM.mdl_create``.
    """
    return made("zeros", shape, dtype, order, vmm)


def full(
    shape: Shape,
    fill_value: ArrayLike,
    dtype: DTypeLike | None = None,
    order: str = "C",
    *,
    vmm: VMM | None = None,
) -> SharedArray[Any]:
    """Make an array of one value in shared memory, as ``zeros`` does.

    Args:
        shape: numbers of elements: a tuple or a list, or one number.
        fill_value: the value, or an array that is repeated.
        dtype: what ``numpy.dtype`` takes; None for the value's.
        order: "C" or "F".
        vmm: the VMM of the buffer; None for the default one.

    Errors:
        INVALID_ARGUMENT: as of ``zeros``; a value that does not fit dtype or shape.
    """
    value = as_array("full", fill_value)
    array = made("full", shape, value.dtype if dtype is None else dtype, order, vmm)
    try:
        array[...] = value
    except (ValueError, TypeError, OverflowError) as problem:
        raise InvalidArgument("full", f"fill_value does not fit: {problem}") from problem
    return array


def empty_like(
    prototype: ArrayLike,
    dtype: DTypeLike | None = None,
    order: str = "K",
    shape: Shape | None = None,
    *,
    vmm: VMM | None = None,
) -> SharedArray[Any]:
    """As ``zeros_like``: new memory of the kernel's is zeroed."""
    return alike("empty_like", prototype, dtype, order, shape, vmm)


def zeros_like(
    prototype: ArrayLike,
    dtype: DTypeLike | None = None,
    order: str = "K",
    shape: Shape | None = None,
    *,
    vmm: VMM | None = None,
) -> SharedArray[Any]:
    """Make an array of zeros in shared memory that is like another array.

    Args:
        prototype: the other array.
        dtype: what ``numpy.dtype`` takes; None for the prototype's.
        order: "C", "F", "A" (Fortran's where the prototype has it) or "K" (as near to the
            prototype's as can be; "C" for another number of dimensions).
        shape: numbers of elements; None for the prototype's.
        vmm: the VMM of the buffer; None for the default one.

    Errors:
        As of ``zeros``.
    """
    return alike("zeros_like", prototype, dtype, order, shape, vmm)


def made(
    method: str, shape: object, dtype: object, order: object, vmm: VMM | None
) -> SharedArray[Any]:
    """An array of zeros in a new buffer."""
    kind = checked_dtype(method, dtype)
    lengths = checked_shape(method, shape)
    if not is_a(order, str) or order not in ("C", "F"):
        raise InvalidArgument(method, f'order is {describe(order)}, not "C" or "F"')
    axes = range(len(lengths))
    return in_new_buffer(method, lengths, kind, axes[::-1] if order == "C" else axes, vmm)


def alike(  # noqa: PLR0917  as NumPy's own function
    method: str, prototype: object, dtype: object, order: object, shape: object, vmm: VMM | None
) -> SharedArray[Any]:
    """An array of zeros that is like another array."""
    source = as_array(method, prototype)
    kind = source.dtype if dtype is None else dtype
    lengths = source.shape if shape is None else checked_shape(method, shape)
    if not is_a(order, str) or order not in ("C", "F", "A", "K"):
        raise InvalidArgument(method, f'order is {describe(order)}, not "C", "F", "A" or "K"')
    if order == "K" and len(lengths) == source.ndim:
        return in_new_buffer(method, lengths, checked_dtype(method, kind), axes_of(source), vmm)
    if order in ("A", "K"):
        order = "F" if order == "A" and source.flags.fnc else "C"
    return made(method, lengths, kind, order, vmm)


def copied(method: str, array: object, vmm: VMM, prot: VmmFlags) -> SharedArray[Any]:
    """An array in a new buffer, which holds a copy of another's elements."""
    source = as_array(method, array)
    kind = checked_dtype(method, source.dtype)
    axes = axes_of(source)
    strides = packed_strides(source.shape, kind, axes)
    # Elements as bytes, in the order that they will have in memory.
    dense = source.transpose(axes[::-1])
    if prot == READ_WRITE and not dense.flags.c_contiguous:
        made_array = in_new_buffer(method, source.shape, kind, axes, vmm)
        np.copyto(made_array, source)
        return made_array
    dense = np.ascontiguousarray(dense).reshape(-1).view(np.ndarray)
    mdl = Mdl._made(
        vmm, vmm.mdl_create_from_buf, dense.view("u1") if dense.size else bytes(1), prot
    )
    return over(method, SharedMdl(mdl), Layout(source.shape, kind, 0, strides))


def in_new_buffer(
    method: str, shape: tuple[int, ...], kind: np.dtype[Any], axes: Sequence[int], vmm: VMM | None
) -> SharedArray[Any]:
    """An array of zeros whose elements are packed, the first of the axes innermost."""
    size = kind.itemsize
    for length in shape:
        size *= length
    mdl = Mdl(max(size, 1), vmm=given_or_default(method, vmm))
    return over(method, SharedMdl(mdl), Layout(shape, kind, 0, packed_strides(shape, kind, axes)))


# ---- arrays over buffers ------------------------------------------------------------------------


def over(
    method: str,
    shared: SharedMdl,
    layout: Layout,
    writable: object = None,
    window: tuple[int, int] | None = None,
) -> SharedArray[Any]:
    """An array over a part of a buffer.

    Args:
        method: for errors.
        shared: the buffer.
        layout: of the array.
        writable: True, False, or None for writable where rights and seals allow it.
        window: offset and size of the pages to map, in bytes; None for those that are needed.
    """
    low, high = layout.extent()
    mdl = shared.mdl
    whole = mdl.nbytes
    if not 0 <= low <= high <= whole:
        part = f"shape {shown(layout.shape)} of {counted(layout.kind.itemsize, 'byte')} each"
        raise InvalidArgument(
            method, f"{part} at offset {layout.offset} is not inside the buffer of {whole} bytes"
        )
    if window is None:
        window = pages_of(layout, whole)
    mapping = shared_mapping(mdl.vmm, mdl.handle, *window, protection(method, writable))
    try:
        made_array = np.ndarray.__new__(
            SharedArray,
            layout.shape,
            layout.kind,
            mapping.view(),
            layout.offset - window[0],
            layout.strides,
        )
    except (ValueError, TypeError) as problem:  # more dimensions than this NumPy has
        raise InvalidArgument(method, f"shape {shown(layout.shape)}: {problem}") from problem
    made_array._shared = shared
    made_array._mapping = (mapping.region.base, *window)
    _pickling.enable(SharedArray, reduce)
    return made_array


def array_of(
    mdl: Mdl, shape: object, dtype: object, offset: object, writable: object
) -> SharedArray[Any]:
    """An array over a part of a buffer (see ``Mdl.array``)."""
    kind = checked_dtype("array", dtype)
    lengths = checked_shape("array", shape)
    for length in lengths:
        if length < 1:
            raise InvalidArgument("array", f"shape {shown(lengths)}: each length is at least 1")
    start = index("array", "offset", offset)
    if start % kind.alignment:
        raise InvalidArgument(
            "array", f"offset {start} is not a multiple of {kind}'s alignment, {kind.alignment}"
        )
    return over("array", SharedMdl(mdl), Layout(lengths, kind, start), writable)


def protection(method: str, writable: object) -> VmmFlags | None:
    """The protection of a mapping; ``writable`` None: writable where that is possible."""
    if writable is None:
        return None
    if not is_a(writable, bool):
        raise InvalidArgument(method, f"writable is {describe(writable)}, not True, False or None")
    return READ_WRITE if writable else VmmFlags.READ


# ---- pickles ------------------------------------------------------------------------------------


def reduce(array: SharedArray[Any]) -> Any:
    """An array on its way through ``multiprocessing``."""
    shared = array._shared
    if shared is None:
        return array.view(np.ndarray).__reduce__()
    return _pickling.reduced(shared.mdl, packed, array, shared)


def packed(array: SharedArray[Any], shared: SharedMdl) -> tuple[Any, ...]:
    """The part of a buffer that an array is in, and where it is there.

    Of a buffer in segments it is a clone: the receiver gets the segments that the array touches.
    """
    layout = Layout(array.shape, array.dtype, array._offset(), array.strides)
    info = _parts.info_of(shared.mdl)
    rights = info.rights if array.flags.writeable else info.rights & ~Rights.MAP_WRITE
    first, window = None, array._mapping[1:]
    if info.segments > 1:
        start, size = pages_of(layout, info.nbytes)
        if size < info.size:
            first, window = start, (0, size)
            layout.offset -= start
    part = _parts.part_of(shared, rights, first, window[1])
    return received, (part, layout.shape, layout.kind, layout.offset, layout.strides, window)


def received(  # noqa: PLR0917  as the pickle has them
    shared: object,
    shape: tuple[int, ...],
    kind: np.dtype[Any],
    offset: int,
    strides: tuple[int, ...],
    window: tuple[int, int],
) -> Any:
    """The array of a pickle, or what stands in for it."""
    if type(shared) is _pickling.Missing:
        return shared
    if not is_a(shared, SharedMdl):
        raise InvalidArgument("unpickle", f"an array over {describe(shared)}, not over a buffer")
    return _pickling.delivered(unpacked, shared, window, shape, kind, offset, strides)


def unpacked(shared: SharedMdl, window: tuple[int, int], *layout: object) -> SharedArray[Any]:
    """The array of a pickle, whose layout only NumPy would believe."""
    return over("unpickle", shared, checked_layout(*layout), None, window)
