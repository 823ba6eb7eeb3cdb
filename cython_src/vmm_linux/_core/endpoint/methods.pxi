"""The table of methods, and a call: its arguments as the numbers that they stand for.

An argument becomes a number once, here: what the policy decides about and the audit writes down
is what is carried out. Python code of the caller's (``__index__``, an iterator, a buffer) runs
here, before the decision, and not again after it.
"""

cdef enum:
    MOST_ARGUMENTS = 5
    UNBOUNDED = 0xFFFFFFFFFFFFFFFF


class Kind(Enum):
    """What an argument of a method is."""

    ADDRESS = "address"
    SIZE = "size"               # bytes; rules bound it
    FLAGS = "flags"
    HANDLE = "handle"
    OFFSET = "offset"           # bytes from the start of a buffer
    SEGMENT_SIZE = "segment_size"
    NBYTES = "nbytes"           # the length to the byte
    RIGHTS = "rights"           # None: all that the handle has
    SEALS = "seals"
    MAX_SIZE = "max_size"       # bytes; None: no bound
    USER = "user"               # a number or None
    DESCRIPTOR = "descriptor"
    SWITCH = "switch"           # what Python takes for true or false
    TRISTATE = "tristate"       # True, False or None
    IGNORED = "ignored"
    DATA = "data"               # a buffer, of so many bytes
    RANGES = "ranges"           # pairs, of so many bytes together
    SOCKET = "socket"
    LIMITS = "limits"


MethodInfo = namedtuple(
    "MethodInfo", ("name", "arguments", "flags"), defaults=(0,), module=__name__)
MethodInfo.__doc__ = (
    "A method: its name, its arguments in order with their kinds, and the flags that it knows.")


cdef tuple RANGE = (("va", Kind.ADDRESS), ("size", Kind.SIZE))

METHODS = (
    MethodInfo("allocate", (("addr", Kind.ADDRESS), ("size", Kind.SIZE), ("flags", Kind.FLAGS)),
               sum(VmmFlags)),
    MethodInfo("commit", RANGE + (("flags", Kind.IGNORED),)),
    MethodInfo("decommit", RANGE),
    MethodInfo("commit_ranges", (("ranges", Kind.RANGES),)),
    MethodInfo("decommit_ranges", (("ranges", Kind.RANGES),)),
    MethodInfo("protect", RANGE + (("flags", Kind.FLAGS),), FLAG_RWX_MASK),
    MethodInfo("free", RANGE),
    MethodInfo("query", (("va", Kind.ADDRESS), ("smaps", Kind.SWITCH))),
    MethodInfo("view", RANGE + (("writable", Kind.TRISTATE),)),
    MethodInfo("read", RANGE),
    MethodInfo("write", (("va", Kind.ADDRESS), ("data", Kind.DATA))),
    MethodInfo("mdl_create", (
        ("size", Kind.SIZE), ("prot", Kind.FLAGS), ("segment_size", Kind.SEGMENT_SIZE),
        ("nbytes", Kind.NBYTES)),
        FLAG_RWX_MASK | FLAG_LOCKED),
    MethodInfo("mdl_create_from_vm", RANGE + (("flags", Kind.FLAGS),), FLAG_RWX_MASK),
    MethodInfo("mdl_create_from_buf", (("data", Kind.DATA), ("prot", Kind.FLAGS)), FLAG_RWX_MASK),
    MethodInfo("mdl_get_size", (("handle", Kind.HANDLE),)),
    MethodInfo("mdl_map", (
        ("handle", Kind.HANDLE), ("offset", Kind.OFFSET), ("length", Kind.SIZE),
        ("hint", Kind.ADDRESS), ("prot", Kind.FLAGS)), MAP_FLAGS),
    MethodInfo("mdl_clone", (
        ("originHandle", Kind.HANDLE), ("offset", Kind.OFFSET), ("length", Kind.SIZE))),
    MethodInfo("mdl_seal", (("handle", Kind.HANDLE), ("seals", Kind.SEALS))),
    MethodInfo("handle_copy", (("handle", Kind.HANDLE), ("rights", Kind.RIGHTS))),
    MethodInfo("handle_close", (("handle", Kind.HANDLE),)),
    MethodInfo("handle_revoke", (("handle", Kind.HANDLE),)),
    MethodInfo("handle_info", (("handle", Kind.HANDLE),)),
    MethodInfo("send_handle", (
        ("sock", Kind.SOCKET), ("handle", Kind.HANDLE), ("rights", Kind.RIGHTS))),
    MethodInfo("recv_handle", (
        ("sock", Kind.SOCKET), ("require", Kind.SEALS), ("max_size", Kind.MAX_SIZE),
        ("peer_uid", Kind.USER))),
    MethodInfo("handle_fileno", (("handle", Kind.HANDLE), ("rights", Kind.RIGHTS))),
    MethodInfo("handle_from_fd", (
        ("fd", Kind.DESCRIPTOR), ("require", Kind.SEALS), ("max_size", Kind.MAX_SIZE))),
    MethodInfo("limits", (("limits", Kind.LIMITS),)),
    MethodInfo("close", ()),
)
"""Every method that a policy decides about and an audit writes down, in the order of ``Method``.

``limits`` is setting them.
"""

