"""How a call becomes system calls: a planner that only reads the ledger, and one executor.

A plan is a list of steps. Every step but the last can be undone; what cannot (discarding contents)
is the last. So a call that fails, at whichever system call, leaves everything as it was.
There are two ways to commit, with steps of their own: see ``_guards.pyx``.
"""


cdef inline int page_access(uint32_t state, uint32_t protection) noexcept nogil:
    """The PROT_* bits that a page's state and protection mean: the one place that decides."""
    if state != STATE_COMMITTED:
        return PROT_NONE
    return (
        (PROT_READ if protection & FLAG_READ else 0)
        | (PROT_WRITE if protection & FLAG_WRITE else 0)
        | (PROT_EXEC if protection & FLAG_EXECUTE else 0)
    )



cdef inline int unmap(uintptr_t start, size_t size) noexcept nogil:
    """Give addresses back: the one place that calls munmap(2)."""
    return kernel.munmap(start, size)


cdef Step step(StepKind kind, uintptr_t start, uintptr_t end) noexcept nogil:
    """A step over private pages."""
    cdef Step result
    result.kind = kind
    result.start = start
    result.size = end - start
    result.protection = PROT_NONE
    result.before = PROT_NONE
    result.backing = NULL
    result.offset = 0
    return result


cdef Step step_over(StepKind kind, uintptr_t start, const Run *run, int protection,
                    int before=PROT_NONE) noexcept nogil:
    """A step over the pages of a run, whatever backs them."""
    cdef Step result = step(kind, start, run.end)
    result.protection = protection
    result.before = before
    result.backing = <MemoryObject *>run.backing
    result.offset = run.offset
    return result


cdef bint add_step(Plan &plan, StepKind kind, uintptr_t start, uintptr_t end, int protection,
                   int before) noexcept nogil:
    """Append a step over private pages; false when memory is short."""
    cdef Step added = step(kind, start, end)
    added.protection = protection
    added.before = before
    return append_or_fail(plan, added)


cdef bint plan_commit_of_run(uint32_t flags, uintptr_t start, const Run *run,
                             Plan &plan) noexcept nogil:
    """Commit one reserved run; false when memory is short.

    Pages of a LOCKED region are populated while they are writable, so that each gets
    memory of its own and is charged for it, and get their protection afterwards. Pages behind
    guards, which no LOCKED region has, only lose these.
    """
    cdef int final = page_access(STATE_COMMITTED, run.protection)
    cdef int first = PROT_READ | PROT_WRITE if flags & FLAG_LOCKED else final
    cdef int behind = page_access(STATE_COMMITTED, run.opened)
    if behind != PROT_NONE:
        if behind != final and not append_or_fail(
                plan, step_over(STEP_PROTECT, start, run, final, behind)):
            return False
        return append_or_fail(plan, step(STEP_UNGUARD, start, run.end))
    if first != PROT_NONE and not append_or_fail(plan, step_over(STEP_ACCESS, start, run, first)):
        return False
    if flags & FLAG_HUGE and run.backing == NULL:
        if not append_or_fail(plan, step(STEP_ADVISE_HUGE, start, run.end)):
            return False
    if not flags & FLAG_LOCKED:
        return True
    if run.backing != NULL and not append_or_fail(plan, step_over(STEP_FILL, start, run, first)):
        return False
    if not append_or_fail(plan, step_over(STEP_POPULATE, start, run, first)):
        return False
    if not append_or_fail(plan, step_over(STEP_LOCK, start, run, first)):
        return False
    return first == final or append_or_fail(plan, step_over(STEP_PROTECT, start, run, final, first))


cdef bint plan_commit(Ledger ledger, uint32_t flags, Runs.iterator run, uintptr_t end,
                      Plan &plan) noexcept nogil:
    """Commit isolated reserved pages from a run on; false when memory is short."""
    while True:
        if run.value().state == STATE_RESERVED:
            if not plan_commit_of_run(
                    flags, run.key(), run.value(), plan):
                return False
        if run.value().end >= end:
            return True
        preincrement(run)


