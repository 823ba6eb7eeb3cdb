"""What the ledger says of one page (see ``_location.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from libcpp.vector cimport vector

from vmm_linux._ledger cimport Ledger
from vmm_linux._memory_object cimport MemoryObject

cdef struct Location:
    # What the ledger says of one page.
    uint32_t kind               # KIND_FREE: nothing of this VMM's from base to end
    uint32_t state
    uint32_t protection
    uint32_t flags
    uintptr_t base
    uintptr_t end
    uintptr_t run_start
    uintptr_t run_end
    MemoryObject *buffer        # of an MDL mapping, while the mutex is held
    uint64_t mdl_offset

cdef struct Intent:
    # What a VMM made of [start, end), pages that are alike in everything below.
    uintptr_t start
    uintptr_t end
    uintptr_t base              # of the region, guard pages not included
    uintptr_t limit
    uint32_t flags              # of the region
    uint32_t kind
    uint32_t state
    uint32_t protection
    uint64_t sid                # of an MDL mapping, or 0

cdef Location locate(Ledger ledger, uintptr_t va) noexcept nogil
cdef bint intent_at(Ledger ledger, uintptr_t va, Intent *intent) noexcept nogil
cdef int add_intents(Ledger ledger, vector[Intent] *intents) except -1
