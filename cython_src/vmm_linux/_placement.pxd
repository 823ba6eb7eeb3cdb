"""Where a new region goes (see ``_placement.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._answer cimport Answer, Request

cdef size_t guard_below(uint32_t flags) noexcept nogil
cdef size_t guard_above(uint32_t flags) noexcept nogil
cdef Answer check_place(const Request *request) noexcept nogil
cdef Py_ssize_t map_region(const Request *request, int fd, uint64_t offset,
                           int protection) noexcept nogil
