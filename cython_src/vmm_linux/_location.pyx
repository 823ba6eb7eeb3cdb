"""What the ledger says of one page: whose it is, and what is around it that is alike."""

from cython.operator cimport dereference, predecrement, preincrement

from vmm_linux cimport _features
from vmm_linux._ledger cimport Regions, Run, Runs
from vmm_linux._vocabulary cimport (
    KIND_FREE,
    KIND_GUARD,
    KIND_MDL,
    STATE_RESERVED,
    round_down,
)


cdef Location locate(Ledger ledger, uintptr_t va) noexcept nogil:
    """What the ledger says of the page that includes ``va``. The caller holds the mutex."""
    cdef size_t page = _features.page_size()
    cdef Location where
    cdef Regions.iterator region = ledger.region_at(va)
    cdef Runs.iterator run, neighbour
    where.kind = KIND_FREE
    where.buffer = NULL
    if region == ledger.regions.end():
        region = ledger.region_around(va, page)
        if region == ledger.regions.end():
            ledger.gap_around(va, page, &where.base, &where.end)
            return where
        where.kind = KIND_GUARD
        where.protection = 0
        where.state = STATE_RESERVED
        where.run_start = round_down(va, page)
        where.run_end = where.run_start + page
    where.flags = dereference(region).second.flags
    where.base = dereference(region).first
    where.end = dereference(region).second.end
    if where.kind == KIND_GUARD:
        return where
    run = ledger.run_at(va)
    where.kind = dereference(run).second.kind
    where.state = dereference(run).second.state
    where.protection = dereference(run).second.protection
    if where.kind == KIND_MDL:
        where.buffer = <MemoryObject *>dereference(run).second.backing
        where.mdl_offset = (
            dereference(run).second.offset + round_down(va, page) - dereference(run).first)
    neighbour = run
    while dereference(neighbour).first > where.base:
        predecrement(neighbour)
        if not looks_like(dereference(neighbour).second, where):
            preincrement(neighbour)
            break
    where.run_start = dereference(neighbour).first
    neighbour = run
    where.run_end = dereference(neighbour).second.end
    while where.run_end < where.end:
        preincrement(neighbour)
        if not looks_like(dereference(neighbour).second, where):
            break
        where.run_end = dereference(neighbour).second.end
    return where


cdef bint looks_like(const Run &run, const Location &where) noexcept nogil:
    """Whether a run has the state and the protection of the page."""
    return run.state == where.state and run.protection == where.protection
