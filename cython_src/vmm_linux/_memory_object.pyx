"""Memory objects (see ``_memory_object.pxd``)."""

from libc.errno cimport EFAULT, EINTR, ENOMEM
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc

from vmm_linux cimport _features, _fork, _room, _syscalls
from vmm_linux._syscalls cimport (
    F_ADD_SEALS,
    F_GET_SEALS,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SEAL,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_EXEC,
    MFD_NOEXEC_SEAL,
    O_CLOEXEC,
    O_RDONLY,
)
from vmm_linux._vocabulary cimport SEAL_FREEZE, SEAL_PUBLISH

cdef enum:
    # A signal interrupts fallocate(2), which then undoes itself: in pieces it always gets on.
    FILL_AT_ONCE = 64 << 20
    # Of the memory: nobody opens it for writing, neither this package nor another user; its
    # owner can, by giving himself leave first.
    READ_ONLY_MODE = 0o444
    EXECUTABLE_MODE = 0o555
    # Of a clone's identity: it is empty for ever.
    IDENTITY_SEALS = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE


cdef unsigned int creation_flags(bint executable) noexcept nogil:
    """Flags of memfd_create(2) for a buffer that may or may not be executed as a file."""
    cdef unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    if _features.has(_features.FEATURE_MEMFD_NOEXEC_SEAL):
        flags |= MFD_EXEC if executable else MFD_NOEXEC_SEAL
    return flags


cdef uint32_t mode_for(bint executable) noexcept nogil:
    """Mode of the file, which cannot lose its x bits where its creation did not deny them."""
    return READ_ONLY_MODE if creation_flags(executable) & MFD_NOEXEC_SEAL else EXECUTABLE_MODE


cdef MemoryObject *object_around(int fd, uint64_t size, int *error) noexcept nogil:
    """A memory object that owns ``fd`` and has no reference yet; without memory it is closed."""
    cdef MemoryObject *self = NULL
    if fd < 0:
        error[0] = -fd
        return NULL
    self = <MemoryObject *>malloc(sizeof(MemoryObject))
    if self == NULL:
        error[0] = ENOMEM
        _syscalls.close(fd)
        return NULL
    self.root = self
    self.origin = NULL
    self.offset = 0
    self.size = size
    self.references = 0
    self.fd = fd
    self.read_only_fd = -1
    self.sid = 0
    self.generation = _fork.generation()
    self.children = _fork.children()
    return self


cdef MemoryObject *memory_object_new(uint64_t size, bint executable, int *error) noexcept nogil:
    """A memory object of holes with no reference yet, or NULL and the errno."""
    cdef MemoryObject *self = object_around(
        _syscalls.memfd_create(b"vmm_linux", creation_flags(executable)), size, error)
    cdef int result
    if self == NULL:
        return NULL
    # Where a sandbox forbids it, the seals and the descriptors' access modes still hold.
    _syscalls.fchmod(self.fd, mode_for(executable))
    result = _syscalls.ftruncate(self.fd, size)
    if result == 0:
        result = _syscalls.fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    if result < 0:
        error[0] = -result
        memory_object_release(self, 0)
        return NULL
    return self


cdef MemoryObject *memory_object_clone(MemoryObject *origin, uint64_t offset, uint64_t size,
                                       int *error) noexcept nogil:
    """A window on an object's memory with no reference yet, or NULL and the errno.

    Its identity is an empty memfd, made now: made later, on both sides of a fork, it would be two.
    """
    cdef int fd = _syscalls.memfd_create(b"vmm_linux clone", creation_flags(False))
    cdef int result
    cdef MemoryObject *self
    if fd >= 0:
        result = _syscalls.fcntl(fd, F_ADD_SEALS, IDENTITY_SEALS)
        if result < 0:
            _syscalls.close(fd)
            fd = result
    self = object_around(fd, size, error)
    if self != NULL:
        become_clone(self, origin, origin.offset + offset)
    return self


cdef MemoryObject *memory_object_adopt(int fd, bint writable, uint64_t size,
                                       int *error) noexcept nogil:
    """An object of another process's making, which owns ``fd``; NULL closes it."""
    cdef MemoryObject *self = object_around(fd, size, error)
    if self != NULL and not writable:
        self.read_only_fd = fd
    return self


cdef MemoryObject *memory_object_adopt_clone(MemoryObject *origin, int fd, uint64_t offset,
                                             uint64_t size, int *error) noexcept nogil:
    """A clone of another process's making, which owns its identity ``fd``; NULL closes it."""
    cdef MemoryObject *self = object_around(fd, size, error)
    if self != NULL:
        become_clone(self, origin, offset)
    return self


cdef void become_clone(MemoryObject *self, MemoryObject *origin, uint64_t offset) noexcept nogil:
    """Make a window of a fresh object, at ``offset`` of the origin's root."""
    self.root = origin.root
    self.origin = origin
    self.offset = offset
    memory_object_acquire(origin, 1)


cdef void memory_object_acquire(MemoryObject *self, int64_t references) noexcept nogil:
    """Refer to the object ``references`` times more."""
    self.references += references


