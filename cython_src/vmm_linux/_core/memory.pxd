"""What the layers above use of the memory layer; see ``memory.pyx``."""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libcpp.map cimport map as ordered_map
from libcpp.unordered_map cimport unordered_map
from libcpp.vector cimport vector

from vmm_linux._core.containers cimport *
from vmm_linux._core.kernel cimport Mutex, OpenFile
from vmm_linux._core.ledger cimport *
from vmm_linux._core.vocabulary cimport *

# ---- request -----------------------------------------------------------------------------------

cdef struct Range:
    uintptr_t start, end
    size_t index                # among the ranges that the caller gave

ctypedef vector[Range] Ranges

cdef enum:
    PARCEL_DESCRIPTORS = 253    # SCM_MAX_FD: the kernel takes no more in a message

cdef struct Parcel:
    # A handle on its way to or from another process. Its files are its identity and its origin's,
    # as far as these are other memfds than its memory; then each segment that it touches. The
    # holder of a parcel owns them, except what ``pack_handle`` lends.
    OpenFile files[PARCEL_DESCRIPTORS]
    int count
    int segments                # how many of them are of memory
    uint32_t rights
    uint64_t offset             # of the buffer in the memory
    uint64_t size               # of the buffer, to the byte
    uint64_t segment_size       # of each but the last, which may be shorter: a page multiple
    uint64_t memory_size        # of all of them, to the byte
    uint64_t handle             # of one that leaves, and how many read-only descriptions of its
    uint64_t descriptions       # buffer there were before

cdef struct HandleFacts:
    uint32_t rights
    uint64_t size, nbytes, segments, sid, origin_sid
    bint cloned
    int seals

cdef enum Method:
    # The endpoint's methods, in the order of its table (``endpoint/methods.pxi``).
    ALLOCATE, COMMIT, DECOMMIT, COMMIT_RANGES, DECOMMIT_RANGES, PROTECT, FREE, QUERY
    VIEW, READ, WRITE
    MDL_CREATE, MDL_CREATE_FROM_VM, MDL_CREATE_FROM_BUF, MDL_GET_SIZE, MDL_MAP, MDL_CLONE, MDL_SEAL
    HANDLE_COPY, HANDLE_CLOSE, HANDLE_REVOKE, HANDLE_INFO
    SEND_HANDLE, RECV_HANDLE, HANDLE_FILENO, HANDLE_FROM_FD
    SET_LIMITS, CLOSE, METHOD_COUNT
    # Parts of methods:
    CHECK                       # of READ: whether the bytes can be read
    UNPIN                       # of VIEW: its end
    UNDESCRIBE                  # of MDL_MAP, SEND_HANDLE, HANDLE_FILENO: undo their descriptions

cdef struct Request:
    # A call as numbers, the same for policy, audit and execution. 0 where a method has no such
    # argument.
    Method method
    uintptr_t va
    size_t size                 # bytes: of the range, the data, the window or the buffer
    uint64_t flags              # VmmFlags: of the region, protection, or access
    uint64_t handle
    uint64_t offset             # bytes from the start of the buffer
    uint64_t segment_size
    uint64_t nbytes             # of MDL_CREATE: the length to the byte; 0: the size
    uint64_t rights             # of the copy, the receiver or the descriptor
    uint64_t seals              # to put on, or that the memory must have
    uint64_t new_handle         # of MDL_CREATE_FROM_VM: the one that it makes
    uint64_t descriptions       # of UNDESCRIBE: how many there were before
    uint32_t forbidden          # of MDL_CREATE_FROM_VM: access that its pages must not have
    void *data                  # of READ, WRITE, MDL_CREATE_FROM_BUF: ``size`` bytes
    Ranges *ranges              # of COMMIT_RANGES, DECOMMIT_RANGES
    Parcel *parcel              # of SEND_HANDLE, HANDLE_FILENO; RECV_HANDLE, HANDLE_FROM_FD
    HandleFacts *facts          # of HANDLE_INFO

