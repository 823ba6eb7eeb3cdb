"""Handles on their way between processes: one message format, one sender, one distrustful receiver.

The message, little-endian, 48 bytes, with its descriptors in one SCM_RIGHTS control message:

=========== ====== ==================================================================
bytes       type   what
=========== ====== ==================================================================
0 to 3      text   ``VMML``
4 to 5      uint16 version of this format: 2
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
identity is an empty one, sealed for good. A buffer that is all of one memory file is known by that
and has none. Any other has one of its own: a buffer of several segments, and a clone, which is any
window. A clone's origin has the second, if it is not that memory file itself. The buffer touches
every segment that comes with it. Security ids are not in the message: the receiver asks the kernel.
"""

import array
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from vmm_linux import _syscalls
from vmm_linux.errors import (
    RETCODES,
    Fail,
    InvalidArgument,
    QuotaExceeded,
    Retcode,
    SecurityDisallow,
    VmmError,
    error,
)
from vmm_linux.flags import Rights, Seal

__all__ = [
    "Demands",
    "Parcel",
    "adopt",
    "check_socket",
    "duplicate",
    "examine",
    "peer_of",
    "read_message",
    "receive",
    "send",
]

MESSAGE: Final = struct.Struct("<4sHHHHIQQQQ")
MAGIC: Final = b"VMML"
VERSION: Final = 2
MOST_DESCRIPTORS: Final = 253
"""SCM_MAX_FD: the kernel takes no more in a message."""
MOST_IDENTITIES: Final = 2
MOST_FD: Final = 2**31 - 1
TMPFS_MAGIC: Final = 0x01021994
"""File system of memfds. Those of huge pages, whose touch can kill, have another."""
SEALS_OF_MEMORY: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
SEALS_OF_IDENTITY: Final = SEALS_OF_MEMORY | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE: Final = 0x10
CREDENTIALS: Final = struct.Struct("iII")
NOBODY_KNOWN: Final = 0xFFFFFFFF
"""The user at the other end of a socket that was never connected to one end alone."""
SO_PASSPIDFD: Final = 76
SCM_PIDFD: Final = 4
TIMESTAMP: Final = struct.Struct("2q")
COMPANIONS: Final = (
    (socket.SO_PASSCRED, CREDENTIALS.size),
    (SO_PASSPIDFD, struct.calcsize("i")),
    (29, TIMESTAMP.size),  # SO_TIMESTAMP
    (35, TIMESTAMP.size),  # SO_TIMESTAMPNS
)
"""The socket options that have the kernel add control data of its own, and its size in bytes."""
ROOM: Final = socket.CMSG_LEN(MOST_DESCRIPTORS * array.array("i").itemsize) + sum(
    socket.CMSG_SPACE(size) for _, size in COMPANIONS
)
"""Bytes of control data for the longest message. No room lets more descriptors in than the kernel
takes, so nobody has to be asked which options the socket has."""
PAGE: Final = _syscalls.page_size()

# As plain integers: arithmetic with enumerations takes a microsecond each time, and the properties
# of Python's sockets make enumerations.
ALL_RIGHTS: Final = int(~Rights(0))
MAP_WRITE: Final = int(Rights.MAP_WRITE)
FROM_DESCRIPTOR: Final = int(Rights.TRANSFER | Rights.COPY | Rights.GET_SID | Rights.MAP_READ)
"""What whoever has a descriptor of a memory can do anyway."""
PUBLISH: Final = int(Seal.PUBLISH)
FREEZE: Final = int(Seal.FREEZE)
AF_UNIX: Final = int(socket.AF_UNIX)
SOL_SOCKET: Final = int(socket.SOL_SOCKET)
SCM_RIGHTS: Final = int(socket.SCM_RIGHTS)
MSG_TRUNC: Final = int(socket.MSG_TRUNC)
MSG_CTRUNC: Final = int(socket.MSG_CTRUNC)
MSG_CMSG_CLOEXEC: Final = int(socket.MSG_CMSG_CLOEXEC)
MSG_NOSIGNAL: Final = int(socket.MSG_NOSIGNAL)
family_of = socket.SocketType.family.__get__


class Parcel(NamedTuple):
    """A handle between two processes. Whoever has it owns its descriptors."""

    descriptors: Sequence[int]
    segments: int
    rights: int
    offset: int
    size: int
    segment_size: int
    memory_size: int


