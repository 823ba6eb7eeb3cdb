"""Contract of procfs."""

from libc.errno cimport ENOMEM
from libc.stdint cimport int8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from vmm_linux._core cimport kernel


# ---- maps --------------------------------------------------------------------------------------

cdef struct Line:
    # A line of maps, which is also the first line of a record of smaps.
    uintptr_t start
    uintptr_t end
    uint32_t permissions
    uint64_t offset
    uint32_t device_major
    uint32_t device_minor
    uint64_t inode
    const char *path
    size_t path_length

cdef struct Text:
    # Bytes on the C heap: starts as [NULL, 0, 0], and free_text() ends it.
    char *data
    size_t length
    size_t room

cdef void free_text(Text *text) noexcept nogil


# ---- pagemap -----------------------------------------------------------------------------------

cdef struct Pages:
    # Neighbouring pages that are alike.
    uintptr_t start
    uintptr_t end
    uint32_t flags

cdef struct PagesFound:
    # Starts as [NULL, 0, 0], and free() of the list ends it.
    Pages *list
    size_t count
    size_t room

cdef int find_pages(int pagemap, uintptr_t start, uintptr_t end, bint exclusive,
                    PagesFound *found) noexcept nogil

cdef uint64_t without_own_memory(uintptr_t start, uintptr_t end) noexcept nogil

cdef bint is_alive(int pagemap) noexcept nogil

cdef uint32_t flags_told(bint exclusive) noexcept nogil


# ---- record ------------------------------------------------------------------------------------

cdef enum:
    FIGURES = 24                # how many figures of smaps have an attribute of their own
    FIGURE_SIZE = 0
    FIGURE_KERNEL_PAGE_SIZE = 1
    FIGURE_MMU_PAGE_SIZE = 2
    FIGURE_PROTECTION_KEY = 23

cdef class SmapsRecord:
    cdef uintptr_t range_start
    cdef uintptr_t range_end
    cdef uint64_t file_offset
    cdef uint64_t file_inode
    cdef uint32_t device_major
    cdef uint32_t device_minor
    cdef uint32_t permission_bits
    cdef uint32_t known         # bit i: values[i] was given
    cdef uint64_t *values       # FIGURES of them, or NULL
    cdef dict others            # figures with no attribute of their own, or None
    cdef readonly object pathname
    cdef readonly object vm_flags

    cdef object figure(self, int index)

cdef int restore_into(SmapsRecord record, tuple said) except -1

cdef int set_figure(SmapsRecord record, int i, uint64_t value) except -1


# ---- store -------------------------------------------------------------------------------------

cdef struct Figure:
    # One with no attribute of its own.
    int name                    # its place among the names
    uint64_t value
    Figure *next

cdef struct Record:
    # One mapping. What it points to belongs to the Records that it is in.
    uintptr_t start
    uintptr_t end
    uint64_t offset
    uint64_t inode
    uint32_t device_major
    uint32_t device_minor
    uint32_t permissions
    uint32_t known              # bit i: values[i] was given
    uint64_t *values            # FIGURES of them, or NULL
    const char *path
    const char *flags           # NULL: the text does not tell
    uint32_t path_length
    uint32_t flags_length
    Figure *others

cdef struct Block:
    # Of memory that is given out piece by piece, and lies behind this.
    Block *before
    size_t used
    size_t room

cdef class Records:
    cdef Record **chunks
    cdef readonly size_t count
    cdef Block *block
    cdef list names             # of figures with no attribute of their own
    cdef dict strings           # paths by their place in memory
    cdef dict flag_sets         # sets of flags by their place in memory, and by their text
    cdef bint backslashes       # some path has one: see decoded_path
    cdef const char *flags      # the flags given last
    cdef size_t flags_length

    cdef Record *at(self, size_t index) noexcept nogil
    cdef void *take(self, size_t size) noexcept nogil
    cdef const char *keep(self, const char *text, size_t length) noexcept nogil
    cdef Record *new_record(self) noexcept nogil
    cdef const char *path_after(self, const Record *before, const char *path,
                                size_t length) noexcept nogil
    cdef Record *append(self, const Line *line) noexcept nogil
    cdef void drop_overlapped(self) noexcept nogil

    cdef inline int set_figure(self, Record *record, int i, uint64_t value) noexcept nogil:
        """A figure with an attribute of its own. Here, as a record has some twenty."""
        if record.values == NULL:
            record.values = <uint64_t *>self.take(FIGURES * sizeof(uint64_t))
            if record.values == NULL:
                return -ENOMEM
            memset(record.values, 0, FIGURES * sizeof(uint64_t))
        record.values[i] = value
        record.known |= <uint32_t>1 << i
        return 0

    cdef int add_other(self, Record *record, int name, uint64_t value) noexcept nogil
    cdef int set_flags(self, Record *record, const char *text, size_t length) noexcept nogil
    cdef int number_of(self, str name) except -1
    cdef object pathname_at(self, const Record *record)
    cdef object flags_at(self, const Record *record)
    cdef int fill(self, SmapsRecord made, size_t index) except -1
    cdef SmapsRecord record(self, size_t index)


# ---- parser ------------------------------------------------------------------------------------

cdef int read_records(Records records, int fd, bint with_figures) except? -1


# ---- own_process -------------------------------------------------------------------------------

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
    cdef int name_at(self, uintptr_t va, kernel.ProcmapQuery *query, char *name,
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

cdef object settled_name(object pathname, uintptr_t start, const kernel.ProcmapQuery *query,
                         const char *name)

cdef int query_with_name(int fd, uintptr_t va, kernel.ProcmapQuery *query, char *name,
                         size_t room) noexcept nogil