cdef struct Answer:
    Reason reason               # DONE, or why the call failed
    int error                   # -errno of the kernel, or 0
    uint64_t result             # the address, handle or size that the call returns
    uint64_t subject            # the address, size or rights that the message is about
    size_t completed            # bytes written or sealed before a failure
    size_t index                # of the range that the message is about
    uint32_t access             # of VIEW: the access that every page gives
    uint64_t descriptions       # of MDL_MAP: how many read-only ones there were before
    uint32_t resource_limits    # after ENOMEM: those that could be the cause
    uint64_t mappings           # after ENOMEM: how many the process had then, or 0
    int limit                   # of BEYOND_LIMIT: what is bounded, by how much, what is used
    uint64_t bound, used
    uint64_t requested          # and how much more was asked for

cdef enum Reason:
    DONE, CLOSED, NOT_IN_REGION, TAKEN, OUTSIDE, TOO_LARGE, NOT_COMMITTED, NO_ACCESS, IS_MDL
    INHERITED, ABOVE_CEILING, PINNED, NO_HUGE_PAGES, NO_LEDGER_MEMORY, NO_BACKING_MEMORY
    UNKNOWN_HANDLE, CLOSED_HANDLE, REVOKED, LACKS_RIGHTS, BEYOND_BUFFER, ALREADY_MDL, SEALED
    STILL_WRITABLE, UNSEALABLE, TOO_MANY_SEGMENTS, OVERLAP, NO_SINGLE_DESCRIPTOR, FORBIDDEN_OF_MDL
    OTHER_HANDLE                # this is no longer the next one: the caller tries again
    BEYOND_LIMIT, KERNEL_REFUSED

cdef enum:
    LIMIT_AS = 1, LIMIT_DATA = 2

cdef enum:
    # What Limits bound, in the order of ``vmm_linux.limits.FIGURES``.
    REGIONS, RESERVED, COMMITTED, LOCKED, MAPPINGS, MDLS, MDL_BYTES, MDL_MAPPINGS, HANDLES
    LIMIT_COUNT                 # how many there are

cdef enum:
    NO_BOUND = 0xFFFFFFFFFFFFFFFF

cdef inline Request new_request(Method method) noexcept nogil:
    """A request without arguments."""
    # Not by memset: the compiler makes a string instruction of it, which takes longer.
    cdef Request request
    request.method = method
    request.va = request.size = request.flags = request.handle = request.offset = 0
    request.segment_size = request.nbytes = request.rights = request.seals = 0
    request.new_handle = request.descriptions = 0
    request.forbidden = 0
    request.data = NULL
    request.ranges = NULL
    request.parcel = NULL
    request.facts = NULL
    return request

cdef inline Answer done() noexcept nogil:
    """A call that succeeded. What only failures report stays unset, except these fields."""
    cdef Answer answer
    answer.reason = DONE
    answer.error = 0
    answer.result = answer.subject = answer.completed = 0
    answer.resource_limits = 0
    answer.mappings = answer.descriptions = 0
    answer.access = 0
    return answer

cdef inline Answer refused(Reason reason, uint64_t subject=0) noexcept nogil:
    """A call that this package refuses."""
    cdef Answer answer = done()
    answer.reason = reason
    answer.subject = subject
    return answer

# ---- identity ----------------------------------------------------------------------------------

cdef struct Window:
    # A part of memory that consists of files side by side.
    const OpenFile *files       # those that the part touches, in order
    size_t stride               # bytes from one to the next
    size_t count
    uint64_t offset             # of the part in the first of them
    uint64_t size
    uint64_t segment_size       # bytes of each file but the last

cdef int identity_is_of(int fd, const Window *window) noexcept nogil
cdef int identity_includes(int fd, const Window *window) noexcept nogil

# ---- object ------------------------------------------------------------------------------------

cdef struct MemoryObject

