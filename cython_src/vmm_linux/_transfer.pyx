"""Handles on their way between processes: one message format, one sender, one distrustful receiver.

The message, little-endian, 48 bytes, with its descriptors in one SCM_RIGHTS control message:

=========== ====== ==================================================================
bytes       type   what
=========== ====== ==================================================================
0 to 3      text   ``VMML``
4 to 5      uint16 version of this format: 3
6 to 7      uint16 number of segments: memory files that the buffer lies in
8 to 9      uint16 number of identities: 0 to 2
10 to 11    uint16 0
12 to 15    uint32 ``Rights`` of the handle
16 to 23    uint64 where in the first segment the buffer begins, in bytes
24 to 31    uint64 size of the buffer in bytes
32 to 39    uint64 size of each segment but the last, which may be shorter, in bytes
40 to 47    uint64 size of all segments in bytes
=========== ====== ==================================================================

The descriptors are the identities, then the segments, at most 253 together. All are memfds; an
identity (see ``_identity.pyx``) is sealed for good. A buffer that is all of one memory file is
known by that and has none. Any other has one of its own: a buffer of several segments, and a clone,
which is any window. A clone's origin has the second, if it is not that memory file itself. The
buffer touches every segment that comes with it. Security ids are not in the message: the receiver
asks the kernel, and compares each identity with the memory that came.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EAGAIN, EBADF, EIO
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy

from vmm_linux cimport _syscalls
from vmm_linux._features cimport PAGE_SIZE
from vmm_linux._identity cimport Window, identity_includes, identity_is_of
from vmm_linux._mdl cimport PARCEL_DESCRIPTORS, Parcel
from vmm_linux._open_file cimport Descriptor, OpenFile, open_file_note, open_file_number
from vmm_linux._syscalls cimport (
    F_DUPFD_CLOEXEC,
    F_GET_SEALS,
    F_GETFL,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    O_ACCMODE,
    O_NONBLOCK,
    O_RDONLY,
    O_RDWR,
    FileStatus,
)
from vmm_linux._vocabulary cimport (
    RIGHT_ALL,
    RIGHT_COPY,
    RIGHT_GET_SID,
    RIGHT_MAP_READ,
    RIGHT_MAP_WRITE,
    RIGHT_TRANSFER,
    SEAL_FREEZE,
    SEAL_PUBLISH,
    is_multiple,
)

import errno
import math
import os
import select
import socket
import struct
import time

from vmm_linux._core.credentials import known_gid, known_uid
from vmm_linux._core.values import describe, is_a
from vmm_linux.errors import (
    RETCODES,
    Fail,
    InvalidArgument,
    InvalidOperation,
    QuotaExceeded,
    Retcode,
    SecurityDisallow,
    error,
    refuse_copies,
)
from vmm_linux.flags import Seal

cdef extern from "<endian.h>" nogil:
    uint16_t htole16(uint16_t)
    uint32_t htole32(uint32_t)
    uint64_t htole64(uint64_t)
    uint16_t le16toh(uint16_t)
    uint32_t le32toh(uint32_t)
    uint64_t le64toh(uint64_t)

cdef struct Message:
    char magic[4]
    uint16_t version
    uint16_t segments
    uint16_t identities
    uint16_t zero
    uint32_t rights
    uint64_t offset
    uint64_t size
    uint64_t segment_size
    uint64_t memory_size

cdef enum:
    FORMAT_VERSION = 3
    MOST_IDENTITIES = 2
    UNKNOWN = -1                # of a deadline
    TMPFS_MAGIC = 0x01021994    # of memfds; those of huge pages, whose touch can kill, have another
    SEALS_OF_MEMORY = F_SEAL_SHRINK | F_SEAL_GROW
    SEALS_OF_IDENTITY = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL
    # What whoever has a descriptor of a memory can do anyway.
    RIGHTS_OF_DESCRIPTOR = RIGHT_TRANSFER | RIGHT_COPY | RIGHT_GET_SID | RIGHT_MAP_READ

cdef const char *MAGIC_TEXT = b"VMML"

MAGIC = MAGIC_TEXT
VERSION = FORMAT_VERSION
MESSAGE_SIZE = sizeof(Message)
MOST_FD = 2**31 - 1
CREDENTIALS = struct.Struct("iII")
NOBODY_KNOWN = 0xFFFFFFFF
"""The user at the other end of a socket that was never connected to one end alone."""
SO_PASSPIDFD = 76
SO_PASSSEC = 34
SO_PEERSEC = 31
SO_TIMESTAMPING = 37
TIMESTAMP = struct.Struct("2q")
TIMESTAMP_OPTIONS = (29, 35, 63, 64)  # SO_TIMESTAMP, SO_TIMESTAMPNS, and the same with _NEW
COMPANIONS = (
    ("SO_PASSCRED", ((socket.SO_PASSCRED,),), CREDENTIALS.size),
    ("SO_PASSPIDFD", ((SO_PASSPIDFD,),), struct.calcsize("i")),
    ("SO_TIMESTAMP", (TIMESTAMP_OPTIONS,), TIMESTAMP.size),
    ("SO_TIMESTAMPING", (TIMESTAMP_OPTIONS, (SO_TIMESTAMPING,)), 3 * TIMESTAMP.size),
)
"""What a socket's options have the kernel add to the control data of a message.

