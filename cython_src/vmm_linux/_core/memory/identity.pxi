"""Identities: how every process recognizes a clone, or a buffer in segments.

An identity is a memfd of its own, whose number from the kernel is the buffer's security id. It
names the memory that it belongs to: the files, by the kernel's names for them, and the part. It is
sealed against every change, so a receiver can only pass it on. A receiver compares it with the
memory that came with it. So no process can give its own memory the security id of another's: a
file's name is the kernel's, with a random number in it, and the identity with the security id
never changes.

The contents, in the machine's own byte order: the text ``VMMLINK1``; the offset in the first file,
the size, the bytes of each file but the last, the number of files, 8 bytes each; then of each file
its inode number and its name from name_to_handle_at(2), 8 bytes each. The name is 0 where a
sandbox hides it; then the inode number alone decides, which the kernel may use again once the
memory is gone.
"""

cdef enum:
    MOST_SEGMENTS = 1 << 20     # that an identity can name

cdef const char *MAGIC = b"VMMLINK1"

cdef struct IdentityHead:
    char magic[8]
    uint64_t offset, size, segment_size, count

cdef struct FileName:
    uint64_t inode
    uint64_t handle             # 0: hidden

cdef enum:
    NAMES_AT_ONCE = 64
    OTHER = 1                   # this is not the identity of that memory


cdef const OpenFile *file_of(const Window *window, size_t number) noexcept nogil:
    """One of the files of a window."""
    return <const OpenFile *>(<const char *>window.files + number * window.stride)


cdef int name_of(const OpenFile *file, FileName *name) noexcept nogil:
    """The kernel's names for a file: 0 or -errno."""
    cdef int fd = open_file_number(file)
    if fd < 0:
        return fd
    name.inode = file.inode
    name.handle = 0
    # A shortage during the probe must not give another name.
    if kernel.lacks(kernel.FEATURE_FILE_HANDLES):
        return 0
    return kernel.file_handle(fd, &name.handle)


cdef bint is_same_file(const FileName *one, const FileName *other) noexcept nogil:
    """Whether two names are one file's."""
    return one.inode == other.inode and (
        one.handle == other.handle or one.handle == 0 or other.handle == 0)


cdef int identity_new(const Window *window) noexcept nogil:
    """An identity of a part of a memory: a descriptor or -errno.

    It is made together with its object: made later, on both sides of a fork, there would be two.
    """
    cdef int result = kernel.check_headroom(sizeof(IdentityHead) + window.count * sizeof(FileName))
    cdef int fd
    if result < 0:
        return result
    fd = kernel.memfd_create(b"vmm_linux identity", creation_flags(False))
    if fd < 0:
        return fd
    result = write_identity(fd, window)
    if result == 0:
        result = kernel.fcntl(
            fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)
    if result < 0:
        kernel.close(fd)
        return result
    return fd


cdef int write_identity(int fd, const Window *window) noexcept nogil:
    """Write the contents of an identity: 0 or -errno."""
    cdef IdentityHead head
    cdef FileName names[NAMES_AT_ONCE]
    cdef size_t named = 0, some, i
    cdef int result
    memcpy(head.magic, MAGIC, sizeof(head.magic))
    head.offset = window.offset
    head.size = window.size
    head.segment_size = window.segment_size
    head.count = window.count
    result = write_whole(fd, &head, sizeof(IdentityHead), 0)
    while result == 0 and named < window.count:
        some = min(window.count - named, <size_t>NAMES_AT_ONCE)
        for i in range(some):
            result = name_of(file_of(window, named + i), names + i)
            if result < 0:
                return result
        result = write_whole(
            fd, names, some * sizeof(FileName), sizeof(IdentityHead) + named * sizeof(FileName))
        named += some
    return result


cdef int write_whole(int fd, const void *data, size_t size, uint64_t offset) noexcept nogil:
    """Write bytes into a fresh memfd: 0 or -errno."""
    cdef size_t done = 0
    cdef Py_ssize_t written
    while done < size:
        written = kernel.pwrite(fd, <const char *>data + done, size - done, offset + done)
        if written < 0:
            return <int>written
        done += written
    return 0


