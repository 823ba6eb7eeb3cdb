"""Many ranges in one call, all or nothing.

A range in an open chunk costs one entry in a vector of process_madvise(2), a fraction of a
system call. All others are changed one by one, and all steps that can fail come first. The caller
holds the mutex.
"""

cdef struct SavedRun:
    uintptr_t start
    Run run                     # as it was

ctypedef vector[SavedRun] SavedRuns

cdef extern from *:
    """
    #include <algorithm>
    template <class Ranges>
    static inline void vmm_sort_ranges(Ranges &ranges) noexcept
    {
        const auto below = [](const auto &left, const auto &right) {
            return left.start < right.start;
        };
        if (!std::is_sorted(ranges.begin(), ranges.end(), below))
            std::sort(ranges.begin(), ranges.end(), below);
    }
    """
    void sort_ranges "vmm_sort_ranges"(Ranges &) noexcept nogil


cdef bint add_range(Ranges *ranges, uintptr_t start, uintptr_t end) noexcept nogil:
    """Append a range; false when memory is short."""
    cdef Range added
    added.start = start
    added.end = end
    added.index = ranges.size()
    return append_or_fail(ranges[0], added)


cdef Answer about_range(Answer answer, const Range &this) noexcept nogil:
    """An answer with the index of the range that it is about."""
    answer.index = this.index
    return answer


cdef Answer check_ranges(AddressSpace space, Ranges &ranges) noexcept nogil:
    """Sort the ranges; whether each lies inside one region, and no two overlap."""
    cdef Regions.iterator region = space.ledger.regions.end()
    cdef uintptr_t start, end
    cdef size_t i
    sort_ranges(ranges)
    for i in range(ranges.size()):
        start = ranges[i].start
        end = ranges[i].end
        if region == space.ledger.regions.end() or start >= region.value().end:
            region = space.ledger.region_at(start)
        if not space.ledger.is_inside(region, start, end - start):
            return about_range(refused(NOT_IN_REGION), ranges[i])
        if i > 0 and start < ranges[i - 1].end:
            return about_range(refused(OVERLAP), ranges[i])
    return done()


cdef Answer isolate_all(AddressSpace space, Ranges &ranges) noexcept nogil:
    """Isolate every range, or none."""
    cdef Runs.iterator run = space.ledger.runs.end()
    cdef Answer answer
    cdef size_t i
    for i in range(ranges.size()):
        run = space.ledger.run_near(run, ranges[i].start)
        if not space.ledger.isolate_from(&run, ranges[i].start, ranges[i].end):
            answer = about_range(refused_cut(space), ranges[i])
            coalesce_all(space.ledger, ranges)
            return answer
    return done()


cdef void coalesce_all(Ledger ledger, Ranges &ranges) noexcept nogil:
    """Undo ``isolate_all``."""
    cdef size_t i
    for i in range(ranges.size()):
        ledger.coalesce(ranges[i].start, ranges[i].end)


cdef size_t advise(Ranges &ranges, int advice, int *result) noexcept nogil:
    """Give the same advice about all ranges: from the first, how many the kernel took it for.

    ``result`` is set to -errno of the first refusal.
    """
    cdef iovec vector[MOST_RANGES]
    cdef size_t first = 0, count
    cdef Py_ssize_t size
    cdef int pidfd
    if not kernel.has(kernel.FEATURE_VECTORED_GUARDS):
        return advise_singly(ranges, 0, advice, result)
    pidfd = kernel.pidfd_open_self()
    if pidfd < 0:
        return advise_singly(ranges, 0, advice, result)
    while first < ranges.size():
        count = fill_vector(ranges, first, vector, &size)
        if kernel.process_madvise(pidfd, vector, count, advice) != size:
            break
        first += count
    kernel.close(pidfd)
    return advise_singly(ranges, first, advice, result)


cdef size_t fill_vector(const Ranges &ranges, size_t first, iovec *vector,
                        Py_ssize_t *size) noexcept nogil:
    """Fill a vector with as many ranges as one call takes, from the first on: how many."""
    cdef size_t count = 0
    size[0] = 0
    while count < MOST_RANGES and first + count < ranges.size():
        vector[count].iov_base = <void *>ranges[first + count].start
        vector[count].iov_len = ranges[first + count].end - ranges[first + count].start
        size[0] += vector[count].iov_len
        count += 1
    return count


