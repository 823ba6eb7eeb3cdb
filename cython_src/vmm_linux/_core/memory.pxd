"""Contract of memory."""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libcpp.map cimport map as ordered_map
from libcpp.unordered_map cimport unordered_map
from libcpp.vector cimport vector

from vmm_linux._core cimport kernel
from vmm_linux._core.containers cimport *
from vmm_linux._core.kernel cimport Mutex, OpenFile, PROT_EXEC, PROT_NONE, PROT_READ, PROT_WRITE
from vmm_linux._core.ledger cimport *
from vmm_linux._core.vocabulary cimport *


# ---- request -----------------------------------------------------------------------------------

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


# ---- identity ----------------------------------------------------------------------------------

cdef struct Window:
    # A part of a memory that lies in files side by side.
    const OpenFile *files       # those that the part touches, in order
    size_t stride               # bytes from one to the next
    size_t count
    uint64_t offset             # of the part in the first of them
    uint64_t size
    uint64_t segment_size       # bytes of each file but the last

cdef int identity_is_of(int fd, const Window *window) noexcept nogil

cdef int identity_includes(int fd, const Window *window) noexcept nogil


# ---- object ------------------------------------------------------------------------------------

cdef struct Segment:
    OpenFile file               # the memory
    OpenFile read_only          # its read-only description once needed; the same where that is all
    uint64_t described          # which of the root's descriptions this was

cdef struct Buffers:
    # What a VMM has of MDL buffers; the mutex of the VMM guards it.
    uint64_t mdls
    uint64_t bytes              # of memory, a clone's not again
    uint64_t locked             # bytes of buffers made with LOCKED

cdef struct MemoryObject:
    MemoryObject *root          # whose memory it is: its own, or what it is a window on
    MemoryObject *origin        # what it was cloned from, or NULL
    uint64_t offset             # of the window in the root's memory
    uint64_t size               # bytes, a page multiple
    int64_t references
    OpenFile identity           # of a root with one segment that is the memory
    uint64_t sid                # the security id once asked for, else 0
    uint32_t generation         # of the process that made it
    uint32_t children           # which that process had at its birth
    Buffers *counted            # where it counts as an MDL buffer, or NULL
    bint locked                 # whether its memory counts as locked there
    # Of a root:
    uint64_t segment_size       # of each segment but the last, which may be shorter
    size_t segment_count        # 0: not a root
    uint64_t descriptions       # how many were opened so far
    Segment *segments           # right behind this

cdef int memory_object_sid(MemoryObject *self, uint64_t *sid) noexcept nogil


# ---- plan --------------------------------------------------------------------------------------

cdef enum StepKind:
    # Can be undone:
    STEP_ACCESS         # make reserved pages accessible
    STEP_PROTECT        # change the protection of accessible pages
    STEP_ADVISE_HUGE    # ask for transparent huge pages
    STEP_FILL           # give pages of a memory object memory
    STEP_POPULATE       # make pages resident, each with memory of its own
    STEP_LOCK           # pin as many pages as the limit allows
    STEP_UNLOCK
    STEP_GUARD          # put guards over reserved pages that have no contents
    STEP_UNGUARD        # take them away
    # Cannot be undone, so last:
    STEP_DISCARD        # private pages back to reserved, their memory to the system
    STEP_PUNCH          # the same for the memory behind shared pages

cdef struct Step:
    StepKind kind
    uintptr_t start
    size_t size
    int protection
    int before                  # the protection to go back to
    MemoryObject *backing       # NULL: private memory
    uint64_t offset

ctypedef ShortVector[Step] Plan

cdef int carry_out(const Plan &plan, uint64_t *mappings) noexcept nogil

cdef Py_ssize_t reserve(uintptr_t start, size_t size, int fixed) noexcept nogil


# ---- guards ------------------------------------------------------------------------------------

cdef struct Chunk:
    uintptr_t start
    uintptr_t end

cdef bint guard(uintptr_t start, uintptr_t end) noexcept nogil


# ---- address_space -----------------------------------------------------------------------------

