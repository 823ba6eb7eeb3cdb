"""AF_UNIX sockets: what is one, what is at its other end, what its options add, waiting.

A socket is any object with ``fileno()`` whose descriptor is an AF_UNIX socket for the kernel. Those
of Python's own class send and receive by their methods. So do others that block and have such
methods: these wait as their library does. For all others this module uses the descriptor, and waits
by what gevent and eventlet have for that, or by ``select``.
"""

cdef enum:
    UNKNOWN = -1                # of a deadline

CREDENTIALS = struct.Struct("iII")
NO_USER = 0xFFFFFFFF
"""The user at the other end of a socket that was never connected to one end alone."""
SO_PASSPIDFD = 76
SO_PASSSEC = 34
SO_PEERSEC = 31
SO_TIMESTAMPING = 37
TIMESTAMP = struct.Struct("2q")
TIMESTAMP_OPTIONS = (29, 35, 63, 64)  # SO_TIMESTAMP, SO_TIMESTAMPNS, and the same with _NEW
COMPANIONS = (
    ("SO_PASSCRED", ((_socket.SO_PASSCRED,),), CREDENTIALS.size),
    ("SO_PASSPIDFD", ((SO_PASSPIDFD,),), struct.calcsize("i")),
    ("SO_TIMESTAMP", (TIMESTAMP_OPTIONS,), TIMESTAMP.size),
    ("SO_TIMESTAMPING", (TIMESTAMP_OPTIONS, (SO_TIMESTAMPING,)), 3 * TIMESTAMP.size),
)
"""What a socket's options have the kernel add to the control data of a message.

The name of the option, the options of which one in each group must be on, and the size in bytes.
Beside them there are SO_PASSSEC, whose security label is of any length, and SO_INQ (Linux 6.17),
which comes last, and whose state the kernel does not report.
"""
LONGEST_LABEL = 1024
"""Bytes of a security label that are looked at."""
MOST_LABEL = 4096
INQ = struct.calcsize("i")
TIMEVAL = struct.Struct("2l")
LONGEST_WAIT = 86_400.0
"""Seconds of one poll(2), which knows no more than 24 days; longer waits take several."""
CO_COROUTINE = 0x80
"""The flag of an ``async`` function's code."""
OF_TRANSPORTS = (("asyncio.trsock", "TransportSocket"), ("uvloop.loop", "PseudoSocket"))
"""Classes of the sockets that a transport of an event loop reads and writes."""
NO_TRANSPORT = (
    ": its transport reads the socket, and would take the message without its descriptors. Stop "
    "that (transport.pause_reading()) and pass get_extra_info('socket').dup(), or a socket without "
    "a transport")
ADVICE = (
    ("asyncio.streams", "StreamReader", NO_TRANSPORT),
    ("asyncio.streams", "StreamWriter", NO_TRANSPORT),
    ("asyncio.transports", "BaseTransport", NO_TRANSPORT),
    ("uvloop.loop", "UVBaseTransport", NO_TRANSPORT),
    ("trio", "SocketStream", ": pass its .socket"),
    ("anyio.abc", "UNIXSocketStream", ": pass .extra(anyio.abc.SocketAttribute.raw_socket)"),
)
"""Classes that are taken for sockets, by module and name, and what to pass instead."""

# As plain integers: arithmetic with enumerations takes a microsecond each time.
cdef int AF_UNIX = _socket.AF_UNIX
cdef int SOL_SOCKET = _socket.SOL_SOCKET
cdef object family_of = SocketType.family.__get__
cdef object type_of = SocketType.type.__get__
cdef object classes_of = type.__dict__["__mro__"].__get__
# The class of Python's sockets, once its module is loaded: the package itself needs only its base.
cdef object Socket = None


# ---- What is a socket ----------------------------------------------------------------------------

cdef bint is_python_socket(object sock):
    """Whether a socket is of Python's own class, or of a subclass."""
    return issubclass(type(sock), SocketType)


cdef bint is_plain(object sock):
    """Whether a socket is of Python's own class, so that sending runs no code of a subclass."""
    global Socket
    if Socket is None:
        found = getattr(imports.loaded("socket"), "socket", None)
        # Libraries put classes of their own there.
        if found is not None and issubclass(found, SocketType):
            Socket = found
    return type(sock) is Socket


cpdef int check_socket(str method, object sock) except -1:
    """Whether this is a socket that descriptors can go through.

    Errors:
        INVALID_ARGUMENT: it is none.
        OSError: its descriptor is closed.
    """
    cdef int family = family_of(sock) if is_python_socket(sock) else family_of_other(method, sock)
    if family != AF_UNIX:
        try:
            name = imports.loaded("socket").AddressFamily(family).name
        except (AttributeError, ValueError):
            name = family
        raise InvalidArgument(method, f"sock is of family {name}; only AF_UNIX carries descriptors")
    return 0


