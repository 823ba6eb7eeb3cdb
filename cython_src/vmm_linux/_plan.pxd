"""How a call becomes system calls: a planner that only reads the ledger, and one executor.

A plan is a list of steps. Every step but the last can be undone; what cannot (discarding contents)
is the last. So a call that fails, at whichever system call, leaves everything as it was.
There are two ways to commit, with steps of their own: see ``_guards.pyx``.
"""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from vmm_linux cimport _syscalls
from vmm_linux._containers cimport ShortVector
from vmm_linux._ledger cimport Ledger, Run, Runs
from vmm_linux._memory_object cimport MemoryObject
from vmm_linux._syscalls cimport PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE
from vmm_linux._vocabulary cimport FLAG_EXECUTE, FLAG_READ, FLAG_WRITE, STATE_COMMITTED

cdef enum StepKind:
    # Can be undone:
    ACCESS              # make reserved pages accessible
    PROTECT             # change the protection of accessible pages
    ADVISE_HUGE         # ask for transparent huge pages
    FILL                # give pages of a memory object memory
    POPULATE            # make pages resident, each with memory of its own
    LOCK                # pin as many pages as the limit allows
    UNLOCK
    GUARD               # put guards over reserved pages that have no contents
    UNGUARD             # take them away
    # Cannot be undone, so last:
    DISCARD             # private pages back to reserved, their memory to the system
    PUNCH               # the same for the memory behind shared pages

cdef struct Step:
    StepKind kind
    uintptr_t start
    size_t size
    int protection
    int before                  # the protection to go back to
    MemoryObject *backing       # NULL: private memory
    uint64_t offset

ctypedef ShortVector[Step] Plan

cdef bint add_step(Plan &plan, StepKind kind, uintptr_t start, uintptr_t end, int protection,
                   int before) noexcept nogil

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
    return _syscalls.munmap(start, size)


cdef bint plan_commit_of_run(uint32_t flags, uintptr_t start, const Run &run,
                             Plan &plan) noexcept nogil
cdef bint plan_commit(Ledger ledger, uint32_t flags, Runs.iterator run, uintptr_t end,
                      Plan &plan) noexcept nogil
cdef bint plan_decommit(Ledger ledger, uint32_t flags, Runs.iterator run, uintptr_t end,
                        Plan &plan) noexcept nogil
cdef bint plan_protect(Ledger ledger, Runs.iterator run, uintptr_t end, uint32_t protection,
                       Plan &plan) noexcept nogil
cdef bint plan_residence(uintptr_t start, size_t size, uint32_t protection,
                         MemoryObject *backing, Plan &plan) noexcept nogil
cdef int do_step(const Step &this) noexcept nogil
cdef int carry_out(const Plan &plan, uint64_t *mappings) noexcept nogil
cdef int populate_pages(uintptr_t start, size_t size, int protection) noexcept nogil
cdef void lock_what_fits(uintptr_t start, size_t size) noexcept nogil
cdef Py_ssize_t reserve(uintptr_t start, size_t size, int fixed) noexcept nogil
cdef int reserve_afresh(uintptr_t start, size_t size) noexcept nogil
