"""The public methods in one table, and the arguments of a call as plain numbers.

What is decided about a call, and written down of it, is what is carried out: an argument is
turned into a number once, and the number is what goes on. Python code of the caller's
(``__index__``, an iterator, a buffer) runs here, before the decision, and not again after it.
"""

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

cdef enum:
    MOST_ARGUMENTS = 5
    UNBOUNDED = 0xFFFFFFFFFFFFFFFF


class Kind(Enum):
    """What an argument of a method is."""

    NUMBER = "number"
    SIZE = "size"               # bytes; rules bound it
    FLAGS = "flags"
    HANDLE = "handle"
    RIGHTS = "rights"           # None: all that the handle has
    SEALS = "seals"
    MOST = "most"               # bytes at most; None: no bound
    MAYBE = "maybe"             # a number or None
    SWITCH = "switch"           # what Python takes for true or false
    TRISTATE = "tristate"       # True, False or None
    IGNORED = "ignored"
    DATA = "data"               # a buffer, of so many bytes
    RANGES = "ranges"           # pairs, of so many bytes together
    SOCKET = "socket"
    LIMITS = "limits"


class PublicMethod(NamedTuple):
    """A public method: its name, its arguments in order, and the flags that it knows."""

    name: str
    arguments: tuple
    flags: int = 0

    def has(self, kind):
        """Whether an argument is of this kind."""
        return any(each is kind for _, each in self.arguments)

    def names(self):
        """The names of its arguments, in order."""
        return tuple(dict(self.arguments))


cdef tuple RANGE = (("va", Kind.NUMBER), ("size", Kind.SIZE))

METHODS = (
    PublicMethod("allocate", (("addr", Kind.NUMBER), ("size", Kind.SIZE), ("flags", Kind.FLAGS)),
           sum(VmmFlags)),
    PublicMethod("commit", RANGE + (("flags", Kind.IGNORED),)),
    PublicMethod("decommit", RANGE),
    PublicMethod("commit_ranges", (("ranges", Kind.RANGES),)),
    PublicMethod("decommit_ranges", (("ranges", Kind.RANGES),)),
    PublicMethod("protect", RANGE + (("flags", Kind.FLAGS),), FLAG_RWX_MASK),
    PublicMethod("free", RANGE),
    PublicMethod("query", (("va", Kind.NUMBER), ("smaps", Kind.SWITCH))),
    PublicMethod("view", RANGE + (("writable", Kind.TRISTATE),)),
    PublicMethod("read", RANGE),
    PublicMethod("write", (("va", Kind.NUMBER), ("data", Kind.DATA))),
    PublicMethod("mdl_create", (
        ("size", Kind.SIZE), ("prot", Kind.FLAGS), ("segment_size", Kind.NUMBER)),
        FLAG_RWX_MASK | FLAG_LOCKED),
    PublicMethod("mdl_create_from_vm", RANGE + (("flags", Kind.FLAGS),), FLAG_RWX_MASK),
    PublicMethod("mdl_create_from_buf", (("data", Kind.DATA), ("prot", Kind.FLAGS)), FLAG_RWX_MASK),
    PublicMethod("mdl_get_size", (("handle", Kind.HANDLE),)),
    PublicMethod("mdl_map", (
        ("handle", Kind.HANDLE), ("offset", Kind.NUMBER), ("length", Kind.SIZE),
        ("hint", Kind.NUMBER), ("prot", Kind.FLAGS)), MAP_FLAGS),
    PublicMethod("mdl_clone", (
        ("originHandle", Kind.HANDLE), ("offset", Kind.NUMBER), ("length", Kind.SIZE))),
    PublicMethod("mdl_seal", (("handle", Kind.HANDLE), ("seals", Kind.SEALS))),
    PublicMethod("handle_copy", (("handle", Kind.HANDLE), ("rights", Kind.RIGHTS))),
    PublicMethod("handle_close", (("handle", Kind.HANDLE),)),
    PublicMethod("handle_revoke", (("handle", Kind.HANDLE),)),
    PublicMethod("handle_info", (("handle", Kind.HANDLE),)),
    PublicMethod("send_handle", (
        ("sock", Kind.SOCKET), ("handle", Kind.HANDLE), ("rights", Kind.RIGHTS))),
    PublicMethod("recv_handle", (
        ("sock", Kind.SOCKET), ("require", Kind.SEALS), ("max_size", Kind.MOST),
        ("peer_uid", Kind.MAYBE))),
    PublicMethod("handle_fileno", (("handle", Kind.HANDLE), ("rights", Kind.RIGHTS))),
    PublicMethod("handle_from_fd", (
        ("fd", Kind.NUMBER), ("require", Kind.SEALS), ("max_size", Kind.MOST))),
    PublicMethod("limits", (("limits", Kind.LIMITS),)),
    PublicMethod("close", ()),
)
"""Every method that is asked about and written down, in the order of their numbers.

``limits`` is setting them.
"""

assert len(METHODS) == METHOD_COUNT

# The same for C.
cdef enum:
    NUMBER
    SIZE
    FLAGS
    HANDLE
    RIGHTS
    SEALS
    MOST
    MAYBE
    SWITCH
    TRISTATE
    IGNORED
    DATA
    RANGES
    SOCKET
    LIMITS

cdef int kinds[METHOD_COUNT][MOST_ARGUMENTS]
cdef tuple argument_names = tuple(map(PublicMethod.names, METHODS))
cdef tuple method_names = tuple(map(attrgetter("name"), METHODS))


