"""Many ranges in one call (see ``_ranges.pyx``)."""

from libc.stdint cimport uintptr_t
from libcpp.vector cimport vector

from vmm_linux._address_space cimport AddressSpace
from vmm_linux._answer cimport Answer
from vmm_linux._ledger cimport Run

cdef struct Range:
    uintptr_t start
    uintptr_t end
    size_t index                # in what the caller gave

ctypedef vector[Range] Ranges

cdef struct SavedRun:
    uintptr_t start
    Run run                     # as it was

ctypedef vector[SavedRun] SavedRuns

cdef bint add_range(Ranges *ranges, uintptr_t start, uintptr_t end) noexcept nogil
cdef Answer commit_ranges(AddressSpace space, Ranges *ranges) noexcept nogil
cdef Answer decommit_ranges(AddressSpace space, Ranges *ranges) noexcept nogil