cdef size_t advise_singly(Ranges &ranges, size_t first, int advice, int *result) noexcept nogil:
    """``advise`` from a range on, with a call for each. Repeated advice changes nothing."""
    while first < ranges.size():
        result[0] = kernel.madvise(
            ranges[first].start, ranges[first].end - ranges[first].start, advice)
        if result[0] < 0:
            break
        first += 1
    return first


cdef Answer commit_ranges(AddressSpace space, Ranges &ranges) noexcept nogil:
    """Commit the reserved pages of every range."""
    cdef Ranges held            # around those that are committed one by one
    cdef SavedRuns saved        # what was reserved in these
    cdef Ranges guarded         # those that only need their guards removed
    cdef Runs.iterator run = space.ledger.runs.end()
    cdef size_t i
    cdef Answer answer = check_ranges(space, ranges)
    if answer.reason == DONE:
        answer = check_limits_of_all(space, ranges)
    for i in range(ranges.size()):
        if answer.reason != DONE:
            break
        run = space.ledger.run_near(run, ranges[i].start)
        if not space.ledger.narrow(&run, &ranges[i].start, &ranges[i].end):
            continue
        if are_just_guarded(space.ledger, run, ranges[i].end):
            if not append_or_fail(guarded, ranges[i]):
                answer = refused(NO_LEDGER_MEMORY)
        else:
            run = space.ledger.runs.end()
            answer = commit_one(space, ranges, i, held, saved)
        answer = about_range(answer, ranges[i])
    if answer.reason == DONE:
        answer = commit_all_behind_guards(space, guarded)
    if answer.reason != DONE:
        for i in range(saved.size(), 0, -1):
            reserve_again(space.ledger, saved[i - 1])
    for i in range(held.size()):
        space.ledger.unpin(held[i].start, held[i].end)
    return answer


cdef Answer check_limits_of_all(AddressSpace space, Ranges &ranges) noexcept nogil:
    """Whether the reserved pages of all ranges together may be committed."""
    cdef Runs.iterator run = space.ledger.runs.end()
    cdef uint64_t committed = 0, locked = 0, size
    cdef size_t i
    cdef Answer answer
    for i in range(ranges.size()):
        committed += ranges[i].end - ranges[i].start
    if is_easily_committed(space, committed):
        return done()
    committed = 0
    for i in range(ranges.size()):
        run = space.ledger.run_near(run, ranges[i].start)
        size = reserved_bytes(space.ledger, run, ranges[i].start, ranges[i].end)
        committed += size
        locked += size if run.value().locked else 0
    answer = check_limit(space, COMMITTED, committed)
    return answer if answer.reason != DONE else check_limit(space, LOCKED, locked)


cdef bint are_just_guarded(Ledger ledger, Runs.iterator run, uintptr_t end) noexcept nogil:
    """Whether the reserved pages from a run on only need their guards removed."""
    while True:
        if run.value().state == STATE_RESERVED and not (
                run.value().opened == run.value().protection != 0):
            return False
        if run.value().end >= end:
            return True
        preincrement(run)


cdef Answer commit_one(AddressSpace space, Ranges &ranges, size_t i, Ranges &held,
                       SavedRuns &saved) noexcept nogil:
    """Commit the i-th range in a way that can be undone."""
    cdef Range this = ranges[i]
    cdef Regions.iterator region = space.ledger.region_at(this.start)
    cdef uint32_t flags = region.value().flags
    cdef Chunk around = chunks_of(region, this.start, this.end)
    cdef bint opening = (
        suits(space.ledger, flags, space.ledger.run_at(this.start),
              around, this.start, this.end, islands_to_come(ranges, i, around.end))
        and opening_access(space.ledger, this.start, this.end) != 0)
    if not opening:
        around.start = this.start
        around.end = this.end
    if not hold_runs(space.ledger, this, around, held, saved):
        return refused_cut(space)
    if opening and commit_by_guards(space.ledger, around, this.start, this.end):
        return done()
    # Not by opening a chunk that is not held, even if the cuts made meanwhile suit that.
    return commit_by_mappings(space, flags, space.ledger.run_at(this.start), this.start, this.end)


cdef size_t islands_to_come(Ranges &ranges, size_t i, uintptr_t end) noexcept nogil:
    """How many ranges after the i-th start below ``end``, counted up to ``crowded``."""
    cdef size_t count = 0
    while count < crowded and i + count + 1 < ranges.size() and ranges[i + count + 1].start < end:
        count += 1
    return count


