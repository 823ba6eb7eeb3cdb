"""What ``/proc/self`` tells about this process's memory (see ``_own_process.pyx``).

The functions without the GIL return 0 or ``-errno``; of one OwnProcess they must not
run at the same time: the caller holds a lock.
"""

from libc.stdint cimport int8_t, uint32_t, uint64_t, uintptr_t

from vmm_linux cimport _syscalls
from vmm_linux._maps_text cimport Text

cdef struct Span:
    # One mapping, or one hole between mappings (then all that follows `mapped` is 0).
    uintptr_t start
    uintptr_t end
    bint mapped
    uint32_t permissions
    uint64_t offset
    uint64_t inode
    uint32_t device_major
    uint32_t device_minor

cdef enum:
    NAME_ROOM = 4096            # what the kernel has for a name itself

cdef struct PageFacts:
    # 1, 0, or -1 where this kernel does not tell.
    int8_t present              # has memory, in this process's page table
    int8_t swapped
    int8_t huge                 # part of a huge page
    int8_t guard                # of MADV_GUARD_INSTALL
    int8_t locked               # in a mapping that mlock was called on
    int8_t file_or_shared       # its memory is a file's or shared (0 where there is none)

cdef class OwnProcess:
    # Descriptors, or -1, of files that nobody else has: known by their marks.
    cdef int maps
    cdef int pagemap
    cdef int smaps
    cdef uint32_t generation
    cdef Text lines

    cdef int span_at(self, uintptr_t va, Span *span) noexcept nogil
    cdef int name_at(self, uintptr_t va, _syscalls.ProcmapQuery *query, char *name,
                     size_t room) noexcept nogil
    cdef int page_at(self, uintptr_t va, PageFacts *facts) noexcept nogil
    cdef int smaps_text_at(self, uintptr_t va, Text *text) noexcept nogil
    cdef void release(self) noexcept nogil

    cdef void notice_fork(self) noexcept nogil
    cdef int span_by_query(self, uintptr_t va, Span *span) noexcept nogil
    cdef int hole_by_query(self, uintptr_t va, Span *span) noexcept nogil
    cdef int span_by_text(self, uintptr_t va, Span *span) noexcept nogil
    cdef int read_span(self, uintptr_t va, Span *span) noexcept nogil
    cdef int read_smaps(self, uintptr_t va, Text *text) noexcept nogil
    cdef int facts_by_scan(self, uintptr_t va, PageFacts *facts) noexcept nogil
    cdef int facts_by_pagemap(self, uintptr_t va, PageFacts *facts) noexcept nogil

cdef bint can_mean_two(object pathname) except -1
cdef object settled_name(object pathname, uintptr_t start, const _syscalls.ProcmapQuery *query,
                         const char *name)
cdef int query_with_name(int fd, uintptr_t va, _syscalls.ProcmapQuery *query, char *name,
                         size_t room) noexcept nogil
