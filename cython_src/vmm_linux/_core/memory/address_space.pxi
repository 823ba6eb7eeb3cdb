"""The address space of one VMM: ledger and kernel in step.

Every call is one ``Request``, carried out by ``perform`` under the VMM's mutex, without a
Python object in sight: no garbage collection, no signal handler and no other Python code can
run while the mutex is held. What went wrong comes back as a number and becomes an exception
afterwards.

The order inside a call is always the same: look at the ledger, see that limits allow it, cut runs
at the borders (the last thing that may run out of memory, or of mappings), plan, carry the plan
out, and write the result into the ledger, which cannot fail.
"""

# Handing the GIL over costs 0.1 µs when nobody waits and a switch of threads when somebody
# does; a call over this many bytes takes at most some ten microseconds.
cdef enum:
    KEEP_GIL_UP_TO = 256 << 10


@cython.no_gc
cdef class AddressSpace:
    """Regions, pages and pins of one VMM."""

    __reduce__ = refuse_copies("each belongs to one VMM")

    def __cinit__(self):
        cdef int figure
        self.ledger = Ledger()
        self.closed = False
        for figure in range(FIGURES):
            self.bounds[figure] = NO_BOUND
        self.mutex = mutex_new()
        if self.mutex == NULL:
            raise MemoryError("no memory for a mutex")

    def __dealloc__(self):
        if self.mutex != NULL:
            self.unmap_unpinned()
            mutex_delete(self.mutex)

    # ---- limits; the caller holds the mutex ------------------------------------------------------

    cdef uint64_t used(self, int figure) noexcept nogil:
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
        return 0

    cdef Answer room_for(self, int figure, uint64_t wish) noexcept nogil:
        """Whether ``wish`` more of a figure are within its bound.

        Whoever wishes for none is never refused: a bound can be set below what there is.
        """
        cdef uint64_t used = self.used(figure)
        cdef uint64_t bound = self.bounds[figure]
        if wish == 0 or (used <= bound and wish <= bound - used):
            return done()
        return beyond_limit(figure, bound, used, wish)

    cdef Answer room_for_region(self, const Request *request,
                                uint64_t seams=0) noexcept nogil:
        """Whether a region with these flags may be made, of one segment and ``seams`` more."""
        cdef size_t guards = guard_below(request.flags) + guard_above(request.flags)
        cdef Answer answer = self.room_for(REGIONS, 1)
        if answer.reason == DONE:
            answer = self.room_for(RESERVED, request.size + guards)
        if answer.reason == DONE:
            answer = self.room_for(MAPPINGS, 1 + seams + guards // kernel.page_size())
        return answer

    cdef Answer room_to_allocate(self, const Request *request) noexcept nogil:
        """Whether a region may be made, and committed if that is asked for."""
        cdef Answer answer = self.room_for_region(request)
        if answer.reason == DONE and request.flags & FLAG_COMMIT:
            answer = self.room_for(COMMITTED, request.size)
            if answer.reason == DONE and request.flags & FLAG_LOCKED:
                answer = self.room_for(LOCKED, request.size)
        return answer

    cdef Answer room_for_commit(self, Runs.iterator run, uintptr_t va,
                                uintptr_t end) noexcept nogil:
        """Whether the reserved pages of a range in one region, from a run on, may be committed."""
        cdef uint64_t wish = self.reserved_bytes(run, va, end)
        cdef Answer answer = self.room_for(COMMITTED, wish)
        if answer.reason == DONE and dereference(run).second.locked:
            answer = self.room_for(LOCKED, wish)
        return answer

    cdef bint is_easily_committed(self, uint64_t size) noexcept nogil:
        """Whether so many bytes fit even if all are reserved and locked: then none is looked at."""
        return (size + self.ledger.committed <= self.bounds[COMMITTED]
                and size + self.ledger.locked + self.buffers.locked <= self.bounds[LOCKED])

    cdef uint64_t reserved_bytes(self, Runs.iterator run, uintptr_t va,
                                 uintptr_t end) noexcept nogil:
        """How many bytes of a range, from the run that includes ``va`` on, are reserved."""
        cdef uint64_t size = 0
        while run != self.ledger.runs.end() and dereference(run).first < end:
            if dereference(run).second.state == STATE_RESERVED:
                size += min(end, dereference(run).second.end) - max(va, dereference(run).first)
            preincrement(run)
        return size

    cdef Answer no_run(self) noexcept nogil:
        """Why the ledger had no run more: a cut takes two at most."""
        if self.ledger.mappings() + 1 >= self.bounds[MAPPINGS]:
            return beyond_limit(
                MAPPINGS, self.bounds[MAPPINGS], self.ledger.mappings(),
                2 if self.ledger.mappings() < self.bounds[MAPPINGS] else 1)
        return refused(NO_LEDGER_MEMORY)

    cdef void set_bounds(self, const uint64_t *bounds) noexcept nogil:
        """Bound what is made from now on."""
        cdef int figure
        for figure in range(FIGURES):
            self.bounds[figure] = bounds[figure]
        self.ledger.most_mappings = bounds[MAPPINGS]

    cdef const char *flaw(self, uintptr_t *where) noexcept nogil:
        """The first invariant that does not hold, and where; NULL when all do."""
        cdef size_t page = kernel.page_size()
        cdef const char *flaw = self.ledger.flaw(where)
        cdef Regions.iterator region = self.ledger.regions.begin()
        cdef uint64_t seams = 0
        while flaw == NULL and region != self.ledger.regions.end():
            where[0] = dereference(region).first
            seams += seams_inside(
                self.ledger.run_at(where[0]), where[0] + page,
                dereference(region).second.end - page)
            preincrement(region)
        if flaw == NULL and seams != self.ledger.seams:
            return b"a count of segments that is not what the regions add up to"
        return flaw

    # ---- one call ----------------------------------------------------------------------------

    cdef void enter(self) noexcept:
        """Take the mutex, with the GIL. Never waits for the GIL with the mutex in hand, since
        a fork takes every mutex with the GIL in hand."""
        while not mutex_try(self.mutex):
            with nogil:
                self.wait()
                self.leave()

    cdef void wait(self) noexcept nogil:
        """Take the mutex, waiting for it without the GIL."""
        mutex_lock(self.mutex)

    cdef void leave(self) noexcept nogil:
        """Let go of the mutex."""
        mutex_unlock(self.mutex)

    cdef Answer perform(self, const Request *request) noexcept:
        """Carry out one call under the mutex; the GIL is released where the call can be long."""
        cdef Answer answer
        if request.size <= KEEP_GIL_UP_TO and not is_of_unknown_length(request.method):
            self.enter()
            answer = self.dispatch(request)
            self.leave()
        else:
            with nogil:
                self.wait()
                answer = self.dispatch(request)
                self.leave()
        return answer

    cdef Answer dispatch(self, const Request *request) noexcept nogil:
        """The call itself. The caller holds the mutex."""
        cdef Regions.iterator region
        if request.method == UNPIN:
            return self.unpin(request.va, request.size)
        if request.method == CLOSE:
            return self.close()
        if self.closed:
            return refused(CLOSED)
        if request.method > CLOSE:
            return self.dispatch_further(request)
        if request.method == ALLOCATE:
            return self.allocate(request)
        region = self.ledger.region_at(request.va)
        if not self.ledger.is_inside(region, request.va, request.size):
            return refused(NOT_IN_REGION)
        if request.method == COMMIT:
            return self.commit(region, request.va, request.va + request.size)
        if request.method == DECOMMIT:
            return self.decommit(region, request.va, request.va + request.size)
        if request.method == PROTECT:
            return self.protect(request.va, request.va + request.size, request.flags)
        if request.method == FREE:
            return self.free(region, request.va, request.va + request.size)
        if request.method == CHECK:
            return self.check(request.va, request.size, request.flags)
        if request.method == PIN:
            return self.pin(request)
        return self.copy(request)

    cdef Answer dispatch_further(self, const Request *request) noexcept nogil:
        """A call that is about more than regions."""
        return refused(CLOSED)

    cdef void end_handles(self) noexcept nogil:
        """What else ends with the VMM."""

    # ---- the methods; the caller holds the mutex ------------------------------------------------

    cdef Answer allocate(self, const Request *request) noexcept nogil:
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
            answer = self.room_to_allocate(request)
            if answer.reason != DONE:
                return answer
        if request.flags & FLAG_SHAREABLE:
            backing = memory_object_new(request.size, request.flags & FLAG_EXECUTE != 0, &error)
            if backing == NULL:
                return kernel_refused(-error)
        run = run_of(backing, 0, KIND_PRIVATE, STATE_RESERVED, request.flags, FLAG_RWX_MASK)
        answer = self.place(request, run, -1 if backing == NULL else backing.identity.fd, 0)
        if answer.reason != DONE:
            if backing != NULL:
                memory_object_release(backing, 0)
        elif request.flags & FLAG_COMMIT:
            committed = self.commit(
                self.ledger.region_at(answer.out), answer.out, answer.out + request.size)
            if committed.reason != DONE:
                self.forget_region(answer.out)
                return committed
        return answer

    cdef Answer place(self, const Request *request, Run run, int fd,
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
        region.flags = request.flags
        region.low_guard = request.flags & FLAG_LOW_GUARD != 0
        region.high_guard = request.flags & FLAG_HIGH_GUARD != 0
        if not self.ledger.insert(base, region, run):
            unmap(base - guard_below(request.flags),
                  guard_below(request.flags) + request.size + guard_above(request.flags))
            return refused(NO_LEDGER_MEMORY)
        if run.backing != NULL:
            memory_object_acquire(
                <MemoryObject *>run.backing, request.size // kernel.page_size())
        answer.out = base
        return answer

    cdef Answer commit(self, Regions.iterator region, uintptr_t va,
                       uintptr_t end) noexcept nogil:
        """Commit the reserved pages of the range."""
        cdef Runs.iterator run = self.ledger.run_at(va)
        cdef uint32_t flags = dereference(region).second.flags
        cdef Chunk chunk
        cdef Answer answer
        if not self.ledger.narrow(&run, &va, &end):
            return done()
        chunk = chunks_of(region, va, end)
        if not self.is_easily_committed(end - va):
            answer = self.room_for_commit(run, va, end)
            if answer.reason != DONE:
                return answer
        if is_just_guarded(dereference(run).second, end):
            return self.unguard(run, va, end)
        if suits(self.ledger, flags, run, chunk, va, end):
            if self.commit_by_guards(chunk, va, end):
                return done()
            run = self.ledger.run_at(va)
        return self.commit_by_mappings(flags, run, va, end)

    cdef Answer commit_by_mappings(self, uint32_t flags, Runs.iterator run, uintptr_t va,
                                   uintptr_t end) noexcept nogil:
        """Commit the reserved pages of the range, from a run on, and open no chunk for that."""
        cdef Plan plan
        if not self.ledger.isolate_from(&run, va, end):
            return self.no_run()
        if not plan_commit(self.ledger, flags, run, end, plan):
            self.ledger.coalesce_from(run, end)
            return refused(NO_LEDGER_MEMORY)
        return self.settle(plan, run, end, STATE_COMMITTED)

    cdef Answer unguard(self, Runs.iterator run, uintptr_t va, uintptr_t end) noexcept nogil:
        """Commit pages of one run that lie behind guards and need nothing else."""
        cdef int result
        if not self.ledger.isolate_from(&run, va, end):
            return self.no_run()
        result = remove_guards(va, end)
        if result < 0:
            guard(va, end)
            self.ledger.coalesce_from(run, end)
            return kernel_refused(result)
        self.ledger.set_state_from(run, end, STATE_COMMITTED)
        return done()

    cdef bint commit_by_guards(self, Chunk chunk, uintptr_t va, uintptr_t end) noexcept nogil:
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

    cdef Answer decommit(self, Regions.iterator region, uintptr_t va,
                         uintptr_t end) noexcept nogil:
        """Reserve the committed pages of the range again."""
        cdef Plan plan
        cdef Runs.iterator run = self.ledger.run_at(va)
        cdef uint32_t flags = dereference(region).second.flags
        cdef Chunk chunk = chunks_of(region, va, end)
        cdef Answer answer = self.check_decommit(run, va, end)
        if answer.reason != DONE or not self.any_committed(run, end):
            return answer
        if (suits(self.ledger, flags, run, chunk, va, end)
                and self.decommit_by_guards(run, chunk, va, end)):
            return done()
        if not flags & FLAG_SHAREABLE:
            va = closing_start(self.ledger, va, end)
            end = closing_end(self.ledger, va, end)
            run = self.ledger.run_at(va)
        if not self.ledger.isolate_from(&run, va, end):
            return self.no_run()
        if not plan_decommit(self.ledger, flags, run, end, plan):
            self.ledger.coalesce_from(run, end)
            return refused(NO_LEDGER_MEMORY)
        return self.settle(plan, run, end, STATE_RESERVED)

    cdef Answer check_decommit(self, Runs.iterator run, uintptr_t va,
                               uintptr_t end) noexcept nogil:
        """Whether pages may be decommitted, from the run that includes ``va`` on."""
        cdef MemoryObject *backing
        cdef uintptr_t pinned = 0
        while run != self.ledger.runs.end() and dereference(run).first < end:
            if dereference(run).second.kind == KIND_MDL:
                return refused(IS_MDL, max(va, dereference(run).first))
            backing = <MemoryObject *>dereference(run).second.backing
            if (backing != NULL and dereference(run).second.state == STATE_COMMITTED
                    and memory_object_is_inherited(backing)):
                return refused(INHERITED, max(va, dereference(run).first))
            if dereference(run).second.pins != 0 and pinned == 0:
                pinned = max(va, dereference(run).first)
            preincrement(run)
        return done() if pinned == 0 else refused(PINNED, pinned)

    cdef bint any_committed(self, Runs.iterator run, uintptr_t end) noexcept nogil:
        """Whether any page is committed, from a run on."""
        while run != self.ledger.runs.end() and dereference(run).first < end:
            if dereference(run).second.state == STATE_COMMITTED:
                return True
            preincrement(run)
        return False

    cdef bint decommit_by_guards(self, Runs.iterator run, Chunk chunk, uintptr_t va,
                                 uintptr_t end) noexcept nogil:
        """Decommit the range in a chunk that stays in use; false where that cannot be."""
        if not self.ledger.isolate_from(&run, va, end):
            return False
        if can_be_guarded(self.ledger, run, chunk, end) and guard(va, end):
            self.ledger.set_guarded(run, end)
            return True
        self.ledger.coalesce_from(run, end)
        return False

    cdef Answer settle(self, const Plan &plan, Runs.iterator run, uintptr_t end,
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

    cdef Answer protect(self, uintptr_t va, uintptr_t end, uint32_t protection) noexcept nogil:
        """Change the protection: of committed pages now, of reserved ones once committed."""
        cdef Plan plan
        cdef uint64_t mappings = 0
        cdef uint32_t limits
        cdef int result
        cdef Runs.iterator run = self.ledger.run_at(va)
        cdef Answer answer = self.check_protect(run, va, end, protection)
        if answer.reason != DONE:
            return answer
        if not self.ledger.isolate_from(&run, va, end):
            return self.no_run()
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

    cdef Answer check_protect(self, Runs.iterator run, uintptr_t va, uintptr_t end,
                              uint32_t protection) noexcept nogil:
        """Whether pages may have this protection, from the run that includes ``va`` on."""
        cdef uintptr_t pinned = 0
        while True:
            if protection & ~dereference(run).second.ceiling:
                return refused(ABOVE_CEILING, max(va, dereference(run).first))
            if dereference(run).second.pins != 0 and pinned == 0:
                pinned = max(va, dereference(run).first)
            if dereference(run).second.end >= end:
                return done() if pinned == 0 else refused(PINNED, pinned)
            preincrement(run)

    cdef Answer free(self, Regions.iterator region, uintptr_t va, uintptr_t end) noexcept nogil:
        """Unmap a part of a region, or all of it; a guard goes with the page next to it."""
        cdef Runs.iterator run = self.ledger.run_at(va)
        cdef uintptr_t pinned = self.first_pinned(run, va, end)
        cdef int result
        cdef Answer answer
        if pinned != 0:
            return refused(PINNED, pinned)
        if dereference(region).first < va and end < dereference(region).second.end:
            answer = self.room_for(REGIONS, 1)
            if answer.reason == DONE and dereference(region).second.flags & FLAG_RESERVE == 0:
                answer = self.room_for(MDL_MAPPINGS, 1)
            if answer.reason != DONE:
                return answer
            if not self.ledger.isolate_from(&run, va, end):
                return self.no_run()
        elif not self.ledger.isolate_to_remove(&run, va, end):
            return refused(NO_LEDGER_MEMORY)
        result = self.forget(region, run, end)
        if result < 0:
            self.ledger.coalesce_from(run, end)
            return kernel_refused(result)
        return done()

    cdef Answer check(self, uintptr_t va, size_t size, uint32_t access) noexcept nogil:
        """Whether every page of the bytes is committed and gives ``access``; what all give."""
        cdef Runs.iterator run = self.ledger.run_at(va)
        cdef Answer answer = done()
        answer.access = FLAG_RWX_MASK
        while run != self.ledger.runs.end() and dereference(run).first < va + size:
            if dereference(run).second.state != STATE_COMMITTED:
                return refused(NOT_COMMITTED, max(va, dereference(run).first))
            if access & ~dereference(run).second.protection:
                return refused(NO_ACCESS, max(va, dereference(run).first))
            answer.access &= dereference(run).second.protection
            preincrement(run)
        return answer

    cdef Answer copy(self, const Request *request) noexcept nogil:
        """Copy between the range and a buffer; a shortage of shared memory is told as one."""
        cdef Answer answer = self.check(request.va, request.size, request.flags)
        cdef size_t copied = 0
        cdef int result
        if answer.reason != DONE:
            return answer
        if not self.group_has_room_to_copy(request):
            return kernel_refused(-EDQUOT)
        if request.method == READ:
            result = copy_out(request.buffer, request.va, request.size, &copied)
        else:
            result = copy_in(request.buffer, request.va, request.size, &copied)
        if result < 0:
            answer = kernel_refused(result)
            if (result == -EFAULT and
                    dereference(self.ledger.run_at(request.va + copied)).second.backing != NULL):
                answer.reason = NO_BACKING_MEMORY
                answer.value = request.va + copied
        if request.method == WRITE:
            answer.done = copied
        return answer

    cdef bint group_has_room_to_copy(self, const Request *request) noexcept nogil:
        """Whether a copy can have the memory that it takes: at most that, and then counted."""
        cdef size_t grain
        cdef uint64_t most
        if not kernel.group_has_limit():
            return True
        grain = self.grain_at(request.va)
        most = round_up(request.va + request.size, grain) - round_down(request.va, grain)
        if request.method == READ:
            most += request.size + 2 * PAGE_SIZE
        return (kernel.group_has_headroom(most)
                or kernel.group_has_headroom(self.memory_to_copy(request, grain)))

    cdef size_t grain_at(self, uintptr_t va) noexcept nogil:
        """How much memory the kernel may give at a touch in the region that includes ``va``."""
        cdef Regions.iterator region = self.ledger.region_at(va)
        if dereference(region).second.flags & FLAG_HUGE or kernel.is_huge_everywhere():
            return max(PAGE_SIZE, kernel.huge_page_size())
        return PAGE_SIZE

    cdef uint64_t memory_to_copy(self, const Request *request, size_t grain) noexcept nogil:
        """How many bytes of memory a copy takes: for the region's pages, and for what is read."""
        cdef uintptr_t end = round_up(request.va + request.size, PAGE_SIZE)
        cdef uintptr_t at = round_down(request.va, PAGE_SIZE)
        cdef uintptr_t until
        cdef uint64_t size = 0
        cdef uint64_t wanted
        cdef Runs.iterator run = self.ledger.run_at(at)
        while at < end:
            until = min(end, dereference(run).second.end)
            wanted = memory_to_touch(run, request.method, at, until)
            if wanted > 0 and grain > PAGE_SIZE:
                wanted = memory_to_touch(
                    run, request.method, max(dereference(run).first, round_down(at, grain)),
                    min(dereference(run).second.end, round_up(until, grain)))
            size += wanted
            at = until
            preincrement(run)
        if request.method == READ:
            at = <uintptr_t>request.buffer
            size += procfs.without_own_memory(
                round_down(at, PAGE_SIZE), round_up(at + request.size, PAGE_SIZE))
        return size

    cdef Answer pin(self, const Request *request) noexcept nogil:
        """Hold the pages that the bytes touch, which give the access wanted."""
        cdef size_t page = kernel.page_size()
        cdef Answer answer = self.check(request.va, request.size, request.flags)
        if answer.reason == DONE and not self.ledger.pin(
                round_down(request.va, page), round_up(request.va + request.size, page)):
            return self.no_run()
        return answer

    cdef Answer unpin(self, uintptr_t va, size_t size) noexcept nogil:
        """Let go of pages; in a closed VMM, unmap the regions that nobody holds any more."""
        cdef size_t page = kernel.page_size()
        self.ledger.unpin(round_down(va, page), round_up(va + size, page))
        if self.closed:
            self.unmap_unpinned()
        return done()

    cdef Answer close(self) noexcept nogil:
        """Unmap every region, but for those that views hold: these go with the last of them.

        Where the kernel refuses to unmap a region, the VMM stays open and can be closed again.
        """
        cdef int result = self.unmap_unpinned()
        self.closed = result == 0
        if self.closed:
            self.end_handles()
        return done() if result == 0 else kernel_refused(result)

    # ---- what they share ------------------------------------------------------------------------

    cdef uintptr_t first_pinned(self, Runs.iterator run, uintptr_t start,
                                uintptr_t end) noexcept nogil:
        """The first address that a view holds, from the run that includes ``start``, or 0."""
        while dereference(run).second.pins == 0:
            if dereference(run).second.end >= end:
                return 0
            preincrement(run)
        return max(start, dereference(run).first)

    cdef int forget(self, Regions.iterator region, Runs.iterator run,
                    uintptr_t end) noexcept nogil:
        """Unmap isolated pages of a region, from a run on, with the guards next to them, and
        forget them: 0 or -errno.

        A SHAREABLE part gives its memory back if nobody else can have it. Up to a region's end
        this needs no memory: a call that finds none goes back this way.
        """
        cdef uintptr_t base = dereference(region).first
        cdef uintptr_t region_end = dereference(region).second.end
        cdef uintptr_t start = dereference(run).first
        cdef uintptr_t low = start
        cdef uintptr_t high = end
        cdef int result
        if start == base and dereference(region).second.low_guard:
            low -= PAGE_SIZE
        if end == region_end and dereference(region).second.high_guard:
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
        self.release_backing(run, end)
        self.ledger.remove_from(region, run, end)
        if start > base:
            self.close_chunk(start - PAGE_SIZE)
        if end < region_end:
            self.close_chunk(end)
        return 0

    cdef int forget_region(self, uintptr_t base) noexcept nogil:
        """Unmap and forget a whole region: 0 or -errno."""
        cdef Regions.iterator region = self.ledger.region_at(base)
        return self.forget(region, self.ledger.run_at(base), dereference(region).second.end)

    cdef void close_chunk(self, uintptr_t at) noexcept nogil:
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

    cdef void release_backing(self, Runs.iterator run, uintptr_t end) noexcept nogil:
        """Let go of the memory objects behind unmapped pages, from a run on."""
        cdef MemoryObject *backing
        cdef size_t length
        while True:
            backing = <MemoryObject *>dereference(run).second.backing
            if backing != NULL:
                length = dereference(run).second.end - dereference(run).first
                if (dereference(run).second.kind == KIND_PRIVATE
                        and memory_object_is_exclusive(backing)):
                    memory_object_punch(backing, dereference(run).second.offset, length)
                memory_object_release(backing, length // kernel.page_size())
            if dereference(run).second.end >= end:
                return
            preincrement(run)

    cdef int unmap_unpinned(self) noexcept nogil:
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
                base = dereference(region).first
                end = dereference(region).second.end
                if self.first_pinned(self.ledger.run_at(base), base, end) == 0:
                    result = self.forget_region(base)
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
            and (not request.flags & FLAG_COMMIT or self.is_easily_committed(request.size)))


cdef bint is_of_unknown_length(Method method) noexcept nogil:
    """Whether a call may take or give back memory of which its request says nothing.

    A handle can be the last of a buffer; a seal waits for whoever changes the memory's size.
    """
    return method in (CLOSE, HANDLE_CLOSE, HANDLE_REVOKE, MDL_SEAL)


cdef uint64_t memory_to_touch(Runs.iterator run, Method method, uintptr_t start,
                              uintptr_t end) noexcept nogil:
    """How many bytes of memory it takes to read or write pages of a run, which are committed.

    A hole in a memory file gets memory when it is read, too; private pages share one of zeros.
    """
    cdef MemoryObject *backing = <MemoryObject *>dereference(run).second.backing
    if backing != NULL:
        return memory_object_missing(
            backing, dereference(run).second.offset + (start - dereference(run).first),
            end - start)
    return procfs.without_own_memory(start, end) if method == WRITE else 0


cdef uint64_t seams_inside(Runs.iterator run, uintptr_t first, uintptr_t last) noexcept nogil:
    """How many segments begin at ``first`` to ``last``, in pages of one buffer from a run on."""
    cdef MemoryObject *backing = <MemoryObject *>dereference(run).second.backing
    if backing == NULL or backing.root.segment_count < 2 or last < first:
        return 0
    return memory_object_seams(
        backing, dereference(run).second.offset + (first - dereference(run).first) - 1,
        dereference(run).second.offset + (last - dereference(run).first))


cdef uint32_t limits_on(Runs.iterator run) noexcept nogil:
    """The limits that have a say when these pages become writable."""
    return LIMIT_DATA if dereference(run).second.backing == NULL else 0


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
