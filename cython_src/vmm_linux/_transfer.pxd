"""Handles on their way between processes (see ``_transfer.pyx``)."""

from libc.stdint cimport uint64_t

from vmm_linux._mdl cimport Parcel

cdef class Demands:
    cdef str method
    cdef uint64_t require       # SEAL_ bits
    cdef object max_size        # bytes, or None

    cdef int check(self, int seals, uint64_t size) except -1

cdef class Received:
    cdef Parcel parcel

    cdef bint add(self, bytes data) except -1

cdef object made_descriptor(int fd)
cpdef int check_socket(str method, object sock) except -1
cdef bint is_plain(object sock)
cdef int send_at_once(int sock, const Parcel *parcel) noexcept nogil
cdef int told(int result) except -1
cdef int send(object sock, const Parcel *parcel) except -1
cdef Received receive(object sock, Demands demands, object peer_uid)
cdef int adopt(uint64_t fd, Demands demands, Parcel *parcel) except -1
