"""The methods over regions of memory (see ``_memory_methods.pyx``)."""

from libc.stdint cimport uint64_t

from vmm_linux._answer cimport Method, Request
from vmm_linux._client cimport Client
from vmm_linux._mdl cimport BufferSpace

cdef class MemoryMethods(Client):
    cdef object change_ranges(self, Method method, str name, object ranges)
    cdef int change(self, Method method, str name, object va, object size,
                    uint64_t flags) except -1

cdef object made(BufferSpace space, Request *request)
cdef void undescribe(BufferSpace space, uint64_t handle, uint64_t since) noexcept