cdef int read_head(int fd, IdentityHead *head) noexcept nogil:
    """Read the head of an identity: 0, OTHER where the file is none, or -errno."""
    cdef FileStatus status
    cdef Py_ssize_t read
    cdef int result = kernel.fstat(fd, &status)
    if result < 0:
        return result
    read = kernel.pread(fd, head, sizeof(IdentityHead), 0)
    if read < 0:
        return <int>read
    if (read != sizeof(IdentityHead) or memcmp(head.magic, MAGIC, sizeof(head.magic)) != 0
            or not 0 < head.count <= <uint64_t>MOST_SEGMENTS
            or <uint64_t>status.st_size != sizeof(IdentityHead) + head.count * sizeof(FileName)):
        return OTHER
    return 0


cdef int read_names(int fd, uint64_t first, uint64_t left, FileName *names) noexcept nogil:
    """Read the next names of an identity that has ``left``: 0, OTHER if it has fewer, or -errno."""
    cdef size_t size = min(left, <uint64_t>NAMES_AT_ONCE) * sizeof(FileName)
    cdef Py_ssize_t read = kernel.pread(
        fd, names, size, sizeof(IdentityHead) + first * sizeof(FileName))
    if read < 0:
        return <int>read
    return 0 if <size_t>read == size else OTHER


cdef int compare_names(int fd, uint64_t first, const Window *window) noexcept nogil:
    """Whether an identity names the files of a window from its ``first`` on: 0, OTHER, -errno."""
    cdef FileName named[NAMES_AT_ONCE]
    cdef FileName name
    cdef size_t at
    cdef int result
    for at in range(window.count):
        if at % NAMES_AT_ONCE == 0:
            result = read_names(fd, first + at, window.count - at, named)
            if result != 0:
                return result
        result = name_of(file_of(window, at), &name)
        if result < 0:
            return result
        if not is_same_file(named + at % NAMES_AT_ONCE, &name):
            return OTHER
    return 0


cdef int identity_is_of(int fd, const Window *window) noexcept nogil:
    """Whether a sealed identity is exactly this part's: 0, OTHER, or -errno."""
    cdef IdentityHead head
    cdef int result = read_head(fd, &head)
    if result != 0:
        return result
    if head.count != window.count or head.offset != window.offset or head.size != window.size:
        return OTHER
    return compare_names(fd, 0, window)


cdef int identity_includes(int fd, const Window *window) noexcept nogil:
    """Whether a sealed identity is of a part that includes this one: 0, OTHER, or -errno."""
    cdef IdentityHead head
    cdef uint64_t first = 0, start
    cdef int result = read_head(fd, &head)
    if result == 0:
        result = find_first(fd, &head, window, &first)
    if result != 0:
        return result
    if head.count - first < window.count:
        return OTHER
    # Numbers from another process: they are only multiplied once they are known to fit.
    if first != 0 and head.segment_size > (<uint64_t>-1 - window.offset) // first:
        return OTHER
    start = first * head.segment_size + window.offset
    if (start < head.offset or window.size > head.size
            or start - head.offset > head.size - window.size):
        return OTHER
    return compare_names(fd, first, window)


cdef int find_first(int fd, const IdentityHead *head, const Window *window,
                    uint64_t *first) noexcept nogil:
    """Find where an identity names the first file of a window: 0, OTHER if nowhere, or -errno."""
    cdef FileName named[NAMES_AT_ONCE]
    cdef FileName name
    cdef uint64_t at
    cdef int result = name_of(window.files, &name)
    if result < 0:
        return result
    for at in range(head.count):
        if at % NAMES_AT_ONCE == 0:
            result = read_names(fd, at, head.count - at, named)
            if result != 0:
                return result
        if is_same_file(named + at % NAMES_AT_ONCE, &name):
            first[0] = at
            return 0
    return OTHER
