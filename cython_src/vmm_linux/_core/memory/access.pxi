"""Access to committed pages: check, copy and pin them, and the memory that a copy takes.

The caller holds the mutex; the bytes lie inside one region.
"""


cdef Answer check_access(Ledger ledger, uintptr_t va, size_t size, uint32_t access) noexcept nogil:
    """Whether every page of the bytes is committed and gives ``access``.

    The answer's ``access`` is what all of them give.
    """
    cdef Runs.iterator run = ledger.run_at(va)
    cdef Answer answer = done()
    answer.access = FLAG_RWX_MASK
    while ledger.starts_below(run, va + size):
        if run.value().state != STATE_COMMITTED:
            return refused(NOT_COMMITTED, max(va, run.key()))
        if access & ~run.value().protection:
            return refused(NO_ACCESS, max(va, run.key()))
        answer.access &= run.value().protection
        preincrement(run)
    return answer


cdef Answer copy_bytes(AddressSpace space, const Request *request) noexcept nogil:
    """Copy between the range and a buffer; a shortage of shared memory is reported as one."""
    cdef Answer answer = check_access(space.ledger, request.va, request.size, request.flags)
    cdef size_t copied = 0
    cdef int result
    if answer.reason != DONE:
        return answer
    if not has_headroom_to_copy(space, request):
        return kernel_refused(-EDQUOT)
    result = copy(request.method == READ, request.data, request.va, request.size, &copied)
    if result < 0:
        answer = kernel_refused(result)
        if result == -EFAULT and space.ledger.run_at(request.va + copied).value().backing != NULL:
            answer.reason = NO_BACKING_MEMORY
            answer.subject = request.va + copied
    if request.method == WRITE:
        answer.completed = copied
    return answer


cdef bint has_headroom_to_copy(AddressSpace space, const Request *request) noexcept nogil:
    """Whether there is headroom for the memory of a copy: first estimated, then counted."""
    cdef size_t grain
    cdef uint64_t most
    if not kernel.group_has_limit():
        return True
    grain = grain_at(space.ledger, request.va)
    most = round_up(request.va + request.size, grain) - round_down(request.va, grain)
    if request.method == READ:
        most += request.size + 2 * PAGE_SIZE
    return (kernel.group_has_headroom(most)
            or kernel.group_has_headroom(memory_to_copy(space.ledger, request, grain)))


cdef size_t grain_at(Ledger ledger, uintptr_t va) noexcept nogil:
    """How many bytes of memory a touch may take in the region that includes ``va``."""
    cdef Regions.iterator region = ledger.region_at(va)
    if region.value().flags & FLAG_HUGE or kernel.is_huge_everywhere():
        return max(PAGE_SIZE, kernel.huge_page_size())
    return PAGE_SIZE


cdef uint64_t memory_to_copy(Ledger ledger, const Request *request, size_t grain) noexcept nogil:
    """How many bytes of memory a copy takes, for the region's pages and the buffer's."""
    cdef uintptr_t end = round_up(request.va + request.size, PAGE_SIZE)
    cdef uintptr_t at = round_down(request.va, PAGE_SIZE)
    cdef uintptr_t until
    cdef uint64_t size = 0, needed
    cdef Runs.iterator run = ledger.run_at(at)
    while at < end:
        until = min(end, run.value().end)
        needed = memory_to_touch(run, request.method, at, until)
        if needed > 0 and grain > PAGE_SIZE:
            needed = memory_to_touch(
                run, request.method, max(run.key(), round_down(at, grain)),
                min(run.value().end, round_up(until, grain)))
        size += needed
        at = until
        preincrement(run)
    if request.method == READ:
        at = <uintptr_t>request.data
        size += procfs.without_own_memory(
            round_down(at, PAGE_SIZE), round_up(at + request.size, PAGE_SIZE))
    return size


cdef uint64_t memory_to_touch(Runs.iterator run, Method method, uintptr_t start,
                              uintptr_t end) noexcept nogil:
    """How many bytes of memory it takes to read or write pages of a run, which are committed.

    Reading a hole in a memory file gives it memory; private pages share one page of zeros.
    """
    cdef MemoryObject *backing = <MemoryObject *>run.value().backing
    if backing != NULL:
        return memory_object_holes(
            backing, run.value().offset + (start - run.key()), end - start, True)
    return procfs.without_own_memory(start, end) if method == WRITE else 0


cdef Answer pin_pages(AddressSpace space, const Request *request) noexcept nogil:
    """Pin the pages that the bytes touch, if they give the requested access."""
    cdef Answer answer = check_access(space.ledger, request.va, request.size, request.flags)
    if answer.reason == DONE and not space.ledger.pin(
            round_down(request.va, PAGE_SIZE), round_up(request.va + request.size, PAGE_SIZE)):
        return refused_cut(space)
    return answer


cdef Answer unpin_pages(AddressSpace space, uintptr_t va, size_t size) noexcept nogil:
    """Unpin pages; in a closed VMM, unmap the regions that no view pins any more."""
    space.ledger.unpin(round_down(va, PAGE_SIZE), round_up(va + size, PAGE_SIZE))
    if space.closed:
        unmap_unpinned(space)
    return done()