cdef bint hold_runs(Ledger ledger, const Range &this, Chunk around, Ranges &held,
                    SavedRuns &saved) noexcept nogil:
    """Save what a commit of a narrowed range can change in its chunk; false when memory is short.

    These runs are pinned meanwhile, so they are not joined, and undoing needs no memory.
    """
    cdef Chunk closed = around
    cdef Runs.iterator run = ledger.run_at(around.start)
    cdef SavedRun added
    if not (ledger.narrow(&run, &closed.start, &closed.end)
            and hold_range(ledger, held, this.start, this.end)
            and hold_range(ledger, held, closed.start, closed.end)):
        return False
    run = ledger.runs.lower_bound(closed.start)
    while ledger.starts_below(run, closed.end):
        if run.value().state == STATE_RESERVED:
            added.start = run.key()
            added.run = run.value()[0]
            if not append_or_fail(saved, added):
                return False
        preincrement(run)
    return True


cdef bint hold_range(Ledger ledger, Ranges &held, uintptr_t start, uintptr_t end) noexcept nogil:
    """Pin pages, and add them to those held; false when memory is short."""
    if not add_range(&held, start, end):
        return False
    if not ledger.pin(start, end):
        held.pop_back()
        return False
    return True


cdef void reserve_again(Ledger ledger, const SavedRun &saved) noexcept nogil:
    """Reserve pages again that were reserved and empty; the last changed ones come first."""
    cdef Runs.iterator run = ledger.runs.lower_bound(saved.start)
    cdef size_t size = saved.run.end - saved.start
    cdef int behind = page_access(STATE_COMMITTED, saved.run.opened)
    cdef uint8_t opened = saved.run.opened
    if run.value().state == STATE_RESERVED and run.value().opened == opened:
        return
    if saved.run.backing != NULL:
        empty_shared(saved.start, size, <MemoryObject *>saved.run.backing, saved.run.offset)
    elif opened == 0 or install_guards(saved.start, size) < 0:
        opened = 0
        empty_private(saved.start, size)
    elif saved.run.opened != saved.run.protection:
        kernel.mprotect(saved.start, size, behind)
    ledger.set_reserved(run, saved.run.end, opened)


cdef void empty_private(uintptr_t start, size_t size) noexcept nogil:
    """Reserve private pages again, which cannot fail where they have mappings of their own."""
    if reserve_afresh(start, size) < 0:
        # Without memory for a fresh mapping the old one serves, emptied.
        kernel.mprotect(start, size, PROT_NONE)
        kernel.munlock(start, size)
        remove_guards(start, size)
        kernel.madvise(start, size, MADV_DONTNEED)


cdef void empty_shared(uintptr_t start, size_t size, MemoryObject *backing,
                       uint64_t offset) noexcept nogil:
    """Reserve shared pages again; memory that another process can have stays."""
    kernel.munlock(start, size)
    kernel.mprotect(start, size, PROT_NONE)
    if memory_object_is_exclusive(backing):
        memory_object_punch(backing, offset, size)


cdef Answer commit_all_behind_guards(AddressSpace space, Ranges &guarded) noexcept nogil:
    """Commit ranges whose reserved pages all lie behind guards."""
    cdef Runs.iterator run = space.ledger.runs.end()
    cdef size_t taken
    cdef int result = 0
    cdef Answer answer = isolate_all(space, guarded)
    if answer.reason != DONE:
        return answer
    taken = advise(guarded, MADV_GUARD_REMOVE, &result)
    if taken == guarded.size():
        for i in range(guarded.size()):
            run = space.ledger.run_near(run, guarded[i].start)
            run = space.ledger.set_state_from(run, guarded[i].end, STATE_COMMITTED)
        return done()
    install_guards_again(space.ledger, guarded)
    coalesce_all(space.ledger, guarded)
    return about_range(kernel_refused(result), guarded[taken])


cdef void install_guards_again(Ledger ledger, Ranges &guarded) noexcept nogil:
    """Install the guards of reserved pages again."""
    cdef Runs.iterator run
    cdef size_t i
    for i in range(guarded.size()):
        run = ledger.runs.lower_bound(guarded[i].start)
        while ledger.starts_below(run, guarded[i].end):
            if run.value().state == STATE_RESERVED:
                install_guards(run.key(), run.value().end - run.key())
            preincrement(run)


