"""Commit, decommit and protect: what may be done to pages, and the way that suits them.

The caller holds the mutex; the range lies inside one region.
"""


cdef Answer commit_pages(AddressSpace space, Regions.iterator region, uintptr_t va,
                         uintptr_t end) noexcept nogil:
    """Commit the reserved pages of the range."""
    cdef Runs.iterator run = space.ledger.run_at(va)
    cdef uint32_t flags = region.value().flags
    cdef Chunk chunk
    cdef Answer answer
    if not space.ledger.narrow(&run, &va, &end):
        return done()
    chunk = chunks_of(region, va, end)
    if not is_easily_committed(space, end - va):
        answer = check_commit_limits(space, run, va, end)
        if answer.reason != DONE:
            return answer
    if is_just_guarded(run.value(), end):
        return commit_behind_guards(space, run, va, end)
    if suits(space.ledger, flags, run, chunk, va, end):
        if commit_by_guards(space.ledger, chunk, va, end):
            return done()
        run = space.ledger.run_at(va)
    return commit_by_mappings(space, flags, run, va, end)


cdef Answer commit_behind_guards(AddressSpace space, Runs.iterator run, uintptr_t va,
                                 uintptr_t end) noexcept nogil:
    """Commit pages of one run that lie behind guards and need nothing else."""
    cdef int result
    if not space.ledger.isolate_from(&run, va, end):
        return refused_cut(space)
    result = remove_guards(va, end - va)
    if result < 0:
        install_guards(va, end - va)
        space.ledger.coalesce_from(run, end)
        return kernel_refused(result)
    space.ledger.set_state_from(run, end, STATE_COMMITTED)
    return done()


cdef bint commit_by_guards(Ledger ledger, Chunk chunk, uintptr_t va, uintptr_t end) noexcept nogil:
    """Commit the range in an open chunk; false, with all unchanged, where that is impossible."""
    cdef Plan plan
    cdef uint64_t mappings
    cdef uint32_t access = opening_access(ledger, va, end)
    cdef Runs.iterator run = ledger.run_at(chunk.start)
    if access == 0 or not ledger.narrow(&run, &chunk.start, &chunk.end):
        return False
    if (ledger.isolate(chunk.start, chunk.end) and ledger.isolate(va, end)
            and plan_opening(ledger, chunk, va, end, access, plan)
            and carry_out(plan, &mappings) == 0):
        ledger.set_state(va, end, STATE_COMMITTED)
        ledger.set_opened(chunk.start, chunk.end, access)
        return True
    ledger.coalesce(chunk.start, chunk.end)
    return False


cdef Answer commit_by_mappings(AddressSpace space, uint32_t flags, Runs.iterator run, uintptr_t va,
                               uintptr_t end) noexcept nogil:
    """Commit the reserved pages of the range, from a run on, without opening a chunk."""
    cdef Plan plan
    if not space.ledger.isolate_from(&run, va, end):
        return refused_cut(space)
    return change_state(
        space.ledger, plan_commit(flags, run, end, plan), plan, run, end, STATE_COMMITTED)


cdef Answer decommit_pages(AddressSpace space, Regions.iterator region, uintptr_t va,
                           uintptr_t end) noexcept nogil:
    """Reserve the committed pages of the range again."""
    cdef Plan plan
    cdef Runs.iterator run = space.ledger.run_at(va)
    cdef uint32_t flags = region.value().flags
    cdef Chunk chunk = chunks_of(region, va, end)
    cdef Answer answer = check_decommit(space.ledger, run, va, end)
    if answer.reason != DONE or not any_committed(space.ledger, run, end):
        return answer
    if (suits(space.ledger, flags, run, chunk, va, end)
            and decommit_by_guards(space.ledger, run, chunk, va, end)):
        return done()
    if not flags & FLAG_SHAREABLE:
        va = closing_start(space.ledger, va, end)
        end = closing_end(space.ledger, va, end)
        run = space.ledger.run_at(va)
    if not space.ledger.isolate_from(&run, va, end):
        return refused_cut(space)
    return change_state(
        space.ledger, plan_decommit(flags, run, end, plan), plan, run, end, STATE_RESERVED)


cdef Answer check_decommit(Ledger ledger, Runs.iterator run, uintptr_t va,
                           uintptr_t end) noexcept nogil:
    """Whether pages may be decommitted, from the run that includes ``va`` on."""
    cdef MemoryObject *backing
    cdef uintptr_t pinned = 0
    while ledger.starts_below(run, end):
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


cdef bint any_committed(Ledger ledger, Runs.iterator run, uintptr_t end) noexcept nogil:
    """Whether any page is committed, from a run on."""
    while ledger.starts_below(run, end):
        if run.value().state == STATE_COMMITTED:
            return True
        preincrement(run)
    return False


cdef bint decommit_by_guards(Ledger ledger, Runs.iterator run, Chunk chunk, uintptr_t va,
                             uintptr_t end) noexcept nogil:
    """Decommit the range in a chunk that stays in use; false where that is impossible."""
    if not ledger.isolate_from(&run, va, end):
        return False
    if can_be_guarded(ledger, run, chunk, end) and install_guards(va, end - va) == 0:
        ledger.set_guarded(run, end)
        return True
    ledger.coalesce_from(run, end)
    return False


cdef Answer change_state(Ledger ledger, bint planned, const Plan &plan, Runs.iterator run,
                         uintptr_t end, uint32_t state) noexcept nogil:
    """Carry out a plan that brings isolated pages to ``state``, and write that into the ledger."""
    cdef Answer answer = carry_out_on(ledger, planned, plan, run, end)
    if answer.reason == DONE:
        ledger.set_state_from(run, end, state)
    return answer


cdef Answer carry_out_on(Ledger ledger, bint planned, const Plan &plan, Runs.iterator run,
                         uintptr_t end) noexcept nogil:
    """Carry out a plan on isolated pages; where that fails, or planning did, join runs again."""
    cdef uint64_t mappings = 0
    cdef int result
    cdef Answer answer = refused(NO_LEDGER_MEMORY)
    if planned:
        result = carry_out(plan, &mappings)
        if result == 0:
            return done()
        # Private pages that become writable count against RLIMIT_DATA.
        answer = kernel_refused(result, LIMIT_DATA if run.value().backing == NULL else 0, mappings)
    ledger.coalesce_from(run, end)
    return answer


cdef Answer protect_pages(AddressSpace space, uintptr_t va, uintptr_t end,
                          uint32_t protection) noexcept nogil:
    """Change the protection: of committed pages now, of reserved ones once committed."""
    cdef Plan plan
    cdef Runs.iterator run = space.ledger.run_at(va)
    cdef Answer answer = check_protect(run, va, end, protection)
    if answer.reason != DONE:
        return answer
    if not space.ledger.isolate_from(&run, va, end):
        return refused_cut(space)
    answer = carry_out_on(space.ledger, plan_protect(run, end, protection, plan), plan, run, end)
    if answer.reason == DONE:
        space.ledger.set_protection_from(run, end, protection)
    return answer


cdef Answer check_protect(Runs.iterator run, uintptr_t va, uintptr_t end,
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
