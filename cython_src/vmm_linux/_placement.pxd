"""Where a new region goes (see ``_placement.pyx``)."""

from vmm_linux._answer cimport Request
from vmm_linux._memory_object cimport MemoryObject

cdef Py_ssize_t reserve(const Request *request, size_t low, size_t high,
                        MemoryObject *backing) noexcept nogil
