"""What a caller may pass: every argument of the endpoint is checked here and nowhere else.

Below, numbers are page multiples that do not overflow, and flags are known.
"""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux cimport _features
from vmm_linux._answer cimport Method, Request
from vmm_linux._vocabulary cimport (
    FLAG_CACHE_DISABLE,
    FLAG_CACHE_MASK,
    FLAG_COMMIT,
    FLAG_FIXED,
    FLAG_GROW_DOWN,
    FLAG_HIGH_GUARD,
    FLAG_HUGE,
    FLAG_LOCKED,
    FLAG_LOW_GUARD,
    FLAG_RESERVE,
    FLAG_RWX_MASK,
    FLAG_SHAREABLE,
    FLAG_WRITE_COMBINE,
    FLAG_WRITE_THROUGH,
    is_legal_protection,
    is_multiple,
)

import operator

from vmm_linux.errors import InvalidArgument, Unimplemented
from vmm_linux.flags import VmmFlags

cdef extern from "Python.h":
    bint PyLong_Check(object)
    bint PyBool_Check(object)
    unsigned long long PyLong_AsUnsignedLongLong(object) except? 0xFFFFFFFFFFFFFFFF

cdef enum:
    REGION_FLAGS = (
        FLAG_RWX_MASK | FLAG_RESERVE | FLAG_COMMIT | FLAG_LOCKED | FLAG_LOW_GUARD
        | FLAG_HIGH_GUARD | FLAG_GROW_DOWN | FLAG_CACHE_MASK | FLAG_FIXED | FLAG_HUGE
        | FLAG_SHAREABLE)
    UNCHOOSABLE = FLAG_WRITE_THROUGH | FLAG_WRITE_COMBINE | FLAG_CACHE_DISABLE


cdef uint64_t number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF:
    """A 64-bit number: an int or whatever has ``__index__``, but no bool."""
    if not PyLong_Check(value) or PyBool_Check(value):
        value = index(method, name, value)
    try:
        return PyLong_AsUnsignedLongLong(value)
    except OverflowError:
        raise InvalidArgument(
            method, f"{name} {value:#x} is not in 0 ... 2**64 - 1") from None


def index(method, name, value):
    """The int that a value stands for: whatever has ``__index__``, but no bool."""
    if not isinstance(value, bool):
        try:
            return int(operator.index(value))
        except Exception as problem:
            raise InvalidArgument(
                method, f"{name} is {describe(value)}, not an integer") from problem
    raise InvalidArgument(method, f"{name} is {value}, not an integer")


cdef str describe(object value):
    """A value of a wrong type in a message: its type, and its text if that is short."""
    try:
        text = repr(value)
    except Exception:
        text = ""
    kind = type(value).__name__
    return f"{text} of type {kind}" if 0 < len(text) <= 40 else f"a {kind}"


cdef object iterate(str method, object ranges):
    """An iterator over what the caller gave as ranges."""
    try:
        return iter(ranges)
    except Exception as problem:
        raise InvalidArgument(
            method, f"ranges is {describe(ranges)}, not pairs (va, size)") from problem


cdef tuple pair(str method, object item):
    """The two values of a range."""
    if type(item) is tuple and len(item) == 2:
        return item
    try:
        va, size = item
    except Exception as problem:
        raise InvalidArgument(
            method, f"a range is {describe(item)}, not a pair (va, size)") from problem
    return va, size


cdef int check_size(str method, uint64_t size, str name="size") except -1:
    """A size of memory: at least one byte."""
    if size == 0:
        raise InvalidArgument(method, f"{name} 0: at least one byte is needed")
    return 0


cdef int check_multiple(str method, str name, uint64_t value) except -1:
    """A page multiple."""
    cdef size_t page = _features.page_size()
    if not is_multiple(value, page):
        raise InvalidArgument(
            method, f"{name} 0x{value:x} is not a multiple of the page size, {page} bytes")
    return 0


cdef int check_end(str method, str name, uint64_t va, uint64_t size) except -1:
    """A range that ends below 2**64."""
    if va + size < va:
        raise InvalidArgument(method, f"{name} 0x{va:x} + size {size} is beyond 64 bits")
    return 0


cdef int check_protection(str method, uint64_t protection) except -1:
    """None, R, RW, RX or RWX."""
    if not is_legal_protection(protection):
        raise InvalidArgument(
            method, f"protection {protection:#x} is not one of none, READ, READ|WRITE, "
            "READ|EXECUTE, READ|WRITE|EXECUTE")
    return 0


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


cdef int check_region_flags(uint64_t flags, uint64_t addr) except -1:
    """The flags of a new region, whose address is ``addr``."""
    check_bits("allocate", "flags", flags, REGION_FLAGS)
    if not flags & FLAG_RESERVE:
        raise InvalidArgument("allocate", f"flags {flags:#x}: RESERVE is required")
    check_protection("allocate", flags & FLAG_RWX_MASK)
    check_fixed("allocate", "addr", flags, addr)
    if flags & UNCHOOSABLE:
        raise Unimplemented(
            "allocate", f"flags {flags:#x}: a Linux process cannot choose "
            f"{VmmFlags(flags & UNCHOOSABLE).name}; WRITE_BACK is what it gets")
    return 0


cdef int check_bytes(str method, uint64_t va, uint64_t size) except -1:
    """Bytes of memory at any address."""
    check_size(method, size)
    return check_end(method, "va", va, size)


cdef int check_pages(str method, str name, uint64_t va, uint64_t size,
                     str size_name="size") except -1:
    """Whole pages; ``name`` is what the caller calls their address."""
    check_size(method, size, size_name)
    check_multiple(method, name, va)
    check_multiple(method, size_name, size)
    return check_end(method, name, va, size)


cdef Request request_of(Method method, uint64_t va, uint64_t size, uint64_t flags) noexcept:
    """A call with numbers that were checked."""
    cdef Request request
    request.method = method
    request.va = va
    request.size = size
    request.flags = <uint32_t>flags
    request.buffer = NULL
    request.handle = 0
    request.offset = 0
    return request


cdef Request handle_request(Method method, uint64_t handle, uint32_t flags) noexcept:
    """A call about a handle."""
    cdef Request request = request_of(method, 0, 0, flags)
    request.handle = handle
    return request
