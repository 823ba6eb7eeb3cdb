"""What the layers above use of the endpoint layer; see ``endpoint.pyx``."""

from libc.stdint cimport uintptr_t
from libcpp.vector cimport vector

from vmm_linux._core.memory cimport Intent

cdef bint intent_of_any(uintptr_t va, Intent *intent) except -1
cdef int add_intents_of_all(vector[Intent] *intents) except -1
