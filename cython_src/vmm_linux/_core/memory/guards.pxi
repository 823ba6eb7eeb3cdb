"""The second way to commit: guard regions, which split no mapping (Linux 6.13).

mprotect(2) cuts a mapping in three for every island of committed pages, and at
``vm.max_map_count`` no more can be cut. So where a VMM's pages are in many runs, the chunk
around an island is opened: its reserved pages get guards, and all of it access. From then on
pages in it are committed by removing guards, and decommitted by installing them, with one
mapping for the chunk and its open neighbours. An open chunk is charged as a whole; it is closed
with its last committed page, which gives the charge back.

The rule: a change smaller than a chunk uses guards where its chunk has ``CROWDED`` islands,
those to come in the same call included, or is open, or where the VMM has ``FRAGMENTED`` runs; but
not in LOCKED regions (the kernel has no guards in locked memory), nor in huge or shared ones.
Outside the ledger only the charge shows which way was taken.

Measured (scripts/bench): opening a chunk of 2 MiB takes 9 µs, as much as six islands by mprotect;
an island then takes 0.6 µs instead of 1.7 µs. One island a chunk takes 1.5 µs by mprotect and
10 µs by guards, 64 take 118 µs and 46 µs. As the first four islands go by mprotect, few islands
stay cheap, and the two ways are equal at twelve.
"""

cdef enum:
    # Committed runs that make a chunk worth opening.
    CROWDED = 4
    # Runs of a VMM that make every chunk worth opening: the kernel's usual map count is 65,530.
    FRAGMENTED = 10_000

cdef struct Chunk:
    # The part of a region that one or several neighbouring pages of page-table entries map.
    uintptr_t start, end

cdef size_t crowded = CROWDED
cdef size_t fragmented = FRAGMENTED

cdef enum Content:
    USED = 1                    # pages that keep an open chunk open
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
    chunk.start = max(region.key(), round_down(start, chunk_size()))
    chunk.end = min(region.value().end, round_up(end, chunk_size()))
    return chunk


cdef bint suits(Ledger ledger, uint32_t flags, Runs.iterator run, Chunk chunk,
                uintptr_t start, uintptr_t end, size_t coming=0) noexcept nogil:
    """Whether a change of ``[start, end)``, from a run on, is one for guards.

    The cheap conditions come first.

    Parameters:
        coming: how many more islands the same call will make in the chunk.
    """
    return (
        end - start < chunk_size()
        and not flags & (FLAG_LOCKED | FLAG_HUGE | FLAG_SHAREABLE)
        and (ledger.runs.size() >= fragmented or is_crowded(ledger, run, chunk, coming))
        and kernel.has(kernel.FEATURE_GUARD_REGIONS)
    )


cdef bint is_crowded(Ledger ledger, Runs.iterator run, Chunk chunk, size_t islands) noexcept nogil:
    """Whether the chunk around a run is open, or has many islands beside ``islands``."""
    cdef Runs.iterator at = run
    while islands < crowded and ledger.starts_below(at, chunk.end):
        if at.value().opened != 0:
            return True
        islands += at.value().state == STATE_COMMITTED
        preincrement(at)
    while islands < crowded and run != ledger.runs.begin():
        predecrement(run)
        if run.value().end <= chunk.start:
            break
        if run.value().opened != 0:
            return True
        islands += run.value().state == STATE_COMMITTED
    return islands >= crowded


cdef uint32_t opening_access(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """The access that all closed pages of the range get; 0: none, or not all the same."""
    cdef Runs.iterator run = ledger.run_at(start)
    cdef uint32_t access = 0
    while ledger.starts_below(run, end):
        if is_closed(run.value()):
            if access != 0 and run.value().protection != access:
                return 0
            access = run.value().protection
            if access == 0:
                return 0
        preincrement(run)
    return access


cdef bint can_be_guarded(Ledger ledger, Runs.iterator run, Chunk chunk,
                         uintptr_t end) noexcept nogil:
    """Whether guards can decommit isolated pages, from a run on: in one chunk, which stays in use.

    Their mappings keep their access, so each must have some.
    """
    if chunk.end - round_down(chunk.start, chunk_size()) > chunk_size() or not (
            is_used_below(ledger, run, chunk) or is_used_from(ledger, run, end, chunk)):
        return False
    while ledger.starts_below(run, end):
        if is_closed(run.value()) or run.value().backing != NULL:
            return False
        if run.value().state == STATE_COMMITTED and run.value().protection == 0:
            return False
        preincrement(run)
    return True


cdef bint is_used_below(Ledger ledger, Runs.iterator run, Chunk chunk) noexcept nogil:
    """Whether pages below a run keep a chunk open; the nearest are looked at first."""
    while run != ledger.runs.begin():
        predecrement(run)
        if run.value().end <= chunk.start:
            return False
        if is_use(run.value()):
            return True
    return False


cdef bint is_used_from(Ledger ledger, Runs.iterator run, uintptr_t end, Chunk chunk) noexcept nogil:
    """Whether pages at ``end`` or above, from a run on, keep a chunk open."""
    while ledger.starts_below(run, chunk.end):
        if run.key() >= end and is_use(run.value()):
            return True
        preincrement(run)
    return False


cdef bint is_use(const Run *run) noexcept nogil:
    """Whether these pages keep an open chunk open."""
    return run.state == STATE_COMMITTED or run.backing != NULL


cdef bint is_just_guarded(const Run *run, uintptr_t end) noexcept nogil:
    """Whether pages of a run up to ``end`` lie behind guards and have their access already."""
    return run.opened != 0 and run.opened == run.protection and end <= run.end


cdef int remove_guards(uintptr_t start, size_t size) noexcept nogil:
    """Remove guards: 0 or -errno."""
    return kernel.madvise(start, size, MADV_GUARD_REMOVE)


cdef int install_guards(uintptr_t start, size_t size) noexcept nogil:
    """Install guards, which discards the contents of pages: 0 or -errno.

    The kernel refuses before the first page where other code locked the memory, and halfway only
    when it has no memory for page tables. Then the caller discards the contents with a fresh
    mapping.
    """
    return kernel.madvise(start, size, MADV_GUARD_INSTALL)


cdef int content(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """What is in a part of a region, as bits of ``Content``; stops at the first USED."""
    cdef Runs.iterator run
    cdef int found = 0
    if start >= end:
        return 0
    run = ledger.run_at(start)
    while ledger.starts_below(run, end):
        if is_use(run.value()):
            return found | USED
        if run.value().opened != 0:
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
    """Whether a chunk is open, with no page that keeps it open."""
    return content(ledger, chunk.start, chunk.end) == OPENED
