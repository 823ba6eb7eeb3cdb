"""How a call becomes system calls: planners only read the ledger and append steps to a plan.

Every step of a plan but the last can be undone; what cannot (discarding contents) is the last. So
a call that fails, at whichever system call, leaves everything as it was: see ``executor.pxi``.
There are two ways to commit, with steps of their own: see ``guards.pxi``.

Every planner takes isolated pages from a run up to an end, and returns false when memory is short.
"""

cdef enum StepKind:
    # Can be undone:
    STEP_ACCESS         # make reserved pages accessible
    STEP_PROTECT        # change the protection of accessible pages
    STEP_ADVISE_HUGE    # ask for transparent huge pages
    STEP_FILL           # give pages of a memory object memory
    STEP_POPULATE       # make pages resident, each with memory of its own
    STEP_LOCK           # lock as many pages as the limit allows
    STEP_UNLOCK
    STEP_GUARD          # put guards over reserved pages that have no contents
    STEP_UNGUARD        # take them away
    # Cannot be undone, so last:
    STEP_DISCARD        # private pages back to reserved, their memory to the system
    STEP_PUNCH          # the same for the memory behind shared pages

cdef struct Step:
    StepKind kind
    uintptr_t start
    size_t size
    int protection
    int before                  # the protection to go back to
    MemoryObject *backing       # NULL: private memory
    uint64_t offset

ctypedef ShortVector[Step] Plan


cdef inline int page_access(uint32_t state, uint32_t protection) noexcept nogil:
    """The PROT_* bits that a page's state and protection mean: the one place that decides."""
    if state != STATE_COMMITTED:
        return PROT_NONE
    return (
        (PROT_READ if protection & FLAG_READ else 0)
        | (PROT_WRITE if protection & FLAG_WRITE else 0)
        | (PROT_EXEC if protection & FLAG_EXECUTE else 0)
    )


cdef inline int access_of(const Run *run) noexcept nogil:
    """The PROT_* bits of the pages of a run."""
    return page_access(run.state, run.protection)


cdef bint add_step(Plan &plan, StepKind kind, uintptr_t start, uintptr_t end,
                   int protection=PROT_NONE, int before=PROT_NONE, MemoryObject *backing=NULL,
                   uint64_t offset=0) noexcept nogil:
    """Append a step, over private pages or those that ``backing`` has from ``offset`` on."""
    cdef Step added
    added.kind = kind
    added.start = start
    added.size = end - start
    added.protection = protection
    added.before = before
    added.backing = backing
    added.offset = offset
    return append_or_fail(plan, added)


cdef bint add_step_over(Plan &plan, StepKind kind, Runs.iterator run, int protection,
                        int before=PROT_NONE) noexcept nogil:
    """Append a step over the pages of a run."""
    return add_step(plan, kind, run.key(), run.value().end, protection, before,
                    <MemoryObject *>run.value().backing, run.value().offset)


cdef bint plan_commit(uint32_t flags, Runs.iterator run, uintptr_t end, Plan &plan) noexcept nogil:
    """Commit the reserved pages of a region with these flags."""
    while True:
        if run.value().state == STATE_RESERVED and not plan_commit_of_run(flags, run, plan):
            return False
        if run.value().end >= end:
            return True
        preincrement(run)


cdef bint plan_commit_of_run(uint32_t flags, Runs.iterator run, Plan &plan) noexcept nogil:
    """Commit one reserved run.

    Pages of a LOCKED region are populated while they are writable, so that each gets
    memory of its own and is charged for it, and get their protection afterwards. Pages behind
    guards, which no LOCKED region has, only lose these.
    """
    cdef int final = page_access(STATE_COMMITTED, run.value().protection)
    cdef int first = PROT_READ | PROT_WRITE if flags & FLAG_LOCKED else final
    cdef int behind = page_access(STATE_COMMITTED, run.value().opened)
    cdef bint is_private = run.value().backing == NULL
    if behind != PROT_NONE:
        return ((behind == final or add_step_over(plan, STEP_PROTECT, run, final, behind))
                and add_step(plan, STEP_UNGUARD, run.key(), run.value().end))
    if first != PROT_NONE and not add_step_over(plan, STEP_ACCESS, run, first):
        return False
    if flags & FLAG_HUGE and is_private and not add_step(
            plan, STEP_ADVISE_HUGE, run.key(), run.value().end):
        return False
    if not flags & FLAG_LOCKED:
        return True
    return ((is_private or add_step_over(plan, STEP_FILL, run, first))
            and add_step_over(plan, STEP_POPULATE, run, first)
            and add_step_over(plan, STEP_LOCK, run, first)
            and (first == final or add_step_over(plan, STEP_PROTECT, run, final, first)))