assert len(METHODS) == METHOD_COUNT

# The kinds in C, in the same order.
cdef enum:
    ARGUMENT_ADDRESS, ARGUMENT_SIZE, ARGUMENT_FLAGS, ARGUMENT_HANDLE, ARGUMENT_OFFSET
    ARGUMENT_SEGMENT_SIZE, ARGUMENT_NBYTES, ARGUMENT_RIGHTS, ARGUMENT_SEALS, ARGUMENT_MAX_SIZE
    ARGUMENT_USER, ARGUMENT_DESCRIPTOR, ARGUMENT_SWITCH, ARGUMENT_TRISTATE, ARGUMENT_IGNORED
    ARGUMENT_DATA, ARGUMENT_RANGES, ARGUMENT_SOCKET, ARGUMENT_LIMITS

cdef int kinds[METHOD_COUNT][MOST_ARGUMENTS]
cdef int argument_counts[METHOD_COUNT]
cdef tuple argument_names = tuple(tuple(dict(info.arguments)) for info in METHODS)
cdef tuple method_names = tuple(map(attrgetter("name"), METHODS))


cdef int fill_in() except -1:
    order = list(Kind)
    for method, info in enumerate(METHODS):
        argument_counts[<int>method] = len(info.arguments)
        for place, (_, kind) in enumerate(info.arguments):
            kinds[<int>method][<int>place] = order.index(kind)
    return 0


fill_in()


cdef str name_of(int method):
    """The name of a method, or of the method that this is a part of."""
    return "read" if method == CHECK else <str>method_names[method]


cdef struct Call:
    # A call of a method: its arguments as numbers, except one that stays a Python object (a socket
    # or limits).
    Request request             # of what is received, ``size`` is the most it may have
    uint64_t peer_uid, descriptor
    int choice                  # of a switch or a tristate: 1 True, 0 False, -1 None
    uint32_t absent             # bit i: None was given for the argument of kind i
    bint holds_data             # ``data`` must be released
    Py_buffer data


cdef class VMM

# What a method does once its arguments are numbers and the call is allowed. ``argument`` is what
# ``read_arguments`` returned.
ctypedef object (*MethodBody)(VMM self, Call *call, object argument)


cdef inline void begin_call(Call *call, Method method, Ranges *ranges) noexcept:
    """A call without arguments yet."""
    call.request = new_request(method)
    call.request.ranges = ranges
    call.absent = 0
    call.holds_data = False


cdef inline void end_call(Call *call) noexcept:
    """Release the caller's data."""
    if call.holds_data:
        PyBuffer_Release(&call.data)


cdef inline bint is_absent(const Call *call, int kind) noexcept:
    """Whether None was given for the argument of a kind, which may be left out."""
    return call.absent >> kind & 1


cdef inline uint64_t *field_of(Call *call, int kind) noexcept:
    """Where a call keeps an argument of a kind; NULL where that is no plain number."""
    cdef Request *request = &call.request
    if kind == ARGUMENT_ADDRESS:
        return <uint64_t *>&request.va
    elif kind == ARGUMENT_SIZE or kind == ARGUMENT_MAX_SIZE:
        return <uint64_t *>&request.size
    elif kind == ARGUMENT_FLAGS:
        return &request.flags
    elif kind == ARGUMENT_HANDLE:
        return &request.handle
    elif kind == ARGUMENT_OFFSET:
        return &request.offset
    elif kind == ARGUMENT_SEGMENT_SIZE:
        return &request.segment_size
    elif kind == ARGUMENT_NBYTES:
        return &request.nbytes
    elif kind == ARGUMENT_RIGHTS:
        return &request.rights
    elif kind == ARGUMENT_SEALS:
        return &request.seals
    elif kind == ARGUMENT_USER:
        return &call.peer_uid
    elif kind == ARGUMENT_DESCRIPTOR:
        return &call.descriptor
    return NULL


