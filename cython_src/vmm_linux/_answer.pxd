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
    LOCATE
    CLOSE

cdef struct Request:
    Method method
    uintptr_t va
    size_t size
    uint32_t flags              # of the region, the protection, or the access wanted
    void *buffer                # of READ and WRITE

cdef struct Answer:
    int reason                  # 0, or why the call failed
    int error                   # the kernel's errno, or 0
    uint64_t value              # what the message is about; after ENOMEM the mappings then, or 0
    uint32_t limits             # of the process, which had a say in an ENOMEM
    uintptr_t address           # ALLOCATE
    size_t done                 # READ, WRITE: bytes copied
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
    KERNEL_REFUSED

cdef enum:
    LIMIT_AS = 1
    LIMIT_DATA = 2

cdef Answer done() noexcept nogil
cdef Answer refused(Reason reason, uint64_t value=?) noexcept nogil
cdef Answer kernel_refused(int result, uint32_t limits=?, uint64_t mappings=?) noexcept nogil
cdef object explain(Request *request, Answer *answer)
