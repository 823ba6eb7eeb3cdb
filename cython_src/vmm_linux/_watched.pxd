"""A VMM's policy and audit, asked once, before every call (see ``_watched.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._audit cimport Audit, Record
from vmm_linux._calls cimport Facts
from vmm_linux._mdl cimport BufferSpace
from vmm_linux._open_file cimport Descriptor
from vmm_linux._rules cimport RuleTable

cdef class Watched:
    cdef BufferSpace space
    cdef RuleTable policy       # None: everything is allowed
    cdef Audit audit            # None: nothing is written down
    cdef bint is_watched        # whether there is one of them, or may be: nobody has said yet
    cdef bint is_settled        # whether it was said which there are
    cdef uint32_t forbidden     # access that pages of MDL buffers never have
    cdef set deciding           # threads in which the policy's callable is just being asked

    cdef int settle(self, object policy, object audit) except -1
    cdef object watch(self, int call, tuple arguments)
    cdef object carry_out(self, int call, tuple arguments)
    cdef object record(self, int call, tuple arguments)
    cdef int end(self, Record record, object result, BaseException problem) except -1
    cdef object checked(self, int call, tuple arguments, Record record)
    cdef object checked_plain(self, int call, tuple plain, Facts *facts, Record record,
                              Descriptor held)
    cdef int decide(self, int call, tuple plain, Facts *facts, Record record) except -1
    cdef tuple ask(self, int call, tuple plain, Facts *facts)
    cdef int look(self, int call, tuple plain, Facts *facts, Record record) except -1
    cdef int look_at_handle(self, uint64_t handle, Facts *facts, Record record) except -1
