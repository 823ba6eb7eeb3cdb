"""A call of the endpoint as numbers: what is asked, what came of it, and why it failed."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

cdef enum Method:
    ALLOCATE
    COMMIT
    DECOMMIT
    PROTECT
    FREE
    CHECK
    READ
    WRITE
    PIN
    UNPIN
    CLOSE
    COMMIT_RANGES
    DECOMMIT_RANGES
    # Over MDL buffers and handles:
    MDL_CREATE
    MDL_CREATE_FROM_VM
    MDL_CREATE_FROM_BUF
    MDL_MAP
    MDL_CLONE
    MDL_SEAL
    MDL_GET_SIZE
    HANDLE_COPY
    HANDLE_CLOSE
    HANDLE_REVOKE
    HANDLE_INFO
    SEND
    HANDLE_FILENO
    RECEIVE
    HANDLE_FROM_FD
    UNDESCRIBE                  # for what failed after MDL_MAP, SEND, HANDLE_FILENO were done

cdef struct Request:
    Method method
    uintptr_t va
    size_t size
    uint32_t flags              # of the region, the protection, rights, seals, access wanted
    void *buffer                # of READ, WRITE, MDL_CREATE_FROM_BUF; Parcel; HandleFacts; Ranges
    uint64_t handle             # of MDL_CREATE_FROM_VM: the one that it makes
    uint64_t offset             # in the MDL buffer; MDL_CREATE: size of segments; UNDESCRIBE: since
    uint32_t forbidden          # of MDL_CREATE_FROM_VM: access that its pages must not have

cdef struct Answer:
    int reason                  # 0, or why the call failed
    int error                   # the kernel's errno, or 0
    uint64_t value              # what the message is about; after ENOMEM the mappings then, or 0
    uint64_t descriptions       # of MDL_MAP: the read-only ones that there were before
    uint32_t limits             # of the process, which had a say in an ENOMEM; the figure
    uint64_t out                # the address or the handle that the call returns; what is used
    uint64_t bound              # of the figure
    size_t done                 # bytes copied, bytes sealed; of ranges: the index of the bad one
    uint32_t access             # PIN: access that every page gives

cdef enum Reason:
    DONE
    CLOSED
    NOT_IN_REGION
    TAKEN
    OUTSIDE
    TOO_LARGE
    NOT_COMMITTED
    NO_ACCESS
    IS_MDL
    INHERITED
    ABOVE_CEILING
    PINNED
    NO_HUGE_PAGES
    NO_LEDGER_MEMORY
    NO_BACKING_MEMORY
    UNKNOWN_HANDLE
    CLOSED_HANDLE
    REVOKED
    LACKS_RIGHTS
    BEYOND_BUFFER
    ALREADY_MDL
    SEALED
    STILL_WRITABLE
    UNSEALABLE
    TOO_MANY_SEGMENTS
    OVERLAP
    NO_SINGLE_DESCRIPTOR
    FORBIDDEN_OF_MDL
    OTHER_HANDLE                # not the next one any more: the caller tries again
    BEYOND_LIMIT                # the figure, its bound and use are in the answer; value: the wish
    KERNEL_REFUSED

cdef enum:
    LIMIT_AS = 1
    LIMIT_DATA = 2

cdef enum:
    # What Limits bound, in the order of ``vmm_linux.limits.FIGURES``.
    REGIONS
    RESERVED
    COMMITTED
    LOCKED
    MAPPINGS
    MDLS
    MDL_BYTES
    MDL_MAPPINGS
    HANDLES
    FIGURES                     # how many there are

cdef enum:
    NO_BOUND = 0xFFFFFFFFFFFFFFFF


cdef inline Answer done() noexcept nogil:
    """A call that succeeded."""
    cdef Answer answer
    answer.reason = DONE
    answer.error = 0
    answer.value = 0
    answer.descriptions = 0
    answer.limits = 0
    answer.out = 0
    answer.bound = 0
    answer.done = 0
    answer.access = 0
    return answer


cdef inline Answer refused(Reason reason, uint64_t value=0) noexcept nogil:
    """A call that this package refused."""
    cdef Answer answer = done()
    answer.reason = reason
    answer.value = value
    return answer


cdef inline Answer beyond_limit(int figure, uint64_t bound, uint64_t used,
                                uint64_t wish) noexcept nogil:
    """A call that wished for more of a figure than its bound leaves."""
    cdef Answer answer = refused(BEYOND_LIMIT, wish)
    answer.limits = figure
    answer.bound = bound
    answer.out = used
    return answer


cdef inline Answer kernel_refused(int result, uint32_t limits=0,
                                  uint64_t mappings=0) noexcept nogil:
    """A call that the kernel refused with -errno."""
    cdef Answer answer = refused(KERNEL_REFUSED, mappings)
    answer.error = -result
    answer.limits = limits
    return answer


cdef object explain(Request *request, Answer *answer)
