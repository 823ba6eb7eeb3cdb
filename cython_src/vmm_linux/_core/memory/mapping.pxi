"""Where a new region goes: its addresses and those of its guards."""

cdef size_t guard_below(uint32_t flags) noexcept nogil:
    """Bytes of the guard below a region with these flags."""
    return PAGE_SIZE if flags & FLAG_LOW_GUARD else 0


cdef size_t guard_above(uint32_t flags) noexcept nogil:
    """Bytes of the guard above a region with these flags."""
    return PAGE_SIZE if flags & FLAG_HIGH_GUARD else 0


cdef Answer check_place(const Request *request) noexcept nogil:
    """Whether a region with its guards can lie where it is wished, if nothing else does."""
    cdef uintptr_t highest = kernel.user_space_end()
    cdef size_t low = guard_below(request.flags)
    cdef size_t total = low + request.size + guard_above(request.flags)
    if request.size > highest or total > highest:
        return refused(TOO_LARGE)
    if request.flags & FLAG_FIXED and (
            request.va < kernel.mmap_min_addr() + low or request.va > highest - total + low):
        return refused(OUTSIDE)
    return done()


cdef uintptr_t huge_page_hint(size_t total, size_t low) noexcept nogil:
    """A free address where a region starts on a huge page, or 0 for the system's choice.

    Newer kernels align by themselves, older ones do not. The address is a hint: if another
    thread takes it first, the region lies elsewhere.
    """
    cdef size_t huge = kernel.huge_page_size()
    cdef size_t page = kernel.page_size()
    cdef Py_ssize_t found
    if huge == 0 or total < huge or total + huge + page < total:
        return 0
    found = kernel.mmap(0, total + huge + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if found < 0:
        return 0
    unmap(found, total + huge + page)
    return round_up(found + low, huge) - low


cdef Py_ssize_t map_region(const Request *request, int fd, uint64_t offset,
                           int protection) noexcept nogil:
    """Map a region and its guards: its base, or -errno. ``fd`` -1: private reserved memory."""
    cdef size_t low = guard_below(request.flags)
    cdef size_t total = low + request.size + guard_above(request.flags)
    cdef uintptr_t hint = request.va - low if request.va > low else 0
    cdef int fixed = MAP_FIXED_NOREPLACE if request.flags & FLAG_FIXED else 0
    cdef Py_ssize_t base
    cdef Py_ssize_t mapped = 0
    if hint == 0 and request.flags & FLAG_HUGE:
        hint = huge_page_hint(total, low)
    if fd >= 0 and total == request.size:
        base = kernel.mmap(hint, total, protection, MAP_SHARED | fixed, fd, offset)
    else:
        base = reserve(hint, total, fixed)
    if base < 0:
        return base
    if fd >= 0 and total != request.size:
        mapped = kernel.mmap(
            base + low, request.size, protection, MAP_SHARED | MAP_FIXED, fd, offset)
    if mapped >= 0 and fd >= 0 and request.flags & FLAG_HUGE:
        mapped = kernel.madvise(base + low, request.size, MADV_HUGEPAGE)
    if mapped < 0:
        unmap(base, total)
        return mapped
    return base + low
