"""Messages with descriptors in their control data, over any socket."""

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


# ---- Receiving -----------------------------------------------------------------------------------

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
    recvmsg = sock.recvmsg if is_plain(sock) else own_method(sock, "recvmsg")
    if recvmsg is None:
        return read_directly(sock, length, room, received)
    message, ancillary, flags, _ = recvmsg(length, room, CLOEXEC)
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


cdef tuple read_directly(object sock, size_t length, size_t room, Received received):
    """The same from the descriptor, which waits here."""
    cdef bytes message = PyBytes_FromStringAndSize(NULL, length)
    cdef int descriptors[PARCEL_DESCRIPTORS]
    cdef double deadline = UNKNOWN
    cdef Py_ssize_t came
    cdef int i, count, flags
    while True:
        came = kernel.receive_at_once(
            fileno_of(sock), PyBytes_AS_STRING(message), length, room, descriptors, &count, &flags)
        if came >= 0:
            break
        if came != -EAGAIN:
            kernel.check(<int>came)
        wait_until_ready(sock, False, &deadline)
    for i in range(count):
        received.parcel.files[i].fd = descriptors[i]
    received.parcel.count = count
    return message[:came], received, flags & FLAWS


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


def cut_off(str method, sock, str what):
    """The exception for descriptors that did not fit: by what took their room, and what to do.

    Asked while those that came are open, so that a limit that is reached still is.
    """
    cdef int own = kernel.fcntl(fileno_of(sock), F_DUPFD_CLOEXEC, 0)
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


# ---- Sending -------------------------------------------------------------------------------------

cdef object own_sendmsg(object sock):
    """What sends by code of a subclass or another library; None where the kernel does alone."""
    return None if is_plain(sock) else own_method(sock, "sendmsg")


def send_descriptor(sock, bytes data, Descriptor held):
    """Send one descriptor with data in one message, without SIGPIPE: the bytes sent.

    Errors:
        OSError (EBADF): the program closed it, or put another file under its number.
        Others as of ``socket.sendmsg``.
    """
    cdef double deadline = UNKNOWN
    cdef int number = held.number
    cdef Py_ssize_t sent
    sendmsg = own_sendmsg(sock)
    if sendmsg is not None:
        return sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, struct.pack("i", number))], NOSIGNAL)
    while True:
        sent = kernel.send_at_once(
            fileno_of(sock), PyBytes_AS_STRING(data), len(data), &number, 1)
        if sent >= 0:
            return sent
        if sent != -EAGAIN:
            kernel.check(<int>sent)
        wait_until_ready(sock, True, &deadline)
        number = held.number
