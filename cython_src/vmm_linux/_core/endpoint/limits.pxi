"""The limits of a VMM: its bounds, their defaults, and what it uses."""


cdef object bound_or_none(uint64_t bound):
    """A bound as Python has it."""
    return None if bound == NO_BOUND else bound


cdef void set_space_bounds(AddressSpace space, const uint64_t *bounds) noexcept:
    """Bound what is made from now on."""
    lock_space(space)
    set_bounds(space, bounds)
    unlock_space(space)


cdef void read_usage(AddressSpace space, uint64_t *used, uint64_t *bounds) noexcept:
    """What is used and what bounds it, at one moment."""
    cdef int limit
    lock_space(space)
    for limit in range(LIMIT_COUNT):
        used[limit] = usage_of(space, limit)
        bounds[limit] = space.bounds[limit]
    unlock_space(space)


cdef object do_set_limits(VMM self, Call *call, object limits):
    """Bound what is made from now on, by ``Limits`` of the package's own class."""
    cdef uint64_t bounds[LIMIT_COUNT]
    cdef int limit
    if self.space.closed:
        refuse_closed("limits")
    for limit, bound in enumerate(attrgetter(*LIMIT_NAMES)(limits)):
        bounds[limit] = NO_BOUND if bound is None else bound
    set_space_bounds(self.space, bounds)
