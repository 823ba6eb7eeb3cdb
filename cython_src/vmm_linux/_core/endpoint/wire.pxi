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
32 to 39    uint64 size of each segment but the last, which may be shorter: a page multiple
40 to 47    uint64 size of all segments in bytes
=========== ====== ==================================================================

The descriptors are the identities, then the segments, at most 253 together. All are memfds; an
identity (``memory/identity.pxi``) is sealed for good. A buffer that is all of one memory file is
known by that and has none. Any other has one of its own: a buffer of several segments, and a clone,
which is any window. A clone's origin has the second, if it is not that memory file itself. The
buffer touches every segment that comes with it. Security ids are not in the message: the receiver
asks the kernel, and compares each identity with the memory that came.
"""

cdef extern from "<endian.h>" nogil:
    uint16_t htole16(uint16_t)
    uint32_t htole32(uint32_t)
    uint64_t htole64(uint64_t)
    uint16_t le16toh(uint16_t)
    uint32_t le32toh(uint32_t)
    uint64_t le64toh(uint64_t)

cdef struct Message:
    char magic[4]
    uint16_t version, segments, identities, zero
    uint32_t rights
    uint64_t offset, size, segment_size, memory_size

cdef enum:
    FORMAT_VERSION = 3
    MOST_IDENTITIES = 2
    TMPFS_MAGIC = 0x01021994    # of memfds; those of huge pages, whose touch can kill, have another
    # A file that grows is no danger. One that shrinks kills whoever touches what it had.
    SEALS_OF_MEMORY = F_SEAL_SHRINK
    SEALS_OF_IDENTITY = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL
    # What the holder of a descriptor can do without this package.
    RIGHTS_OF_DESCRIPTOR = RIGHT_TRANSFER | RIGHT_COPY | RIGHT_GET_SID | RIGHT_MAP_READ

cdef const char *MAGIC_TEXT = b"VMML"

MAGIC = MAGIC_TEXT
VERSION = FORMAT_VERSION
MESSAGE_SIZE = sizeof(Message)
MOST_FD = 2**31 - 1
# Makes the exception that says why a descriptor is refused.
ctypedef object (*Refusal)(str why)


# ---- The sender ----------------------------------------------------------------------------------

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

    A socket reports some errors once: what is returned here is for the caller.
    """
    cdef Message message
    cdef int descriptors[PARCEL_DESCRIPTORS]
    cdef Py_ssize_t sent
    write_message(parcel, &message, descriptors)
    sent = kernel.send_at_once(sock, &message, sizeof(Message), descriptors, parcel.count)
    return <int>sent if sent < 0 else 0 if sent == sizeof(Message) else -EIO


cdef int check_files(const Parcel *parcel) except -1:
    """Whether the descriptors of a parcel still are its own, after others went on."""
    cdef int i
    for i in range(parcel.count):
        check_result(
            open_file_number(&parcel.files[i]), "send_handle",
            "the program closed a descriptor that waited for room in the socket, or put another "
            "file under its number (os.closerange, os.dup2); nothing was sent")
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
                kernel.check(result)
                return 0
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


# ---- The receiver --------------------------------------------------------------------------------

cdef int check_required(const Request *request, int seals, uint64_t size) except -1:
    """Whether a received buffer, with these F_SEAL_* bits, is as its request requires."""
    cdef bint frozen = seals & F_SEAL_WRITE != 0
    cdef bint published = frozen or seals & F_SEAL_FUTURE_WRITE != 0
    if request.seals & SEAL_FREEZE and not frozen or request.seals & SEAL_PUBLISH and not published:
        raise SecurityDisallow(
            name_of(request.method), f"the memory is not sealed with {Seal(request.seals)!r}")
    if size > request.size:
        raise SecurityDisallow(
            name_of(request.method), f"a buffer of {size} bytes; max_size is {request.size}")
    return 0


cdef object bad(str why):
    """The exception for a message that is none of ``send``'s."""
    return InvalidArgument("recv_handle", f"bad message: {why}")


cdef object unfit(str why):
    """The exception for a descriptor that is no buffer's."""
    return InvalidArgument(
        "handle_from_fd",
        f"{why}; Mdl.from_fd(fd, copy=True) copies what can be read of a file")


cdef Received receive(object sock, const Request *request, object peer_uid):
    """Receive one parcel, and believe only what the kernel says of it."""
    cdef Received received
    message, received, flags = read_message(sock, sizeof(Message), PARCEL_DESCRIPTORS)
    if not (message or len(received) or flags) and sock.type != _socket.SOCK_DGRAM:
        raise EOFError("recv_handle: the other end is closed")
    if peer_uid is not None:
        check_peer(sock, peer_uid)
    read_head(sock, message, flags, &received.parcel)
    examine_parcel(&received.parcel, request)
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
        announced = "1 descriptor is" if count == 1 else f"{count} descriptors are"
        raise bad(f"{announced} announced, and {came} or more came")
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


cdef int examine_parcel(Parcel *parcel, const Request *request) except -1:
    """Check a parcel against the kernel's word and the caller's request."""
    cdef int identities = parcel.count - parcel.segments
    cdef int seals, i
    for i in range(identities):
        seals_of(parcel.files[i].fd, SEALS_OF_IDENTITY, bad)
        size_of(&parcel.files[i])
    seals = examine_memory(parcel)
    check_window(parcel, identities > (parcel.segments > 1))
    check_identities(parcel, identities)
    return check_required(request, seals, parcel.size)


