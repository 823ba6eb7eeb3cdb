"""What the ledger says of one page (see ``_location.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

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

cdef Location locate(Ledger ledger, uintptr_t va) noexcept nogil