cdef bint plan_decommit(Ledger ledger, uint32_t flags, Runs.iterator run, uintptr_t end,
                        Plan &plan) noexcept nogil:
    """Reserve isolated committed pages again, and close what is open; false: short of memory.

    Private pages: one mapping of fresh PROT_NONE memory over all of them. It is atomic, returns
    memory and charge, and merges with its neighbours. MADV_DONTNEED with mprotect(2) never
    merges back and keeps the charge; MADV_DONTNEED before the mapping would lose the contents
    when the mapping then fails at the map-count wall.
    """
    cdef uintptr_t first = end
    cdef uintptr_t last = end
    cdef Run lowest = run.value()[0]
    cdef int before
    cdef Step punch
    while ledger.starts_below(run, end):
        if run.value().state == STATE_COMMITTED or run.value().opened:
            if first == end:
                first = run.key()
                lowest = run.value()[0]
            last = run.value().end
            before = page_access(STATE_COMMITTED, run.value().protection)
            if run.value().backing != NULL:
                if flags & FLAG_LOCKED and not append_or_fail(plan, step_over(
                        STEP_UNLOCK, run.key(), run.value(), before)):
                    return False
                if before != PROT_NONE and not append_or_fail(plan, step_over(
                        STEP_PROTECT, run.key(), run.value(),
                        PROT_NONE, before)):
                    return False
        preincrement(run)
    if first == end:
        return True
    if lowest.backing == NULL:
        return append_or_fail(plan, step(STEP_DISCARD, first, last))
    punch = step_over(STEP_PUNCH, first, &lowest, PROT_NONE)
    punch.size = last - first
    return append_or_fail(plan, punch)


cdef bint plan_protect(Ledger ledger, Runs.iterator run, uintptr_t end, uint32_t protection,
                       Plan &plan) noexcept nogil:
    """Change the protection of isolated committed pages from a run on; false: short of memory."""
    cdef int before, after
    while True:
        before = page_access(run.value().state, run.value().protection)
        after = page_access(run.value().state, protection)
        if before != after and not append_or_fail(plan, step_over(
                STEP_PROTECT, run.key(), run.value(), after, before)):
            return False
        if run.value().end >= end:
            return True
        preincrement(run)


cdef bint plan_residence(uintptr_t start, size_t size, uint32_t protection,
                         MemoryObject *backing, Plan &plan) noexcept nogil:
    """Give pages of a memory object memory and pin them; false when memory is short."""
    cdef Step populate = step(STEP_POPULATE, start, start + size)
    populate.protection = page_access(STATE_COMMITTED, protection)
    populate.backing = backing
    return append_or_fail(plan, populate) and append_or_fail(
        plan, step(STEP_LOCK, start, start + size))


cdef Py_ssize_t reserve(uintptr_t start, size_t size, int fixed) noexcept nogil:
    """Map private reserved memory: its address, or -errno. ``fixed``: MAP_FIXED and its like.

    The one place that makes private memory for regions, so that all of it has one name where the
    kernel has names: mappings with different ones never merge. Without its name memory is as good.
    The kernel names a mapping that is all its own without cutting any, at the map-count wall too.
    One that it merged with a stranger's it would have to cut off first; where it has no room for
    that, and no memory for a name, it changes nothing.
    """
    cdef Py_ssize_t address = kernel.mmap(
        start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | fixed, -1, 0)
    if address >= 0 and kernel.has(kernel.FEATURE_ANONYMOUS_NAMES):
        kernel.name_memory(address, size, b"vmm_linux region")
    return address


cdef int reserve_afresh(uintptr_t start, size_t size) noexcept nogil:
    """Fresh PROT_NONE memory in place of private pages: 0 or -errno."""
    return <int>min(0, reserve(start, size, MAP_FIXED))