cdef int fill_in() except -1:
    order = list(Kind)
    for call, method in enumerate(METHODS):
        for place, (_, kind) in enumerate(method.arguments):
            kinds[<int>call][<int>place] = order.index(kind)
    return 0


fill_in()


cdef str name_of(int call):
    """The name of a method, or of the method that this is a part of."""
    return "read" if call == CHECK else <str>method_names[call]


cdef tuple normalised(int call, tuple arguments, Facts *facts):
    """The arguments of a call as the plain numbers that they stand for; what rules look at.

    Buffers become memoryviews, which hold their bytes and their size, ranges a tuple of pairs.

    Errors:
        INVALID_ARGUMENT: what has no number, in the words of the method itself.
    """
    cdef str method = name_of(call)
    cdef tuple names = <tuple>argument_names[call]
    cdef list plain = []
    cdef int place
    facts.flags = facts.size = facts.handle = facts.rights = facts.seals = 0
    facts.pid = facts.uid = facts.gid = -1
    for place in range(len(arguments)):
        plain.append(one(
            method, <str>names[place], kinds[call][place], <object>arguments[place], facts))
    return tuple(plain)


cdef object one(str method, str name, int kind, object value, Facts *facts):
    """One argument."""
    cdef uint64_t found = 0
    if kind == DATA:
        value = contiguous(method, value)
        facts.size = len(value)
        return value
    if kind == RANGES:
        return plain_ranges(method, value, facts)
    if kind == SOCKET:
        check_socket(method, value)
        return value
    if kind == LIMITS:
        return plain_limits(method, value)
    if kind == SWITCH:
        return switch(method, name, value)
    if kind == TRISTATE:
        return tristate(method, name, value)
    if kind == IGNORED:
        return 0
    if value is None and (kind == RIGHTS or kind == MOST or kind == MAYBE):
        if kind == RIGHTS:
            facts.rights = rights_of(facts.handle) & RIGHT_ALL
        elif kind == MOST:
            facts.size = UNBOUNDED
        return None
    found = number(method, name, value)
    if kind == SIZE or kind == MOST:
        facts.size = found
    elif kind == FLAGS:
        facts.flags = found
    elif kind == HANDLE:
        facts.handle = found
    elif kind == RIGHTS:
        facts.rights = found
    elif kind == SEALS:
        facts.seals = found
    return found


cdef tuple plain_ranges(str method, object ranges, Facts *facts):
    """Pairs of plain numbers; ``facts.size`` is their sum, or the most there is."""
    cdef list plain = []
    cdef uint64_t start, length
    for item in iterate(method, ranges):
        va, size = pair(method, item)
        start = number(method, "va", va)
        length = number(method, "size", size)
        facts.size = facts.size + length if length <= UNBOUNDED - facts.size else UNBOUNDED
        plain.append((start, length))
    return tuple(plain)


cdef dict as_numbers(int call, tuple arguments):
    """Normalised arguments by name, as numbers: no contents."""
    cdef dict numbers = {}
    cdef tuple names = <tuple>argument_names[call]
    cdef int place, kind
    for place in range(len(arguments)):
        value = arguments[place]
        kind = kinds[call][place]
        if kind == DATA or kind == RANGES:
            value = len(value)
        elif kind == SOCKET:
            value = SocketType.fileno(value)
        elif kind == LIMITS:
            for figure in FIGURE_NAMES:
                numbers[figure] = getattr(value, figure)
            continue
        numbers[names[place]] = value
    return numbers


@cython.final
cdef class Question:
    """A call that a policy's callable decides about. Immutable.

    Attributes:
        method: its Python name.
        arguments: by name, as numbers; of data and ranges how many there are.
    """

    cdef object vmm
    cdef Facts facts
    cdef readonly str method
    cdef readonly dict arguments

    __reduce__ = refuse_copies("each is of one call of one VMM; keep its method and arguments")

    def __init__(self):
        raise TypeError("questions are put by a VMM")

    def __repr__(self):
        return f"<Question: {self.method} {self.arguments}>"

    @property
    def flags(self):
        """The flags or the protection that are asked for."""
        return VmmFlags(self.facts.flags) if self.facts.flags < 1 << 63 else self.facts.flags

    @property
    def size(self):
        """Bytes that the call is about: of ranges all of them; of what is received at most."""
        return self.facts.size

    @property
    def rights(self):
        """The rights that the copy, the receiver or the descriptor is to have."""
        return Rights(self.facts.rights & <uint64_t>int(~Rights(0)))

    @property
    def seals(self):
        """Of a buffer that leaves, its seals; of others those that are put on or demanded."""
        return Seal(self.facts.seals & <uint64_t>int(~Seal(0)))

    @property
    def peer(self):
        """``(pid, uid, gid)`` of who made the other end of the socket, or None.

        The user, and the group, is None where it may be anybody: a stranger to this user namespace.
        """
        if self.facts.pid < 0:
            return None
        return (self.facts.pid, None if self.facts.uid < 0 else self.facts.uid,
                None if self.facts.gid < 0 else self.facts.gid)

    @property
    def usage(self):
        """What the VMM uses (``VMM.usage``), asked for when it is looked at."""
        return usage_of_vmm(self.vmm)


cdef object usage_of_vmm(object vmm):
    """The one place where a policy's callable gets at what the VMM uses.

    It is the package's own method that is asked, whatever a subclass has in its place.
    """
    for kind in reversed(type(vmm).__mro__):
        if "usage" in vars(kind):
            return vars(kind)["usage"].__get__(vmm)()
    raise AttributeError("this VMM tells no usage")