cdef int check_identities(const Parcel *parcel, int identities) except -1:
    """Whether the first identity is just this buffer's, and the second one of what it is a part of.

    Otherwise a sender could give its own memory the security id of another buffer.
    """
    cdef Window window
    cdef int i, result = 0
    window.files = parcel.files + identities
    window.stride = sizeof(OpenFile)
    window.count = parcel.segments
    window.offset = parcel.offset
    window.size = round_up(parcel.size, PAGE_SIZE)
    window.segment_size = parcel.segment_size
    for i in range(identities):
        if i == 0:
            result = identity_is_of(parcel.files[i].fd, &window)
        else:
            result = identity_includes(parcel.files[i].fd, &window)
        check_result(result, "recv_handle", "the kernel does not tell what an identity is of")
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
        if seals & F_SEAL_GROW == 0 and parcel.segments == 1:
            size = min(size, left)      # of another program's memory, which may have grown
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
    cdef int mode = kernel.fcntl(file.fd, F_GETFL, 0) & O_ACCMODE
    cdef int expected = O_RDWR if rights & RIGHT_MAP_WRITE else O_RDONLY
    if mode != expected:
        raise refuse(f"the memory's descriptor has access mode {mode}, the rights need {expected}")
    size[0] = size_of(file)
    if size[0] == 0:
        raise refuse("memory of 0 bytes")
    return seals


cdef int64_t size_of(OpenFile *file) except -1:
    """The size of a file in bytes. Which file it is, is noted."""
    cdef FileStatus status
    check_result(open_file_note(file, &status), "recv_handle", "fstat")
    return status.st_size


cdef int seals_of(int fd, int needed, Refusal refuse) except -1:
    """The seals of a descriptor, which is a memfd of ordinary pages with the ``needed`` ones.

    Only files in memory have seals. Any other file is asked for nothing else: a file system in
    user space, or on the network, can let this process wait for ever.
    """
    cdef int seals = kernel.fcntl(fd, F_GET_SEALS, 0)
    if seals < 0:
        raise refuse("a descriptor that is no memfd")
    if kernel.filesystem_type(fd) != TMPFS_MAGIC:
        raise refuse("a descriptor that is no memfd of ordinary pages")
    if needed == SEALS_OF_MEMORY and needed & ~seals:
        raise refuse(
            f"memory with seals {seals:#x}, not sealed against shrinking: its owner can cut it, "
            "and a process that touches what was cut ends with SIGBUS")
    if needed & ~seals:
        raise refuse(f"a memfd with seals {seals:#x}; {needed:#x} are needed")
    return seals


cdef int check_window(const Parcel *parcel, bint is_clone) except -1:
    """Whether a buffer lies in its memory and needs all its segments.

    A clone has whole pages of it, but for the end of the memory; any other buffer is all of it.
    """
    cdef uint64_t offset = parcel.offset
    cdef uint64_t size = parcel.size
    cdef uint64_t memory_size = parcel.memory_size
    if offset > memory_size or size > memory_size - offset:
        raise bad(f"{size} bytes at offset {offset} of a memory of {memory_size} bytes")
    if size == 0 or not is_multiple(offset, PAGE_SIZE) or not (
            is_multiple(size, PAGE_SIZE) or size == memory_size - offset):
        raise bad(f"a buffer of {size} bytes at offset {offset}, not whole pages")
    if not is_clone and size != memory_size:
        raise bad(f"a buffer of {size} bytes that is no clone, of a memory of {memory_size} bytes")
    # The segments were counted and measured, so that no product of theirs is beyond their memory.
    if (not is_multiple(parcel.segment_size, PAGE_SIZE) or offset >= parcel.segment_size
            or parcel.segment_size > <uint64_t>round_up(memory_size, PAGE_SIZE)
            or offset + size <= (parcel.segments - 1) * parcel.segment_size):
        raise bad(f"{size} bytes at offset {offset} do not touch every segment")
    return 0


# ---- Descriptors from elsewhere -----------------------------------------------------------------

cdef int adopt(uint64_t fd, const Request *request, Parcel *parcel) except -1:
    """A parcel, which is the caller's, of a descriptor, which this process keeps.

    A duplicate is looked at, so that what was checked is what is used.
    """
    cdef int own
    if fd > <uint64_t>MOST_FD:
        raise InvalidArgument(name_of(request.method), f"fd {fd} is no descriptor")
    own = kernel.fcntl(<int>fd, F_DUPFD_CLOEXEC, 0)
    if own == -EBADF:
        raise InvalidArgument(name_of(request.method), f"fd {fd} is not open in this process")
    if own < 0:
        raise QuotaExceeded(
            name_of(request.method), "no descriptor is left; raise RLIMIT_NOFILE or close some",
            -own)
    parcel.files[0].fd = own
    parcel.count = parcel.segments = 1
    try:
        return examine_adopted(parcel, request)
    except BaseException:
        kernel.close(own)
        raise


cdef int examine_adopted(Parcel *parcel, const Request *request) except -1:
    """Whether a descriptor can be a buffer's: the rights are what it is open for."""
    cdef int fd = parcel.files[0].fd
    cdef int seals
    # First whether it is a memfd: any other file is asked nothing else.
    seals_of(fd, SEALS_OF_MEMORY, unfit)
    parcel.rights = RIGHTS_OF_DESCRIPTOR
    if kernel.fcntl(fd, F_GETFL, 0) & O_ACCMODE == O_RDWR:
        parcel.rights |= RIGHT_MAP_WRITE
    seals = examine(&parcel.files[0], parcel.rights, &parcel.size, unfit)
    parcel.offset = 0
    parcel.memory_size = parcel.size
    parcel.segment_size = round_up(parcel.size, PAGE_SIZE)
    return check_required(request, seals, parcel.size)
