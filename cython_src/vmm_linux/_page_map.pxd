"""What the kernel knows of many pages (see ``_page_map.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

cdef enum:
    # The numbers of ``vmm_linux.inspect.PageFlags``.
    PAGE_PRESENT = 0x1
    PAGE_SWAPPED = 0x2
    PAGE_SHARED = 0x4
    PAGE_EXCLUSIVE = 0x8
    PAGE_HUGE = 0x10
    PAGE_GUARD = 0x20
    PAGE_WRITE_PROTECTED = 0x40
    PAGE_ZERO = 0x80

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
