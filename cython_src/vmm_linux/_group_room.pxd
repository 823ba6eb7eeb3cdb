"""How much the memory cgroup of this process leaves (see ``_group_room.pyx``)."""

from libc.stdint cimport uint64_t

cdef bint group_has_limit() noexcept nogil
cdef bint is_huge_everywhere() noexcept nogil
cdef bint group_has_room_for(uint64_t size) noexcept nogil
