"""What tests of shared arrays ask: whether a result is of the class that its memory says."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

import numpy as np

import kernel_oracle as kernel
from vmm_linux.shared_array import SharedArray

if TYPE_CHECKING:
    from collections.abc import Iterator

PROT_READ_WRITE = 3


def arrays_in(result: Any) -> Iterator[np.ndarray[Any, Any]]:  # noqa: ANN401
    """All arrays of a result: itself, or those in tuples, lists and dictionaries."""
    if isinstance(result, np.ndarray):
        yield result
    elif isinstance(result, tuple | list):
        for each in result:
            yield from arrays_in(each)
    elif isinstance(result, dict):
        yield from arrays_in(list(result.values()))


def bounds(array: np.ndarray[Any, Any]) -> tuple[int, int]:
    """The addresses that an array's elements lie between."""
    low, high = np.lib.array_utils.byte_bounds(np.asarray(array))
    return int(low), int(high)


def inode_of(address: int) -> int:
    """The file behind an address."""
    mapping = kernel.mapping_at(address)
    return 0 if mapping is None else mapping.inode


def memory_of(array: SharedArray[Any]) -> int:
    """The file of an array's buffer, by its descriptor."""
    return os.fstat(array.mdl.fileno()).st_ino


def flaws(result: object, *sources: SharedArray[Any]) -> list[str]:
    """What is wrong with the arrays of a result that was made of these sources."""
    return [flaw for array in arrays_in(result) for flaw in flaws_of(array, sources)]


def flaws_of(array: np.ndarray[Any, Any], sources: tuple[SharedArray[Any], ...]) -> Iterator[str]:
    """What is wrong with one array: of memory of its own, or of another buffer than it says."""
    if not isinstance(array, SharedArray):
        return
    if array._shared is None:
        yield "a SharedArray without shared memory"
        return
    buffers = {id(source.mdl): source for source in sources}
    source = buffers.get(id(array.mdl))
    if source is None:
        yield "a SharedArray of a buffer that no source has"
        return
    low, high = bounds(array)
    address, _, size = array._mapping
    if array.size and not address <= low <= high <= address + size:
        yield "elements outside its mapping"
    if array.size and not any(shares(array, each) for each in sources):
        yield "elements that are none of the sources'"


def shares(array: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> bool:
    """Whether two arrays lie over each other."""
    return bool(np.may_share_memory(array, source))


def refuses_writing(array: SharedArray[Any]) -> bool:
    """Whether the kernel refuses to make the pages of an array writable."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, _, size = array._mapping
    done = libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), PROT_READ_WRITE)
    return (done, ctypes.get_errno()) == (-1, errno.EACCES)


def seals_of(array: SharedArray[Any]) -> int:
    """The kernel's seals of the memory of an array."""
    return fcntl.fcntl(array.mdl.fileno(), fcntl.F_GET_SEALS)
