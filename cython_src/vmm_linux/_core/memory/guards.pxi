"""The second way to commit: guard regions, which split no mapping (Linux 6.13).

mprotect(2) cuts a mapping in three for every island of committed pages, and at
``vm.max_map_count`` no more can be cut. So where a VMM's pages are in many pieces, the chunk
around an island is opened: its reserved pages get guards, and all of it access; from then on
pages in it are committed by taking guards away, and decommitted by putting them back, with one
mapping for the chunk and its open neighbours. An open chunk is charged as a whole; with its last
committed page it is closed, which gives the charge back.

The rule: a change smaller than a chunk goes by guards where its chunk has ``CROWDED`` islands,
those to come in the same call included, or is open, or where the VMM has ``FRAGMENTED`` runs; but
not where pages are to be pinned (the kernel has no guards in pinned memory), huge or shared.
Nothing outside this package's ledger shows which way was taken, but the charge.

Measured (scripts/bench): to open a chunk of 2 MiB takes 9 µs, as much as six islands by mprotect;
an island then takes 0.6 µs instead of 1.7 µs. One island a chunk takes 1.5 µs by mprotect and
10 µs by guards, 64 take 118 µs and 46 µs. With four islands left to mprotect first, the few stay
cheap, and the two ways are even at twelve.
"""

cdef enum:
    # Committed runs that make a chunk worth opening.
    CROWDED = 4
    # Runs of a VMM that make every chunk worth opening: the kernel's usual map count is 65,530.
    FRAGMENTED = 10_000

cdef size_t crowded = CROWDED
cdef size_t fragmented = FRAGMENTED

cdef enum Content:
    USED = 1                    # something that an open chunk has to stay open for
    OPENED = 2                  # reserved pages behind guards


def set_rule(in_chunk=None, in_vmm=None):
    """Take guards from these numbers of runs on; for tests.

    Args:
        in_chunk: committed runs of a chunk, or None for ``CROWDED``.
        in_vmm: runs of a VMM, or None for ``FRAGMENTED``.
    """
    global crowded, fragmented
    cdef size_t islands = CROWDED if in_chunk is None else in_chunk
    cdef size_t runs = FRAGMENTED if in_vmm is None else in_vmm
    crowded = islands
    fragmented = runs


cdef size_t chunk_size() noexcept nogil:
    """Bytes that one page of page-table entries covers."""
    return PAGE_SIZE // sizeof(void *) * PAGE_SIZE


