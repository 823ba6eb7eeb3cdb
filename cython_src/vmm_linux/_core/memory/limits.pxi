"""Limits: what there is of each limit, and whether a call may have more. And the invariants.

The caller holds the mutex.
"""

cdef uint64_t usage_of(AddressSpace space, int limit) noexcept nogil:
    """What there is of a limit (see ``vmm_linux.Limits``)."""
    if limit == REGIONS:
        return space.ledger.regions.size()
    elif limit == RESERVED:
        return space.ledger.covered + space.ledger.guards * PAGE_SIZE
    elif limit == COMMITTED:
        return space.ledger.committed
    elif limit == LOCKED:
        return space.ledger.locked + space.buffers.locked
    elif limit == MAPPINGS:
        return space.ledger.mappings()
    elif limit == MDLS:
        return space.buffers.mdls
    elif limit == MDL_BYTES:
        return space.buffers.bytes
    elif limit == MDL_MAPPINGS:
        return space.ledger.mapped
    return space.handles.live.size()


cdef void set_bounds(AddressSpace space, const uint64_t *bounds) noexcept nogil:
    """Bound what is made from now on."""
    cdef int limit
    for limit in range(LIMIT_COUNT):
        space.bounds[limit] = bounds[limit]
    space.ledger.most_mappings = bounds[MAPPINGS]


cdef Answer check_limit(AddressSpace space, int limit, uint64_t requested) noexcept nogil:
    """Whether ``requested`` more of a limit are within its bound.

    A request for zero always passes: a bound can be set below what there is.
    """
    cdef uint64_t used = usage_of(space, limit)
    cdef uint64_t bound = space.bounds[limit]
    if requested == 0 or (used <= bound and requested <= bound - used):
        return done()
    return beyond_limit(limit, bound, used, requested)


cdef Answer check_region_limits(AddressSpace space, const Request *request,
                                uint64_t boundaries=0) noexcept nogil:
    """Whether there may be a region with these flags and so many segment boundaries inside."""
    cdef size_t guards = guard_below(request.flags) + guard_above(request.flags)
    cdef Answer answer = check_limit(space, REGIONS, 1)
    if answer.reason == DONE:
        answer = check_limit(space, RESERVED, request.size + guards)
    if answer.reason == DONE:
        answer = check_limit(space, MAPPINGS, 1 + boundaries + guards // PAGE_SIZE)
    return answer


cdef Answer check_allocate_limits(AddressSpace space, const Request *request) noexcept nogil:
    """Whether there may be a region, committed if that is requested."""
    cdef Answer answer = check_region_limits(space, request)
    if answer.reason == DONE and request.flags & FLAG_COMMIT:
        answer = check_limit(space, COMMITTED, request.size)
        if answer.reason == DONE and request.flags & FLAG_LOCKED:
            answer = check_limit(space, LOCKED, request.size)
    return answer


cdef inline bint is_easily_allocated(AddressSpace space, const Request *request) noexcept nogil:
    """Whether a region fits even with two guards: then no limit is checked by itself.

    Every ``allocate`` asks this, so it calls nothing.
    """
    return (space.ledger.regions.size() < space.bounds[REGIONS]
            and request.size + space.ledger.covered + (space.ledger.guards + 2) * PAGE_SIZE
            <= space.bounds[RESERVED]
            and space.ledger.mappings() + 3 <= space.bounds[MAPPINGS]
            and (not request.flags & FLAG_COMMIT or is_easily_committed(space, request.size)))


cdef Answer check_commit_limits(AddressSpace space, Runs.iterator run, uintptr_t va,
                                uintptr_t end) noexcept nogil:
    """Whether the reserved pages of a range in one region, from a run on, may be committed."""
    cdef uint64_t requested = reserved_bytes(space.ledger, run, va, end)
    cdef Answer answer = check_limit(space, COMMITTED, requested)
    if answer.reason == DONE and run.value().locked:
        answer = check_limit(space, LOCKED, requested)
    return answer


cdef bint is_easily_committed(AddressSpace space, uint64_t size) noexcept nogil:
    """Whether so many bytes fit even if all are reserved and locked: then no page is looked at."""
    return (size + space.ledger.committed <= space.bounds[COMMITTED]
            and size + space.ledger.locked + space.buffers.locked <= space.bounds[LOCKED])


cdef uint64_t reserved_bytes(Ledger ledger, Runs.iterator run, uintptr_t va,
                             uintptr_t end) noexcept nogil:
    """How many bytes of a range are reserved, from the run that includes ``va`` on."""
    cdef uint64_t size = 0
    while ledger.starts_below(run, end):
        if run.value().state == STATE_RESERVED:
            size += min(end, run.value().end) - max(va, run.key())
        preincrement(run)
    return size


cdef Answer check_buffer_limits(AddressSpace space, uint64_t mdls, uint64_t size,
                                bint locked) noexcept nogil:
    """Whether there may be one more handle, of so many more memory objects with so many bytes."""
    cdef Answer answer = check_limit(space, HANDLES, 1)
    if answer.reason == DONE:
        answer = check_limit(space, MDLS, mdls)
    if answer.reason == DONE:
        answer = check_limit(space, MDL_BYTES, size)
    if answer.reason == DONE and locked:
        answer = check_limit(space, LOCKED, size)
    return answer


cdef Answer refused_cut(AddressSpace space) noexcept nogil:
    """Why the ledger could not cut runs at the ends of a range, which takes two runs at most."""
    cdef uint64_t used = space.ledger.mappings()
    cdef uint64_t bound = space.bounds[MAPPINGS]
    if used + 1 >= bound:
        return beyond_limit(MAPPINGS, bound, used, 2 if used < bound else 1)
    return refused(NO_LEDGER_MEMORY)


cdef const char *find_flaw(AddressSpace space, uintptr_t *where) noexcept nogil:
    """The first invariant that does not hold, and where; NULL when all do."""
    cdef const char *flaw = space.ledger.flaw(where)
    cdef Regions.iterator region = space.ledger.regions.begin()
    cdef uint64_t boundaries = 0
    while flaw == NULL and region != space.ledger.regions.end():
        where[0] = region.key()
        boundaries += boundaries_inside(
            space.ledger.run_at(where[0]), where[0] + PAGE_SIZE, region.value().end - PAGE_SIZE)
        preincrement(region)
    if flaw == NULL and boundaries != space.ledger.boundaries:
        return b"a count of segments that is not what the regions add up to"
    return flaw
