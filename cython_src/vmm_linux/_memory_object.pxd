"""Memory objects: what can back pages and be shared.

A memory object is a memfd, sealed against shrinking and growing at birth, or a clone: a window
on another object's memory, with an identity of its own. It lives as long as something refers to
it: a mapping counts one for each of its pages (so that cutting a mapping in two changes nothing),
a handle one, a clone of it one. The mutex of the VMM that made it guards its count.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef struct MemoryObject:
    MemoryObject *root          # whose memory it is: its own, or what it is a window on
    MemoryObject *origin        # what it was cloned from, or NULL
    uint64_t offset             # of the window in the root's memory
    uint64_t size               # bytes, a page multiple
    int64_t references
    int fd                      # the memory; of a clone an empty memfd: its identity
    int read_only_fd            # the memory's read-only description once needed, else -1
    uint64_t sid                # the security id once asked for, else 0
    uint32_t generation         # of the process that made it
    uint32_t children           # which that process had at its birth

cdef MemoryObject *memory_object_new(uint64_t size, bint executable, int *error) noexcept nogil
cdef MemoryObject *memory_object_clone(MemoryObject *origin, uint64_t offset, uint64_t size,
                                       int *error) noexcept nogil
cdef MemoryObject *memory_object_adopt(int fd, bint writable, uint64_t size,
                                       int *error) noexcept nogil
cdef MemoryObject *memory_object_adopt_clone(MemoryObject *origin, int fd, uint64_t offset,
                                             uint64_t size, int *error) noexcept nogil
cdef void memory_object_acquire(MemoryObject *self, int64_t references) noexcept nogil
cdef void memory_object_release(MemoryObject *self, int64_t references) noexcept nogil
cdef int memory_object_descriptor(MemoryObject *self, bint writable) noexcept nogil
cdef bint memory_object_is_described(const MemoryObject *self) noexcept nogil
cdef void memory_object_undescribe(MemoryObject *self) noexcept nogil
cdef int memory_object_sid(MemoryObject *self, uint64_t *sid) noexcept nogil
cdef int memory_object_seal(MemoryObject *self, uint32_t seals) noexcept nogil
cdef int memory_object_seals(MemoryObject *self) noexcept nogil
cdef bint memory_object_is_inherited(const MemoryObject *self) noexcept nogil
cdef bint memory_object_is_exclusive(const MemoryObject *self) noexcept nogil
cdef uint64_t memory_object_holes(MemoryObject *self, uint64_t size) noexcept nogil
cdef int memory_object_fill(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil
cdef int memory_object_store(MemoryObject *self, uint64_t offset, const void *data,
                             uint64_t size) noexcept nogil
cdef int memory_object_punch(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil
