"""The life of a VMM (see ``_client.pyx``)."""

from vmm_linux._mdl cimport BufferSpace
from vmm_linux._own_process cimport OwnProcess

cdef class Client:
    cdef BufferSpace space
    cdef OwnProcess process
    cdef object __weakref__
    cdef str made_at
    cdef int made_by
    cdef bint warned

    cdef int warn_if_open(self) except -1

cdef int refuse_closed(str method) except -1


cdef inline int check_open(Client self, str method) except -1:
    """Every method but ``close`` begins with this."""
    return refuse_closed(method) if self.space.closed else 0
