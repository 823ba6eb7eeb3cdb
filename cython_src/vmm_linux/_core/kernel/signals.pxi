"""signals."""


cdef inline bint is_past_file_limit(uint64_t end) noexcept nogil:
    """Whether a file of so many bytes is longer than this process may make one."""
    cdef file_limit limit
    return getrlimit(RLIMIT_FSIZE, &limit) != 0 or end > limit.rlim_cur

