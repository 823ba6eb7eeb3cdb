"""request."""


cdef inline Answer beyond_limit(int figure, uint64_t bound, uint64_t used,
                                uint64_t wish) noexcept nogil:
    """A call that wished for more of a figure than its bound leaves."""
    cdef Answer answer = refused(BEYOND_LIMIT, wish)
    answer.limits = figure
    answer.bound = bound
    answer.out = used
    return answer



cdef inline Answer kernel_refused(int result, uint32_t limits=0,
                                  uint64_t mappings=0) noexcept nogil:
    """A call that the kernel refused with -errno."""
    cdef Answer answer = refused(KERNEL_REFUSED, mappings)
    answer.error = -result
    answer.limits = limits
    return answer

