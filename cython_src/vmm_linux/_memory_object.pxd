"""Memory objects: what can back pages and be shared.

A memory object is a memfd, sealed against shrinking and growing at birth. It lives as long as
something refers to it: a mapping counts one for each of its pages (so that cutting a mapping
in two changes nothing). The mutex of the VMM that made it guards its count.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef struct MemoryObject:
    int fd
    uint64_t size               # bytes, a page multiple
    int64_t references
    uint32_t generation         # of the process that made it
    uint32_t children           # which that process had at its birth

cdef MemoryObject *memory_object_new(uint64_t size, bint executable, int *error) noexcept nogil
cdef void memory_object_acquire(MemoryObject *self, int64_t references) noexcept nogil
cdef void memory_object_release(MemoryObject *self, int64_t references) noexcept nogil
cdef bint memory_object_is_inherited(const MemoryObject *self) noexcept nogil
cdef bint memory_object_is_exclusive(const MemoryObject *self) noexcept nogil
cdef int memory_object_fill(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil
cdef int memory_object_punch(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil
