"""AF_UNIX sockets: what is at the other end, descriptors in control data, waiting to send."""

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
LONGEST_POLL = 86_400_000
"""Milliseconds of one poll(2), which knows no more than 24 days; longer waits take several."""

# As plain integers: arithmetic with enumerations takes a microsecond each time.
cdef int AF_UNIX = _socket.AF_UNIX
cdef int SOL_SOCKET = _socket.SOL_SOCKET
cdef int SCM_RIGHTS = _socket.SCM_RIGHTS
cdef int SCM_PIDFD = 4
cdef int FLAWS = _socket.MSG_TRUNC | _socket.MSG_CTRUNC
cdef int FLAW_OF_BYTES = _socket.MSG_TRUNC
cdef int FLAW_OF_DESCRIPTORS = _socket.MSG_CTRUNC
cdef object CLOEXEC = int(_socket.MSG_CMSG_CLOEXEC)
cdef object NOSIGNAL = int(_socket.MSG_NOSIGNAL)
# Bytes of control data for the longest message. No room lets more descriptors in than the kernel
# takes, so the socket's options need not be read.
cdef object ROOM = _socket.CMSG_LEN(PARCEL_DESCRIPTORS * sizeof(int)) + sum(
    _socket.CMSG_SPACE(size) for _, _, size in COMPANIONS) + (
    _socket.CMSG_SPACE(MOST_LABEL) + _socket.CMSG_SPACE(INQ))
cdef object family_of = SocketType.family.__get__
# The class of Python's sockets, once its module is loaded: the package itself needs only its base.
cdef object Socket = None


cdef object python_socket():
    """``socket.socket``; None where the module is not loaded, so that there is no such object."""
    global Socket
    if Socket is None:
        Socket = getattr(imports.loaded("socket"), "socket", None)
    return Socket


cpdef int check_socket(str method, object sock) except -1:
    """Whether this is a socket that descriptors can go through."""
    if python_socket() is None or not is_a(sock, Socket):
        raise InvalidArgument(method, f"sock is {describe(sock)}, not a socket")
    family = family_of(sock)
    if family != AF_UNIX:
        try:
            name = imports.loaded("socket").AddressFamily(family).name
        except ValueError:
            name = family
        raise InvalidArgument(method, f"sock is of family {name}; only AF_UNIX carries descriptors")
    return 0


cdef object duplicate_socket(str method, object sock, Descriptor held):
    """A plain socket on a descriptor of its own, which waits as long as the given one does.

    ``held``, which has none yet, owns that descriptor, and says whether it is still open.
    """
    cdef int own = kernel.fcntl(SocketType.fileno(sock), F_DUPFD_CLOEXEC, 0)
    if own == -EBADF:
        kernel.check(own)
    if own < 0:
        raise QuotaExceeded(method, "no descriptor is left; raise RLIMIT_NOFILE", -own)
    held.take(own)
    try:
        plain = python_socket()(AF_UNIX, SocketType.type.__get__(sock), 0, own)
    except BaseException:
        held.close()
        raise
    timeout = SocketType.gettimeout(sock)
    if plain.gettimeout() != timeout:
        plain.settimeout(timeout)
    return plain


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
        credentials = SocketType.getsockopt(sock, SOL_SOCKET, _socket.SO_PEERCRED, CREDENTIALS.size)
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


@cython.no_gc
@cython.final
cdef class Received:
    """The descriptors of one message, as ``read_message`` takes them. Closes those it still has."""

    cdef Parcel parcel

    __reduce__ = refuse_copies("each owns its descriptors; take them")

    def __cinit__(self):
        self.parcel.count = 0

    def __dealloc__(self):
        # They came just now: what they name is not noted yet.
        while self.parcel.count > 0:
            self.parcel.count -= 1
            kernel.close(self.parcel.files[self.parcel.count].fd)

    def __len__(self):
        return self.parcel.count

    def take(self):
        """The last descriptor, which is the caller's: a ``Descriptor``."""
        cdef Descriptor made = Descriptor()
        if self.parcel.count == 0:
            raise IndexError("no descriptor is left")
        self.parcel.count -= 1
        made.take(self.parcel.files[self.parcel.count].fd)
        return made

    cdef bint add(self, bytes data) except -1:
        """Take the descriptors of control data; false where there are more than a message has."""
        cdef int came = <int>(len(data) // sizeof(int))     # one cut off is none
        cdef int count = min(PARCEL_DESCRIPTORS - self.parcel.count, came)
        cdef int i
        for i in range(count):
            self.parcel.files[self.parcel.count + i].fd = descriptor_in(data, i)
        self.parcel.count += count
        close_all(data, count)
        return came <= count


cdef int descriptor_in(bytes data, size_t number) noexcept:
    """One of the descriptors that control data has."""
    cdef int fd
    memcpy(&fd, PyBytes_AS_STRING(data) + number * sizeof(int), sizeof(int))
    return fd


cpdef tuple read_message(object sock, size_t length, int most_descriptors):
    """One message: its bytes, its descriptors, and the flags that ``recvmsg`` returns.

    There is room for as many bytes and descriptors as the longest message has, for what the
    socket's options add to it, but for nothing else.
    """
    cdef Received received = Received()
    cdef int flaws
    room = ROOM if most_descriptors == PARCEL_DESCRIPTORS else room_for(sock, most_descriptors)
    message, ancillary, flags, _ = sock.recvmsg(length, room, CLOEXEC)
    # Python closes what came where it finds no memory for the result. From here on, nothing takes
    # memory before ``received`` has every descriptor.
    flaws = 0
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            if not received.add(data):
                flaws = FLAW_OF_DESCRIPTORS
        elif level == SOL_SOCKET and kind == SCM_PIDFD:
            # The sender's pidfd is not asked for. A negative number says there is none.
            close_all(data, 0)
    return message, received, flags & FLAWS | flaws


cdef int close_all(bytes data, size_t first) except -1:
    """Close what came in control data and is not wanted: the descriptors from one on."""
    cdef size_t i
    for i in range(first, len(data) // sizeof(int)):
        kernel.close(descriptor_in(data, i))
    return 0


cdef object made_descriptor(int fd):
    """A new descriptor for Python, closed if no memory is left for its number; or ``-errno``."""
    cdef bint is_made = False
    cdef object number
    try:
        number = fd
        is_made = True
        return number
    finally:
        if not is_made:
            kernel.close(fd)


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
            label = sock.getsockopt(SOL_SOCKET, SO_PEERSEC, LONGEST_LABEL)
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


def cut_off(str method, sock, str what):
    """The exception for descriptors that did not fit: by what took their room, and what to do.

    Asked while those that came are open, so that a limit that is reached still is.
    """
    cdef int own = kernel.fcntl(SocketType.fileno(sock), F_DUPFD_CLOEXEC, 0)
    cdef list names
    if own < 0:
        return QuotaExceeded(method, f"{what}; raise RLIMIT_NOFILE (ulimit -n) or close some", -own)
    kernel.close(own)
    names = [name for name, _ in companions_of(sock)]
    if names:
        return InvalidOperation(
            method, f"{what}: other control data took the room; switch off {', '.join(names)} of "
            "the socket")
    return QuotaExceeded(
        method, f"{what}: descriptors were short for a moment, or a security module let none in")


cdef bint is_set(object sock, object option) except? True:
    """Whether an option of a socket is on; one that this kernel does not know is not."""
    try:
        return sock.getsockopt(SOL_SOCKET, option) != 0
    except OSError as problem:
        if problem.errno != ENOPROTOOPT:
            raise
        return False


cdef bint is_plain(object sock):
    """Whether a socket is of Python's own class, so that sending runs no code of a subclass."""
    return type(sock) is Socket


cdef int wait_for_room(object sock, double *deadline) except -1:
    """Wait, as long as the socket does, until it takes something.

    Python's own ``sendmsg`` waits with the numbers of descriptors in hand, which may name other
    files afterwards; here they are looked at when there is room.

    Args:
        sock: a plain socket.
        deadline: of all waiting for this message, UNKNOWN at first.

    Errors:
        TimeoutError, BlockingIOError: as of ``socket.sendmsg``.
    """
    cdef int fd = sock.fileno()
    cdef int flags = kernel.fcntl(fd, F_GETFL, 0)
    cdef object timeout = sock.gettimeout()
    if timeout == 0 or timeout is None and flags >= 0 and flags & O_NONBLOCK:
        kernel.check(-EAGAIN)
    if deadline[0] == UNKNOWN:
        deadline[0] = time.monotonic() + (kernel_timeout(sock) if timeout is None else timeout)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while True:
        left = deadline[0] - time.monotonic()
        if poll.poll(min(max(left, 0) * 1e3, LONGEST_POLL)):
            return 0
        if left <= 0 and timeout is None:
            kernel.check(-EAGAIN)
        elif left <= 0:
            raise TimeoutError("timed out")


cdef object kernel_timeout(object sock):
    """Seconds that the kernel lets a sender on a blocking socket wait."""
    seconds, micro = TIMEVAL.unpack(sock.getsockopt(SOL_SOCKET, _socket.SO_SNDTIMEO, TIMEVAL.size))
    return seconds + micro / 1e6 or float("inf")


def send_descriptor(sock, bytes data, Descriptor held):
    """Send one descriptor with data in one message, without SIGPIPE: the bytes sent.

    Errors:
        OSError (EBADF): the program closed it, or put another file under its number.
        Others as of ``socket.sendmsg``.
    """
    cdef double deadline = UNKNOWN
    cdef int number = held.number
    cdef Py_ssize_t sent
    if not is_plain(sock):
        return sock.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, struct.pack("i", number))], NOSIGNAL)
    while True:
        sent = kernel.send_at_once(sock.fileno(), PyBytes_AS_STRING(data), len(data), &number, 1)
        if sent >= 0:
            return sent
        if sent != -EAGAIN:
            kernel.check(<int>sent)
        wait_for_room(sock, &deadline)
        number = held.number