cdef struct BufferCounts:
    # What a VMM has of MDL buffers; the mutex of the VMM guards it.
    uint64_t mdls
    uint64_t bytes              # of memory, a clone's not again
    uint64_t locked             # bytes of buffers made with LOCKED

cdef int memory_object_sid(MemoryObject *self, uint64_t *sid) noexcept nogil

# ---- mapping -----------------------------------------------------------------------------------

cdef size_t guard_below(uint64_t flags) noexcept nogil
cdef size_t guard_above(uint64_t flags) noexcept nogil

# ---- handles -----------------------------------------------------------------------------------

cdef struct HandleEntry:
    uint64_t value
    MemoryObject *buffer        # NULL once revoked
    HandleEntry *parent         # the handle that this one was copied or cloned from
    HandleEntry *child          # the first that came from this one
    HandleEntry *next           # the others that came from the same
    HandleEntry *previous

cdef class HandleTable:
    cdef unordered_map[uint64_t, HandleEntry] live      # by serial number
    cdef ordered_map[uint64_t, uint64_t] blocks         # serial numbers taken: start to end
    cdef uint64_t unused                                # of the newest block: from here
    cdef uint64_t unused_end                            # to here

cdef uint32_t rights_of(uint64_t value) noexcept nogil

# ---- address_space -----------------------------------------------------------------------------

cdef class AddressSpace:
    cdef Mutex *mutex
    cdef Ledger ledger
    cdef readonly bint closed
    cdef BufferCounts buffers
    cdef uint64_t bounds[LIMIT_COUNT]
    cdef HandleTable handles

# ---- limits ------------------------------------------------------------------------------------

cdef uint64_t usage_of(AddressSpace space, int limit) noexcept nogil
cdef void set_bounds(AddressSpace space, const uint64_t *bounds) noexcept nogil
cdef const char *find_flaw(AddressSpace space, uintptr_t *where) noexcept nogil

# ---- copy --------------------------------------------------------------------------------------

cdef int copy(bint out, void *buffer, uintptr_t va, size_t size, size_t *done) noexcept nogil

# ---- batches -----------------------------------------------------------------------------------

cdef bint add_range(Ranges *ranges, uintptr_t start, uintptr_t end) noexcept nogil

# ---- intent ------------------------------------------------------------------------------------

cdef struct Location:
    # What the ledger says of one page.
    uint32_t kind               # KIND_FREE: nothing of this VMM's from base to end
    uint32_t state, protection, flags
    uintptr_t base, end, run_start, run_end
    MemoryObject *buffer        # of an MDL mapping, while the mutex is held
    uint64_t mdl_offset

cdef struct Intent:
    # What a VMM made of [start, end), pages that are alike in everything below.
    uintptr_t start, end
    uintptr_t base              # of the region, guard pages not included
    uintptr_t limit
    uint32_t flags              # of the region
    uint32_t kind, state, protection
    uint64_t sid                # of an MDL mapping, or 0

cdef Location locate(Ledger ledger, uintptr_t va) noexcept nogil
cdef bint intent_at(Ledger ledger, uintptr_t va, Intent *intent) noexcept nogil
cdef int add_intents(Ledger ledger, vector[Intent] *intents) except -1

# ---- buffers -----------------------------------------------------------------------------------

cdef uint64_t next_handle(AddressSpace space, uint64_t flags) noexcept

# ---- parcel ------------------------------------------------------------------------------------

cdef Answer pack_handle(AddressSpace space, const Request *request) noexcept nogil
cdef Answer undescribe_handle(AddressSpace space, uint64_t handle, uint64_t since) noexcept nogil
cdef void close_parcel(Parcel *parcel) noexcept nogil

# ---- dispatch ----------------------------------------------------------------------------------

cdef Answer perform(AddressSpace space, const Request *request) noexcept
cdef void lock_space(AddressSpace space) noexcept
cdef void wait_for_space(AddressSpace space) noexcept nogil
cdef void unlock_space(AddressSpace space) noexcept nogil
