"""An address space whose pages can be an MDL buffer's (see ``_buffer_mappings.pyx``)."""

from libc.stdint cimport uint32_t, uintptr_t

from vmm_linux._address_space cimport AddressSpace
from vmm_linux._answer cimport Answer, Request
from vmm_linux._memory_object cimport MemoryObject

cdef class BufferMappings(AddressSpace):
    cdef Answer map_buffer(self, const Request *request, MemoryObject *buffer) noexcept nogil
    cdef Answer map_described(self, const Request *request, MemoryObject *buffer) noexcept nogil
    cdef Answer room_for_mapping(self, const Request *request,
                                 MemoryObject *buffer) noexcept nogil
    cdef Answer map_segments(self, const Request *request, MemoryObject *buffer) noexcept nogil
    cdef Answer convert(self, const Request *request, MemoryObject **buffer) noexcept nogil
    cdef Answer check_convertible(self, uintptr_t va, uintptr_t end,
                                  uint32_t forbidden) noexcept nogil
    cdef MemoryObject *whole_object(self, uintptr_t va, uintptr_t end) noexcept nogil
