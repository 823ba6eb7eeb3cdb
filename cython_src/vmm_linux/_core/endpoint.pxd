"""Contract of endpoint."""

from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libcpp.vector cimport vector

from vmm_linux._core.kernel cimport Descriptor, OpenFile, PAGE_SIZE
from vmm_linux._core.memory cimport AddressSpace, BufferSpace, Intent, Method, Parcel, Request
from vmm_linux._core.procfs cimport OwnProcess, PageFacts
from vmm_linux._core.vocabulary cimport (
    FLAG_CACHE_DISABLE,
    FLAG_CACHE_MASK,
    FLAG_COMMIT,
    FLAG_FIXED,
    FLAG_GROW_DOWN,
    FLAG_HIGH_GUARD,
    FLAG_HUGE,
    FLAG_LOCKED,
    FLAG_LOW_GUARD,
    FLAG_RESERVE,
    FLAG_RWX_MASK,
    FLAG_SHAREABLE,
    FLAG_WRITE_COMBINE,
    FLAG_WRITE_THROUGH,
    is_legal_protection,
    is_multiple,
)

# ---- arguments ---------------------------------------------------------------------------------

cdef extern from "Python.h":
    bint PyLong_Check(object)
    bint PyBool_Check(object)
    long long PyLong_AsLongLongAndOverflow(object, int *)

cdef enum:
    REGION_FLAGS = (
        FLAG_RWX_MASK | FLAG_RESERVE | FLAG_COMMIT | FLAG_LOCKED | FLAG_LOW_GUARD
        | FLAG_HIGH_GUARD | FLAG_GROW_DOWN | FLAG_CACHE_MASK | FLAG_FIXED | FLAG_HUGE
        | FLAG_SHAREABLE)
    MAP_FLAGS = FLAG_RWX_MASK | FLAG_LOCKED | FLAG_LOW_GUARD | FLAG_HIGH_GUARD | FLAG_FIXED
    UNCHOOSABLE = FLAG_WRITE_THROUGH | FLAG_WRITE_COMBINE | FLAG_CACHE_DISABLE

cdef uint64_t other_number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF
cdef object iterate(str method, object ranges)
cdef tuple other_pair(str method, object item)
cdef object contiguous(str method, object data)
cdef object plain_limits(str method, object value)
cdef object tristate(str method, str name, object value)
cdef object switch(str method, str name, object value)
cdef int check_multiple(str method, str name, uint64_t value) except -1
cdef int refuse_bytes(str method, str name, uint64_t va, uint64_t size, str size_name) except -1
cdef int refuse_pages(str method, str name, uint64_t va, uint64_t size, str size_name) except -1
cdef int refuse_protection(str method, uint64_t protection) except -1
cdef int refuse_region_flags(uint64_t flags, uint64_t addr) except -1
cdef int check_some_access(str method, uint64_t flags) except -1
cdef int check_bits(str method, str name, uint64_t value, uint64_t known) except -1
cdef int check_fixed(str method, str name, uint64_t flags, uint64_t addr) except -1


cdef inline uint64_t number(str method, str name, object value) except? 0xFFFFFFFFFFFFFFFF:
    """A 64-bit number: an int or whatever has ``__index__``, but no bool."""
    cdef long long result
    cdef int overflow
    if PyLong_Check(value) and not PyBool_Check(value):
        result = PyLong_AsLongLongAndOverflow(value, &overflow)
        if result >= 0:
            return result
    return other_number(method, name, value)


cdef inline tuple pair(str method, object item):
    """The two values of a range."""
    if type(item) is tuple and len(<tuple>item) == 2:
        return item
    return other_pair(method, item)


cdef inline int check_bytes(str method, uint64_t va, uint64_t size) except -1:
    """Bytes of memory at any address: one at least, which end below 2**64."""
    if size != 0 and va + size >= va:
        return 0
    return refuse_bytes(method, "va", va, size, "size")


cdef inline int check_pages(str method, str name, uint64_t va, uint64_t size,
                            str size_name) except -1:
    """Whole pages; ``name`` and ``size_name`` are what the caller calls the two numbers."""
    if size != 0 and is_multiple(va | size, PAGE_SIZE) and va + size >= va:
        return 0
    return refuse_pages(method, name, va, size, size_name)


cdef inline int check_protection(str method, uint64_t protection) except -1:
    """None, R, RW, RX or RWX."""
    if is_legal_protection(protection):
        return 0
    return refuse_protection(method, protection)


cdef inline int check_region_flags(uint64_t flags, uint64_t addr) except -1:
    """The flags of a new region, whose address is ``addr``."""
    if (flags & ~<uint64_t>(REGION_FLAGS & ~UNCHOOSABLE) == 0 and flags & FLAG_RESERVE
            and is_legal_protection(flags & FLAG_RWX_MASK)
            and (addr != 0 or not flags & FLAG_FIXED)):
        return 0
    return refuse_region_flags(flags, addr)


cdef inline Request request_of(Method method, uint64_t va, uint64_t size, uint64_t flags) noexcept:
    """A call with numbers that were checked."""
    cdef Request request
    request.method = method
    request.va = va
    request.size = size
    request.flags = <uint32_t>flags
    request.buffer = NULL
    request.handle = 0
    request.offset = 0
    request.forbidden = 0
    return request


cdef inline Request handle_request(Method method, uint64_t handle, uint32_t flags) noexcept:
    """A call about a handle."""
    cdef Request request = request_of(method, 0, 0, flags)
    request.handle = handle
    return request


# ---- methods -----------------------------------------------------------------------------------

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


# ---- audit -------------------------------------------------------------------------------------

cdef class Record:
    cdef readonly uint64_t call
    cdef readonly int64_t time          # nanoseconds since 1970
    cdef readonly int64_t duration      # nanoseconds; of a call that still runs 0
    cdef readonly long pid
    cdef readonly long thread
    cdef readonly str method
    cdef dict numbers                   # the arguments; None where they were no numbers
    cdef readonly str decision          # "allow", "deny"; None before there was one
    cdef readonly str rule              # that decided
    cdef readonly object rc             # a Retcode; None of a call that still runs
    cdef readonly str error             # what was raised that is no return code
    cdef readonly object result         # the address, handle, descriptor or count, or None
    cdef readonly object sid
    cdef readonly object origin_sid
    cdef readonly object peer
    cdef int64_t began                  # of the clock that never jumps

    cdef str line(self, str event)

cdef class Audit:
    cdef object ring                    # the last records, the newest at the end
    cdef object logger                  # or None
    cdef readonly object file           # its path, or None
    cdef readonly str failure           # "deny" or "continue"
    cdef OpenFile opened                # its descriptor is -1 where it could not be opened
    cdef bint linked                    # whether it had a name when it was opened
    cdef bint torn                      # whether the last line in the file is a half one
    cdef bint warned
    cdef set logging                    # threads whose record is just going to the logger
    cdef bint made

    cdef int check_unmade(self) except -1
    cdef void keep(self, int fd) noexcept
    cdef Record begin(self, str method)
    cdef int write_before(self, Record record) except -1
    cdef int end(self, Record record) except -1
    cdef int write(self, str line)
    cdef bint writes_first(self, object failure)
    cdef int warn(self, int error) except -1
    cdef int log(self, Record record) except -1

cdef void tell_unraisable(object where, BaseException problem) noexcept


# ---- rules -------------------------------------------------------------------------------------

cdef enum:
    NOBODY = 0x7FFFFFFF         # what ``answer`` returns where no rule matches

cdef struct Bits:
    uint64_t all                # every one of these
    uint64_t any                # one of these at least; 0: no matter
    uint64_t none               # none of these

cdef struct Rule:
    uint64_t calls              # which it is for, a bit for each
    bint allows
    int number                  # in the policy's list of names
    uint64_t min_size
    uint64_t max_size
    Bits flags
    Bits rights
    Bits seals
    vector[int64_t] uids        # of the peer, in order; empty: no matter
    vector[int64_t] gids
    bint other_user             # whether the peer has to be another user than this process's

cdef class RuleTable:
    cdef vector[vector[Rule]] rules     # of every method
    cdef bint asks_seals[CALLS]
    cdef bint asks_peer[CALLS]
    cdef bint compiled
    cdef bint allows_otherwise
    cdef readonly object ask            # a callable, asked where no rule matches, or None
    cdef readonly uint32_t forbidden    # access that pages of MDL buffers never have
    cdef readonly object audit_failure  # "deny", "continue", or None
    cdef tuple names

    cdef int answer(self, int call, const Facts *facts) noexcept
    cdef str name_of_rule(self, int number)


# ---- wire --------------------------------------------------------------------------------------

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
cdef int raise_refusal(int result) except -1
cdef int send(object sock, const Parcel *parcel) except -1
cdef Received receive(object sock, Demands demands, object peer_uid)
cdef int adopt(uint64_t fd, Demands demands, Parcel *parcel) except -1


# ---- gate --------------------------------------------------------------------------------------

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


# ---- query -------------------------------------------------------------------------------------

cdef class PageInfo:
    cdef readonly uintptr_t va
    cdef uint32_t _state
    cdef uint32_t _kind
    cdef uint32_t _protection
    cdef uint32_t _flags
    cdef readonly uintptr_t base
    cdef uintptr_t _end
    cdef readonly uintptr_t run_start
    cdef readonly uintptr_t run_end
    cdef PageFacts _facts
    cdef readonly object mdl_offset
    cdef readonly object sid
    cdef readonly object smaps

cdef PageInfo query(AddressSpace space, OwnProcess process, uintptr_t va, bint smaps)


# ---- views -------------------------------------------------------------------------------------

cdef object pinned_view(AddressSpace space, uintptr_t va, size_t size, object writable)


# ---- life --------------------------------------------------------------------------------------

cdef class Client(Watched):
    cdef OwnProcess process
    cdef object __weakref__
    cdef str made_at
    cdef int made_by
    cdef bint warned

    cdef int warn_if_open(self) except -1

cdef object do_close(Client self)
cdef int refuse_closed(str method) except -1
cdef bint intent_of_any(uintptr_t va, Intent *intent) except -1
cdef int add_intents_of_all(vector[Intent] *intents) except -1


cdef inline int check_open(Client self, str method) except -1:
    """Every method but ``close`` begins with this."""
    return refuse_closed(method) if self.space.closed else 0


# ---- region_methods ----------------------------------------------------------------------------

cdef class MemoryMethods(Client):
    cdef object change_ranges(self, Method method, str name, object ranges)
    cdef int change(self, Method method, str name, object va, object size,
                    uint64_t flags) except -1

cdef object made(BufferSpace space, Request *request)
cdef void undescribe(BufferSpace space, uint64_t handle, uint64_t since) noexcept