cdef object read_arguments(Call *call, PyObject **given):
    """Turn the arguments of a call into numbers.

    Returns:
        The argument that is no number: a socket or limits; None where a method has none.

    Errors:
        INVALID_ARGUMENT: what has no number, in the words of the method.
    """
    cdef int method = call.request.method
    cdef int place, kind
    cdef uint64_t *field
    cdef object value, argument = None
    for place in range(argument_counts[method]):
        value = <object>given[place]
        kind = kinds[method][place]
        field = field_of(call, kind)
        if value is None and kind in (ARGUMENT_RIGHTS, ARGUMENT_MAX_SIZE, ARGUMENT_USER):
            call.absent |= 1 << kind
            field[0] = UNBOUNDED
            if kind == ARGUMENT_RIGHTS:
                field[0] = rights_of(call.request.handle) & RIGHT_ALL
        elif field != NULL:
            field[0] = number(method, place, value)
        elif kind == ARGUMENT_SWITCH:
            call.choice = switch(method, place, value)
        elif kind == ARGUMENT_TRISTATE:
            call.choice = tristate(method, place, value)
        elif kind == ARGUMENT_DATA:
            hold_data(call, value)
        elif kind == ARGUMENT_RANGES:
            read_ranges(call, value)
        elif kind == ARGUMENT_SOCKET:
            check_socket(name_of(method), value)
            argument = value
        elif kind == ARGUMENT_LIMITS:
            argument = plain_limits(name_of(method), value)
    return argument


cdef int hold_data(Call *call, object data) except -1:
    """Hold the bytes of a buffer, which stay where they are until ``end_call``."""
    try:
        PyObject_GetBuffer(data, &call.data, PyBUF_SIMPLE)
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            name_of(call.request.method),
            f"data is {describe(data)}, not a contiguous buffer") from problem
    call.holds_data = True
    call.request.data = call.data.buf
    call.request.size = call.data.len
    return 0


cdef int read_ranges(Call *call, object ranges) except -1:
    """Pairs as numbers; the size of the call is their sum, or the most there is."""
    cdef Request *request = &call.request
    cdef str method = name_of(request.method)
    cdef uint64_t start, length
    for item in iterate(method, ranges):
        va, size = pair(method, item)
        start = number_of_range(method, "va", va)
        length = number_of_range(method, "size", size)
        request.size = request.size + length if length <= UNBOUNDED - request.size else UNBOUNDED
        if not add_range(request.ranges, start, start + length):
            raise OutOfMemory(method, "no memory for the list of ranges")
    return 0


cdef dict arguments_of(Call *call, object argument):
    """The arguments of a call by name, as numbers: of data and ranges how many there are."""
    cdef dict numbers = {}
    cdef int method = call.request.method
    cdef tuple names = <tuple>argument_names[method]
    cdef int place
    for place in range(argument_counts[method]):
        if kinds[method][place] == ARGUMENT_LIMITS:
            for limit in LIMIT_NAMES:
                numbers[limit] = getattr(argument, limit)
        else:
            numbers[names[place]] = argument_of(call, argument, kinds[method][place])
    return numbers


cdef object argument_of(Call *call, object argument, int kind):
    """One argument of a call, as the audit writes it down."""
    cdef uint64_t *field = field_of(call, kind)
    if field != NULL:
        return None if is_absent(call, kind) else field[0]
    elif kind == ARGUMENT_DATA:
        return call.request.size
    elif kind == ARGUMENT_SWITCH or kind == ARGUMENT_TRISTATE:
        return None if call.choice < 0 else call.choice != 0
    elif kind == ARGUMENT_RANGES:
        return call.request.ranges.size()
    elif kind == ARGUMENT_SOCKET:
        return SocketType.fileno(argument)
    return 0
