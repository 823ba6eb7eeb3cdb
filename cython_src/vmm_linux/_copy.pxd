"""Copies between a buffer and addresses of this process with the kernel's checks."""

from libc.stdint cimport uintptr_t

cdef int copy_out(void *buffer, uintptr_t va, size_t size, size_t *done) noexcept nogil
cdef int copy_in(const void *buffer, uintptr_t va, size_t size, size_t *done) noexcept nogil
