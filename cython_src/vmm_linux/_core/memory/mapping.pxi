"""Every mmap(2), munmap(2) and mremap(2) of the layer, and the place of a new region.

The caller holds the mutex. Every function returns an address, 0, or -errno.
"""


cdef Py_ssize_t reserve(uintptr_t start, size_t size, int fixed) noexcept nogil:
    """Map private reserved memory: its address. ``fixed``: MAP_FIXED, MAP_FIXED_NOREPLACE or 0.

    The one place that makes private memory for regions, so that all of it has one name where the
    kernel has names: mappings with different names never merge. Memory without its name is as
    good. The kernel names a whole mapping without cutting any, at the map-count wall too. One
    merged with a mapping that is not the package's it would first have to cut off; where it can
    have no more mappings, or has no memory for a name, it changes nothing.
    """
    cdef Py_ssize_t address = kernel.mmap(
        start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0)
    if address >= 0 and kernel.has(kernel.FEATURE_ANONYMOUS_NAMES):
        kernel.name_memory(address, size, b"vmm_linux region")
    return address


cdef int reserve_afresh(uintptr_t start, size_t size) noexcept nogil:
    """Put fresh PROT_NONE memory in place of private pages."""
    return <int>min(0, reserve(start, size, MAP_FIXED))


cdef inline Py_ssize_t map_file(uintptr_t start, size_t size, int protection, int fixed, int fd,
                                uint64_t offset) noexcept nogil:
    """Map a part of a memory file, shared: its address."""
    return kernel.mmap(start, size, protection, MAP_SHARED | fixed, fd, offset)


cdef inline int move_mapping(uintptr_t start, size_t size, uintptr_t to) noexcept nogil:
    """Move a mapping in place of what is mapped at ``to``."""
    return <int>min(0, kernel.mremap(start, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, to))


cdef inline int unmap(uintptr_t start, size_t size) noexcept nogil:
    """Give addresses back: the one place that calls munmap(2)."""
    return kernel.munmap(start, size)


cdef size_t guard_below(uint64_t flags) noexcept nogil:
    """Bytes of the guard below a region with these flags."""
    return PAGE_SIZE if flags & FLAG_LOW_GUARD else 0


cdef size_t guard_above(uint64_t flags) noexcept nogil:
    """Bytes of the guard above a region with these flags."""
    return PAGE_SIZE if flags & FLAG_HIGH_GUARD else 0


cdef Answer check_place(const Request *request) noexcept nogil:
    """Whether a region with its guards can lie at the requested address, if nothing else does."""
    cdef uintptr_t highest = kernel.user_space_end()
    cdef size_t low = guard_below(request.flags)
    cdef size_t total = low + request.size + guard_above(request.flags)
    if request.size > highest or total > highest:
        return refused(TOO_LARGE)
    if request.flags & FLAG_FIXED and (
            request.va < kernel.mmap_min_addr() + low or request.va > highest - total + low):
        return refused(OUTSIDE)
    return done()


cdef Py_ssize_t map_region(const Request *request, int fd, uint64_t offset,
                           int protection) noexcept nogil:
    """Map a region and its guards: its base. ``fd`` -1: private reserved memory."""
    cdef size_t low = guard_below(request.flags)
    cdef size_t total = low + request.size + guard_above(request.flags)
    cdef uintptr_t hint = request.va - low if request.va > low else 0
    cdef int fixed = MAP_FIXED_NOREPLACE if request.flags & FLAG_FIXED else 0
    cdef Py_ssize_t base, mapped = 0
    if hint == 0 and request.flags & FLAG_HUGE:
        hint = huge_page_hint(total, low)
    if fd >= 0 and total == request.size:
        base = map_file(hint, total, protection, fixed, fd, offset)
    else:
        base = reserve(hint, total, fixed)
    if base < 0:
        return base
    if fd >= 0 and total != request.size:
        mapped = map_file(base + low, request.size, protection, MAP_FIXED, fd, offset)
    if mapped >= 0 and fd >= 0 and request.flags & FLAG_HUGE:
        mapped = kernel.madvise(base + low, request.size, MADV_HUGEPAGE)
    if mapped < 0:
        unmap(base, total)
        return mapped
    return base + low


cdef uintptr_t huge_page_hint(size_t total, size_t low) noexcept nogil:
    """A free address where a region starts on a huge page, or 0 for the system's choice.

    Newer kernels align by themselves, older ones do not. The address is a hint: if another
    thread takes it first, the region lies elsewhere.
    """
    cdef size_t huge = kernel.huge_page_size()
    cdef size_t room = total + huge + PAGE_SIZE
    cdef Py_ssize_t found
    if huge == 0 or total < huge or room < total:
        return 0
    found = kernel.mmap(0, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if found < 0:
        return 0
    unmap(found, room)
    return round_up(found + low, huge) - low