The name of the option, the options of which one in each group must be on, and the size in bytes.
Beside them there are SO_PASSSEC, whose security label is of any length, and SO_INQ (Linux 6.17),
which comes last, and of which the kernel does not tell whether it is on.
"""
LONGEST_LABEL = 1024
"""Bytes of a security label that are looked at."""
MOST_LABEL = 4096
INQ = struct.calcsize("i")
TIMEVAL = struct.Struct("2l")
LONGEST_POLL = 86_400_000
"""Milliseconds of one poll(2), which knows no more than 24 days; longer waits take several."""

# As plain integers: arithmetic with enumerations takes a microsecond each time.
cdef int AF_UNIX = socket.AF_UNIX
cdef int SOL_SOCKET = socket.SOL_SOCKET
cdef int SCM_RIGHTS = socket.SCM_RIGHTS
cdef int SCM_PIDFD = 4
cdef int FLAWS = socket.MSG_TRUNC | socket.MSG_CTRUNC
cdef int FLAW_OF_BYTES = socket.MSG_TRUNC
cdef int FLAW_OF_DESCRIPTORS = socket.MSG_CTRUNC
cdef object CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)
cdef object NOSIGNAL = int(socket.MSG_NOSIGNAL)
# Bytes of control data for the longest message. No room lets more descriptors in than the kernel
# takes, so nobody has to be asked which options the socket has.
cdef object ROOM = socket.CMSG_LEN(PARCEL_DESCRIPTORS * sizeof(int)) + sum(
    socket.CMSG_SPACE(size) for _, _, size in COMPANIONS) + (
    socket.CMSG_SPACE(MOST_LABEL) + socket.CMSG_SPACE(INQ))
cdef object Socket = socket.socket
cdef object family_of = socket.SocketType.family.__get__
cdef dict FAMILIES = {int(family): family.name for family in socket.AddressFamily}

# Makes the exception that says why a descriptor is refused.
ctypedef object (*Refusal)(str why)


# ---- Sockets -------------------------------------------------------------------------------------

cpdef int check_socket(str method, object sock) except -1:
    """Whether this is a socket that descriptors can go through."""
    if not is_a(sock, Socket):
        raise InvalidArgument(method, f"sock is {describe(sock)}, not a socket")
    family = family_of(sock)
    if family != AF_UNIX:
        name = FAMILIES.get(family, family)
        raise InvalidArgument(
            method, f"sock is of family {name}; only AF_UNIX carries descriptors")
    return 0


def duplicate(str method, sock, Descriptor held):
    """A plain socket on a descriptor of its own, which waits as long as the given one does.

    ``held``, which has none yet, tells of that descriptor from then on whether it is still ours.
    """
    cdef int own = _syscalls.fcntl(socket.SocketType.fileno(sock), F_DUPFD_CLOEXEC, 0)
    if own == -EBADF:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    if own < 0:
        raise QuotaExceeded(method, "no descriptor is left; raise RLIMIT_NOFILE", -own)
    held.take(own)
    try:
        plain = socket.socket(AF_UNIX, socket.SocketType.type.__get__(sock), 0, own)
    except BaseException:
        held.close()
        raise
    timeout = socket.SocketType.gettimeout(sock)
    if plain.gettimeout() != timeout:
        plain.settimeout(timeout)
    return plain


def peer_of(sock):
    """The process, user and group that made the other end; None where the kernel does not tell.

    The user, and the group, is None where it may be anybody.
    """
    credentials = credentials_of(sock)
    if credentials is None:
        return None
    pid, uid, gid = credentials
    return pid, known_uid(uid), known_gid(gid)


cdef tuple credentials_of(object sock):
    """The same as the kernel reports them, with its placeholders."""
    try:
        credentials = socket.SocketType.getsockopt(
            sock, SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    except OSError:
        return None
    pid, uid, gid = CREDENTIALS.unpack(credentials)
    return None if uid == NOBODY_KNOWN else (pid, uid, gid)


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

    __reduce__ = refuse_copies("each owns its descriptors; take them")

    def __cinit__(self):
        self.parcel.count = 0

    def __dealloc__(self):
        # They came just now, and nobody has noted yet what they name.
        while self.parcel.count > 0:
            self.parcel.count -= 1
            _syscalls.close(self.parcel.files[self.parcel.count].fd)

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
    socket's options add to it, and no more.
    """
    cdef Received received = Received()
    cdef int flaws
    room = ROOM if most_descriptors == PARCEL_DESCRIPTORS else room_for(sock, most_descriptors)
    message, ancillary, flags, _ = sock.recvmsg(length, room, CLOEXEC)
    # Python closes what came where it finds no memory to tell of it. From here on, nothing takes
    # memory before ``received`` has every descriptor.
    flaws = 0
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS:
            if not received.add(data):
                flaws = FLAW_OF_DESCRIPTORS
        elif level == SOL_SOCKET and kind == SCM_PIDFD:
            # Nobody asked for the sender's pidfd. A negative number says there is none.
            close_all(data, 0)
    return message, received, flags & FLAWS | flaws


