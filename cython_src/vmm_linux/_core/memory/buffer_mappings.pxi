"""Pages that are an MDL buffer's: mapped from one, or converted into one.

The caller holds the mutex.
"""


cdef Answer map_handle(AddressSpace space, const Request *request) noexcept nogil:
    """Map a part of a buffer, within the handle's rights."""
    cdef HandleEntry *entry = NULL
    cdef uint64_t descriptions
    cdef Answer answer = find_entry(
        space.handles, request.handle, (request.flags & FLAG_RWX_MASK) << RIGHT_MAP_SHIFT, &entry)
    if answer.reason != DONE:
        return answer
    if not is_inside(request, entry.buffer):
        return refused(BEYOND_BUFFER, entry.buffer.size)
    descriptions = entry.buffer.root.descriptions
    answer = map_buffer(space, request, entry.buffer)
    if answer.reason == DONE:
        answer.descriptions = descriptions
    else:
        memory_object_undescribe(entry.buffer, descriptions)
    return answer


cdef Answer map_buffer(AddressSpace space, const Request *request,
                       MemoryObject *buffer) noexcept nogil:
    """Map a part of a memory object; a failure may leave read-only descriptions behind."""
    cdef uint32_t protection = request.flags & FLAG_RWX_MASK
    cdef Plan plan
    cdef uint64_t mappings = 0
    cdef int result
    cdef Answer answer = check_place(request)
    if answer.reason == DONE:
        answer = check_mapping_limits(space, request, buffer)
    if answer.reason != DONE:
        return answer
    answer = map_segments(space, request, buffer)
    if answer.error == -EPERM and protection & FLAG_WRITE:
        return refused(SEALED)
    if answer.error == -EACCES and protection & FLAG_WRITE:
        return kernel_refused(-EBADF)       # ours is open for writing, so this is another file
    if answer.reason != DONE or not request.flags & FLAG_LOCKED or protection == 0:
        return answer
    result = memory_object_check_headroom(buffer, request.offset, request.size)
    if result == 0 and not plan_residence(space.ledger.run_at(answer.result), plan):
        result = -ENOMEM
    if result == 0:
        result = carry_out(plan, &mappings)
    if result < 0:
        unmap_region(space, answer.result)
        return kernel_refused(result, 0, mappings)
    return answer


cdef Answer check_mapping_limits(AddressSpace space, const Request *request,
                                 MemoryObject *buffer) noexcept nogil:
    """Whether a part of a memory object may be mapped once more."""
    cdef Answer answer = check_region_limits(space, request, memory_object_boundaries(
        buffer, request.offset, request.offset + request.size - 1))
    if answer.reason == DONE:
        answer = check_limit(space, MDL_MAPPINGS, 1)
    if answer.reason == DONE and request.flags & FLAG_LOCKED:
        answer = check_limit(space, LOCKED, request.size)
    return answer


cdef Answer map_segments(AddressSpace space, const Request *request,
                         MemoryObject *buffer) noexcept nogil:
    """Map each segment of a part of a memory object, side by side, and enter the region.

    Without WRITE their read-only descriptions are mapped, so that the kernel enforces the ceiling.

    The first mapping is as long as all of them, which reserves the range; each other segment
    replaces what is left after its predecessor. So the kernel never has to cut a mapping in three.
    Undoing needs no new mapping either, which the kernel could refuse: reserved memory may have
    been merged with a neighbour, and returning a part of it would cut that.
    """
    cdef uint32_t protection = request.flags & FLAG_RWX_MASK
    cdef bint writable = protection & FLAG_WRITE != 0
    cdef Extent extent = memory_object_extent(buffer, request.offset, request.size)
    cdef uint64_t mapped = extent.size
    cdef uint64_t mappings
    cdef Py_ssize_t result = memory_object_descriptor(buffer, extent.segment, writable)
    cdef Answer answer
    if result < 0:
        return kernel_refused(<int>result)
    answer = place_region(
        space, request,
        new_run(buffer, request.offset, KIND_MDL, STATE_COMMITTED, request.flags,
                protection),
        <int>result, extent.offset)
    if answer.reason == DONE:
        space.ledger.boundaries += memory_object_boundaries(
            buffer, request.offset, request.offset + request.size - 1)
    while answer.reason == DONE and mapped < request.size:
        extent = memory_object_extent(buffer, request.offset + mapped, request.size - mapped)
        result = memory_object_descriptor(buffer, extent.segment, writable)
        if result >= 0:
            result = map_file(
                answer.result + mapped, request.size - mapped,
                page_access(STATE_COMMITTED, protection), MAP_FIXED, <int>result, extent.offset)
        if result < 0:
            # Counted before undoing, which gives mappings back.
            mappings = kernel.mapping_count() if result == -ENOMEM else 0
            unmap_region(space, answer.result)
            return kernel_refused(<int>result, LIMIT_AS, mappings)
        mapped += extent.size
    return answer


cdef Answer check_convertible(Ledger ledger, uintptr_t va, uintptr_t end,
                              uint32_t forbidden) noexcept nogil:
    """Whether every page is committed, private and unpinned, and gives no forbidden access."""
    cdef uintptr_t pinned
    cdef Runs.iterator run = ledger.run_at(va)
    while ledger.starts_below(run, end):
        if run.value().state != STATE_COMMITTED:
            return refused(NOT_COMMITTED, max(va, run.key()))
        if run.value().kind == KIND_MDL:
            return refused(ALREADY_MDL, max(va, run.key()))
        if run.value().protection & forbidden:
            return refused(FORBIDDEN_OF_MDL, max(va, run.key()))
        preincrement(run)
    pinned = first_pinned(ledger.run_at(va), va, end)
    return done() if pinned == 0 else refused(PINNED, pinned)


cdef Answer convert_to_buffer(AddressSpace space, const Request *request,
                              MemoryObject **buffer) noexcept nogil:
    """Make a memory object of convertible pages, which is then mapped there.

    A whole SHAREABLE region is one already, unless a parent process has it too.
    """
    cdef uintptr_t va = request.va
    cdef uintptr_t end = va + request.size
    cdef uint32_t flags = space.ledger.region_at(va).value().flags
    cdef uint64_t mappings = 0
    cdef int result
    if not space.ledger.isolate(va, end):
        return refused_cut(space)
    buffer[0] = whole_object(space.ledger, va, end)
    if buffer[0] == NULL:
        result = memory_object_new(buffer, request.size, request.flags & FLAG_EXECUTE != 0)
        if result == 0:
            result = convert_pages(space.ledger, flags, va, end, buffer[0], &mappings)
            if result < 0:
                memory_object_release(buffer[0], 0)
        if result < 0:
            space.ledger.coalesce(va, end)
            return kernel_refused(result, LIMIT_AS, mappings)
        release_backing(space.ledger.runs.lower_bound(va), end)
        memory_object_acquire(buffer[0], request.size // PAGE_SIZE)
    space.ledger.set_backing(va, end, buffer[0], 0, KIND_MDL, FLAG_RWX_MASK & ~request.forbidden)
    return done()


cdef MemoryObject *whole_object(Ledger ledger, uintptr_t va, uintptr_t end) noexcept nogil:
    """The memory object of which these pages are all, in order, or NULL."""
    cdef Runs.iterator run = ledger.run_at(va)
    cdef MemoryObject *backing = <MemoryObject *>run.value().backing
    if backing == NULL or backing.size != end - va or memory_object_is_inherited(backing):
        return NULL
    while ledger.starts_below(run, end):
        if run.value().backing != backing or run.value().offset != run.key() - va:
            return NULL
        preincrement(run)
    return backing
