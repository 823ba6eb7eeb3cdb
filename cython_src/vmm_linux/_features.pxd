"""What this kernel gives, found by trying (see ``_features.pyx``)."""

from libc.stdint cimport uintptr_t

# The numbers of the Python enum ``Feature``.
cdef enum:
    FEATURE_PROCMAP_QUERY = 0
    FEATURE_PAGEMAP_SCAN = 1
    FEATURE_PAGEMAP = 2
    FEATURE_PAGEMAP_GUARD = 3
    FEATURE_GUARD_REGIONS = 4
    FEATURE_DONTNEED_LOCKED = 5
    FEATURE_MEMFD_NOEXEC_SEAL = 6
    FEATURE_PROCESS_VM = 7
    FEATURE_TRANSPARENT_HUGE_PAGES = 8
    FEATURE_FILE_HANDLES = 9
    FEATURE_VECTORED_GUARDS = 10
    FEATURE_ANONYMOUS_NAMES = 11
    FEATURE_COUNT = 12

cdef extern from *:
    """
    #include <unistd.h>

    /* Of this module: on the way of every call, a look into another one would be felt. */
    static const size_t vmm_page_size = (size_t)sysconf(_SC_PAGESIZE);
    """
    const size_t PAGE_SIZE "vmm_page_size"      # the kernel's page in bytes

cdef bint has(int feature) noexcept nogil
cdef bint lacks(int feature) noexcept nogil
cpdef size_t page_size() noexcept nogil
cpdef uintptr_t user_space_end() noexcept nogil
cpdef uintptr_t mmap_min_addr() noexcept nogil
cpdef size_t huge_page_size() noexcept nogil
