"""The address space of one VMM: ledger and kernel in step.

Every call is one ``Request``, carried out by ``perform`` under the VMM's mutex, without a
Python object in sight: no garbage collection, no signal handler and no other Python code can
run while the mutex is held. What went wrong comes back as a number and becomes an exception
afterwards.

The order inside a call is always the same: look at the ledger, see that limits allow it, cut runs
at the borders (the last thing that may run out of memory, or of mappings), plan, carry the plan
out, and write the result into the ledger, which cannot fail.
"""


@cython.no_gc
cdef class AddressSpace:
    """Regions, pages, pins, buffers and handles of one VMM."""

    __reduce__ = refuse_copies("each belongs to one VMM")

    def __cinit__(self):
        cdef int figure
        self.ledger = Ledger()
        self.handles = HandleTable()
        self.closed = False
        for figure in range(FIGURES):
            self.bounds[figure] = NO_BOUND
        self.mutex = mutex_new()
        if self.mutex == NULL:
            raise MemoryError("no memory for a mutex")

    def __dealloc__(self):
        if self.mutex != NULL:
            unmap_unpinned(self)
            mutex_delete(self.mutex)


# ---- limits; the caller holds the mutex ------------------------------------------------------


cdef uint64_t usage_of(AddressSpace self, int figure) noexcept nogil:
    """What there is of a figure (see ``vmm_linux.Limits``)."""
    if figure == REGIONS:
        return self.ledger.regions.size()
    if figure == RESERVED:
        return self.ledger.covered + self.ledger.guards * kernel.page_size()
    if figure == COMMITTED:
        return self.ledger.committed
    if figure == LOCKED:
        return self.ledger.locked + self.buffers.locked
    if figure == MAPPINGS:
        return self.ledger.mappings()
    if figure == MDLS:
        return self.buffers.mdls
    if figure == MDL_BYTES:
        return self.buffers.bytes
    if figure == MDL_MAPPINGS:
        return self.ledger.mapped
    return self.handles.live.size()


cdef Answer check_limit(AddressSpace self, int figure, uint64_t requested) noexcept nogil:
    """Whether ``requested`` more of a figure are within its bound.

    A request for zero always passes: a bound can be set below what there is.
    """
    cdef uint64_t used = usage_of(self, figure)
    cdef uint64_t bound = self.bounds[figure]
    if requested == 0 or (used <= bound and requested <= bound - used):
        return done()
    return beyond_limit(figure, bound, used, requested)


