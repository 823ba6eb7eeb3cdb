"""How much memory could be taken now."""

from libc.stdint cimport uint64_t

cpdef uint64_t available() noexcept nogil
cdef uint64_t mappings() noexcept nogil
cdef int ask_for(uint64_t size) noexcept nogil
