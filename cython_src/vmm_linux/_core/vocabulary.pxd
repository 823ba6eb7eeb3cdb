"""The words of ``vmm_linux.flags``, ``states`` and ``errors`` as C numbers, and page arithmetic.

A test holds these numbers equal to the Python ones.
"""

from libc.stdint cimport uint64_t

cdef enum:
    FLAG_READ = 0x1, FLAG_WRITE = 0x2, FLAG_EXECUTE = 0x4, FLAG_RWX_MASK = 0x7
    FLAG_RESERVE = 0x10, FLAG_COMMIT = 0x20, FLAG_LOCKED = 0x40
    FLAG_LOW_GUARD = 0x100, FLAG_HIGH_GUARD = 0x200, FLAG_GROW_DOWN = 0x400
    FLAG_WRITE_BACK = 0x1000, FLAG_WRITE_THROUGH = 0x2000, FLAG_WRITE_COMBINE = 0x4000
    FLAG_CACHE_DISABLE = 0x8000, FLAG_CACHE_MASK = 0xF000
    FLAG_FIXED = 0x10000, FLAG_HUGE = 0x20000, FLAG_SHAREABLE = 0x40000

cdef enum:
    STATE_FREE = 0, STATE_RESERVED = 1, STATE_COMMITTED = 2

cdef enum:
    KIND_FREE = 0, KIND_PRIVATE = 1, KIND_MDL = 2, KIND_GUARD = 3, KIND_FOREIGN = 4

cdef enum:
    RIGHT_TRANSFER = 0x1, RIGHT_COPY = 0x2, RIGHT_GET_SID = 0x4
    RIGHT_MAP_READ = 0x8, RIGHT_MAP_WRITE = 0x10, RIGHT_MAP_EXECUTE = 0x20, RIGHT_ALL = 0x3F
    # MAP_READ, MAP_WRITE and MAP_EXECUTE are the protection, shifted.
    RIGHT_MAP_SHIFT = 3

cdef enum:
    SEAL_PUBLISH = 0x1, SEAL_FREEZE = 0x2

cdef inline bint is_multiple(uint64_t value, uint64_t page) noexcept nogil:
    """Whether ``value`` is a multiple of the page size, a power of two."""
    return (value & (page - 1)) == 0

cdef inline uint64_t round_down(uint64_t value, uint64_t page) noexcept nogil:
    """The start of the page that includes ``value``."""
    return value & ~(page - 1)

cdef inline uint64_t round_up(uint64_t value, uint64_t page) noexcept nogil:
    """The first page boundary at or above ``value``, which is not in the last page of 64 bits."""
    return (value + page - 1) & ~(page - 1)

cdef inline bint is_legal_protection(uint64_t protection) noexcept nogil:
    """None, R, RW, RX and RWX are what KasperskyOS documents."""
    return protection == 0 or (protection <= FLAG_RWX_MASK and (protection & FLAG_READ) != 0)
