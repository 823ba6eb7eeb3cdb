"""MDL buffers of one VMM: its address space with handles."""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._answer cimport Answer, Request
from vmm_linux._buffer_mappings cimport BufferMappings
from vmm_linux._handles cimport Entry, HandleTable
from vmm_linux._memory_object cimport MemoryObject

cdef enum:
    PARCEL_DESCRIPTORS = 3

cdef struct Parcel:
    # A handle on its way to or from another process. Whoever has a parcel owns its descriptors:
    # of the memory; of a clone its identity, too; and its origin's, if that is a clone.
    int descriptors[PARCEL_DESCRIPTORS]
    int count
    uint32_t rights
    uint64_t offset             # of the buffer in the memory
    uint64_t size               # of the buffer
    uint64_t memory_size

cdef struct HandleFacts:
    uint32_t rights
    uint64_t size
    uint64_t sid
    uint64_t origin_sid
    bint cloned
    int seals

cdef class BufferSpace(BufferMappings):
    cdef HandleTable handles

    cdef Answer dispatch_mdl(self, const Request *request) noexcept nogil
    cdef Answer dispatch_handle(self, const Request *request) noexcept nogil
    cdef Answer new_handle(self, MemoryObject *buffer, uint32_t rights,
                           Entry *parent) noexcept nogil
    cdef Answer create(self, const Request *request) noexcept nogil
    cdef Answer create_from_vm(self, const Request *request) noexcept nogil
    cdef Answer create_from_buffer(self, const Request *request) noexcept nogil
    cdef Answer get_size(self, const Request *request) noexcept nogil
    cdef Answer map(self, const Request *request) noexcept nogil
    cdef Answer clone(self, const Request *request) noexcept nogil
    cdef Answer seal(self, const Request *request) noexcept nogil
    cdef Answer copy_handle(self, const Request *request) noexcept nogil
    cdef Answer end_handle(self, const Request *request) noexcept nogil
    cdef Answer revoke(self, const Request *request) noexcept nogil
    cdef Answer tell(self, const Request *request) noexcept nogil
    cdef Answer pack(self, const Request *request) noexcept nogil
    cdef Answer unpack(self, const Request *request) noexcept nogil

cdef void close_parcel(Parcel *parcel) noexcept nogil