cdef class AddressSpace:
    cdef Mutex *mutex
    cdef Ledger ledger
    cdef readonly bint closed
    cdef Buffers buffers
    cdef uint64_t bounds[FIGURES]

    cdef Answer perform(self, const Request *request) noexcept
    cdef void enter(self) noexcept
    cdef void wait(self) noexcept nogil
    cdef void leave(self) noexcept nogil

    cdef uint64_t used(self, int figure) noexcept nogil
    cdef Answer room_for(self, int figure, uint64_t wish) noexcept nogil
    cdef Answer room_for_region(self, const Request *request,
                                uint64_t seams=*) noexcept nogil
    cdef Answer room_for_commit(self, Runs.iterator run, uintptr_t va,
                                uintptr_t end) noexcept nogil
    cdef Answer room_to_allocate(self, const Request *request) noexcept nogil
    cdef bint is_easily_committed(self, uint64_t size) noexcept nogil
    cdef uint64_t reserved_bytes(self, Runs.iterator run, uintptr_t va,
                                 uintptr_t end) noexcept nogil
    cdef Answer no_run(self) noexcept nogil
    cdef void set_bounds(self, const uint64_t *bounds) noexcept nogil
    cdef const char *flaw(self, uintptr_t *where) noexcept nogil

    cdef Answer dispatch(self, const Request *request) noexcept nogil
    cdef Answer dispatch_further(self, const Request *request) noexcept nogil
    cdef void end_handles(self) noexcept nogil
    cdef Answer allocate(self, const Request *request) noexcept nogil
    cdef Answer commit(self, Regions.iterator region, uintptr_t va,
                       uintptr_t end) noexcept nogil
    cdef Answer decommit(self, Regions.iterator region, uintptr_t va,
                         uintptr_t end) noexcept nogil
    cdef Answer protect(self, uintptr_t va, uintptr_t end, uint32_t protection) noexcept nogil
    cdef Answer free(self, Regions.iterator region, uintptr_t va, uintptr_t end) noexcept nogil
    cdef Answer check(self, uintptr_t va, size_t size, uint32_t access) noexcept nogil
    cdef Answer copy(self, const Request *request) noexcept nogil
    cdef bint group_has_room_to_copy(self, const Request *request) noexcept nogil
    cdef size_t grain_at(self, uintptr_t va) noexcept nogil
    cdef uint64_t memory_to_copy(self, const Request *request, size_t grain) noexcept nogil
    cdef Answer pin(self, const Request *request) noexcept nogil
    cdef Answer unpin(self, uintptr_t va, size_t size) noexcept nogil
    cdef Answer place(self, const Request *request, Run run, int fd,
                      uint64_t offset) noexcept nogil
    cdef Answer unguard(self, Runs.iterator run, uintptr_t va, uintptr_t end) noexcept nogil
    cdef Answer commit_by_mappings(self, uint32_t flags, Runs.iterator run, uintptr_t va,
                                   uintptr_t end) noexcept nogil
    cdef bint commit_by_guards(self, Chunk chunk, uintptr_t va, uintptr_t end) noexcept nogil
    cdef Answer check_decommit(self, Runs.iterator run, uintptr_t va,
                               uintptr_t end) noexcept nogil
    cdef bint any_committed(self, Runs.iterator run, uintptr_t end) noexcept nogil
    cdef bint decommit_by_guards(self, Runs.iterator run, Chunk chunk, uintptr_t va,
                                 uintptr_t end) noexcept nogil
    cdef void close_chunk(self, uintptr_t at) noexcept nogil
    cdef Answer settle(self, const Plan &plan, Runs.iterator run, uintptr_t end,
                       uint32_t state) noexcept nogil
    cdef Answer check_protect(self, Runs.iterator run, uintptr_t va, uintptr_t end,
                              uint32_t protection) noexcept nogil
    cdef uintptr_t first_pinned(self, Runs.iterator run, uintptr_t start,
                                uintptr_t end) noexcept nogil
    cdef void release_backing(self, Runs.iterator run, uintptr_t end) noexcept nogil
    cdef Answer close(self) noexcept nogil
    cdef int forget(self, Regions.iterator region, Runs.iterator run,
                    uintptr_t end) noexcept nogil
    cdef int forget_region(self, uintptr_t base) noexcept nogil
    cdef int unmap_unpinned(self) noexcept nogil


# ---- buffer_mappings ---------------------------------------------------------------------------

cdef class BufferMappings(AddressSpace):
    cdef Answer map_buffer(self, const Request *request, MemoryObject *buffer) noexcept nogil
    cdef Answer map_described(self, const Request *request, MemoryObject *buffer) noexcept nogil
    cdef Answer room_for_mapping(self, const Request *request,
                                 MemoryObject *buffer) noexcept nogil
    cdef Answer map_segments(self, const Request *request, MemoryObject *buffer) noexcept nogil
    cdef Answer convert(self, const Request *request, MemoryObject **buffer) noexcept nogil
    cdef Answer check_convertible(self, uintptr_t va, uintptr_t end,
                                  uint32_t forbidden) noexcept nogil
    cdef MemoryObject *whole_object(self, uintptr_t va, uintptr_t end) noexcept nogil


# ---- batches -----------------------------------------------------------------------------------

cdef struct Range:
    uintptr_t start
    uintptr_t end
    size_t index                # in what the caller gave

ctypedef vector[Range] Ranges

cdef bint add_range(Ranges *ranges, uintptr_t start, uintptr_t end) noexcept nogil

cdef Answer commit_ranges(AddressSpace space, Ranges *ranges) noexcept nogil

cdef Answer decommit_ranges(AddressSpace space, Ranges *ranges) noexcept nogil


# ---- intent ------------------------------------------------------------------------------------

cdef struct Location:
    # What the ledger says of one page.
    uint32_t kind               # KIND_FREE: nothing of this VMM's from base to end
    uint32_t state
    uint32_t protection
    uint32_t flags
    uintptr_t base
    uintptr_t end
    uintptr_t run_start
    uintptr_t run_end
    MemoryObject *buffer        # of an MDL mapping, while the mutex is held
    uint64_t mdl_offset

