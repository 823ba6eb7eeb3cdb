"""What a caller may pass: every argument of the endpoint is checked here and nowhere else.

Below, numbers are page multiples that do not overflow, and flags are known. What is in order
passes inline; only a refusal goes into ``_arguments.pyx``, for its words: after a system call that
takes the caches away, each page of code on the way of a call is felt.
"""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._answer cimport Method, Request
from vmm_linux._features cimport PAGE_SIZE
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

cdef extern from "Python.h":
    bint PyLong_Check(object)
    bint PyBool_Check(object)
    long long PyLong_AsLongLongAndOverflow(object, int *)

cdef enum:
    REGION_FLAGS = (
        FLAG_RWX_MASK | FLAG_RESERVE | FLAG_COMMIT | FLAG_LOCKED | FLAG_LOW_GUARD
        | FLAG_HIGH_GUARD | FLAG_GROW_DOWN | FLAG_CACHE_MASK | FLAG_FIXED | FLAG_HUGE
        | FLAG_SHAREABLE)
    MAP_FLAGS = FLAG_RWX_MASK | FLAG_LOCKED | FLAG_LOW_GUARD | FLAG_HIGH_GUARD | FLAG_FIXED
    UNCHOOSABLE = FLAG_WRITE_THROUGH | FLAG_WRITE_COMBINE | FLAG_CACHE_DISABLE

cdef uint64_t other_number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF
cdef object iterate(str method, object ranges)
cdef tuple other_pair(str method, object item)
cdef object contiguous(str method, object data)
cdef object plain_limits(str method, object value)
cdef object tristate(str method, str name, object value)
cdef object switch(str method, str name, object value)
cdef int check_multiple(str method, str name, uint64_t value) except -1
cdef int refuse_bytes(str method, str name, uint64_t va, uint64_t size, str size_name) except -1
cdef int refuse_pages(str method, str name, uint64_t va, uint64_t size, str size_name) except -1
cdef int refuse_protection(str method, uint64_t protection) except -1
cdef int refuse_region_flags(uint64_t flags, uint64_t addr) except -1
cdef int check_some_access(str method, uint64_t flags) except -1
cdef int check_bits(str method, str name, uint64_t value, uint64_t known) except -1
cdef int check_fixed(str method, str name, uint64_t flags, uint64_t addr) except -1


cdef inline uint64_t number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF:
    """A 64-bit number: an int or whatever has ``__index__``, but no bool."""
    cdef long long result
    cdef int overflow
    if PyLong_Check(value) and not PyBool_Check(value):
        result = PyLong_AsLongLongAndOverflow(value, &overflow)
        if result >= 0:
            return result
    return other_number(method, name, value)


cdef inline tuple pair(str method, object item):
    """The two values of a range."""
    if type(item) is tuple and len(<tuple>item) == 2:
        return item
    return other_pair(method, item)


cdef inline int check_bytes(str method, uint64_t va, uint64_t size) except -1:
    """Bytes of memory at any address: one at least, which end below 2**64."""
    if size != 0 and va + size >= va:
        return 0
    return refuse_bytes(method, "va", va, size, "size")


cdef inline int check_pages(str method, str name, uint64_t va, uint64_t size,
                            str size_name) except -1:
    """Whole pages; ``name`` and ``size_name`` are what the caller calls the two numbers."""
    if size != 0 and is_multiple(va | size, PAGE_SIZE) and va + size >= va:
        return 0
    return refuse_pages(method, name, va, size, size_name)


cdef inline int check_protection(str method, uint64_t protection) except -1:
    """None, R, RW, RX or RWX."""
    if is_legal_protection(protection):
        return 0
    return refuse_protection(method, protection)


cdef inline int check_region_flags(uint64_t flags, uint64_t addr) except -1:
    """The flags of a new region, whose address is ``addr``."""
    if (flags & ~<uint64_t>(REGION_FLAGS & ~UNCHOOSABLE) == 0 and flags & FLAG_RESERVE
            and is_legal_protection(flags & FLAG_RWX_MASK)
            and (addr != 0 or not flags & FLAG_FIXED)):
        return 0
    return refuse_region_flags(flags, addr)


cdef inline Request request_of(Method method, uint64_t va, uint64_t size, uint64_t flags) noexcept:
    """A call with numbers that were checked."""
    cdef Request request
    request.method = method
    request.va = va
    request.size = size
    request.flags = <uint32_t>flags
    request.buffer = NULL
    request.handle = 0
    request.offset = 0
    request.forbidden = 0
    return request


cdef inline Request handle_request(Method method, uint64_t handle, uint32_t flags) noexcept:
    """A call about a handle."""
    cdef Request request = request_of(method, 0, 0, flags)
    request.handle = handle
    return request