cdef void lock_what_fits(uintptr_t start, size_t size) noexcept nogil:
    """Pin the longest leading part that RLIMIT_MEMLOCK allows, found by halving."""
    cdef size_t page = kernel.page_size()
    cdef uintptr_t end = start + size
    cdef size_t piece = size
    cdef int result
    while piece != 0 and start != end:
        piece = min(piece, end - start)
        result = kernel.mlock(start, piece)
        if result == -EPERM:
            return
        if result == 0:
            start += piece
        else:
            piece = round_down(piece // 2, page)


cdef int populate(const Step &this) noexcept nogil:
    """Make pages resident: 0 or -errno, at once where there is no room for private ones."""
    cdef int result = kernel.check_headroom(this.size) if this.backing == NULL else 0
    if result == 0:
        result = populate_pages(this.start, this.size, this.protection)
    return result


cdef int populate_pages(uintptr_t start, size_t size, int protection) noexcept nogil:
    """Make pages resident, by writing where that is allowed: 0 or -errno."""
    return not_again(kernel.madvise(
        start, size, MADV_POPULATE_WRITE if protection & PROT_WRITE else MADV_POPULATE_READ))


cdef int not_again(int result) noexcept nogil:
    """What madvise(2) answers; it says EAGAIN where others say ENOMEM."""
    return -ENOMEM if result == -EAGAIN else result


cdef int do_step(const Step &this) noexcept nogil:
    """Carry out one step: 0 or -errno."""
    if this.kind == STEP_ACCESS or this.kind == STEP_PROTECT:
        return kernel.mprotect(this.start, this.size, this.protection)
    if this.kind == STEP_ADVISE_HUGE:
        return not_again(kernel.madvise(this.start, this.size, MADV_HUGEPAGE))
    if this.kind == STEP_FILL:
        return memory_object_fill(this.backing, this.offset, this.size)
    if this.kind == STEP_POPULATE:
        return populate(this)
    if this.kind == STEP_LOCK:
        lock_what_fits(this.start, this.size)
        return 0
    if this.kind == STEP_UNLOCK:
        return kernel.munlock(this.start, this.size)
    if this.kind == STEP_GUARD:
        return kernel.madvise(this.start, this.size, MADV_GUARD_INSTALL)
    if this.kind == STEP_UNGUARD:
        return kernel.madvise(this.start, this.size, MADV_GUARD_REMOVE)
    if this.kind == STEP_DISCARD:
        return reserve_afresh(this.start, this.size)
    return memory_object_punch(this.backing, this.offset, this.size)


cdef void undo_step(const Step &this) noexcept nogil:
    """Undo one step, which may have failed half way."""
    if this.kind == STEP_ACCESS:
        if this.backing != NULL or reserve_afresh(this.start, this.size) < 0:
            kernel.mprotect(this.start, this.size, PROT_NONE)
    elif this.kind == STEP_PROTECT:
        kernel.mprotect(this.start, this.size, this.before)
    elif this.kind == STEP_FILL and memory_object_is_exclusive(this.backing):
        memory_object_punch(this.backing, this.offset, this.size)
    elif this.kind == STEP_LOCK:
        kernel.munlock(this.start, this.size)
    elif this.kind == STEP_UNLOCK:
        lock_what_fits(this.start, this.size)
    elif this.kind == STEP_GUARD:
        kernel.madvise(this.start, this.size, MADV_GUARD_REMOVE)
    elif this.kind == STEP_UNGUARD:
        kernel.madvise(this.start, this.size, MADV_GUARD_INSTALL)


cdef int carry_out(const Plan &plan, uint64_t *mappings) noexcept nogil:
    """Carry out every step, or none: 0 or -errno of the step that failed.

    After an ENOMEM ``mappings`` says how many the process had then: the way back makes room.
    """
    cdef size_t done
    cdef int result
    for done in range(plan.size()):
        result = do_step(plan[done])
        if result < 0:
            if result == -ENOMEM:
                mappings[0] = kernel.mapping_count()
            while True:
                undo_step(plan[done])
                if done == 0:
                    return result
                done -= 1
    return 0
