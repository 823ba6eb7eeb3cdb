"""The address space of one VMM, ledger and kernel in step: its regions, from allocate to close.

The order inside a call is always the same: look at the ledger, check the limits, cut runs
at the ends of the range (the last thing that may run out of memory, or of mappings), plan, carry
the plan out, and write the result into the ledger, which cannot fail. The caller holds the mutex.
"""


@cython.no_gc
cdef class AddressSpace:
    """Regions, pages, pins, buffers and handles of one VMM."""

    __reduce__ = refuse_copies("each belongs to one VMM")

    def __cinit__(self):
        cdef int limit
        self.ledger = Ledger()
        self.handles = HandleTable()
        self.closed = False
        for limit in range(LIMIT_COUNT):
            self.bounds[limit] = NO_BOUND
        self.mutex = mutex_new()
        if self.mutex == NULL:
            raise MemoryError("no memory for a mutex")

    def __dealloc__(self):
        if self.mutex != NULL:
            unmap_unpinned(self)
            mutex_delete(self.mutex)


cdef Answer allocate_region(AddressSpace space, const Request *request) noexcept nogil:
    """Reserve a region with its guards, and commit it if that is requested."""
    cdef MemoryObject *backing = NULL
    cdef Run run
    cdef int result
    cdef Answer answer = check_place(request)
    cdef Answer committed
    if answer.reason != DONE:
        return answer
    if request.flags & FLAG_HUGE and kernel.lacks(kernel.FEATURE_TRANSPARENT_HUGE_PAGES):
        return refused(NO_HUGE_PAGES)
    if not is_easily_allocated(space, request):
        answer = check_allocate_limits(space, request)
        if answer.reason != DONE:
            return answer
    if request.flags & FLAG_SHAREABLE:
        result = memory_object_new(&backing, request.size, request.flags & FLAG_EXECUTE != 0)
        if result < 0:
            return kernel_refused(result)
    run = new_run(backing, 0, KIND_PRIVATE, STATE_RESERVED, request.flags, FLAG_RWX_MASK)
    answer = place_region(space, request, run, -1 if backing == NULL else backing.identity.fd, 0)
    if answer.reason != DONE:
        if backing != NULL:
            memory_object_release(backing, 0)
    elif request.flags & FLAG_COMMIT:
        committed = commit_pages(
            space, space.ledger.region_at(answer.result), answer.result,
            answer.result + request.size)
        if committed.reason != DONE:
            unmap_region(space, answer.result)
            return committed
    return answer


