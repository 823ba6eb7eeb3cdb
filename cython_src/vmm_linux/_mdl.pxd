"""MDL buffers of one VMM: its address space with handles."""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._answer cimport Answer, Request
from vmm_linux._buffer_mappings cimport BufferMappings
from vmm_linux._handles cimport Entry, HandleTable
from vmm_linux._memory_object cimport MemoryObject
from vmm_linux._open_file cimport OpenFile

cdef enum:
    PARCEL_DESCRIPTORS = 253    # SCM_MAX_FD: the kernel takes no more in a message

cdef struct Parcel:
    # A handle on its way to or from another process. Its files are its identity and its origin's,
    # as far as these are other memfds than its memory; then each segment that it touches. Whoever
    # has a parcel owns them, but for what ``BufferSpace.pack`` lends.
    OpenFile files[PARCEL_DESCRIPTORS]
    int count
    int segments                # how many of them are of memory
    uint32_t rights
    uint64_t offset             # of the buffer in the memory
    uint64_t size               # of the buffer
    uint64_t segment_size       # of each but the last, which may be shorter; of one its size
    uint64_t memory_size        # of all of them
    uint64_t handle             # of one that leaves, and how many read-only descriptions of its
    uint64_t descriptions       # buffer there were before

cdef struct HandleFacts:
    uint32_t rights
    uint64_t size
    uint64_t sid
    uint64_t origin_sid
    bint cloned
    int seals

cdef class BufferSpace(BufferMappings):
    cdef HandleTable handles

    cdef uint64_t next_handle(self, uint32_t flags) noexcept
    cdef Answer dispatch_mdl(self, const Request *request) noexcept nogil
    cdef Answer dispatch_handle(self, const Request *request) noexcept nogil
    cdef Answer room_for_buffer(self, uint64_t mdls, uint64_t size,
                                bint locked) noexcept nogil
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
    cdef Answer pack_own(self, const Request *request) noexcept nogil
    cdef Answer undescribe(self, uint64_t handle, uint64_t since) noexcept nogil
    cdef Answer unpack(self, const Request *request) noexcept nogil

cdef void close_parcel(Parcel *parcel) noexcept nogil
