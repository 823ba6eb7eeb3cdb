"""The methods over regions of memory (see ``_memory_methods.pyx``)."""

from libc.stdint cimport uint64_t

from vmm_linux._answer cimport Method
from vmm_linux._client cimport Client

cdef class MemoryMethods(Client):
    cdef object change_ranges(self, Method method, str name, object ranges)
    cdef int change(self, Method method, str name, object va, object size,
                    uint64_t flags) except -1