cdef void memory_object_release(MemoryObject *self, int64_t references) noexcept nogil:
    """Let go of references; with the last one the descriptors are closed, here and nowhere else.

    A clone then lets go of its origin.
    """
    cdef MemoryObject *origin
    while self != NULL:
        self.references -= references
        if self.references > 0:
            return
        origin = self.origin
        if self.read_only_fd >= 0 and self.read_only_fd != self.fd:
            _syscalls.close(self.read_only_fd)
        _syscalls.close(self.fd)
        free(self)
        self = origin
        references = 1


cdef int memory_object_descriptor(MemoryObject *self, bint writable) noexcept nogil:
    """A descriptor of the memory, borrowed, or -errno.

    The read-only one is opened when first needed: descriptors are scarce.
    """
    cdef MemoryObject *root = self.root
    cdef char path[32]
    if writable:
        return root.fd
    if root.read_only_fd < 0:
        snprintf(path, sizeof(path), b"/proc/self/fd/%d", root.fd)
        root.read_only_fd = _syscalls.openat(path, O_RDONLY | O_CLOEXEC)
        if root.read_only_fd < 0:
            writable = root.read_only_fd
            root.read_only_fd = -1
            return writable
    return root.read_only_fd


cdef bint memory_object_is_described(const MemoryObject *self) noexcept nogil:
    """Whether the memory has a read-only descriptor already."""
    return self.root.read_only_fd >= 0


cdef void memory_object_undescribe(MemoryObject *self) noexcept nogil:
    """Close the read-only descriptor, which was opened for what then failed."""
    cdef MemoryObject *root = self.root
    if root.read_only_fd >= 0 and root.read_only_fd != root.fd:
        _syscalls.close(root.read_only_fd)
        root.read_only_fd = -1


cdef int memory_object_sid(MemoryObject *self, uint64_t *sid) noexcept nogil:
    """The kernel's identity of the object, the same in every process: 0 or -errno.

    The file's generation, a random number, with its inode number; where a sandbox hides it the
    inode number alone, which the kernel may give again once the object is gone.
    """
    cdef uint64_t device, high
    cdef int result = 0
    if self.sid == 0:
        # A shortage while the kernel is asked what it offers must not give another identity.
        if _features.lacks(_features.FEATURE_FILE_HANDLES):
            result = _syscalls.identity(self.fd, &device, &self.sid)
        else:
            result = _syscalls.file_handle(self.fd, &self.sid, &high)
    sid[0] = self.sid
    return result


cdef int memory_object_seal(MemoryObject *self, uint32_t seals) noexcept nogil:
    """Seal the memory, for every window on it: 0 or -errno."""
    cdef int wanted = 0
    if seals & SEAL_PUBLISH:
        wanted |= F_SEAL_FUTURE_WRITE
    if seals & SEAL_FREEZE:
        wanted |= F_SEAL_WRITE
    return min(0, _syscalls.fcntl(self.root.fd, F_ADD_SEALS, wanted))


cdef int memory_object_seals(MemoryObject *self) noexcept nogil:
    """The SEAL_* bits of the memory, or -errno."""
    cdef int seals = _syscalls.fcntl(self.root.fd, F_GET_SEALS, 0)
    if seals < 0:
        return seals
    return (
        (SEAL_PUBLISH if seals & F_SEAL_FUTURE_WRITE else 0)
        | (SEAL_FREEZE if seals & F_SEAL_WRITE else 0))


cdef bint memory_object_is_inherited(const MemoryObject *self) noexcept nogil:
    """Whether a parent of this process made the object: emptying it would empty the parent's."""
    return self.generation != _fork.generation()


cdef bint memory_object_is_exclusive(const MemoryObject *self) noexcept nogil:
    """Whether no other process can have the object by inheritance."""
    return not memory_object_is_inherited(self) and self.children == _fork.children()


cdef uint64_t memory_object_holes(MemoryObject *self, uint64_t size) noexcept nogil:
    """At most how many of ``size`` bytes of the object have no memory yet."""
    cdef uint64_t allocated
    if _syscalls.allocated(self.root.fd, &allocated) < 0:
        return size
    return min(size, self.root.size - min(self.root.size, allocated))


cdef int memory_object_fill(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil:
    """Give every page of the range memory now: 0, or -errno with some of them given."""
    cdef uint64_t done = 0
    cdef uint64_t piece
    cdef int result
    if not _room.is_room_for(size):
        return -ENOMEM
    while done < size:
        piece = min(size - done, <uint64_t>FILL_AT_ONCE)
        result = _syscalls.fallocate(self.fd, 0, offset + done, piece)
        if result == 0:
            done += piece
        elif result != -EINTR:
            return result
    return 0


cdef int memory_object_store(MemoryObject *self, uint64_t offset, const void *data,
                             uint64_t size) noexcept nogil:
    """Write bytes into a fresh object: 0 or -errno, with some of them written.

    pwrite(2) costs half of copying through a mapping.
    """
    cdef uint64_t done = 0
    cdef Py_ssize_t written
    while done < size:
        written = _syscalls.pwrite(
            self.fd, <const char *>data + done, size - done, offset + done)
        if written <= 0:
            return <int>written if written < 0 else -EFAULT
        done += written
    return 0


cdef int memory_object_punch(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil:
    """Give the range's memory back to the system, for everybody who maps it."""
    return _syscalls.fallocate(
        self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