cdef bint plan_opening(Ledger ledger, Chunk chunk, uintptr_t start, uintptr_t end,
                       uint32_t access, Plan &plan) noexcept nogil:
    """Commit isolated reserved pages in an isolated chunk, which is opened.

    All guards come first, then the access: at no time can a reserved page be accessed.
    """
    cdef Runs.iterator run = ledger.runs.lower_bound(chunk.start)
    cdef int protection = page_access(STATE_COMMITTED, access)
    cdef uintptr_t closed = 0           # where the closed pages before this run begin, or 0
    while ledger.starts_below(run, chunk.end):
        if is_closed(run.value()) and not start <= run.key() < end and not add_step(
                plan, STEP_GUARD, run.key(), run.value().end):
            return False
        preincrement(run)
    run = ledger.runs.lower_bound(chunk.start)
    while ledger.starts_below(run, chunk.end):
        if is_closed(run.value()):
            if closed == 0:
                closed = run.key()
        elif closed != 0:
            if not add_step(plan, STEP_ACCESS, closed, run.key(), protection):
                return False
            closed = 0
        if (run.value().opened != 0 and start <= run.key() < end
                and not plan_commit_of_run(0, run, plan)):
            return False
        preincrement(run)
    return closed == 0 or add_step(plan, STEP_ACCESS, closed, chunk.end, protection)


cdef bint plan_decommit(uint32_t flags, Runs.iterator run, uintptr_t end,
                        Plan &plan) noexcept nogil:
    """Reserve the committed pages of a region with these flags again, and close open chunks.

    Private pages: one mapping of fresh PROT_NONE memory over all of them. It is atomic, returns
    memory and charge, and merges with its neighbours. MADV_DONTNEED with mprotect(2) never
    merges back and keeps the charge; MADV_DONTNEED before the mapping would lose the contents
    when the mapping then fails at the map-count wall.
    """
    cdef uintptr_t first = end, last = end
    cdef Run *lowest = run.value()
    cdef int before
    while True:
        if run.value().state == STATE_COMMITTED or run.value().opened:
            if first == end:
                first = run.key()
                lowest = run.value()
            last = run.value().end
            before = page_access(STATE_COMMITTED, run.value().protection)
            if run.value().backing != NULL and not (
                    (not flags & FLAG_LOCKED or add_step_over(plan, STEP_UNLOCK, run, before))
                    and (before == PROT_NONE
                         or add_step_over(plan, STEP_PROTECT, run, PROT_NONE, before))):
                return False
        if run.value().end >= end:
            break
        preincrement(run)
    if first == end:
        return True
    if lowest.backing == NULL:
        return add_step(plan, STEP_DISCARD, first, last)
    return add_step(plan, STEP_PUNCH, first, last, PROT_NONE, PROT_NONE,
                    <MemoryObject *>lowest.backing, lowest.offset)


cdef bint plan_protect(Runs.iterator run, uintptr_t end, uint32_t protection,
                       Plan &plan) noexcept nogil:
    """Change the protection of the committed pages."""
    cdef int before, after
    while True:
        before = access_of(run.value())
        after = page_access(run.value().state, protection)
        if before != after and not add_step_over(plan, STEP_PROTECT, run, after, before):
            return False
        if run.value().end >= end:
            return True
        preincrement(run)


cdef bint plan_residence(Runs.iterator run, Plan &plan) noexcept nogil:
    """Give the committed pages of a run, which a memory object backs, memory and lock them."""
    cdef int access = page_access(STATE_COMMITTED, run.value().protection)
    return (add_step_over(plan, STEP_POPULATE, run, access)
            and add_step_over(plan, STEP_LOCK, run, access))
