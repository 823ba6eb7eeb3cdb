"""The public methods as numbers, and a call of one as plain numbers (see ``_calls.pyx``)."""

from libc.stdint cimport int64_t, uint64_t

cdef enum Call:
    CALL_ALLOCATE
    CALL_COMMIT
    CALL_DECOMMIT
    CALL_COMMIT_RANGES
    CALL_DECOMMIT_RANGES
    CALL_PROTECT
    CALL_FREE
    CALL_QUERY
    CALL_VIEW
    CALL_READ
    CALL_WRITE
    CALL_MDL_CREATE
    CALL_MDL_CREATE_FROM_VM
    CALL_MDL_CREATE_FROM_BUF
    CALL_MDL_GET_SIZE
    CALL_MDL_MAP
    CALL_MDL_CLONE
    CALL_MDL_SEAL
    CALL_HANDLE_COPY
    CALL_HANDLE_CLOSE
    CALL_HANDLE_REVOKE
    CALL_HANDLE_INFO
    CALL_SEND_HANDLE
    CALL_RECV_HANDLE
    CALL_HANDLE_FILENO
    CALL_HANDLE_FROM_FD
    CALL_LIMITS
    CALL_CLOSE
    CALLS                       # how many there are

cdef struct Facts:
    # What a rule can look at. Where a call has no such thing, it is 0; of the peer
    # -1, as is what is unknown of one.
    uint64_t flags
    uint64_t size               # bytes
    uint64_t handle
    uint64_t rights
    uint64_t seals
    int64_t pid                 # of the peer
    int64_t uid
    int64_t gid

cdef class Question:
    cdef object vmm
    cdef Facts facts
    cdef readonly str method
    cdef readonly dict arguments

cdef str name_of(int call)
cdef tuple normalised(int call, tuple arguments, Facts *facts)
cdef dict as_numbers(int call, tuple arguments)
