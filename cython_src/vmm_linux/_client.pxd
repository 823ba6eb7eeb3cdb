"""The life of a VMM (see ``_client.pyx``)."""

from libc.stdint cimport uintptr_t
from libcpp.vector cimport vector

from vmm_linux._location cimport Intent
from vmm_linux._own_process cimport OwnProcess
from vmm_linux._watched cimport Watched

cdef class Client(Watched):
    cdef OwnProcess process
    cdef object __weakref__
    cdef str made_at
    cdef int made_by
    # That it is open was said, or is no mistake of the user's.
    cdef public bint _warned

    cdef int warn_if_open(self) except -1

cdef object do_close(Client self)
cdef int refuse_closed(str method) except -1
cdef bint intent_of_any(uintptr_t va, Intent *intent) except -1
cdef int add_intents_of_all(vector[Intent] *intents) except -1


cdef inline int check_open(Client self, str method) except -1:
    """Every method but ``close`` begins with this."""
    return refuse_closed(method) if self.space.closed else 0