cdef struct Intent:
    # What a VMM made of [start, end), pages that are alike in everything below.
    uintptr_t start
    uintptr_t end
    uintptr_t base              # of the region, guard pages not included
    uintptr_t limit
    uint32_t flags              # of the region
    uint32_t kind
    uint32_t state
    uint32_t protection
    uint64_t sid                # of an MDL mapping, or 0

cdef Location locate(Ledger ledger, uintptr_t va) noexcept nogil

cdef bint intent_at(Ledger ledger, uintptr_t va, Intent *intent) noexcept nogil

cdef int add_intents(Ledger ledger, vector[Intent] *intents) except -1


# ---- handles -----------------------------------------------------------------------------------

cdef struct Entry:
    uint64_t value
    MemoryObject *buffer        # NULL once revoked
    Entry *parent               # the handle that this one was copied or cloned from
    Entry *child                # the first that came from this one
    Entry *next                 # the others that came from the same
    Entry *previous

cdef class HandleTable:
    cdef unordered_map[uint64_t, Entry] live            # by serial number
    cdef ordered_map[uint64_t, uint64_t] blocks         # serial numbers taken: start to end
    cdef uint64_t unused                                # of the newest block: from here
    cdef uint64_t unused_end                            # to here

    cdef Entry *add(self, MemoryObject *buffer, uint32_t rights, Entry *parent) noexcept nogil
    cdef uint64_t next(self, uint32_t rights) noexcept nogil
    cdef Answer find(self, uint64_t value, uint32_t rights, Entry **found) noexcept nogil
    cdef void give(self, Entry *entry, MemoryObject *buffer) noexcept nogil
    cdef void withdraw(self, Entry *entry) noexcept nogil
    cdef void close(self, Entry *entry) noexcept nogil
    cdef void revoke_descendants(self, Entry *entry) noexcept nogil
    cdef void close_all(self) noexcept nogil
    cdef bint take_block(self) noexcept nogil
    cdef bint handed_out(self, uint64_t serial) noexcept nogil

cdef uint32_t rights_of(uint64_t value) noexcept nogil


# ---- buffers -----------------------------------------------------------------------------------

cdef enum:
    PARCEL_DESCRIPTORS = 253    # SCM_MAX_FD: the kernel takes no more in a message

cdef struct Parcel:
    # A handle on its way to or from another process. Its files are its identity and its origin's,
    # as far as these are other memfds than its memory; then each segment that it touches. Whoever
    # has a parcel owns them, but for what ``BufferSpace.pack`` lends.
    OpenFile files[PARCEL_DESCRIPTORS]
    int count
    int segments                # how many of them are of memory
    uint32_t rights
    uint64_t offset             # of the buffer in the memory
    uint64_t size               # of the buffer
    uint64_t segment_size       # of each but the last, which may be shorter; of one its size
    uint64_t memory_size        # of all of them
    uint64_t handle             # of one that leaves, and how many read-only descriptions of its
    uint64_t descriptions       # buffer there were before

cdef struct HandleFacts:
    uint32_t rights
    uint64_t size
    uint64_t sid
    uint64_t origin_sid
    bint cloned
    int seals

cdef class BufferSpace(BufferMappings):
    cdef HandleTable handles

    cdef uint64_t next_handle(self, uint32_t flags) noexcept
    cdef Answer dispatch_mdl(self, const Request *request) noexcept nogil
    cdef Answer dispatch_handle(self, const Request *request) noexcept nogil
    cdef Answer room_for_buffer(self, uint64_t mdls, uint64_t size,
                                bint locked) noexcept nogil
    cdef Answer new_handle(self, MemoryObject *buffer, uint32_t rights,
                           Entry *parent) noexcept nogil
    cdef Answer create(self, const Request *request) noexcept nogil
    cdef Answer create_from_vm(self, const Request *request) noexcept nogil
    cdef Answer create_from_buffer(self, const Request *request) noexcept nogil
    cdef Answer get_size(self, const Request *request) noexcept nogil
    cdef Answer map(self, const Request *request) noexcept nogil
    cdef Answer clone(self, const Request *request) noexcept nogil
    cdef Answer seal(self, const Request *request) noexcept nogil
    cdef Answer copy_handle(self, const Request *request) noexcept nogil
    cdef Answer end_handle(self, const Request *request) noexcept nogil
    cdef Answer revoke(self, const Request *request) noexcept nogil
    cdef Answer tell(self, const Request *request) noexcept nogil
    cdef Answer pack(self, const Request *request) noexcept nogil
    cdef Answer pack_own(self, const Request *request) noexcept nogil
    cdef Answer undescribe(self, uint64_t handle, uint64_t since) noexcept nogil
    cdef Answer unpack(self, const Request *request) noexcept nogil

cdef void close_parcel(Parcel *parcel) noexcept nogil
