"""How much memory could be taken now."""

from libc.stdint cimport uint64_t

cdef bint is_room_for(uint64_t size) noexcept nogil