cdef Answer decommit_ranges(AddressSpace space, Ranges &ranges) noexcept nogil:
    """Reserve the committed pages of every range again."""
    cdef Plan undoable, final
    cdef Ranges guarded, plain
    cdef uint64_t mappings = 0
    cdef size_t i
    cdef int result
    cdef Answer answer = check_ranges(space, ranges)
    for i in range(ranges.size()):
        if answer.reason != DONE:
            return answer
        answer = about_range(check_decommit(
            space.ledger, space.ledger.run_at(ranges[i].start), ranges[i].start, ranges[i].end),
            ranges[i])
    if answer.reason != DONE:
        return answer
    answer = isolate_all(space, ranges)
    if answer.reason != DONE:
        return answer
    if not (choose_ways(space.ledger, ranges, guarded, plain, undoable, final)
            and (final.empty() or append_or_fail(undoable, final[0]))):
        coalesce_all(space.ledger, ranges)
        return refused(NO_LEDGER_MEMORY)
    result = carry_out(undoable, &mappings)
    if result < 0:
        coalesce_all(space.ledger, ranges)
        return about_range(kernel_refused(result, 0, mappings), ranges[0])
    for i in range(1, final.size()):
        finish(final[i])
    for i in range(plain.size()):
        space.ledger.set_state(plain[i].start, plain[i].end, STATE_RESERVED)
    decommit_all_by_guards(space.ledger, guarded)
    for i in range(ranges.size()):
        close_chunk(space.ledger, ranges[i].start)
        close_chunk(space.ledger, ranges[i].end - 1)
    return answer


cdef bint choose_ways(Ledger ledger, Ranges &ranges, Ranges &guarded, Ranges &plain,
                      Plan &undoable, Plan &final) noexcept nogil:
    """Which isolated ranges get guards, and the steps for the others; false: short of memory.

    The others first lose their access, which can be undone. Then each has mappings of its own, and
    its last step needs no more of them; only the first of these last steps may fail.
    """
    cdef Regions.iterator region
    cdef Runs.iterator run
    cdef uint32_t flags
    cdef Chunk chunk
    cdef size_t i
    cdef Range at
    for i in range(ranges.size()):
        at = ranges[i]
        region = ledger.region_at(at.start)
        run = ledger.run_at(at.start)
        flags = region.value().flags
        chunk = chunks_of(region, at.start, at.end)
        if (suits(ledger, flags, run, chunk, at.start, at.end)
                and can_be_guarded(ledger, run, chunk, at.end)):
            if not add_range(&guarded, at.start, at.end):
                return False
        elif not (add_range(&plain, at.start, at.end)
                  and plan_closing(ledger, flags, at, undoable, final)):
            return False
    return True


cdef bint plan_closing(Ledger ledger, uint32_t flags, const Range &this, Plan &undoable,
                       Plan &final) noexcept nogil:
    """The steps that decommit an isolated range: all but the last, and the last."""
    cdef Plan plan
    cdef Runs.iterator run = ledger.runs.lower_bound(this.start)
    cdef int before
    cdef size_t i
    while ledger.starts_below(run, this.end):
        before = access_of(run.value())
        if run.value().opened != 0:
            before = page_access(STATE_COMMITTED, run.value().opened)
        if run.value().backing == NULL and before != PROT_NONE and not add_step(
                undoable, STEP_PROTECT, run.key(), run.value().end, PROT_NONE, before):
            return False
        preincrement(run)
    if not plan_decommit(flags, ledger.runs.lower_bound(this.start), this.end, plan):
        return False
    for i in range(plan.size()):
        if i + 1 < plan.size():
            if not append_or_fail(undoable, plan[i]):
                return False
        elif not append_or_fail(final, plan[i]):
            return False
    return True


cdef void finish(const Step &this) noexcept nogil:
    """The last step over pages without access, which have mappings of their own."""
    if this.kind == STEP_DISCARD:
        empty_private(this.start, this.size)
    elif do_step(this) < 0:
        # A hole needs hardly any memory: the shortage, or the interruption, is over by now.
        do_step(this)


cdef void decommit_all_by_guards(Ledger ledger, Ranges &guarded) noexcept nogil:
    """Decommit ranges by guards; where the kernel refuses, by a fresh mapping."""
    cdef int result = 0
    cdef size_t taken = advise(guarded, MADV_GUARD_INSTALL, &result)
    cdef size_t i
    for i in range(taken):
        ledger.set_guarded(ledger.runs.lower_bound(guarded[i].start), guarded[i].end)
    while taken < guarded.size():
        empty_private(guarded[taken].start, guarded[taken].end - guarded[taken].start)
        ledger.set_state(guarded[taken].start, guarded[taken].end, STATE_RESERVED)
        taken += 1
