"""What the layers above use of the procfs layer; see ``procfs.pyx``."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from vmm_linux._core cimport kernel

# ---- reader ------------------------------------------------------------------------------------

cdef struct Text:
    # Bytes on the C heap: starts as [NULL, 0, 0], and free_text() ends it.
    char *data
    size_t length, capacity

cdef void free_text(Text *text) noexcept nogil

# ---- maps --------------------------------------------------------------------------------------

cdef struct Span:
    # One mapping, or one hole between mappings (then all that follows ``end`` is 0).
    uintptr_t start, end
    bint mapped
    uint32_t permissions        # bits, see ``maps.pxi``
    uint64_t offset, inode
    uint32_t device_major, device_minor

# ---- mapping_query -----------------------------------------------------------------------------

cdef struct NamedQuery:
    # The mapping that covers an address. The name ends with a zero, and has its newlines as they
    # are, unlike the text of maps.
    kernel.ProcmapQuery mapping
    char name[4096]             # as much as the kernel itself has

cdef int query_with_name(int fd, uintptr_t va, NamedQuery *query) noexcept nogil
cdef void fill_span(Span *span, const kernel.ProcmapQuery *query) noexcept nogil
cdef bint is_ambiguous(object pathname) except -1
cdef object settled_name(object pathname, uintptr_t start, const NamedQuery *query)

# ---- pagemap -----------------------------------------------------------------------------------

cdef enum:
    # The numbers of ``vmm_linux.inspect.PageFlags``.
    PAGE_PRESENT = 0x1          # has memory, in the process's page table
    PAGE_SWAPPED = 0x2
    PAGE_SHARED = 0x4           # its memory is a file's or shared
    PAGE_EXCLUSIVE = 0x8
    PAGE_HUGE = 0x10            # part of a huge page
    PAGE_GUARD = 0x20           # of MADV_GUARD_INSTALL
    PAGE_WRITE_PROTECTED = 0x40
    PAGE_ZERO = 0x80
    # Of one page alone: in a mapping that mlock was called on.
    PAGE_LOCKED = 0x100

cdef struct Pages:
    # Neighbouring pages that are alike.
    uintptr_t start, end
    uint32_t flags

cdef struct PagesFound:
    # Starts as [NULL, 0, 0], and free() of the list ends it.
    Pages *list
    size_t count, capacity

cdef int find_pages(int pagemap, uintptr_t start, uintptr_t end, bint exclusive,
                    PagesFound *found) noexcept nogil
cdef int find_touched(int pagemap, uintptr_t at, uintptr_t until, uintptr_t *start,
                      uintptr_t *end) noexcept nogil
cdef uint64_t without_own_memory(uintptr_t start, uintptr_t end) noexcept nogil
cdef bint is_alive(int pagemap) noexcept nogil
cdef uint32_t known_flags(bint exclusive) noexcept nogil

# ---- record ------------------------------------------------------------------------------------

cdef enum:
    FIGURES = 24                # how many figures of smaps have an attribute of their own
    FIGURE_SIZE = 0
    FIGURE_KERNEL_PAGE_SIZE = 1
    FIGURE_MMU_PAGE_SIZE = 2
    FIGURE_PROTECTION_KEY = 23

cdef class SmapsRecord:
    cdef Span span
    cdef uint32_t known         # bit i: values[i] was given
    cdef uint64_t *values       # FIGURES of them, or NULL
    cdef dict others            # figures with no attribute of their own, or None
    cdef readonly object pathname
    cdef readonly object vm_flags

cdef int restore_into(SmapsRecord record, tuple values) except -1
cdef int set_figure(SmapsRecord record, int i, uint64_t value) except -1

# ---- store -------------------------------------------------------------------------------------

cdef struct Figure

cdef struct Block

cdef struct SmapsEntry:
    # One mapping. What it points to belongs to the SmapsStore that it is in.
    Span span
    uint64_t *values            # FIGURES of them, or NULL
    const char *path
    const char *flags           # NULL: the text has none
    Figure *others
    uint32_t known              # bit i: values[i] was given
    uint32_t path_length, flags_length

cdef class SmapsStore:
    cdef SmapsEntry **chunks
    cdef readonly size_t count
    cdef Block *block
    cdef list names             # of figures with no attribute of their own
    cdef dict strings           # paths by their place in memory
    cdef dict flag_sets         # sets of flags by their place in memory, and by their text
    cdef bint backslashes       # some path has one: see decoded_path
    cdef const char *flags      # the flags given last
    cdef size_t flags_length
    cdef SmapsEntry *at(self, size_t index) noexcept nogil
    cdef void drop_overlapped(self) noexcept nogil
    cdef object pathname_at(self, const SmapsEntry *entry)
    cdef int fill(self, SmapsRecord made, size_t index) except -1

# ---- parser ------------------------------------------------------------------------------------

cdef int read_records(SmapsStore store, int fd, bint with_figures) except? -1

# ---- own_process -------------------------------------------------------------------------------

cdef struct PageFacts:
    # What is known of one page, as PAGE_ flags.
    uint32_t known
    uint32_t flags              # of those known

cdef inline object page_fact(PageFacts facts, uint32_t flag):
    """Whether a page has this flag; None where that is unknown."""
    return bool(facts.flags & flag) if facts.known & flag else None

cdef class OwnProcess:
    # Descriptors, or -1, of files that are this object's alone: known by their marks.
    cdef int maps, pagemap, smaps
    cdef uint32_t generation
    cdef Text lines
    cdef int span_at(self, uintptr_t va, Span *span) noexcept nogil
    cdef int name_at(self, uintptr_t va, NamedQuery *query) noexcept nogil
    cdef int page_at(self, uintptr_t va, PageFacts *facts) noexcept nogil
    cdef int smaps_text_at(self, uintptr_t va, Text *text) noexcept nogil
    cdef void release(self) noexcept nogil
