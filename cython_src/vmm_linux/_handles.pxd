"""The handles of one VMM: which there are, what each allows, and which came from which.

A handle is a serial number that no other in this process ever had, with rights. Its value has
the lower 32 bits of the serial in bits 0-31 (the number), the rights in bits 32-47, the
upper 15 in bits 48-62 (the number's generation), and 0 in bit 63.

The caller holds the mutex. The table refers to the memory object of every handle once.
"""

from libc.stdint cimport uint32_t, uint64_t
from libcpp.map cimport map as ordered_map
from libcpp.unordered_map cimport unordered_map

from vmm_linux._answer cimport Answer
from vmm_linux._memory_object cimport MemoryObject

cdef struct Entry:
    uint64_t value
    MemoryObject *buffer        # NULL once revoked
    Entry *parent               # the handle that this one was copied or cloned from
    Entry *child                # the first that came from this one
    Entry *next                 # the others that came from the same
    Entry *previous

cdef class HandleTable:
    cdef unordered_map[uint64_t, Entry] live            # by serial number
    cdef ordered_map[uint64_t, uint64_t] blocks         # serial numbers taken: start to end
    cdef uint64_t unused                                # of the newest block: from here
    cdef uint64_t unused_end                            # to here

    cdef Entry *add(self, MemoryObject *buffer, uint32_t rights, Entry *parent) noexcept nogil
    cdef uint64_t next(self, uint32_t rights) noexcept nogil
    cdef Answer find(self, uint64_t value, uint32_t rights, Entry **found) noexcept nogil
    cdef void give(self, Entry *entry, MemoryObject *buffer) noexcept nogil
    cdef void withdraw(self, Entry *entry) noexcept nogil
    cdef void close(self, Entry *entry) noexcept nogil
    cdef void revoke_descendants(self, Entry *entry) noexcept nogil
    cdef void close_all(self) noexcept nogil
    cdef bint take_block(self) noexcept nogil
    cdef bint handed_out(self, uint64_t serial) noexcept nogil

cdef uint32_t rights_of(uint64_t value) noexcept nogil
