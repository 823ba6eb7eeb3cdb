"""What the ledger says of one page, and which pages around it are alike.

The caller holds the mutex.
"""


cdef Location locate(Ledger ledger, uintptr_t va) noexcept nogil:
    """What the ledger says of the page that includes ``va``."""
    cdef Location where
    cdef Regions.iterator region = ledger.region_at(va)
    cdef Runs.iterator run, neighbour
    where.kind = KIND_FREE
    where.buffer = NULL
    if region == ledger.regions.end():
        region = ledger.region_around(va, PAGE_SIZE)
        if region == ledger.regions.end():
            ledger.gap_around(va, PAGE_SIZE, &where.base, &where.end)
            return where
        where.kind = KIND_GUARD
        where.protection = 0
        where.state = STATE_RESERVED
        where.run_start = round_down(va, PAGE_SIZE)
        where.run_end = where.run_start + PAGE_SIZE
    where.flags = region.value().flags
    where.base = region.key()
    where.end = region.value().end
    if where.kind == KIND_GUARD:
        return where
    run = ledger.run_at(va)
    where.kind = run.value().kind
    where.state = run.value().state
    where.protection = run.value().protection
    if where.kind == KIND_MDL:
        where.buffer = <MemoryObject *>run.value().backing
        where.mdl_offset = run.value().offset + round_down(va, PAGE_SIZE) - run.key()
    neighbour = run
    while neighbour.key() > where.base:
        predecrement(neighbour)
        if not looks_like(neighbour.value(), where):
            preincrement(neighbour)
            break
    where.run_start = neighbour.key()
    neighbour = run
    where.run_end = neighbour.value().end
    while where.run_end < where.end:
        preincrement(neighbour)
        if not looks_like(neighbour.value(), where):
            break
        where.run_end = neighbour.value().end
    return where


cdef bint looks_like(const Run *run, const Location &where) noexcept nogil:
    """Whether a run has the state and the protection of the page."""
    return run.state == where.state and run.protection == where.protection


cdef bint intent_at(Ledger ledger, uintptr_t va, Intent *intent) noexcept nogil:
    """The pages around ``va`` that are alike, kind and buffer included.

    False where ``va`` is not this VMM's: then only ``start`` and ``end`` of the gap are set.
    """
    cdef Location where = locate(ledger, va)
    cdef Runs.iterator run, neighbour
    if where.kind == KIND_FREE:
        intent.start = where.base
        intent.end = where.end
        return False
    intent.start = where.run_start
    intent.end = where.run_end
    intent.base = where.base
    intent.limit = where.end
    intent.flags = where.flags
    intent.kind = where.kind
    intent.state = where.state
    intent.protection = where.protection
    intent.sid = 0
    if where.kind == KIND_GUARD:
        return True
    if where.buffer != NULL and memory_object_sid(where.buffer, &intent.sid) < 0:
        intent.sid = 0
    run = neighbour = ledger.run_at(va)
    while neighbour.key() > where.run_start:
        predecrement(neighbour)
        if not is_of_the_same(neighbour.value(), run.value()):
            intent.start = neighbour.value().end
            break
    neighbour = run
    while neighbour.value().end < where.run_end:
        preincrement(neighbour)
        if not is_of_the_same(neighbour.value(), run.value()):
            intent.end = neighbour.key()
            break
    return True


cdef bint is_of_the_same(const Run *run, const Run *other) noexcept nogil:
    """Whether two runs are of one kind, and of one buffer."""
    return run.kind == other.kind and run.backing == other.backing


cdef int add_intents(Ledger ledger, vector[Intent] *intents) except -1:
    """Add the intents of all pages.

    The caller holds the GIL too: nothing here waits for it, not even to raise MemoryError.
    """
    cdef Regions.iterator region = ledger.regions.begin()
    cdef Intent intent
    cdef uintptr_t va, end
    while region != ledger.regions.end():
        va = region.key()
        end = region.value().end
        if region.value().low_guard:
            va -= PAGE_SIZE
        if region.value().high_guard:
            end += PAGE_SIZE
        while va < end and intent_at(ledger, va, &intent):
            intents.push_back(intent)
            va = intent.end
        preincrement(region)
    return 0