cdef Answer check_region_limits(AddressSpace self, const Request *request,
                            uint64_t seams=0) noexcept nogil:
    """Whether a region with these flags may be made, of one segment and ``seams`` more."""
    cdef size_t guards = guard_below(<uint32_t>request.flags) + guard_above(request.flags)
    cdef Answer answer = check_limit(self, REGIONS, 1)
    if answer.reason == DONE:
        answer = check_limit(self, RESERVED, request.size + guards)
    if answer.reason == DONE:
        answer = check_limit(self, MAPPINGS, 1 + seams + guards // kernel.page_size())
    return answer


cdef Answer check_allocate_limits(AddressSpace self, const Request *request) noexcept nogil:
    """Whether a region may be made, and committed if that is asked for."""
    cdef Answer answer = check_region_limits(self, request)
    if answer.reason == DONE and request.flags & FLAG_COMMIT:
        answer = check_limit(self, COMMITTED, request.size)
        if answer.reason == DONE and request.flags & FLAG_LOCKED:
            answer = check_limit(self, LOCKED, request.size)
    return answer


cdef Answer check_commit_limits(AddressSpace self, Runs.iterator run, uintptr_t va,
                            uintptr_t end) noexcept nogil:
    """Whether the reserved pages of a range in one region, from a run on, may be committed."""
    cdef uint64_t requested = reserved_bytes(self, run, va, end)
    cdef Answer answer = check_limit(self, COMMITTED, requested)
    if answer.reason == DONE and run.value().locked:
        answer = check_limit(self, LOCKED, requested)
    return answer


cdef bint is_easily_committed(AddressSpace self, uint64_t size) noexcept nogil:
    """Whether so many bytes fit even if all are reserved and locked: then none is looked at."""
    return (size + self.ledger.committed <= self.bounds[COMMITTED]
            and size + self.ledger.locked + self.buffers.locked <= self.bounds[LOCKED])


cdef uint64_t reserved_bytes(AddressSpace self, Runs.iterator run, uintptr_t va,
                             uintptr_t end) noexcept nogil:
    """How many bytes of a range, from the run that includes ``va`` on, are reserved."""
    cdef uint64_t size = 0
    while self.ledger.starts_below(run, end):
        if run.value().state == STATE_RESERVED:
            size += min(end, run.value().end) - max(va, run.key())
        preincrement(run)
    return size


cdef Answer no_run(AddressSpace self) noexcept nogil:
    """Why the ledger had no run more: a cut takes two at most."""
    if self.ledger.mappings() + 1 >= self.bounds[MAPPINGS]:
        return beyond_limit(
            MAPPINGS, self.bounds[MAPPINGS], self.ledger.mappings(),
            2 if self.ledger.mappings() < self.bounds[MAPPINGS] else 1)
    return refused(NO_LEDGER_MEMORY)


cdef void set_bounds(AddressSpace self, const uint64_t *bounds) noexcept nogil:
    """Bound what is made from now on."""
    cdef int figure
    for figure in range(FIGURES):
        self.bounds[figure] = bounds[figure]
    self.ledger.most_mappings = bounds[MAPPINGS]


cdef const char *find_flaw(AddressSpace self, uintptr_t *where) noexcept nogil:
    """The first invariant that does not hold, and where; NULL when all do."""
    cdef size_t page = kernel.page_size()
    cdef const char *flaw = self.ledger.flaw(where)
    cdef Regions.iterator region = self.ledger.regions.begin()
    cdef uint64_t seams = 0
    while flaw == NULL and region != self.ledger.regions.end():
        where[0] = region.key()
        seams += seams_inside(
            self.ledger.run_at(where[0]), where[0] + page,
            region.value().end - page)
        preincrement(region)
    if flaw == NULL and seams != self.ledger.seams:
        return b"a count of segments that is not what the regions add up to"
    return flaw


# ---- the methods; the caller holds the mutex ------------------------------------------------


cdef Answer allocate_region(AddressSpace self, const Request *request) noexcept nogil:
    """Reserve a region with its guards, and commit it if asked to."""
    cdef MemoryObject *backing = NULL
    cdef Run run
    cdef int error = 0
    cdef Answer answer = check_place(request)
    cdef Answer committed
    if answer.reason != DONE:
        return answer
    if (request.flags & FLAG_HUGE
            and kernel.lacks(kernel.FEATURE_TRANSPARENT_HUGE_PAGES)):
        return refused(NO_HUGE_PAGES)
    if not is_easily_allocated(self, request):
        answer = check_allocate_limits(self, request)
        if answer.reason != DONE:
            return answer
    if request.flags & FLAG_SHAREABLE:
        backing = memory_object_new(request.size, request.flags & FLAG_EXECUTE != 0, &error)
        if backing == NULL:
            return kernel_refused(-error)
    run = run_of(backing, 0, KIND_PRIVATE, STATE_RESERVED, <uint32_t>request.flags, FLAG_RWX_MASK)
    answer = place_region(self, request, run, -1 if backing == NULL else backing.identity.fd, 0)
    if answer.reason != DONE:
        if backing != NULL:
            memory_object_release(backing, 0)
    elif request.flags & FLAG_COMMIT:
        committed = commit_pages(
           self,  self.ledger.region_at(answer.result), answer.result, answer.result + request.size)
        if committed.reason != DONE:
            unmap_region(self, answer.result)
            return committed
    return answer


cdef Answer place_region(AddressSpace self, const Request *request, Run run, int fd,
                  uint64_t offset) noexcept nogil:
    """Map a region with its guards, whose pages are all as ``run`` says, and enter it."""
    cdef Py_ssize_t base = map_region(
        request, fd, offset, page_access(run.state, run.protection))
    cdef Region region
    cdef Answer answer = done()
    if base == -EEXIST:
        return refused(TAKEN)
    if base < 0:
        return kernel_refused(<int>base, LIMIT_AS)
    region.end = run.end = base + request.size
    region.flags = <uint32_t>request.flags
    region.low_guard = request.flags & FLAG_LOW_GUARD != 0
    region.high_guard = request.flags & FLAG_HIGH_GUARD != 0
    if not self.ledger.insert(base, region, run):
        unmap(base - guard_below(<uint32_t>request.flags),
              guard_below(<uint32_t>request.flags) + request.size + guard_above(request.flags))
        return refused(NO_LEDGER_MEMORY)
    if run.backing != NULL:
        memory_object_acquire(
            <MemoryObject *>run.backing, request.size // kernel.page_size())
    answer.result = base
    return answer


cdef Answer commit_pages(AddressSpace self, Regions.iterator region, uintptr_t va,
                   uintptr_t end) noexcept nogil:
    """Commit the reserved pages of the range."""
    cdef Runs.iterator run = self.ledger.run_at(va)
    cdef uint32_t flags = region.value().flags
    cdef Chunk chunk
    cdef Answer answer
    if not self.ledger.narrow(&run, &va, &end):
        return done()
    chunk = chunks_of(region, va, end)
    if not is_easily_committed(self, end - va):
        answer = check_commit_limits(self, run, va, end)
        if answer.reason != DONE:
            return answer
    if is_just_guarded(run.value(), end):
        return commit_behind_guards(self, run, va, end)
    if suits(self.ledger, flags, run, chunk, va, end):
        if commit_by_guards(self, chunk, va, end):
            return done()
        run = self.ledger.run_at(va)
    return commit_by_mappings(self, flags, run, va, end)


cdef Answer commit_by_mappings(AddressSpace self, uint32_t flags, Runs.iterator run, uintptr_t va,
                               uintptr_t end) noexcept nogil:
    """Commit the reserved pages of the range, from a run on, and open no chunk for that."""
    cdef Plan plan
    if not self.ledger.isolate_from(&run, va, end):
        return no_run(self)
    if not plan_commit(self.ledger, flags, run, end, plan):
        self.ledger.coalesce_from(run, end)
        return refused(NO_LEDGER_MEMORY)
    return settle(self, plan, run, end, STATE_COMMITTED)


cdef Answer commit_behind_guards(AddressSpace self, Runs.iterator run, uintptr_t va, uintptr_t end) noexcept nogil:
    """Commit pages of one run that lie behind guards and need nothing else."""
    cdef int result
    if not self.ledger.isolate_from(&run, va, end):
        return no_run(self)
    result = remove_guards(va, end)
    if result < 0:
        guard(va, end)
        self.ledger.coalesce_from(run, end)
        return kernel_refused(result)
    self.ledger.set_state_from(run, end, STATE_COMMITTED)
    return done()


cdef bint commit_by_guards(AddressSpace self, Chunk chunk, uintptr_t va, uintptr_t end) noexcept nogil:
    """Commit the range in an open chunk; false with nothing changed where that cannot be."""
    cdef Plan plan
    cdef uint64_t mappings
    cdef uint32_t access = opening_access(self.ledger, va, end)
    cdef Runs.iterator run = self.ledger.run_at(chunk.start)
    if access == 0 or not self.ledger.narrow(&run, &chunk.start, &chunk.end):
        return False
    if (self.ledger.isolate(chunk.start, chunk.end) and self.ledger.isolate(va, end)
            and plan_opening(self.ledger, chunk, va, end, access, plan)
            and carry_out(plan, &mappings) == 0):
        self.ledger.set_state(va, end, STATE_COMMITTED)
        self.ledger.set_opened(chunk.start, chunk.end, access)
        return True
    self.ledger.coalesce(chunk.start, chunk.end)
    return False


cdef Answer decommit_pages(AddressSpace self, Regions.iterator region, uintptr_t va,
                     uintptr_t end) noexcept nogil:
    """Reserve the committed pages of the range again."""
    cdef Plan plan
    cdef Runs.iterator run = self.ledger.run_at(va)
    cdef uint32_t flags = region.value().flags
    cdef Chunk chunk = chunks_of(region, va, end)
    cdef Answer answer = check_decommit(self, run, va, end)
    if answer.reason != DONE or not any_committed(self, run, end):
        return answer
    if (suits(self.ledger, flags, run, chunk, va, end)
            and decommit_by_guards(self, run, chunk, va, end)):
        return done()
    if not flags & FLAG_SHAREABLE:
        va = closing_start(self.ledger, va, end)
        end = closing_end(self.ledger, va, end)
        run = self.ledger.run_at(va)
    if not self.ledger.isolate_from(&run, va, end):
        return no_run(self)
    if not plan_decommit(self.ledger, flags, run, end, plan):
        self.ledger.coalesce_from(run, end)
        return refused(NO_LEDGER_MEMORY)
    return settle(self, plan, run, end, STATE_RESERVED)


cdef Answer check_decommit(AddressSpace self, Runs.iterator run, uintptr_t va,
                           uintptr_t end) noexcept nogil:
    """Whether pages may be decommitted, from the run that includes ``va`` on."""
    cdef MemoryObject *backing
    cdef uintptr_t pinned = 0
    while self.ledger.starts_below(run, end):
        if run.value().kind == KIND_MDL:
            return refused(IS_MDL, max(va, run.key()))
        backing = <MemoryObject *>run.value().backing
        if (backing != NULL and run.value().state == STATE_COMMITTED
                and memory_object_is_inherited(backing)):
            return refused(INHERITED, max(va, run.key()))
        if run.value().pins != 0 and pinned == 0:
            pinned = max(va, run.key())
        preincrement(run)
    return done() if pinned == 0 else refused(PINNED, pinned)


cdef bint any_committed(AddressSpace self, Runs.iterator run, uintptr_t end) noexcept nogil:
    """Whether any page is committed, from a run on."""
    while self.ledger.starts_below(run, end):
        if run.value().state == STATE_COMMITTED:
            return True
        preincrement(run)
    return False


cdef bint decommit_by_guards(AddressSpace self, Runs.iterator run, Chunk chunk, uintptr_t va,
                             uintptr_t end) noexcept nogil:
    """Decommit the range in a chunk that stays in use; false where that cannot be."""
    if not self.ledger.isolate_from(&run, va, end):
        return False
    if can_be_guarded(self.ledger, run, chunk, end) and guard(va, end):
        self.ledger.set_guarded(run, end)
        return True
    self.ledger.coalesce_from(run, end)
    return False


cdef Answer settle(AddressSpace self, const Plan &plan, Runs.iterator run, uintptr_t end,
                   uint32_t state) noexcept nogil:
    """Carry a plan out that brings isolated pages to ``state``, and write that down."""
    cdef uint64_t mappings = 0
    cdef uint32_t limits = limits_on(run)
    cdef int result = carry_out(plan, &mappings)
    if result < 0:
        self.ledger.coalesce_from(run, end)
        return kernel_refused(result, limits, mappings)
    self.ledger.set_state_from(run, end, state)
    return done()


cdef Answer protect_pages(AddressSpace self, uintptr_t va, uintptr_t end, uint32_t protection) noexcept nogil:
    """Change the protection: of committed pages now, of reserved ones once committed."""
    cdef Plan plan
    cdef uint64_t mappings = 0
    cdef uint32_t limits
    cdef int result
    cdef Runs.iterator run = self.ledger.run_at(va)
    cdef Answer answer = check_protect(self, run, va, end, protection)
    if answer.reason != DONE:
        return answer
    if not self.ledger.isolate_from(&run, va, end):
        return no_run(self)
    if not plan_protect(self.ledger, run, end, protection, plan):
        self.ledger.coalesce_from(run, end)
        return refused(NO_LEDGER_MEMORY)
    limits = limits_on(run)
    result = carry_out(plan, &mappings)
    if result < 0:
        self.ledger.coalesce_from(run, end)
        return kernel_refused(result, limits, mappings)
    self.ledger.set_protection_from(run, end, protection)
    return done()


cdef Answer check_protect(AddressSpace self, Runs.iterator run, uintptr_t va, uintptr_t end,
                          uint32_t protection) noexcept nogil:
    """Whether pages may have this protection, from the run that includes ``va`` on."""
    cdef uintptr_t pinned = 0
    while True:
        if protection & ~run.value().ceiling:
            return refused(ABOVE_CEILING, max(va, run.key()))
        if run.value().pins != 0 and pinned == 0:
            pinned = max(va, run.key())
        if run.value().end >= end:
            return done() if pinned == 0 else refused(PINNED, pinned)
        preincrement(run)


cdef Answer free_pages(AddressSpace self, Regions.iterator region, uintptr_t va, uintptr_t end) noexcept nogil:
    """Unmap a part of a region, or all of it; a guard goes with the page next to it."""
    cdef Runs.iterator run = self.ledger.run_at(va)
    cdef uintptr_t pinned = first_pinned(self, run, va, end)
    cdef int result
    cdef Answer answer
    if pinned != 0:
        return refused(PINNED, pinned)
    if region.key() < va and end < region.value().end:
        answer = check_limit(self, REGIONS, 1)
        if answer.reason == DONE and region.value().flags & FLAG_RESERVE == 0:
            answer = check_limit(self, MDL_MAPPINGS, 1)
        if answer.reason != DONE:
            return answer
        if not self.ledger.isolate_from(&run, va, end):
            return no_run(self)
    elif not self.ledger.isolate_to_remove(&run, va, end):
        return refused(NO_LEDGER_MEMORY)
    result = unmap_pages(self, region, run, end)
    if result < 0:
        self.ledger.coalesce_from(run, end)
        return kernel_refused(result)
    return done()


cdef Answer check_access(AddressSpace self, uintptr_t va, size_t size, uint32_t access) noexcept nogil:
    """Whether every page of the bytes is committed and gives ``access``; what all give."""
    cdef Runs.iterator run = self.ledger.run_at(va)
    cdef Answer answer = done()
    answer.access = FLAG_RWX_MASK
    while self.ledger.starts_below(run, va + size):
        if run.value().state != STATE_COMMITTED:
            return refused(NOT_COMMITTED, max(va, run.key()))
        if access & ~run.value().protection:
            return refused(NO_ACCESS, max(va, run.key()))
        answer.access &= run.value().protection
        preincrement(run)
    return answer


cdef Answer copy_bytes(AddressSpace self, const Request *request) noexcept nogil:
    """Copy between the range and a buffer; a shortage of shared memory is told as one."""
    cdef Answer answer = check_access(self, request.va, request.size, <uint32_t>request.flags)
    cdef size_t copied = 0
    cdef int result
    if answer.reason != DONE:
        return answer
    if not has_headroom_to_copy(self, request):
        return kernel_refused(-EDQUOT)
    if request.method == READ:
        result = copy_out(request.data, request.va, request.size, &copied)
    else:
        result = copy_in(request.data, request.va, request.size, &copied)
    if result < 0:
        answer = kernel_refused(result)
        if (result == -EFAULT and
                self.ledger.run_at(request.va + copied).value().backing != NULL):
            answer.reason = NO_BACKING_MEMORY
            answer.subject = request.va + copied
    if request.method == WRITE:
        answer.completed = copied
    return answer


cdef bint has_headroom_to_copy(AddressSpace self, const Request *request) noexcept nogil:
    """Whether a copy can have the memory that it takes: at most that, and then counted."""
    cdef size_t grain
    cdef uint64_t most
    if not kernel.group_has_limit():
        return True
    grain = grain_at(self, request.va)
    most = round_up(request.va + request.size, grain) - round_down(request.va, grain)
    if request.method == READ:
        most += request.size + 2 * PAGE_SIZE
    return (kernel.group_has_headroom(most)
            or kernel.group_has_headroom(memory_to_copy(self, request, grain)))


cdef size_t grain_at(AddressSpace self, uintptr_t va) noexcept nogil:
    """How much memory the kernel may give at a touch in the region that includes ``va``."""
    cdef Regions.iterator region = self.ledger.region_at(va)
    if region.value().flags & FLAG_HUGE or kernel.is_huge_everywhere():
        return max(PAGE_SIZE, kernel.huge_page_size())
    return PAGE_SIZE


cdef uint64_t memory_to_copy(AddressSpace self, const Request *request, size_t grain) noexcept nogil:
    """How many bytes of memory a copy takes: for the region's pages, and for what is read."""
    cdef uintptr_t end = round_up(request.va + request.size, PAGE_SIZE)
    cdef uintptr_t at = round_down(request.va, PAGE_SIZE)
    cdef uintptr_t until
    cdef uint64_t size = 0
    cdef uint64_t wanted
    cdef Runs.iterator run = self.ledger.run_at(at)
    while at < end:
        until = min(end, run.value().end)
        wanted = memory_to_touch(run, request.method, at, until)
        if wanted > 0 and grain > PAGE_SIZE:
            wanted = memory_to_touch(
                run, request.method, max(run.key(), round_down(at, grain)),
                min(run.value().end, round_up(until, grain)))
        size += wanted
        at = until
        preincrement(run)
    if request.method == READ:
        at = <uintptr_t>request.data
        size += procfs.without_own_memory(
            round_down(at, PAGE_SIZE), round_up(at + request.size, PAGE_SIZE))
    return size


cdef Answer pin_pages(AddressSpace self, const Request *request) noexcept nogil:
    """Hold the pages that the bytes touch, which give the access wanted."""
    cdef size_t page = kernel.page_size()
    cdef Answer answer = check_access(self, request.va, request.size, <uint32_t>request.flags)
    if answer.reason == DONE and not self.ledger.pin(
            round_down(request.va, page), round_up(request.va + request.size, page)):
        return no_run(self)
    return answer


cdef Answer unpin_pages(AddressSpace self, uintptr_t va, size_t size) noexcept nogil:
    """Let go of pages; in a closed VMM, unmap the regions that nobody holds any more."""
    cdef size_t page = kernel.page_size()
    self.ledger.unpin(round_down(va, page), round_up(va + size, page))
    if self.closed:
        unmap_unpinned(self)
    return done()


cdef Answer close_space(AddressSpace self) noexcept nogil:
    """Unmap every region, but for those that views hold: these go with the last of them.

    Where the kernel refuses to unmap a region, the VMM stays open and can be closed again.
    """
    cdef int result = unmap_unpinned(self)
    self.closed = result == 0
    if self.closed:
        self.handles.close_all()
    return done() if result == 0 else kernel_refused(result)


# ---- what they share ------------------------------------------------------------------------


cdef uintptr_t first_pinned(AddressSpace self, Runs.iterator run, uintptr_t start,
                            uintptr_t end) noexcept nogil:
    """The first address that a view holds, from the run that includes ``start``, or 0."""
    while run.value().pins == 0:
        if run.value().end >= end:
            return 0
        preincrement(run)
    return max(start, run.key())


cdef int unmap_pages(AddressSpace self, Regions.iterator region, Runs.iterator run,
                uintptr_t end) noexcept nogil:
    """Unmap isolated pages of a region, from a run on, with the guards next to them, and
    forget them: 0 or -errno.

    A SHAREABLE part gives its memory back if nobody else can have it. Up to a region's end
    this needs no memory: a call that finds none goes back this way.
    """
    cdef uintptr_t base = region.key()
    cdef uintptr_t region_end = region.value().end
    cdef uintptr_t start = run.key()
    cdef uintptr_t low = start
    cdef uintptr_t high = end
    cdef int result
    if start == base and region.value().low_guard:
        low -= PAGE_SIZE
    if end == region_end and region.value().high_guard:
        high += PAGE_SIZE
    if end < region_end and not self.ledger.split(end):
        return -ENOMEM
    result = unmap(low, high - low)
    if result < 0:
        if end < region_end:
            self.ledger.join(end)
        return result
    self.ledger.seams -= seams_inside(
        run, max(start, base + PAGE_SIZE), min(end, region_end - PAGE_SIZE))
    release_backing(self, run, end)
    self.ledger.remove_from(region, run, end)
    if start > base:
        close_chunk(self, start - PAGE_SIZE)
    if end < region_end:
        close_chunk(self, end)
    return 0


cdef int unmap_region(AddressSpace self, uintptr_t base) noexcept nogil:
    """Unmap and forget a whole region: 0 or -errno."""
    cdef Regions.iterator region = self.ledger.region_at(base)
    return unmap_pages(self, region, self.ledger.run_at(base), region.value().end)


cdef void close_chunk(AddressSpace self, uintptr_t at) noexcept nogil:
    """Give back what an open chunk is charged if nothing in it is committed any more.

    Where the kernel or the ledger has no room for that, the chunk stays open.
    """
    cdef Chunk chunk
    chunk = chunks_around(self.ledger, at, at + 1)
    if not is_open_and_unused(self.ledger, chunk):
        return
    if (self.ledger.isolate(chunk.start, chunk.end)
            and reserve_afresh(chunk.start, chunk.end - chunk.start) == 0):
        self.ledger.set_state(chunk.start, chunk.end, STATE_RESERVED)
    else:
        self.ledger.coalesce(chunk.start, chunk.end)


cdef void release_backing(AddressSpace self, Runs.iterator run, uintptr_t end) noexcept nogil:
    """Let go of the memory objects behind unmapped pages, from a run on."""
    cdef MemoryObject *backing
    cdef size_t length
    while True:
        backing = <MemoryObject *>run.value().backing
        if backing != NULL:
            length = run.value().end - run.key()
            if (run.value().kind == KIND_PRIVATE
                    and memory_object_is_exclusive(backing)):
                memory_object_punch(backing, run.value().offset, length)
            memory_object_release(backing, length // kernel.page_size())
        if run.value().end >= end:
            return
        preincrement(run)


cdef int unmap_unpinned(AddressSpace self) noexcept nogil:
    """Unmap every region that no view holds: 0, or -errno of what the kernel refused.

    At the map-count wall a region in the middle of a merged mapping cannot go before its
    neighbours, so this goes round until nothing more can be unmapped.
    """
    cdef Regions.iterator region
    cdef uintptr_t base, end
    cdef bint progress = True
    cdef int refusal = 0
    cdef int result
    while progress:
        progress = False
        refusal = 0
        region = self.ledger.regions.begin()
        while region != self.ledger.regions.end():
            base = region.key()
            end = region.value().end
            if first_pinned(self, self.ledger.run_at(base), base, end) == 0:
                result = unmap_region(self, base)
                progress = progress or result == 0
                refusal = min(refusal, result)
            region = self.ledger.regions.upper_bound(base)
        if refusal == 0:
            return 0
    return refusal


cdef inline bint is_easily_allocated(AddressSpace self, const Request *request) noexcept nogil:
    """Whether a region fits even with two guards: then it is not looked which limit it meets.

    On the way of every ``allocate``, so without a call.
    """
    return (self.ledger.regions.size() < self.bounds[REGIONS]
            and request.size + self.ledger.covered + (self.ledger.guards + 2) * PAGE_SIZE
            <= self.bounds[RESERVED]
            and self.ledger.mappings() + 3 <= self.bounds[MAPPINGS]
            and (not request.flags & FLAG_COMMIT or is_easily_committed(self, request.size)))


cdef uint64_t memory_to_touch(Runs.iterator run, Method method, uintptr_t start,
                              uintptr_t end) noexcept nogil:
    """How many bytes of memory it takes to read or write pages of a run, which are committed.

    A hole in a memory file gets memory when it is read, too; private pages share one of zeros.
    """
    cdef MemoryObject *backing = <MemoryObject *>run.value().backing
    if backing != NULL:
        return memory_object_missing(
            backing, run.value().offset + (start - run.key()),
            end - start)
    return procfs.without_own_memory(start, end) if method == WRITE else 0


cdef uint64_t seams_inside(Runs.iterator run, uintptr_t first, uintptr_t last) noexcept nogil:
    """How many segments begin at ``first`` to ``last``, in pages of one buffer from a run on."""
    cdef MemoryObject *backing = <MemoryObject *>run.value().backing
    if backing == NULL or backing.root.segment_count < 2 or last < first:
        return 0
    return memory_object_seams(
        backing, run.value().offset + (first - run.key()) - 1,
        run.value().offset + (last - run.key()))


cdef uint32_t limits_on(Runs.iterator run) noexcept nogil:
    """The limits that have a say when these pages become writable."""
    return LIMIT_DATA if run.value().backing == NULL else 0


cdef Run run_of(MemoryObject *backing, uint64_t offset, uint32_t kind, uint32_t state,
                uint32_t flags, uint32_t ceiling) noexcept nogil:
    """Pages of a new region; where they end is filled in when that is known."""
    cdef Run run
    run.end = 0
    run.backing = backing
    run.offset = offset
    run.pins = 0
    run.state = state
    run.protection = flags & FLAG_RWX_MASK
    run.ceiling = ceiling
    run.kind = kind
    run.opened = 0
    run.locked = flags & FLAG_LOCKED != 0
    return run
