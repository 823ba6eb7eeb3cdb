"""Query: the kernel's word and the ledger's intent put together."""

from libc.stdint cimport uint32_t, uintptr_t

from vmm_linux._address_space cimport AddressSpace
from vmm_linux._own_process cimport OwnProcess, PageFacts

cdef class PageInfo:
    cdef readonly uintptr_t va
    cdef uint32_t _state
    cdef uint32_t _kind
    cdef uint32_t _protection
    cdef uint32_t _flags
    cdef readonly uintptr_t base
    cdef uintptr_t _end
    cdef readonly uintptr_t run_start
    cdef readonly uintptr_t run_end
    cdef PageFacts _facts
    cdef readonly object mdl_offset
    cdef readonly object sid
    cdef readonly object smaps

cdef PageInfo query(AddressSpace space, OwnProcess process, uintptr_t va, bint smaps)
