"""The address space of one VMM: ledger and kernel in step."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

from vmm_linux._answer cimport FIGURES, Answer, Request
from vmm_linux._guards cimport Chunk
from vmm_linux._ledger cimport Ledger, Regions, Run, Runs
from vmm_linux._memory_object cimport Buffers, MemoryObject
from vmm_linux._mutex cimport Mutex
from vmm_linux._plan cimport Plan

cdef class AddressSpace:
    cdef Mutex *mutex
    cdef Ledger ledger
    cdef readonly bint closed
    cdef Buffers buffers
    cdef uint64_t bounds[FIGURES]

    cdef Answer perform(self, const Request *request) noexcept
    cdef uint64_t call(self, Request *request) except? 0xFFFFFFFFFFFFFFFF
    cdef void enter(self) noexcept
    cdef void wait(self) noexcept nogil
    cdef void leave(self) noexcept nogil

    cdef uint64_t used(self, int figure) noexcept nogil
    cdef Answer room_for(self, int figure, uint64_t wish) noexcept nogil
    cdef Answer room_for_region(self, const Request *request,
                                uint64_t seams=*) noexcept nogil
    cdef Answer room_for_commit(self, Runs.iterator run, uintptr_t va,
                                uintptr_t end) noexcept nogil
    cdef Answer room_to_allocate(self, const Request *request) noexcept nogil
    cdef bint is_easily_committed(self, uint64_t size) noexcept nogil
    cdef uint64_t reserved_bytes(self, Runs.iterator run, uintptr_t va,
                                 uintptr_t end) noexcept nogil
    cdef Answer no_run(self) noexcept nogil
    cdef void set_bounds(self, const uint64_t *bounds) noexcept nogil
    cdef const char *flaw(self, uintptr_t *where) noexcept nogil

    cdef Answer dispatch(self, const Request *request) noexcept nogil
    cdef Answer dispatch_further(self, const Request *request) noexcept nogil
    cdef void end_handles(self) noexcept nogil
    cdef Answer allocate(self, const Request *request) noexcept nogil
    cdef Answer commit(self, Regions.iterator region, uintptr_t va,
                       uintptr_t end) noexcept nogil
    cdef Answer decommit(self, Regions.iterator region, uintptr_t va,
                         uintptr_t end) noexcept nogil
    cdef Answer protect(self, uintptr_t va, uintptr_t end, uint32_t protection) noexcept nogil
    cdef Answer free(self, Regions.iterator region, uintptr_t va, uintptr_t end) noexcept nogil
    cdef Answer check(self, uintptr_t va, size_t size, uint32_t access) noexcept nogil
    cdef Answer copy(self, const Request *request) noexcept nogil
    cdef bint group_has_room_to_copy(self, const Request *request) noexcept nogil
    cdef size_t grain_at(self, uintptr_t va) noexcept nogil
    cdef uint64_t memory_to_copy(self, const Request *request, size_t grain) noexcept nogil
    cdef Answer pin(self, const Request *request) noexcept nogil
    cdef Answer unpin(self, uintptr_t va, size_t size) noexcept nogil
    cdef Answer place(self, const Request *request, Run run, int fd,
                      uint64_t offset) noexcept nogil
    cdef Answer unguard(self, Runs.iterator run, uintptr_t va, uintptr_t end) noexcept nogil
    cdef Answer commit_by_mappings(self, uint32_t flags, Runs.iterator run, uintptr_t va,
                                   uintptr_t end) noexcept nogil
    cdef bint commit_by_guards(self, Chunk chunk, uintptr_t va, uintptr_t end) noexcept nogil
    cdef Answer check_decommit(self, Runs.iterator run, uintptr_t va,
                               uintptr_t end) noexcept nogil
    cdef bint any_committed(self, Runs.iterator run, uintptr_t end) noexcept nogil
    cdef bint decommit_by_guards(self, Runs.iterator run, Chunk chunk, uintptr_t va,
                                 uintptr_t end) noexcept nogil
    cdef void close_chunk(self, uintptr_t at) noexcept nogil
    cdef Answer settle(self, const Plan &plan, Runs.iterator run, uintptr_t end,
                       uint32_t state) noexcept nogil
    cdef Answer check_protect(self, Runs.iterator run, uintptr_t va, uintptr_t end,
                              uint32_t protection) noexcept nogil
    cdef uintptr_t first_pinned(self, Runs.iterator run, uintptr_t start,
                                uintptr_t end) noexcept nogil
    cdef void release_backing(self, Runs.iterator run, uintptr_t end) noexcept nogil
    cdef Answer close(self) noexcept nogil
    cdef int forget(self, Regions.iterator region, Runs.iterator run,
                    uintptr_t end) noexcept nogil
    cdef int forget_region(self, uintptr_t base) noexcept nogil
    cdef int unmap_unpinned(self) noexcept nogil

cdef uint64_t seams_inside(Runs.iterator run, uintptr_t first, uintptr_t last) noexcept nogil
cdef Run run_of(MemoryObject *backing, uint64_t offset, uint32_t kind, uint32_t state,
                uint32_t flags, uint32_t ceiling) noexcept nogil
