"""Pages of a region become pages of a memory object, in place.

Linux cannot turn private pages into a memory file. So the replacement is prepared elsewhere: a
file with a copy of every page that was ever touched, mapped, and resident where the region is
LOCKED. One mremap(2) then puts it in the pages' place, the only step that cannot be undone.
"""

cdef enum:
    RESTORE_TRIES = 1000


cdef int convert_pages(Ledger ledger, uint32_t flags, uintptr_t start, uintptr_t end,
                       MemoryObject *fresh, uint64_t *mappings) noexcept nogil:
    """Put ``fresh``, holes so far, in place of isolated committed pages.

    Returns 0, or -errno with all unchanged. The replacement is mapped first. Undoing gives that
    mapping back, which at the map-count wall allows to cut again what was merged meanwhile. After
    an ENOMEM ``mappings`` is how many the process had then.
    """
    cdef int protection = widest_access(ledger, start, end)
    cdef Py_ssize_t replacement
    cdef int result
    if flags & FLAG_LOCKED:
        protection |= PROT_READ
    replacement = map_file(0, end - start, protection, 0, fresh.identity.fd, 0)
    if replacement < 0:
        return <int>replacement
    result = set_hidden_access(ledger, start, end, PROT_READ)
    if result == 0:
        result = copy_to(ledger, start, end, fresh)
    if result == 0:
        result = make_like(flags, replacement, end - start, protection, fresh)
    if result == 0:
        result = move_mapping(replacement, end - start, start)
    if result == 0:
        # Only now: what was replaced counted against RLIMIT_MEMLOCK too.
        if flags & FLAG_LOCKED:
            lock_what_fits(start, end - start)
        restore_access(ledger, start, end, protection)
        return 0
    if result == -ENOMEM:
        mappings[0] = kernel.mapping_count()
    unmap(replacement, end - start)
    set_hidden_access(ledger, start, end, PROT_NONE)
    return result


cdef int make_like(uint32_t flags, uintptr_t start, size_t size, int protection,
                   MemoryObject *fresh) noexcept nogil:
    """Give a mapping of ``fresh`` what the region's flags promise: 0 or -errno."""
    cdef int result = 0
    if flags & FLAG_HUGE:
        # Shared memory has huge pages only where the system's settings allow that.
        kernel.madvise(start, size, MADV_HUGEPAGE)
    if flags & FLAG_LOCKED:
        result = memory_object_fill(fresh, 0, size)
        if result == 0:
            # Resident, locked or not.
            result = populate_pages(start, size, protection)
    return result


cdef int widest_access(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil:
    """The PROT_* bits that any of the pages has."""
    cdef Runs.iterator run = ledger.runs.lower_bound(start)
    cdef int access = PROT_NONE
    while ledger.starts_below(run, end):
        access |= access_of(run.value())
        preincrement(run)
    return access


cdef void restore_access(Ledger ledger, uintptr_t start, uintptr_t end, int access) noexcept nogil:
    """Give each page its own access again where all now have ``access``.

    This needs no more mappings than the move gave back, so the map count allows it. If other
    threads take them all in between, it tries again, a limited number of times.
    """
    cdef Runs.iterator run = ledger.runs.lower_bound(start)
    cdef int tries = 0, own
    while ledger.starts_below(run, end):
        own = access_of(run.value())
        if own != access:
            while (kernel.mprotect(run.key(), run.value().end - run.key(), own) == -ENOMEM
                   and tries < RESTORE_TRIES):
                tries += 1
        preincrement(run)


cdef int copy_to(Ledger ledger, uintptr_t start, uintptr_t end, MemoryObject *fresh) noexcept nogil:
    """Copy every touched page to its place in ``fresh``, if there is headroom: 0 or -errno."""
    cdef int pagemap = -1
    cdef uint64_t needed = 0
    cdef int result
    if kernel.has(kernel.FEATURE_PAGEMAP):
        pagemap = kernel.openat(b"/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC)
        if pagemap < 0:
            return pagemap
    result = walk(ledger, start, end, pagemap, NULL, &needed)
    if result == 0:
        result = kernel.check_headroom(needed)
    if result == 0:
        result = walk(ledger, start, end, pagemap, fresh, &needed)
    if pagemap >= 0:
        kernel.close(pagemap)
    return result


cdef int walk(Ledger ledger, uintptr_t start, uintptr_t end, int pagemap, MemoryObject *fresh,
              uint64_t *needed) noexcept nogil:
    """Copy every touched page to ``fresh``, or count their bytes where it is NULL: 0 or -errno."""
    cdef Runs.iterator run = ledger.runs.lower_bound(start)
    cdef uintptr_t at, until, low, high
    cdef int result = 0
    while result == 0 and ledger.starts_below(run, end):
        at = low = run.key()
        until = run.value().end
        while result == 0 and at < until:
            result = next_touched(at, low, run.value(), pagemap, &at, &high)
            if result == 0 and fresh == NULL:
                needed[0] += high - at
            elif result == 0:
                result = memory_object_store(fresh, at - start, <const void *>at, high - at)
            at = high
        preincrement(run)
    return result


cdef int set_hidden_access(Ledger ledger, uintptr_t start, uintptr_t end,
                           int access) noexcept nogil:
    """Give pages without access this one meanwhile, or PROT_NONE again: 0 or -errno."""
    cdef Runs.iterator run = ledger.runs.lower_bound(start)
    cdef int result
    while ledger.starts_below(run, end):
        if access_of(run.value()) == PROT_NONE:
            result = kernel.mprotect(run.key(), run.value().end - run.key(), access)
            if result < 0 and access != PROT_NONE:
                return result
        preincrement(run)
    return 0


cdef int next_touched(uintptr_t at, uintptr_t run_start, const Run *run, int pagemap,
                      uintptr_t *start, uintptr_t *end) noexcept nogil:
    """The next touched pages of a run from ``at`` on, side by side; empty at its end."""
    cdef int memory
    if run.backing != NULL:
        memory = open_file_number(&(<MemoryObject *>run.backing).identity)
        return memory if memory < 0 else next_data(memory, at, run_start, run, start, end)
    if pagemap < 0:
        start[0] = at
        end[0] = run.end
        return 0
    return procfs.find_touched(pagemap, at, run.end, start, end)


cdef int next_data(int fd, uintptr_t at, uintptr_t run_start, const Run *run, uintptr_t *start,
                   uintptr_t *end) noexcept nogil:
    """``next_touched`` of a memory file: what is not a hole."""
    cdef int64_t offset = <int64_t>(run.offset + (at - run_start))
    cdef int64_t last = <int64_t>(run.offset + (run.end - run_start))
    cdef int64_t data = kernel.lseek(fd, offset, SEEK_DATA)
    cdef int64_t hole
    if data == -ENXIO or data >= last:
        start[0] = end[0] = run.end
        return 0
    if data < 0:
        return <int>data
    hole = kernel.lseek(fd, data, SEEK_HOLE)
    if hole < 0:
        return <int>hole
    start[0] = at + (data - offset)
    end[0] = at + (min(hole, last) - offset)
    return 0
