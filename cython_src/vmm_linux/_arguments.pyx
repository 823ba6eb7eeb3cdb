"""What a caller may pass: every argument of the endpoint is checked here and nowhere else.

Below, numbers are page multiples that do not overflow, and flags are known.
"""

from libc.stdint cimport uint64_t

from vmm_linux._features cimport PAGE_SIZE
from vmm_linux._vocabulary cimport FLAG_FIXED, FLAG_RESERVE, FLAG_RWX_MASK, is_multiple

from vmm_linux._core.values import describe, index, is_a, written
from vmm_linux.errors import InvalidArgument, Unimplemented
from vmm_linux.flags import VmmFlags
from vmm_linux.limits import FIGURES, Limits

cdef extern from "Python.h":
    unsigned long long PyLong_AsUnsignedLongLong(object) except? 0xFFFFFFFFFFFFFFFF


cdef uint64_t other_number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF:
    """``number`` of what is no plain int below 2**63, or is no number at all."""
    value = index(method, name, value)
    try:
        return PyLong_AsUnsignedLongLong(value)
    except OverflowError:
        raise InvalidArgument(
            method, f"{name} {written(value, '#x')} is not in 0 ... 2**64 - 1") from None


cdef object iterate(str method, object ranges):
    """What the caller gave as ranges, to go through: none of the caller's code runs in that."""
    if type(ranges) is list or type(ranges) is tuple:
        return ranges
    try:
        return list(ranges)
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            method, f"ranges is {describe(ranges)}, not pairs (va, size)") from problem


cdef tuple other_pair(str method, object item):
    """``pair`` of what is no plain tuple of two."""
    try:
        va, size = item
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            method, f"a range is {describe(item)}, not a pair (va, size)") from problem
    return va, size


cdef object contiguous(str method, object data):
    """A memoryview of a buffer's bytes, which stay where they are as long as it lives."""
    try:
        view = memoryview(data)
        if not view.c_contiguous:
            raise BufferError("its bytes do not lie side by side")
        return view.cast("B")
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            method, f"data is {describe(data)}, not a contiguous buffer") from problem


cdef object plain_limits(str method, object value):
    """``Limits`` of the package's own class, whose bounds nobody computes."""
    if not is_a(value, Limits):
        raise InvalidArgument(method, f"limits is {describe(value)}, not Limits(...)")
    try:
        bounds = {figure: getattr(value, figure) for figure in FIGURES}
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            method, f"limits is {describe(value)}, which does not tell its bounds") from problem
    return Limits(**bounds)


cdef object tristate(str method, str name, object value):
    """True, False or None."""
    if value is None or value is True or value is False:
        return value
    raise InvalidArgument(method, f"{name} is {describe(value)}, not True, False or None")


cdef object switch(str method, str name, object value):
    """What Python takes for true or for false."""
    if value is True or value is False:
        return value
    try:
        return bool(value)
    except Exception as problem:
        raise InvalidArgument(
            method, f"{name} is {describe(value)}, not True or False") from problem


cdef int check_multiple(str method, str name, uint64_t value) except -1:
    """A page multiple."""
    if not is_multiple(value, PAGE_SIZE):
        raise InvalidArgument(
            method, f"{name} 0x{value:x} is not a multiple of the page size, {PAGE_SIZE} bytes")
    return 0


cdef int refuse_bytes(str method, str name, uint64_t va, uint64_t size, str size_name) except -1:
    """Say why these are no bytes of memory."""
    if size == 0:
        raise InvalidArgument(method, f"{size_name} 0: at least one byte is needed")
    raise InvalidArgument(method, f"{name} 0x{va:x} + size {size} is beyond 64 bits")


cdef int refuse_pages(str method, str name, uint64_t va, uint64_t size, str size_name) except -1:
    """Say why these are no whole pages of memory."""
    if size != 0:
        check_multiple(method, name, va)
        check_multiple(method, size_name, size)
    return refuse_bytes(method, name, va, size, size_name)


cdef int refuse_protection(str method, uint64_t protection) except -1:
    """Say that this is no protection."""
    raise InvalidArgument(
        method, f"protection {protection:#x} is not one of none, READ, READ|WRITE, "
        "READ|EXECUTE, READ|WRITE|EXECUTE")


cdef int check_some_access(str method, uint64_t flags) except -1:
    """A protection that gives some access."""
    if flags & FLAG_RWX_MASK == 0:
        raise InvalidArgument(method, "no protection: a buffer allows READ at least")
    return check_protection(method, flags & FLAG_RWX_MASK)


cdef int check_bits(str method, str name, uint64_t value, uint64_t known) except -1:
    """No bits but the known ones."""
    if value & ~known:
        raise InvalidArgument(
            method, f"{name} {value:#x}: unknown bits {value & ~known:#x}")
    return 0


cdef int check_fixed(str method, str name, uint64_t flags, uint64_t addr) except -1:
    """An address where FIXED needs one."""
    if flags & FLAG_FIXED and addr == 0:
        raise InvalidArgument(method, f"FIXED needs an address, and {name} is 0")
    return 0


cdef int refuse_region_flags(uint64_t flags, uint64_t addr) except -1:
    """Say what is wrong with the flags of a new region, whose address is ``addr``."""
    check_bits("allocate", "flags", flags, REGION_FLAGS)
    if not flags & FLAG_RESERVE:
        raise InvalidArgument("allocate", f"flags {flags:#x}: RESERVE is required")
    check_protection("allocate", flags & FLAG_RWX_MASK)
    check_fixed("allocate", "addr", flags, addr)
    raise Unimplemented(
        "allocate", f"flags {flags:#x}: a Linux process cannot choose "
        f"{VmmFlags(flags & UNCHOOSABLE).name}; WRITE_BACK is what it gets")