cdef int family_of_other(str method, object sock) except -1:
    """The family of what is not Python's own socket, by the kernel's word."""
    try:
        return number_option(sock, _socket.SO_DOMAIN)
    except AttributeError:
        cause = None
    except OSError as problem:
        # fileno() may raise one too: that of a file without a descriptor.
        if problem.errno == EBADF:
            raise
        cause = problem
    except Exception as problem:
        cause = problem
    raise InvalidArgument(
        method, f"sock is {describe(sock)}, not a socket{advice_for(sock)}") from cause


cdef str advice_for(object sock):
    """What to pass instead of an object that has a socket; empty for others."""
    for module, name, advice in ADVICE:
        if is_instance_of(sock, module, name):
            return advice
    return ""


cdef bint is_instance_of(object sock, str module, str name):
    """Whether an object is of a class that a library defines, if that is loaded."""
    kind = getattr(imports.loaded(module), name, None)
    for base in classes_of(type(sock)):
        if kind is base:
            return True
    return False


cpdef bint is_of_transport(object sock):
    """Whether a transport of an event loop reads and writes this socket meanwhile."""
    for module, name in OF_TRANSPORTS:
        if is_instance_of(sock, module, name):
            return True
    return False


cdef int fileno_of(object sock) except? -1:
    """The descriptor of a socket; -1 for a closed one."""
    return SocketType.fileno(sock) if is_python_socket(sock) else sock.fileno()


cdef object timeout_of(object sock):
    """Seconds that a socket waits: 0 where it does not block, None for ever."""
    cdef int flags
    if is_python_socket(sock):
        timeout = SocketType.gettimeout(sock)
    elif hasattr(sock, "gettimeout"):
        timeout = sock.gettimeout()
        return None if timeout is None else float(timeout)
    else:
        timeout = None
    if timeout is None:
        flags = kernel.fcntl(fileno_of(sock), F_GETFL, 0)
        if flags >= 0 and flags & O_NONBLOCK:
            return 0
    return timeout


cpdef bint blocks(object sock):
    """Whether sending and receiving can wait. What is no socket does not."""
    try:
        check_socket("blocks", sock)
    except (InvalidArgument, OSError):
        return False
    return timeout_of(sock) != 0


cpdef bint is_datagram(object sock):
    """Whether messages are datagrams, among which an empty one is no end."""
    kind = type_of(sock) if is_python_socket(sock) else number_option(sock, _socket.SO_TYPE)
    return kind == _socket.SOCK_DGRAM


cdef object own_method(object sock, str name):
    """The method of a socket by which it waits in its own way; None where there is none.

    Attributes of the object alone, by which libraries pass on calls to a socket that they hold, do
    not wait. Coroutines need an event loop.
    """
    method = getattr(type(sock), name, None)
    if method is None or not is_python_socket(sock) and (
            getattr(getattr(method, "__code__", None), "co_flags", 0) & CO_COROUTINE
            or timeout_of(sock) == 0):
        return None
    return getattr(sock, name)


@cython.final
cdef class Duplicate:
    """A socket that only this package has: a duplicate, which waits as long as the given one."""

    cdef Descriptor held
    cdef object timeout
    cdef object given           # the socket that it is of, never used: it says how to wait

    __reduce__ = refuse_copies("each owns its descriptor")

    def __cinit__(self):
        self.held = Descriptor()

    def fileno(self):
        """The descriptor; raises OSError if it no longer is what it was."""
        return self.held.number

    def gettimeout(self):
        """Seconds that it waits, or None."""
        return self.timeout


cdef Duplicate duplicate_socket(str method, object sock):
    """A duplicate of a socket."""
    cdef Duplicate made = Duplicate()
    cdef int own
    made.timeout = timeout_of(sock)
    made.given = sock
    own = kernel.fcntl(fileno_of(sock), F_DUPFD_CLOEXEC, 0)
    if own == -EBADF:
        kernel.check(own)
    if own < 0:
        raise QuotaExceeded(method, "no descriptor is left; raise RLIMIT_NOFILE", -own)
    made.held.take(own)
    return made


cdef bytes option_of(object sock, int option, unsigned int size):
    """An option of a socket, at most ``size`` bytes."""
    cdef bytes value = PyBytes_FromStringAndSize(NULL, size)
    kernel.check(kernel.getsockopt(
        fileno_of(sock), SOL_SOCKET, option, PyBytes_AS_STRING(value), &size))
    return value[:size]


cdef int number_option(object sock, int option) except? -1:
    """An option of a socket that is a number."""
    return int.from_bytes(option_of(sock, option, sizeof(int)), sys.byteorder)


# ---- The other end -------------------------------------------------------------------------------


def peer_of(sock):
    """The process, user and group that made the other end; None where that is not reported.

    The user, and the group, is None where it is unknown.
    """
    credentials = credentials_of(sock)
    if credentials is None:
        return None
    pid, uid, gid = credentials
    return pid, known_uid(uid), known_gid(gid)


cdef tuple credentials_of(object sock):
    """The same as the kernel reports them, with its placeholders."""
    try:
        credentials = option_of(sock, _socket.SO_PEERCRED, CREDENTIALS.size)
    except OSError:
        return None
    pid, uid, gid = CREDENTIALS.unpack(credentials)
    return None if uid == NO_USER else (pid, uid, gid)


