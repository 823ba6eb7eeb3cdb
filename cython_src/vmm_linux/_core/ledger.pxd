"""What the layers above use of the ledger layer; see ``ledger.pyx``."""

from cython.operator cimport predecrement
from libc.stdint cimport uint32_t, uint64_t, uint8_t, uintptr_t

from vmm_linux._core.containers cimport OrderedMap
from vmm_linux._core.vocabulary cimport STATE_RESERVED

# ---- runs --------------------------------------------------------------------------------------

cdef struct Region:
    uintptr_t end               # guards not included
    uint32_t flags              # as allocated
    bint low_guard, high_guard

cdef struct Run:
    # Pages [key, end) of one region that are alike in everything below.
    uintptr_t end
    void *backing               # memory object; NULL: anonymous private memory
    uint64_t offset             # of the first page in the memory object
    uint32_t pins               # how many views pin these pages
    uint8_t state
    uint8_t protection          # of the pages once committed
    uint8_t ceiling             # the most that protection may become
    uint8_t kind
    uint8_t opened              # of reserved pages behind guards: access of the mapping, else 0
    uint8_t locked              # whether the region is LOCKED

cdef inline bint is_closed(const Run *run) noexcept nogil:
    """Whether these are reserved private pages in a mapping without access."""
    return run.state == STATE_RESERVED and run.backing == NULL and run.opened == 0

ctypedef OrderedMap[uintptr_t, Region] Regions
ctypedef OrderedMap[uintptr_t, Run] Runs

# ---- ledger ------------------------------------------------------------------------------------

cdef class Ledger:
    cdef Regions regions
    cdef Runs runs
    # Kept up to date with every change; ``flaw`` counts them again.
    cdef uint64_t covered        # bytes of regions
    cdef uint64_t guards
    cdef uint64_t committed      # bytes of private committed pages
    cdef uint64_t locked         # bytes of committed pages in LOCKED regions
    cdef uint64_t mapped         # regions that are mappings of buffers
    cdef uint64_t boundaries     # between segments inside these, which the owner counts
    cdef uint64_t most_mappings  # the limit that cuts of runs keep

    cdef inline uint64_t mappings(self) noexcept nogil:
        """How many mappings of the kernel all regions take at most, if it merges what is alike."""
        return self.runs.size() + self.guards + self.boundaries

    cdef bint insert(self, uintptr_t base, Region region, Run run) noexcept nogil
    cdef inline Regions.iterator region_at(self, uintptr_t va) noexcept nogil:
        """The region that includes ``va``, or ``regions.end()``."""
        cdef Regions.iterator region = self.regions.upper_bound(va)
        if region == self.regions.begin():
            return self.regions.end()
        predecrement(region)
        if va < region.value().end:
            return region
        return self.regions.end()

    cdef Regions.iterator region_around(self, uintptr_t va, size_t page) noexcept nogil
    cdef void gap_around(self, uintptr_t va, size_t page, uintptr_t *start,
                         uintptr_t *end) noexcept nogil
    cdef inline bint is_inside(self, Regions.iterator region, uintptr_t va,
                               size_t size) noexcept nogil:
        """Whether what ``region_at(va)`` returned is a region that includes all of the range."""
        return region != self.regions.end() and size <= region.value().end - va

    cpdef bint holds(self, uintptr_t va, size_t size) noexcept nogil
    cdef inline Runs.iterator run_at(self, uintptr_t va) noexcept nogil:
        """The run that includes ``va``, which is inside a region."""
        cdef Runs.iterator run = self.runs.upper_bound(va)
        predecrement(run)
        return run

    cdef inline bint starts_below(self, Runs.iterator run, uintptr_t end) noexcept nogil:
        """Whether there is a run, and it starts below ``end``."""
        return run != self.runs.end() and run.key() < end

    cdef Runs.iterator run_near(self, Runs.iterator near, uintptr_t va) noexcept nogil
    cpdef bint cut(self, uintptr_t at) noexcept nogil
    cdef bint isolate(self, uintptr_t start, uintptr_t end) noexcept nogil
    cdef bint isolate_from(self, Runs.iterator *run, uintptr_t start, uintptr_t end) noexcept nogil
    cdef bint isolate_to_remove(self, Runs.iterator *run, uintptr_t start,
                                uintptr_t end) noexcept nogil
    cdef bint narrow(self, Runs.iterator *run, uintptr_t *start, uintptr_t *end) noexcept nogil
    cdef Runs.iterator coalesce_from(self, Runs.iterator left, uintptr_t end) noexcept nogil
    cpdef void coalesce(self, uintptr_t start, uintptr_t end) noexcept nogil
    cdef bint split(self, uintptr_t at) noexcept nogil
    cdef void join(self, uintptr_t at) noexcept nogil
    cdef void remove_from(self, Regions.iterator region, Runs.iterator run,
                          uintptr_t end) noexcept nogil
    cpdef void set_state(self, uintptr_t start, uintptr_t end, uint8_t state) noexcept nogil
    cdef Runs.iterator set_state_from(self, Runs.iterator first, uintptr_t end,
                                      uint8_t state) noexcept nogil
    cdef void set_guarded(self, Runs.iterator first, uintptr_t end) noexcept nogil
    cdef void set_reserved(self, Runs.iterator first, uintptr_t end, uint8_t opened) noexcept nogil
    cdef void set_opened(self, uintptr_t start, uintptr_t end, uint8_t access) noexcept nogil
    cdef void set_protection_from(self, Runs.iterator first, uintptr_t end,
                                  uint8_t protection) noexcept nogil
    cdef void set_backing(self, uintptr_t start, uintptr_t end, void *backing, uint64_t offset,
                          uint8_t kind, uint8_t ceiling) noexcept nogil
    cdef bint pin(self, uintptr_t start, uintptr_t end) noexcept nogil
    cpdef void unpin(self, uintptr_t start, uintptr_t end) noexcept nogil
    cdef const char *flaw(self, uintptr_t *where) noexcept nogil
