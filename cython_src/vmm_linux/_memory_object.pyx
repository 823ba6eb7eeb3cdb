"""Memory objects (see ``_memory_object.pxd``)."""

from libc.errno cimport EINTR, ENOMEM
from libc.stdlib cimport free, malloc

from vmm_linux cimport _features, _fork, _room, _syscalls
from vmm_linux._syscalls cimport (
    F_ADD_SEALS,
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    MFD_ALLOW_SEALING,
    MFD_CLOEXEC,
    MFD_EXEC,
    MFD_NOEXEC_SEAL,
)

# A signal interrupts fallocate(2), which then undoes itself: in pieces it always gets on.
cdef enum:
    FILL_AT_ONCE = 64 << 20


cdef unsigned int creation_flags(bint executable) noexcept nogil:
    """Flags of memfd_create(2) for a buffer that may or may not be executed as a file."""
    cdef unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    if _features.has(_features.FEATURE_MEMFD_NOEXEC_SEAL):
        flags |= MFD_EXEC if executable else MFD_NOEXEC_SEAL
    return flags


cdef MemoryObject *memory_object_new(uint64_t size, bint executable, int *error) noexcept nogil:
    """A memory object of holes with no reference yet, or NULL and the errno."""
    cdef MemoryObject *self = <MemoryObject *>malloc(sizeof(MemoryObject))
    cdef int result
    if self == NULL:
        error[0] = ENOMEM
        return NULL
    self.fd = _syscalls.memfd_create(b"vmm_linux", creation_flags(executable))
    if self.fd < 0:
        error[0] = -self.fd
        free(self)
        return NULL
    self.size = size
    self.references = 0
    self.generation = _fork.generation()
    self.children = _fork.children()
    result = _syscalls.ftruncate(self.fd, size)
    if result == 0:
        result = _syscalls.fcntl(self.fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    if result < 0:
        error[0] = -result
        memory_object_release(self, 0)
        return NULL
    return self


cdef void memory_object_acquire(MemoryObject *self, int64_t references) noexcept nogil:
    """Refer to the object ``references`` times more."""
    self.references += references


cdef void memory_object_release(MemoryObject *self, int64_t references) noexcept nogil:
    """Let go of references; with the last one the descriptor is closed, here and nowhere else."""
    self.references -= references
    if self.references == 0:
        _syscalls.close(self.fd)
        free(self)


cdef bint memory_object_is_inherited(const MemoryObject *self) noexcept nogil:
    """Whether a parent of this process made the object: emptying it would empty the parent's."""
    return self.generation != _fork.generation()


cdef bint memory_object_is_exclusive(const MemoryObject *self) noexcept nogil:
    """Whether no other process can have the object by inheritance."""
    return not memory_object_is_inherited(self) and self.children == _fork.children()


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


cdef int memory_object_punch(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil:
    """Give the range's memory back to the system, for everybody who maps it."""
    return _syscalls.fallocate(
        self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
