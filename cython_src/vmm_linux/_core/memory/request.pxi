"""Answers of calls that fail, in numbers."""


cdef Answer beyond_limit(int limit, uint64_t bound, uint64_t used,
                         uint64_t requested) noexcept nogil:
    """A call that asks for more of a limit than its bound leaves."""
    cdef Answer answer = refused(BEYOND_LIMIT)
    answer.limit = limit
    answer.bound = bound
    answer.used = used
    answer.requested = requested
    return answer


cdef Answer kernel_refused(int result, uint32_t resource_limits=0,
                           uint64_t mappings=0) noexcept nogil:
    """A call that the kernel refused with ``result``, a -errno."""
    cdef Answer answer = refused(KERNEL_REFUSED)
    answer.error = result
    answer.resource_limits = resource_limits
    answer.mappings = mappings
    return answer