cdef int close_all(bytes data, size_t first) except -1:
    """Close what came in control data and is not wanted: the descriptors from one on."""
    cdef size_t i
    for i in range(first, len(data) // sizeof(int)):
        _syscalls.close(descriptor_in(data, i))
    return 0


cdef object made_descriptor(int fd):
    """A new descriptor for Python, closed if no memory is left for its number; or ``-errno``."""
    cdef bint is_told = False
    cdef object number
    try:
        number = fd
        is_told = True
        return number
    finally:
        if not is_told:
            _syscalls.close(fd)


cdef object room_for(object sock, int descriptors):
    """Bytes of control data for so many descriptors, and what the socket's options add to them."""
    room = socket.CMSG_LEN(descriptors * sizeof(int))
    for _, size in companions_of(sock):
        room += socket.CMSG_SPACE(size)
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
    cdef int own = _syscalls.fcntl(socket.SocketType.fileno(sock), F_DUPFD_CLOEXEC, 0)
    cdef list names
    if own < 0:
        return QuotaExceeded(method, f"{what}; raise RLIMIT_NOFILE (ulimit -n) or close some", -own)
    _syscalls.close(own)
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
        if problem.errno != errno.ENOPROTOOPT:
            raise
        return False


# ---- The sender ----------------------------------------------------------------------------------

cdef bint is_plain(object sock):
    """Whether a socket is of Python's own class, and does nothing else than that when it sends."""
    return type(sock) is Socket


cdef void write_message(const Parcel *parcel, Message *message, int *descriptors) noexcept nogil:
    """A parcel as it is sent."""
    cdef int i
    for i in range(parcel.count):
        descriptors[i] = parcel.files[i].fd
    memcpy(message.magic, MAGIC_TEXT, sizeof(message.magic))
    message.version = htole16(FORMAT_VERSION)
    message.segments = htole16(<uint16_t>parcel.segments)
    message.identities = htole16(<uint16_t>(parcel.count - parcel.segments))
    message.zero = 0
    message.rights = htole32(parcel.rights)
    message.offset = htole64(parcel.offset)
    message.size = htole64(parcel.size)
    message.segment_size = htole64(parcel.segment_size)
    message.memory_size = htole64(parcel.memory_size)


cdef int send_at_once(int sock, const Parcel *parcel) noexcept nogil:
    """Send a parcel if the socket takes it now: 0 or -errno.

    A socket tells some errors once: what is returned here is for the caller.
    """
    cdef Message message
    cdef int descriptors[PARCEL_DESCRIPTORS]
    cdef Py_ssize_t sent
    write_message(parcel, &message, descriptors)
    sent = _syscalls.send_at_once(sock, &message, sizeof(Message), descriptors, parcel.count)
    return <int>sent if sent < 0 else 0 if sent == sizeof(Message) else -EIO


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
    cdef int flags = _syscalls.fcntl(fd, F_GETFL, 0)
    cdef object timeout = sock.gettimeout()
    if timeout == 0 or timeout is None and flags >= 0 and flags & O_NONBLOCK:
        raise refusal(-EAGAIN)
    late = refusal(-EAGAIN) if timeout is None else TimeoutError("timed out")
    if deadline[0] == UNKNOWN:
        deadline[0] = time.monotonic() + (kernel_timeout(sock) if timeout is None else timeout)
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    while True:
        left = deadline[0] - time.monotonic()
        if poll.poll(min(max(left, 0) * 1e3, LONGEST_POLL)):
            return 0
        if left <= 0:
            raise late


cdef object kernel_timeout(object sock):
    """Seconds that the kernel lets a sender on a blocking socket wait."""
    seconds, micro = TIMEVAL.unpack(
        sock.getsockopt(SOL_SOCKET, socket.SO_SNDTIMEO, TIMEVAL.size))
    return seconds + micro / 1e6 or math.inf


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
        sent = _syscalls.send_at_once(
            sock.fileno(), PyBytes_AS_STRING(data), len(data), &number, 1)
        if sent >= 0:
            return sent
        if sent != -EAGAIN:
            raise refusal(<int>sent)
        wait_for_room(sock, &deadline)
        number = held.number


cdef object refusal(int result):
    """The exception of ``socket.sendmsg`` for a -errno."""
    return OSError(-result, os.strerror(-result))


cdef int check_files(const Parcel *parcel) except -1:
    """Whether the descriptors of a parcel still are its own, after others went on."""
    cdef int result, i
    for i in range(parcel.count):
        result = open_file_number(&parcel.files[i])
        if result < 0:
            raise error(
                RETCODES.get(-result, Retcode.FAIL), "send_handle",
                "the program closed a descriptor that waited for room in the socket, or put "
                "another file under its number (os.closerange, os.dup2); nothing was sent", -result)
    return 0


cdef int send(object sock, const Parcel *parcel) except -1:
    """Send a parcel in one message, without SIGPIPE. The descriptors stay the caller's."""
    cdef Message message
    cdef int descriptors[PARCEL_DESCRIPTORS]
    cdef Py_ssize_t sent
    cdef double deadline = UNKNOWN
    cdef int result = -EAGAIN
    check_files(parcel)
    if is_plain(sock):
        while True:
            result = send_at_once(sock.fileno(), parcel)
            if result != -EAGAIN:
                return told(result)
            wait_for_room(sock, &deadline)
            check_files(parcel)
    write_message(parcel, &message, descriptors)
    sent = sock.sendmsg(
        [PyBytes_FromStringAndSize(<char *>&message, sizeof(Message))],
        [(SOL_SOCKET, SCM_RIGHTS, PyBytes_FromStringAndSize(
            <char *>descriptors, parcel.count * sizeof(int)))], NOSIGNAL)
    if sent != sizeof(Message):
        raise Fail("send_handle", f"{sent} of {sizeof(Message)} bytes were sent; close the socket")
    return 0


cdef int told(int result) except -1:
    """Raise what ``send_at_once`` returned, if that is an error."""
    if result < 0:
        raise refusal(result)
    return 0


# ---- The receiver --------------------------------------------------------------------------------

@cython.final
cdef class Demands:
    """What the receiver of a buffer asks of it."""

    __reduce__ = refuse_copies("each belongs to one call")

    cdef int check(self, int seals, uint64_t size) except -1:
        """Whether memory with these F_SEAL_* bits, and a buffer of this size, is fine."""
        cdef bint frozen = seals & F_SEAL_WRITE != 0
        cdef bint published = frozen or seals & F_SEAL_FUTURE_WRITE != 0
        if (self.require & SEAL_FREEZE and not frozen
                or self.require & SEAL_PUBLISH and not published):
            raise SecurityDisallow(
                self.method, f"the memory is not sealed with {Seal(self.require)!r}")
        if self.max_size is not None and size > self.max_size:
            raise SecurityDisallow(
                self.method, f"a buffer of {size} bytes; max_size is {self.max_size}")
        return 0


cdef object bad(str why):
    """The exception for a message that is none of ``send``'s."""
    return InvalidArgument("recv_handle", f"bad message: {why}")


cdef object unfit(str why):
    """The exception for a descriptor that is no buffer's."""
    return InvalidArgument(
        "handle_from_fd", f"{why}; handle_fileno of a buffer gives what is needed")


cdef Received receive(object sock, Demands demands, object peer_uid):
    """Receive one parcel, and believe only what the kernel says of it."""
    cdef Received received
    message, received, flags = read_message(sock, sizeof(Message), PARCEL_DESCRIPTORS)
    if not (message or len(received) or flags) and sock.type != socket.SOCK_DGRAM:
        raise EOFError("recv_handle: the other end is closed")
    if peer_uid is not None:
        check_peer(sock, peer_uid)
    read_head(sock, message, flags, &received.parcel)
    examine_parcel(&received.parcel, demands)
    return received


cdef int read_head(object sock, bytes message, int flags, Parcel *parcel) except -1:
    """What a message says, if it is one of ``send``'s and all that it announces came with it."""
    cdef Message head
    cdef int came = parcel.count
    cdef int segments, identities, count
    if len(message) != sizeof(Message) or flags & FLAW_OF_BYTES:
        raise bad(f"{len(message)} bytes, not the {sizeof(Message)} of a handle's message")
    memcpy(&head, PyBytes_AS_STRING(message), sizeof(Message))
    if memcmp(head.magic, MAGIC_TEXT, sizeof(head.magic)) != 0 or head.zero != 0:
        raise bad("not a handle's message")
    if le16toh(head.version) != FORMAT_VERSION:
        raise bad(
            f"version {le16toh(head.version)} of the format; this package knows {FORMAT_VERSION}")
    segments = le16toh(head.segments)
    identities = le16toh(head.identities)
    count = segments + identities
    if flags & FLAW_OF_DESCRIPTORS and came < min(count, <int>PARCEL_DESCRIPTORS):
        raise cut_off("recv_handle", sock, f"{count} descriptors came and {came} fitted")
    if flags & FLAW_OF_DESCRIPTORS or count != came or count > PARCEL_DESCRIPTORS:
        raise bad(f"{count} descriptors are announced, and {came} or more came")
    if segments == 0 or not (segments > 1) <= identities <= <int>MOST_IDENTITIES:
        raise bad(f"{segments} segments with {identities} identities")
    if le32toh(head.rights) & ~<uint32_t>RIGHT_ALL:
        raise bad(f"unknown rights {le32toh(head.rights):#x}")
    parcel.segments = segments
    parcel.rights = le32toh(head.rights)
    parcel.offset = le64toh(head.offset)
    parcel.size = le64toh(head.size)
    parcel.segment_size = le64toh(head.segment_size)
    parcel.memory_size = le64toh(head.memory_size)
    return 0


cdef int examine_parcel(Parcel *parcel, Demands demands) except -1:
    """Check a parcel against the kernel's word and the caller's demands."""
    cdef int identities = parcel.count - parcel.segments
    cdef int seals, i
    for i in range(identities):
        seals_of(parcel.files[i].fd, SEALS_OF_IDENTITY, bad)
        size_of(&parcel.files[i])
    seals = examine_memory(parcel)
    check_window(parcel, identities > (parcel.segments > 1))
    check_identities(parcel, identities)
    return demands.check(seals, parcel.size)


cdef int check_identities(const Parcel *parcel, int identities) except -1:
    """Whether the first identity is just this buffer's, and the second one of what it is a part of.

    Otherwise somebody gives memory of his own the security id of another buffer.
    """
    cdef Window window
    cdef int i
    cdef int result = 0
    window.files = parcel.files + identities
    window.stride = sizeof(OpenFile)
    window.count = parcel.segments
    window.offset = parcel.offset
    window.size = parcel.size
    window.segment_size = parcel.segment_size
    for i in range(identities):
        if i == 0:
            result = identity_is_of(parcel.files[i].fd, &window)
        else:
            result = identity_includes(parcel.files[i].fd, &window)
        if result < 0:
            raise error(
                RETCODES.get(-result, Retcode.FAIL), "recv_handle",
                "the kernel does not tell what an identity is of", -result)
        if result != 0:
            raise bad("an identity of other memory")
    return 0


cdef int examine_memory(Parcel *parcel) except -1:
    """Whether the segments are what the message says, each another one.

    Returns:
        The F_SEAL_* bits that all of them have; F_SEAL_WRITE counts as F_SEAL_FUTURE_WRITE too.
    """
    cdef int common = SEALS_OF_MEMORY | F_SEAL_WRITE | F_SEAL_FUTURE_WRITE
    cdef uint64_t left = parcel.memory_size
    cdef uint64_t size
    cdef int seals, i
    for i in range(parcel.count - parcel.segments, parcel.count):
        seals = examine(&parcel.files[i], parcel.rights, &size, bad)
        if size != min(left, parcel.segment_size):
            raise bad(f"a segment of {size} bytes, which is not the size that is announced")
        left -= size
        common &= seals | (F_SEAL_FUTURE_WRITE if seals & F_SEAL_WRITE else 0)
    if left:
        raise bad(f"{left} bytes of memory are announced that did not come")
    if parcel.segments > 1:
        check_different(parcel)
    return common


cdef int check_different(const Parcel *parcel) except -1:
    """Whether no memory file comes twice."""
    cdef set seen = set()
    cdef int i
    for i in range(parcel.count - parcel.segments, parcel.count):
        seen.add(parcel.files[i].inode)
    if len(seen) < parcel.segments:
        raise bad("the same memory twice")
    return 0


cdef int examine(OpenFile *file, uint32_t rights, uint64_t *size, Refusal refuse) except -1:
    """Whether a descriptor is the memory of a buffer, open for just what the rights say.

    Returns:
        The memory's F_SEAL_* bits; ``size`` is set to its bytes.
    """
    cdef int seals = seals_of(file.fd, SEALS_OF_MEMORY, refuse)
    cdef int mode = _syscalls.fcntl(file.fd, F_GETFL, 0) & O_ACCMODE
    cdef int expected = O_RDWR if rights & RIGHT_MAP_WRITE else O_RDONLY
    if mode != expected:
        raise refuse(f"the memory's descriptor has access mode {mode}, the rights need {expected}")
    size[0] = size_of(file)
    if size[0] == 0 or not is_multiple(size[0], PAGE_SIZE):
        raise refuse(f"memory of {size[0]} bytes, not whole pages")
    return seals


cdef int64_t size_of(OpenFile *file) except -1:
    """The size of a file in bytes. Which file it is, is noted."""
    cdef FileStatus status
    cdef int result = open_file_note(file, &status)
    if result < 0:
        raise error(RETCODES.get(-result, Retcode.FAIL), "recv_handle", "fstat", -result)
    return status.st_size


cdef int seals_of(int fd, int needed, Refusal refuse) except -1:
    """The seals of a descriptor, which is a memfd of ordinary pages with the ``needed`` ones.

    Only files in memory have seals. Any other file is asked for nothing else: a file system in
    user space, or on the network, can let who asks wait for ever.
    """
    cdef int seals = _syscalls.fcntl(fd, F_GET_SEALS, 0)
    if seals < 0:
        raise refuse("a descriptor that is no memfd")
    if _syscalls.filesystem_type(fd) != TMPFS_MAGIC:
        raise refuse("a descriptor that is no memfd of ordinary pages")
    if needed & ~seals:
        raise refuse(f"a memfd with seals {seals:#x}; {needed:#x} are needed")
    return seals


cdef int check_window(const Parcel *parcel, bint is_clone) except -1:
    """Whether a buffer lies in its memory and needs all its segments.

    A clone lies in whole pages of it; any other buffer is all of it.
    """
    cdef uint64_t offset = parcel.offset
    cdef uint64_t size = parcel.size
    cdef uint64_t memory_size = parcel.memory_size
    if size == 0 or not is_multiple(size | offset, PAGE_SIZE):
        raise bad(f"a buffer of {size} bytes at offset {offset}, not whole pages")
    if offset > memory_size or size > memory_size - offset:
        raise bad(f"{size} bytes at offset {offset} of a memory of {memory_size} bytes")
    if not is_clone and size != memory_size:
        raise bad(f"a buffer of {size} bytes that is no clone, of a memory of {memory_size} bytes")
    # The segments were counted and measured, so that no product of theirs is beyond their memory.
    if (parcel.segment_size > memory_size or offset >= parcel.segment_size
            or offset + size <= (parcel.segments - 1) * parcel.segment_size):
        raise bad(f"{size} bytes at offset {offset} do not touch every segment")
    return 0


# ---- Descriptors that somebody left to this process ----------------------------------------------

cdef int adopt(uint64_t fd, Demands demands, Parcel *parcel) except -1:
    """A parcel, which is the caller's, of a descriptor, which this process keeps.

    A duplicate is looked at, so that what was checked is what is used.
    """
    cdef int own
    if fd > <uint64_t>MOST_FD:
        raise InvalidArgument(demands.method, f"fd {fd} is no descriptor")
    own = _syscalls.fcntl(<int>fd, F_DUPFD_CLOEXEC, 0)
    if own == -EBADF:
        raise InvalidArgument(demands.method, f"fd {fd} is not open in this process")
    if own < 0:
        raise QuotaExceeded(
            demands.method, "no descriptor is left; raise RLIMIT_NOFILE or close some", -own)
    parcel.files[0].fd = own
    parcel.count = parcel.segments = 1
    try:
        return examine_adopted(parcel, demands)
    except BaseException:
        _syscalls.close(own)
        raise


cdef int examine_adopted(Parcel *parcel, Demands demands) except -1:
    """Whether a descriptor can be a buffer's: the rights are what it is open for."""
    cdef int fd = parcel.files[0].fd
    cdef int seals
    # First whether it is a memfd: any other file is asked nothing else.
    seals_of(fd, SEALS_OF_MEMORY, unfit)
    parcel.rights = RIGHTS_OF_DESCRIPTOR
    if _syscalls.fcntl(fd, F_GETFL, 0) & O_ACCMODE == O_RDWR:
        parcel.rights |= RIGHT_MAP_WRITE
    seals = examine(&parcel.files[0], parcel.rights, &parcel.size, unfit)
    parcel.offset = 0
    parcel.segment_size = parcel.memory_size = parcel.size
    return demands.check(seals, parcel.size)