class Demands(NamedTuple):
    """What the receiver of a buffer asks of it."""

    method: str
    require: int
    max_size: int | None

    def check(self, seals: int, size: int) -> None:
        """Whether memory with these F_SEAL_* bits, and a buffer of this size, is fine."""
        if self.require and not holds(self.require, seals):
            raise SecurityDisallow(
                self.method, f"the memory is not sealed with {Seal(self.require)!r}"
            )
        if self.max_size is not None and size > self.max_size:
            raise SecurityDisallow(
                self.method, f"a buffer of {size} bytes; max_size is {self.max_size}"
            )


def check_socket(method: str, sock: object) -> None:
    """Whether this is a socket that descriptors can go through."""
    if not isinstance(sock, socket.socket):
        raise InvalidArgument(method, f"sock is a {type(sock).__name__}, not a socket")
    if family_of(sock) != AF_UNIX:
        raise InvalidArgument(
            method, f"sock is of family {sock.family!r}; only AF_UNIX carries descriptors"
        )


def duplicate(method: str, sock: socket.socket) -> socket.socket:
    """A plain socket on a descriptor of its own, which waits as long as the given one does."""
    own = _syscalls.fcntl(socket.SocketType.fileno(sock), fcntl.F_DUPFD_CLOEXEC, 0)
    if own == -errno.EBADF:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    if own < 0:
        raise QuotaExceeded(method, "no descriptor is left; raise RLIMIT_NOFILE", -own)
    try:
        plain = socket.socket(AF_UNIX, socket.SocketType.type.__get__(sock), 0, own)
    except BaseException:
        os.close(own)
        raise
    timeout = socket.SocketType.gettimeout(sock)
    if plain.gettimeout() != timeout:
        plain.settimeout(timeout)
    return plain


def peer_of(sock: socket.socket) -> tuple[int, int, int] | None:
    """The process, user and group that made the other end; None where the kernel does not tell."""
    try:
        credentials = socket.SocketType.getsockopt(
            sock, SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size
        )
    except OSError:
        return None
    pid, uid, gid = CREDENTIALS.unpack(credentials)
    return None if uid == NOBODY_KNOWN else (pid, uid, gid)


def send(sock: socket.socket, parcel: Parcel) -> None:
    """Send a parcel in one message, without SIGPIPE. The descriptors stay the caller's."""
    message = MESSAGE.pack(
        MAGIC,
        VERSION,
        parcel.segments,
        len(parcel.descriptors) - parcel.segments,
        0,
        parcel.rights,
        parcel.offset,
        parcel.size,
        parcel.segment_size,
        parcel.memory_size,
    )
    rights = (SOL_SOCKET, SCM_RIGHTS, array.array("i", parcel.descriptors))
    sent = sock.sendmsg([message], [rights], MSG_NOSIGNAL)
    if sent != len(message):
        raise Fail("send_handle", f"{sent} of {len(message)} bytes were sent; close the socket")


def receive(sock: socket.socket, demands: Demands, peer_uid: int | None) -> Parcel:
    """Receive one parcel, and believe only what the kernel says of it."""
    message, descriptors, flags = read_message(sock)
    if not (message or descriptors or flags) and sock.type != socket.SOCK_DGRAM:
        raise EOFError("recv_handle: the other end is closed")
    try:
        if peer_uid is not None:
            check_peer(sock, peer_uid)
        return open_parcel(message, descriptors, flags, demands)
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def read_message(
    sock: socket.socket, length: int = MESSAGE.size, most_descriptors: int = MOST_DESCRIPTORS
) -> tuple[bytes, list[int], int]:
    """One message: its bytes, its descriptors, and the flags that ``recvmsg`` returns.

    There is room for as many bytes and descriptors as the longest message has, for what the
    socket's options add to it, and no more.
    """
    room = ROOM if most_descriptors == MOST_DESCRIPTORS else room_for(sock, most_descriptors)
    message, ancillary, flags, _ = sock.recvmsg(length, room, MSG_CMSG_CLOEXEC)
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        elif (level, kind) == (SOL_SOCKET, SCM_PIDFD):
            # Nobody asked this call for the sender's pidfd. A negative number says there is none.
            _syscalls.close(*struct.unpack("i", data))
    return message, list(descriptors), flags & (MSG_TRUNC | MSG_CTRUNC)


def room_for(sock: socket.socket, descriptors: int) -> int:
    """Bytes of control data for so many descriptors, and what the socket's options add to them."""
    room = socket.CMSG_LEN(descriptors * array.array("i").itemsize)
    return room + sum(
        socket.CMSG_SPACE(size) for option, size in COMPANIONS if is_set(sock, option)
    )


def is_set(sock: socket.socket, option: int) -> bool:
    """Whether an option of a socket is on; one that this kernel does not know is not."""
    try:
        return sock.getsockopt(SOL_SOCKET, option) != 0
    except OSError as problem:
        if problem.errno != errno.ENOPROTOOPT:
            raise
        return False


def open_parcel(message: bytes, descriptors: list[int], flags: int, demands: Demands) -> Parcel:
    """Check a message with its descriptors against the kernel's word and the caller's demands."""
    parcel = read_head(message, descriptors, flags)
    identities = len(descriptors) - parcel.segments
    for descriptor in descriptors[:identities]:
        examine_identity(descriptor)
    seals = examine_memory(parcel)
    check_window(parcel, is_clone=identities > (parcel.segments > 1))
    demands.check(seals, parcel.size)
    return parcel


def read_head(message: bytes, descriptors: list[int], flags: int) -> Parcel:
    """What a message says, if it is one of ``send``'s and all that it announces came with it."""
    if len(message) != MESSAGE.size or flags & MSG_TRUNC:
        raise bad(f"{len(message)} bytes, not the {MESSAGE.size} of a handle's message")
    magic, version, segments, identities, zero, rights, *sizes = MESSAGE.unpack(message)
    if magic != MAGIC or zero != 0:
        raise bad("not a handle's message")
    if version != VERSION:
        raise bad(f"version {version} of the format; this package knows {VERSION}")
    count = segments + identities
    if flags & MSG_CTRUNC and len(descriptors) < min(count, MOST_DESCRIPTORS):
        raise QuotaExceeded(
            "recv_handle",
            f"{count} descriptors came and {len(descriptors)} fitted; raise RLIMIT_NOFILE "
            "(ulimit -n) or close some",
        )
    if flags & MSG_CTRUNC or count != len(descriptors) or count > MOST_DESCRIPTORS:
        raise bad(f"{count} descriptors are announced, and {len(descriptors)} or more came")
    if segments == 0 or not (segments > 1) <= identities <= MOST_IDENTITIES:
        raise bad(f"{segments} segments with {identities} identities")
    if rights & ~ALL_RIGHTS:
        raise bad(f"unknown rights {rights:#x}")
    return Parcel(descriptors, segments, rights, *sizes)


def adopt(fd: int, demands: Demands) -> Parcel:
    """A parcel of a descriptor that somebody left to this process, which keeps it.

    A duplicate is looked at, so that what was checked is what is used.
    """
    if fd > MOST_FD:
        raise InvalidArgument(demands.method, f"fd {fd} is no descriptor")
    own = _syscalls.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
    if own == -errno.EBADF:
        raise InvalidArgument(demands.method, f"fd {fd} is not open in this process")
    if own < 0:
        raise QuotaExceeded(
            demands.method, "no descriptor is left; raise RLIMIT_NOFILE or close some", -own
        )
    try:
        return examine_adopted(own, demands)
    except BaseException:
        os.close(own)
        raise


def examine_adopted(fd: int, demands: Demands) -> Parcel:
    """The parcel of a descriptor that can be a buffer's: the rights are what it is open for."""

    def refuse(why: str) -> VmmError:
        return InvalidArgument(
            demands.method, f"{why}; handle_fileno of a buffer gives what is needed"
        )

    # First whether it is a memfd: any other file is asked nothing else.
    seals_of(fd, SEALS_OF_MEMORY, refuse)
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    rights = FROM_DESCRIPTOR | (MAP_WRITE if mode == os.O_RDWR else 0)
    size, seals = examine(fd, rights, refuse)
    demands.check(seals, size)
    return Parcel([fd], 1, rights, 0, size, size, size)


def bad(why: str) -> VmmError:
    """The exception for a message that is none of ``send``'s."""
    return InvalidArgument("recv_handle", f"bad message: {why}")


def examine(fd: int, rights: int, refuse: Callable[[str], VmmError]) -> tuple[int, int]:
    """Whether a descriptor is the memory of a buffer, open for just what the rights say.

    Returns:
        The memory's size in bytes, and its F_SEAL_* bits.
    """
    seals = seals_of(fd, SEALS_OF_MEMORY, refuse)
    mode = _syscalls.fcntl(fd, fcntl.F_GETFL, 0) & os.O_ACCMODE
    expected = os.O_RDWR if rights & MAP_WRITE else os.O_RDONLY
    if mode != expected:
        raise refuse(f"the memory's descriptor has access mode {mode}, the rights need {expected}")
    size = size_of(fd)
    if size == 0 or size % PAGE:
        raise refuse(f"memory of {size} bytes, not whole pages")
    return size, seals


def examine_memory(parcel: Parcel) -> int:
    """Whether the segments are what the message says, each another one.

    Returns:
        The F_SEAL_* bits that all of them have; F_SEAL_WRITE counts as F_SEAL_FUTURE_WRITE too.
    """
    segments = parcel.descriptors[-parcel.segments :]
    common = ~0
    left = parcel.memory_size
    for segment in segments:
        size, seals = examine(segment, parcel.rights, bad)
        if size != min(left, parcel.segment_size):
            raise bad(f"a segment of {size} bytes, which is not the size that is announced")
        left -= size
        common &= seals | (F_SEAL_FUTURE_WRITE if seals & fcntl.F_SEAL_WRITE else 0)
    if left:
        raise bad(f"{left} bytes of memory are announced that did not come")
    if len(segments) > 1 and len({os.fstat(segment).st_ino for segment in segments}) < len(
        segments
    ):
        raise bad("the same memory twice")
    return common


def size_of(fd: int) -> int:
    """The size of a file in bytes."""
    size = _syscalls.file_size(fd)
    if size < 0:
        raise error(RETCODES.get(-size, Retcode.FAIL), "recv_handle", "fstat", -size)
    return size


def examine_identity(fd: int) -> None:
    """Whether a descriptor can be a clone's identity."""
    seals_of(fd, SEALS_OF_IDENTITY, bad)
    if size_of(fd) != 0:
        raise bad("an identity that is not empty")


def seals_of(fd: int, needed: int, refuse: Callable[[str], VmmError]) -> int:
    """The seals of a descriptor, which is a memfd of ordinary pages with the ``needed`` ones.

    Only files in memory have seals. Any other file is asked for nothing else: a file system in
    user space, or on the network, can let who asks wait for ever.
    """
    seals = _syscalls.fcntl(fd, fcntl.F_GET_SEALS, 0)
    if seals < 0:
        raise refuse("a descriptor that is no memfd")
    if _syscalls.filesystem_type(fd) != TMPFS_MAGIC:
        raise refuse("a descriptor that is no memfd of ordinary pages")
    if needed & ~seals:
        raise refuse(f"a memfd with seals {seals:#x}; {needed:#x} are needed")
    return seals


def check_window(parcel: Parcel, *, is_clone: bool) -> None:
    """Whether a buffer lies in its memory and needs all its segments.

    A clone lies in whole pages of it; any other buffer is all of it.
    """
    offset, size, segment_size, memory_size = parcel[3:]
    if size == 0 or size % PAGE or offset % PAGE:
        raise bad(f"a buffer of {size} bytes at offset {offset}, not whole pages")
    if offset > memory_size or size > memory_size - offset:
        raise bad(f"{size} bytes at offset {offset} of a memory of {memory_size} bytes")
    if not is_clone and size != memory_size:
        raise bad(f"a buffer of {size} bytes that is no clone, of a memory of {memory_size} bytes")
    last = (parcel.segments - 1) * segment_size
    if segment_size > memory_size or offset >= segment_size or offset + size <= last:
        raise bad(f"{size} bytes at offset {offset} do not touch every segment")


def holds(require: int, seals: int) -> bool:
    """Whether the F_SEAL_* bits are what the receiver demands."""
    frozen = bool(seals & fcntl.F_SEAL_WRITE)
    published = frozen or bool(seals & F_SEAL_FUTURE_WRITE)
    return (frozen or not require & FREEZE) and (published or not require & PUBLISH)


def check_peer(sock: socket.socket, peer_uid: int) -> None:
    """Whether the other end was connected by this user."""
    peer = peer_of(sock)
    if peer is None:
        raise SecurityDisallow(
            "recv_handle", "the socket does not tell who is at the other end; peer_uid needs that"
        )
    uid = peer[1]
    if uid != peer_uid:
        raise SecurityDisallow(
            "recv_handle", f"user {uid} is at the other end; peer_uid is {peer_uid}"
        )