cdef Chunk chunks_around(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """The chunks that a range in one region touches, as far as they are the region's."""
    return chunks_of(ledger.region_at(start), start, end)


cdef Chunk chunks_of(Regions.iterator region, uintptr_t start, uintptr_t end) noexcept nogil:
    """``chunks_around`` in this region."""
    cdef Chunk chunk
    chunk.start = max(dereference(region).first, round_down(start, chunk_size()))
    chunk.end = min(dereference(region).second.end, round_up(end, chunk_size()))
    return chunk


cdef bint suits(Ledger ledger, uint32_t flags, Runs.iterator run, Chunk chunk,
                uintptr_t start, uintptr_t end, size_t coming=0) noexcept nogil:
    """Whether a change of ``[start, end)``, from a run on, is one for guards.

    ``coming``: how many more islands the same call is to make in the chunk.
    Only the kernel's guards, which it may not have, are worth more than a look at neighbours.
    """
    return (
        end - start < chunk_size()
        and not flags & (FLAG_LOCKED | FLAG_HUGE | FLAG_SHAREABLE)
        and (ledger.runs.size() >= fragmented or is_crowded(ledger, run, chunk, coming))
        and kernel.has(kernel.FEATURE_GUARD_REGIONS)
    )


cdef bint is_crowded(Ledger ledger, Runs.iterator run, Chunk chunk,
                     size_t islands) noexcept nogil:
    """Whether the chunk around a run is open, or has many islands beside ``islands``."""
    cdef Runs.iterator at = run
    while (islands < crowded and at != ledger.runs.end()
            and dereference(at).first < chunk.end):
        if dereference(at).second.opened != 0:
            return True
        islands += dereference(at).second.state == STATE_COMMITTED
        preincrement(at)
    while islands < crowded and run != ledger.runs.begin():
        predecrement(run)
        if dereference(run).second.end <= chunk.start:
            break
        if dereference(run).second.opened != 0:
            return True
        islands += dereference(run).second.state == STATE_COMMITTED
    return islands >= crowded


cdef uint32_t opening_access(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """The access that all closed pages of the range are to have; 0: none, or not all the same."""
    cdef Runs.iterator run = ledger.run_at(start)
    cdef uint32_t access = 0
    while run != ledger.runs.end() and dereference(run).first < end:
        if is_closed(dereference(run).second):
            if access != 0 and dereference(run).second.protection != access:
                return 0
            access = dereference(run).second.protection
            if access == 0:
                return 0
        preincrement(run)
    return access


cdef bint plan_opening(Ledger ledger, Chunk chunk, uintptr_t start, uintptr_t end,
                       uint32_t access, Plan &plan) noexcept nogil:
    """Commit isolated reserved pages in isolated chunks, which are opened; false: short of memory.

    First come all guards, then the access: no page is ever open that should not be.
    """
    cdef Runs.iterator run = ledger.runs.lower_bound(chunk.start)
    cdef int protection = page_access(STATE_COMMITTED, access)
    cdef uintptr_t stretch = 0
    while run != ledger.runs.end() and dereference(run).first < chunk.end:
        if is_closed(dereference(run).second) and not start <= dereference(run).first < end:
            if not add_step(plan, STEP_GUARD, dereference(run).first, dereference(run).second.end,
                            PROT_NONE, PROT_NONE):
                return False
        preincrement(run)
    run = ledger.runs.lower_bound(chunk.start)
    while run != ledger.runs.end() and dereference(run).first < chunk.end:
        if is_closed(dereference(run).second):
            if stretch == 0:
                stretch = dereference(run).first
        elif stretch != 0:
            if not add_step(plan, STEP_ACCESS, stretch, dereference(run).first, protection, PROT_NONE):
                return False
            stretch = 0
        if dereference(run).second.opened != 0 and start <= dereference(run).first < end:
            if not plan_commit_of_run(0, dereference(run).first, dereference(run).second, plan):
                return False
        preincrement(run)
    return stretch == 0 or add_step(plan, STEP_ACCESS, stretch, chunk.end, protection, PROT_NONE)


cdef bint can_be_guarded(Ledger ledger, Runs.iterator run, Chunk chunk,
                         uintptr_t end) noexcept nogil:
    """Whether guards can take isolated pages away, from a run on: one chunk's, which stays in use.

    Their mappings keep their access, so each must have some.
    """
    if chunk.end - round_down(chunk.start, chunk_size()) > chunk_size() or not (
            is_used_below(ledger, run, chunk) or is_used_from(ledger, run, end, chunk)):
        return False
    while run != ledger.runs.end() and dereference(run).first < end:
        if is_closed(dereference(run).second) or dereference(run).second.backing != NULL:
            return False
        if (dereference(run).second.state == STATE_COMMITTED
                and dereference(run).second.protection == 0):
            return False
        preincrement(run)
    return True


cdef bint is_used_below(Ledger ledger, Runs.iterator run, Chunk chunk) noexcept nogil:
    """Whether a chunk has to stay open for pages below a run; the nearest come first."""
    while run != ledger.runs.begin():
        predecrement(run)
        if dereference(run).second.end <= chunk.start:
            return False
        if is_use(dereference(run).second):
            return True
    return False


cdef bint is_used_from(Ledger ledger, Runs.iterator run, uintptr_t end,
                       Chunk chunk) noexcept nogil:
    """Whether a chunk has to stay open for pages at ``end`` or above, which comes after a run."""
    while run != ledger.runs.end() and dereference(run).first < chunk.end:
        if dereference(run).first >= end and is_use(dereference(run).second):
            return True
        preincrement(run)
    return False


cdef bint is_use(const Run &run) noexcept nogil:
    """Whether an open chunk has to stay so for these pages."""
    return run.state == STATE_COMMITTED or run.backing != NULL


cdef bint is_just_guarded(const Run &run, uintptr_t end) noexcept nogil:
    """Whether pages of a run up to ``end`` lie behind guards and have their access already."""
    return run.opened != 0 and run.opened == run.protection and end <= run.end


cdef int remove_guards(uintptr_t start, uintptr_t end) noexcept nogil:
    """Take guards away: 0 or -errno."""
    return kernel.madvise(start, end - start, MADV_GUARD_REMOVE)


cdef bint guard(uintptr_t start, uintptr_t end) noexcept nogil:
    """Put guards over pages, which discards their contents; false when the kernel refuses.

    It refuses at once where memory was pinned behind the package's back; half way only when it has
    no memory for page tables. Either way the caller discards the contents with a fresh mapping.
    """
    return kernel.madvise(start, end - start, MADV_GUARD_INSTALL) == 0


cdef int content(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """What lies in a part of a region, as bits of ``Content``; ends with the first USED."""
    cdef Runs.iterator run
    cdef int found = 0
    if start >= end:
        return 0
    run = ledger.run_at(start)
    while run != ledger.runs.end() and dereference(run).first < end:
        if is_use(dereference(run).second):
            return found | USED
        if dereference(run).second.opened != 0:
            found |= OPENED
        preincrement(run)
    return found


cdef uintptr_t closing_start(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """Where to start when ``[start, end)`` is decommitted: there, or where its chunk can close."""
    cdef Chunk chunk = chunks_around(ledger, start, start + 1)
    cdef int below = content(ledger, chunk.start, start)
    if below == OPENED and not content(ledger, end, chunk.end) & USED:
        return chunk.start
    return start


cdef uintptr_t closing_end(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """Where to end when ``[start, end)`` is decommitted: there, or where its chunk can close."""
    cdef Chunk chunk = chunks_around(ledger, end - 1, end)
    cdef int above = content(ledger, end, chunk.end)
    if above == OPENED and not content(ledger, chunk.start, start) & USED:
        return chunk.end
    return end


cdef bint is_open_and_unused(Ledger ledger, Chunk chunk) noexcept nogil:
    """Whether a chunk has nothing left that it is open for."""
    return content(ledger, chunk.start, chunk.end) == OPENED