cdef Answer place_region(AddressSpace space, const Request *request, Run run, int fd,
                         uint64_t offset) noexcept nogil:
    """Map a region with its guards, whose pages are all as ``run`` says, and enter it.

    Parameters:
        fd: the memory file to map, or -1 for private memory.
        offset: in that file, in bytes.
    """
    cdef Py_ssize_t base = map_region(request, fd, offset, page_access(run.state, run.protection))
    cdef Region region
    cdef Answer answer = done()
    if base == -EEXIST:
        return refused(TAKEN)
    if base < 0:
        return kernel_refused(<int>base, LIMIT_AS)
    region.end = run.end = base + request.size
    region.flags = request.flags
    region.low_guard = request.flags & FLAG_LOW_GUARD != 0
    region.high_guard = request.flags & FLAG_HIGH_GUARD != 0
    if not space.ledger.insert(base, region, run):
        unmap(base - guard_below(request.flags),
              guard_below(request.flags) + request.size + guard_above(request.flags))
        return refused(NO_LEDGER_MEMORY)
    if run.backing != NULL:
        memory_object_acquire(<MemoryObject *>run.backing, request.size // PAGE_SIZE)
    answer.result = base
    return answer


cdef Run new_run(MemoryObject *backing, uint64_t offset, uint32_t kind, uint32_t state,
                 uint32_t flags, uint32_t ceiling) noexcept nogil:
    """The pages of a new region; their end is filled in once it is known."""
    cdef Run run
    memset(&run, 0, sizeof(run))
    run.backing = backing
    run.offset = offset
    run.state = state
    run.protection = flags & FLAG_RWX_MASK
    run.ceiling = ceiling
    run.kind = kind
    run.locked = flags & FLAG_LOCKED != 0
    return run


cdef Answer free_pages(AddressSpace space, Regions.iterator region, uintptr_t va,
                       uintptr_t end) noexcept nogil:
    """Unmap a part of a region, or all of it; a guard goes with the page next to it."""
    cdef Runs.iterator run = space.ledger.run_at(va)
    cdef uintptr_t pinned = first_pinned(run, va, end)
    cdef int result
    cdef Answer answer
    if pinned != 0:
        return refused(PINNED, pinned)
    if region.key() < va and end < region.value().end:
        answer = check_limit(space, REGIONS, 1)
        if answer.reason == DONE and region.value().flags & FLAG_RESERVE == 0:
            answer = check_limit(space, MDL_MAPPINGS, 1)
        if answer.reason != DONE:
            return answer
        if not space.ledger.isolate_from(&run, va, end):
            return refused_cut(space)
    elif not space.ledger.isolate_to_remove(&run, va, end):
        return refused(NO_LEDGER_MEMORY)
    result = unmap_pages(space, region, run, end)
    if result < 0:
        space.ledger.coalesce_from(run, end)
        return kernel_refused(result)
    return done()


cdef Answer close_space(AddressSpace space) noexcept nogil:
    """Unmap every region except those that a view pins: each of these ends with its last view.

    Where the kernel refuses to unmap a region, the VMM stays open and can be closed again.
    """
    cdef int result = unmap_unpinned(space)
    space.closed = result == 0
    if space.closed:
        close_all_entries(space.handles)
    return done() if result == 0 else kernel_refused(result)


cdef int unmap_unpinned(AddressSpace space) noexcept nogil:
    """Unmap every region that no view pins: 0, or -errno of what the kernel refused.

    At the map-count wall a region in the middle of a merged mapping cannot go before its
    neighbours, so this repeats until no more regions can be unmapped.
    """
    cdef Regions.iterator region
    cdef uintptr_t base, end
    cdef bint progress = True
    cdef int refusal = 0, result
    while progress:
        progress = False
        refusal = 0
        region = space.ledger.regions.begin()
        while region != space.ledger.regions.end():
            base = region.key()
            end = region.value().end
            if first_pinned(space.ledger.run_at(base), base, end) == 0:
                result = unmap_region(space, base)
                progress = progress or result == 0
                refusal = min(refusal, result)
            region = space.ledger.regions.upper_bound(base)
        if refusal == 0:
            return 0
    return refusal


cdef int unmap_region(AddressSpace space, uintptr_t base) noexcept nogil:
    """Unmap and forget a whole region: 0 or -errno."""
    cdef Regions.iterator region = space.ledger.region_at(base)
    return unmap_pages(space, region, space.ledger.run_at(base), region.value().end)


cdef int unmap_pages(AddressSpace space, Regions.iterator region, Runs.iterator run,
                     uintptr_t end) noexcept nogil:
    """Unmap and forget isolated pages of a region, from a run on, with the guards next to them.

    Returns 0 or -errno. A SHAREABLE part gives its memory back if no other process can have it.
    Up to a region's end this needs no memory: a call that runs out of it is undone this way.
    """
    cdef uintptr_t base = region.key()
    cdef uintptr_t region_end = region.value().end
    cdef uintptr_t start = run.key()
    cdef uintptr_t low = start, high = end
    cdef int result
    if start == base and region.value().low_guard:
        low -= PAGE_SIZE
    if end == region_end and region.value().high_guard:
        high += PAGE_SIZE
    if end < region_end and not space.ledger.split(end):
        return -ENOMEM
    result = unmap(low, high - low)
    if result < 0:
        if end < region_end:
            space.ledger.join(end)
        return result
    space.ledger.boundaries -= boundaries_inside(
        run, max(start, base + PAGE_SIZE), min(end, region_end - PAGE_SIZE))
    release_backing(run, end)
    space.ledger.remove_from(region, run, end)
    if start > base:
        close_chunk(space.ledger, start - PAGE_SIZE)
    if end < region_end:
        close_chunk(space.ledger, end)
    return 0


cdef uintptr_t first_pinned(Runs.iterator run, uintptr_t start, uintptr_t end) noexcept nogil:
    """The first address that a view pins, from the run that includes ``start``, or 0."""
    while run.value().pins == 0:
        if run.value().end >= end:
            return 0
        preincrement(run)
    return max(start, run.key())


cdef void release_backing(Runs.iterator run, uintptr_t end) noexcept nogil:
    """Release the memory objects behind unmapped pages, from a run on."""
    cdef MemoryObject *backing
    cdef size_t length
    while True:
        backing = <MemoryObject *>run.value().backing
        if backing != NULL:
            length = run.value().end - run.key()
            if run.value().kind == KIND_PRIVATE and memory_object_is_exclusive(backing):
                memory_object_punch(backing, run.value().offset, length)
            memory_object_release(backing, length // PAGE_SIZE)
        if run.value().end >= end:
            return
        preincrement(run)


cdef void close_chunk(Ledger ledger, uintptr_t at) noexcept nogil:
    """Close an open chunk that has no committed page left, which returns its commit charge.

    Where the kernel or the ledger has no memory for that, the chunk stays open.
    """
    cdef Chunk chunk = chunks_around(ledger, at, at + 1)
    if not is_open_and_unused(ledger, chunk):
        return
    if (ledger.isolate(chunk.start, chunk.end)
            and reserve_afresh(chunk.start, chunk.end - chunk.start) == 0):
        ledger.set_state(chunk.start, chunk.end, STATE_RESERVED)
    else:
        ledger.coalesce(chunk.start, chunk.end)


cdef uint64_t boundaries_inside(Runs.iterator run, uintptr_t first, uintptr_t last) noexcept nogil:
    """How many segments begin at ``first`` to ``last``, addresses in pages of one buffer."""
    cdef MemoryObject *backing = <MemoryObject *>run.value().backing
    if backing == NULL or backing.root.segment_count < 2 or last < first:
        return 0
    return memory_object_boundaries(
        backing, run.value().offset + (first - run.key()) - 1,
        run.value().offset + (last - run.key()))
