"""Contract of endpoint."""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libcpp.vector cimport vector

from vmm_linux._core.kernel cimport Descriptor, OpenFile, PAGE_SIZE
from vmm_linux._core.memory cimport *
from vmm_linux._core.procfs cimport OwnProcess, PageFacts
from vmm_linux._core.vocabulary cimport *


# ---- arguments ---------------------------------------------------------------------------------

cdef extern from "Python.h":
    bint PyLong_Check(object)
    bint PyBool_Check(object)
    long long PyLong_AsLongLongAndOverflow(object, int *)


# ---- life --------------------------------------------------------------------------------------

cdef bint intent_of_any(uintptr_t va, Intent *intent) except -1

cdef int add_intents_of_all(vector[Intent] *intents) except -1
