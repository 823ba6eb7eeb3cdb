"""Where a new region goes: its addresses and those of its guards."""

from libc.stdint cimport uintptr_t

from vmm_linux cimport _features, _syscalls
from vmm_linux._plan cimport unmap
from vmm_linux._syscalls cimport (
    MADV_HUGEPAGE,
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
)
from vmm_linux._vocabulary cimport FLAG_FIXED, FLAG_HUGE, round_up


cdef uintptr_t huge_page_hint(size_t total, size_t low, size_t page) noexcept nogil:
    """A free address where a region starts on a huge page, or 0 for the system's choice.

    Newer kernels align by themselves, older ones do not. The address is a hint: if another
    thread takes it first, the region lies elsewhere.
    """
    cdef size_t huge = _features.huge_page_size()
    cdef Py_ssize_t found
    if huge == 0 or total < huge or total + huge + page < total:
        return 0
    found = _syscalls.mmap(0, total + huge + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if found < 0:
        return 0
    unmap(found, total + huge + page)
    return round_up(found + low, huge) - low


cdef Py_ssize_t reserve(const Request *request, size_t low, size_t high,
                        MemoryObject *backing) noexcept nogil:
    """Take the addresses of a region and its guards: the region's base, or -errno."""
    cdef size_t total = low + request.size + high
    cdef uintptr_t hint = request.va - low if request.va > low else 0
    cdef int fixed = MAP_FIXED_NOREPLACE if request.flags & FLAG_FIXED else 0
    cdef Py_ssize_t base, mapped
    if hint == 0 and request.flags & FLAG_HUGE:
        hint = huge_page_hint(total, low, _features.page_size())
    if backing != NULL and total == request.size:
        base = _syscalls.mmap(hint, total, PROT_NONE, MAP_SHARED | fixed, backing.fd, 0)
    else:
        base = _syscalls.mmap(hint, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0)
    if base < 0:
        return base
    mapped = 0
    if backing != NULL and total != request.size:
        mapped = _syscalls.mmap(
            base + low, request.size, PROT_NONE, MAP_SHARED | MAP_FIXED, backing.fd, 0)
    if mapped >= 0 and backing != NULL and request.flags & FLAG_HUGE:
        mapped = _syscalls.madvise(base + low, request.size, MADV_HUGEPAGE)
    if mapped < 0:
        unmap(base, total)
        return mapped
    return base + low