cdef int check_peer(object sock, object peer_uid) except -1:
    """Whether the other end was connected by this user."""
    credentials = credentials_of(sock)
    if credentials is None:
        raise SecurityDisallow(
            "recv_handle", "the socket does not tell who is at the other end; peer_uid needs that")
    uid = known_uid(credentials[1])
    if uid is None:
        raise SecurityDisallow(
            "recv_handle",
            "the user at the other end is unknown: this process's user namespace does not map all "
            "users (/proc/self/uid_map), and the kernel reports those that it does not by the "
            f"same number as one that it may; peer_uid is {peer_uid}")
    if uid != peer_uid:
        raise SecurityDisallow(
            "recv_handle", f"user {uid} is at the other end; peer_uid is {peer_uid}")
    return 0


# ---- Options that add control data ---------------------------------------------------------------

cdef object room_for(object sock, int descriptors):
    """Bytes of control data for so many descriptors, and what the socket's options add to them."""
    room = _socket.CMSG_LEN(descriptors * sizeof(int))
    for _, size in companions_of(sock):
        room += _socket.CMSG_SPACE(size)
    return room


cdef list companions_of(object sock):
    """The options of a socket that add control data, by name, and how many bytes they add."""
    cdef list found = []
    for name, groups, size in COMPANIONS:
        for group in groups:
            if not any_set(sock, group):
                break
        else:
            found.append((name, size))
    if any_set(sock, (SO_PASSSEC,)):
        try:
            label = option_of(sock, SO_PEERSEC, LONGEST_LABEL)
        except OSError:     # no security module gives labels, and none comes
            label = b""
        if label:
            found.append(("SO_PASSSEC", len(label)))
    return found


cdef bint any_set(object sock, tuple options) except? True:
    """Whether one of these options of a socket is on."""
    for option in options:
        if is_set(sock, option):
            return True
    return False


cdef bint is_set(object sock, object option) except? True:
    """Whether an option of a socket is on; one that this kernel does not know is not."""
    try:
        return number_option(sock, option) != 0
    except OSError as problem:
        if problem.errno != ENOPROTOOPT:
            raise
        return False


# ---- Waiting -------------------------------------------------------------------------------------

cdef int wait_until_ready(object sock, bint to_send, double *deadline) except -1:
    """Wait, as long as the socket does, until it takes or has something.

    Python's own ``sendmsg`` waits with the numbers of descriptors in hand, which may name other
    files afterwards; here they are looked at when there is room.

    Args:
        sock: a socket.
        to_send: whether to wait for room, or for a message.
        deadline: of all waiting for this message, UNKNOWN at first.

    Errors:
        TimeoutError, BlockingIOError: as of ``socket.sendmsg``.
    """
    cdef object timeout = timeout_of(sock)
    cdef int fd = fileno_of(sock)
    if timeout == 0:
        kernel.check(-EAGAIN)
    if deadline[0] == UNKNOWN:
        deadline[0] = time.monotonic() + (
            kernel_timeout(sock, to_send) if timeout is None else timeout)
    while True:
        left = deadline[0] - time.monotonic()
        if is_ready(sock, fd, to_send, min(max(left, 0), LONGEST_WAIT)):
            return 0
        if left <= 0 and timeout is None:
            kernel.check(-EAGAIN)
        elif left <= 0:
            raise TimeoutError("timed out")


cdef bint is_ready(object sock, int fd, bint to_send, double seconds) except? True:
    """Whether a descriptor takes or has something within that time.

    A socket of gevent's or eventlet's lets other greenlets run meanwhile.
    """
    given = (<Duplicate>sock).given if type(sock) is Duplicate else sock
    try:
        if is_instance_of(given, "gevent.socket", "socket"):
            library = imports.loaded("gevent.socket")
            wait = library.wait_write if to_send else library.wait_read
            wait(fd, seconds, TimeoutError())
            return True
        if is_instance_of(given, "eventlet.greenio.base", "GreenSocket"):
            imports.loaded("eventlet.hubs").trampoline(
                fd, read=not to_send, write=to_send, timeout=seconds, timeout_exc=TimeoutError)
            return True
    except TimeoutError:
        return False
    if not hasattr(select, "poll"):     # eventlet removes it, and replaces select
        waiting = [fd]
        return any(select.select(
            [] if to_send else waiting, waiting if to_send else [], [], seconds))
    poll = select.poll()
    poll.register(fd, select.POLLOUT if to_send else select.POLLIN)
    return bool(poll.poll(seconds * 1e3))


cdef object kernel_timeout(object sock, bint to_send):
    """Seconds that the kernel lets a sender, or a receiver, on a blocking socket wait."""
    seconds, micro = TIMEVAL.unpack(option_of(
        sock, _socket.SO_SNDTIMEO if to_send else _socket.SO_RCVTIMEO, TIMEVAL.size))
    return seconds + micro / 1e6 or float("inf")
