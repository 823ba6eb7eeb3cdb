"""Pages of a region become pages of a memory object, in place (see ``_conversion.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from vmm_linux._ledger cimport Ledger
from vmm_linux._memory_object cimport MemoryObject

cdef int convert_pages(Ledger ledger, uint32_t flags, uintptr_t start, uintptr_t end,
                       MemoryObject *fresh, uint64_t *mappings) noexcept nogil
