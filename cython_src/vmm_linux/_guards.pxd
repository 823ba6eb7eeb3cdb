"""The second way to commit: guard regions (see ``_guards.pyx``)."""

from libc.stdint cimport uint32_t, uintptr_t

from vmm_linux._ledger cimport Ledger, Regions, Run, Runs
from vmm_linux._plan cimport Plan

cdef struct Chunk:
    uintptr_t start
    uintptr_t end

cdef size_t crowded             # so many islands make a chunk worth opening

cdef bint suits(Ledger ledger, uint32_t flags, Runs.iterator run, Chunk chunk,
                uintptr_t start, uintptr_t end, size_t coming=*) noexcept nogil
cdef Chunk chunks_around(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil
cdef Chunk chunks_of(Regions.iterator region, uintptr_t start, uintptr_t end) noexcept nogil
cdef uint32_t opening_access(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil
cdef bint plan_opening(Ledger ledger, Chunk chunk, uintptr_t start, uintptr_t end,
                       uint32_t access, Plan &plan) noexcept nogil
cdef bint can_be_guarded(Ledger ledger, Runs.iterator run, Chunk chunk,
                         uintptr_t end) noexcept nogil
cdef bint is_just_guarded(const Run &run, uintptr_t end) noexcept nogil
cdef int remove_guards(uintptr_t start, uintptr_t end) noexcept nogil
cdef bint guard(uintptr_t start, uintptr_t end) noexcept nogil
cdef uintptr_t closing_start(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil
cdef uintptr_t closing_end(Ledger ledger, uintptr_t start, uintptr_t end) noexcept nogil
cdef bint is_open_and_unused(Ledger ledger, Chunk chunk) noexcept nogil
