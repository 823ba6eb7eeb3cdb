"""Memory objects: what can back pages and be shared.

A memory object is a window on the memory of a root, which is itself the window on all of it. A
root's memory is one memfd or several, its segments, sealed against shrinking and growing at birth;
mapped side by side they are one range. A clone is any other window. A receiver of a window that
starts and ends at segment boundaries needs no other segments, so the others can be kept from it.

Another process knows an object by a memfd too: a root with one segment by the memory itself,
any other object by an identity (see ``identity.pxi``).

An object lives as long as something refers to it: a mapping counts one for each of its pages (so
that cutting a mapping in two changes nothing), a handle one, a clone of it one. The mutex of the
VMM that made it guards its count.

What can fail returns 0 or -errno, or a descriptor or -errno.
"""

cdef struct Segment:
    OpenFile file               # the memory
    OpenFile read_only          # its read-only description once needed; the same where that is all
    uint64_t described          # which of the root's descriptions this was

cdef struct MemoryObject:
    MemoryObject *root          # whose memory it is: its own, or what it is a window on
    MemoryObject *origin        # what it was cloned from, or NULL
    uint64_t offset             # of the window in the root's memory
    uint64_t size               # bytes that can be mapped, a page multiple
    int64_t references
    OpenFile identity           # of a root with one segment that is the memory
    uint64_t sid                # the security id once it was asked for, else 0
    uint32_t generation         # of the process that made it
    uint32_t children           # which that process had at its birth
    BufferCounts *counted       # where it counts as an MDL buffer, or NULL
    bint locked                 # whether its memory counts as locked there
    # Of a root:
    uint64_t nbytes             # of its memory to the byte: what its files have together
    uint64_t segment_size       # of each segment but the last, which may be shorter
    size_t segment_count        # 0: not a root
    uint64_t descriptions       # how many were opened so far
    Segment *segments           # right behind this

cdef struct Extent:
    # A part of a window that lies in one segment.
    Segment *segment
    uint64_t offset             # in the segment
    uint64_t size

cdef enum:
    # Of the memory: neither this package nor another user can open it for writing. Its owner
    # can, after changing the mode.
    READ_ONLY_MODE = 0o444, EXECUTABLE_MODE = 0o555


cdef unsigned int creation_flags(bint executable) noexcept nogil:
    """Flags of memfd_create(2) for a file that may or may not be executed."""
    cdef unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    if kernel.has(kernel.FEATURE_MEMFD_NOEXEC_SEAL):
        flags |= MFD_EXEC if executable else MFD_NOEXEC_SEAL
    return flags


cdef uint32_t mode_for(bint executable) noexcept nogil:
    """Mode of the file, which cannot lose its x bits where its creation did not deny them."""
    return READ_ONLY_MODE if creation_flags(executable) & MFD_NOEXEC_SEAL else EXECUTABLE_MODE


cdef MemoryObject *new_object(size_t segments, uint64_t size) noexcept nogil:
    """An object of ``size`` bytes with no descriptor, no segment and no reference yet.

    NULL when memory is short.
    """
    cdef MemoryObject *self = <MemoryObject *>malloc(
        sizeof(MemoryObject) + segments * sizeof(Segment))
    if self == NULL:
        return NULL
    memset(self, 0, sizeof(MemoryObject))
    self.root = self
    self.nbytes = size
    self.size = self.segment_size = round_up(size, PAGE_SIZE)
    self.identity.fd = -1
    self.generation = kernel.fork_generation()
    self.children = kernel.fork_children()
    self.segments = <Segment *>(self + 1)
    return self


cdef void add_segment(MemoryObject *self, OpenFile file, bint writable) noexcept nogil:
    """Give a root that was made for it another segment, which the root then owns."""
    cdef Segment *segment = self.segments + self.segment_count
    segment.file = segment.read_only = file
    if writable:
        segment.read_only.fd = -1
    segment.described = 0
    self.segment_count += 1


cdef int new_memory(uint64_t size, bint executable) noexcept nogil:
    """A memfd of holes that can neither shrink nor grow: a descriptor or -errno."""
    cdef int fd = kernel.memfd_create(b"vmm_linux", creation_flags(executable))
    cdef int result
    if fd < 0:
        return fd
    # Where a sandbox forbids fchmod, the seals and the descriptors' access modes still hold.
    kernel.fchmod(fd, mode_for(executable))
    result = kernel.ftruncate(fd, size)
    if result == 0:
        result = kernel.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    if result < 0:
        kernel.close(fd)
        return result
    return fd


cdef uint64_t memory_object_nbytes(const MemoryObject *self) noexcept nogil:
    """How many bytes of the window its files have; pages are mapped whole."""
    return min(self.size, self.root.nbytes - self.offset)


cdef Window window_of(const MemoryObject *self) noexcept nogil:
    """The segments that an object's window touches, and where it lies in them."""
    cdef const MemoryObject *root = self.root
    cdef uint64_t first = self.offset // root.segment_size
    cdef Window window
    window.files = &root.segments[first].file
    window.stride = sizeof(Segment)
    window.count = (self.offset + self.size - 1) // root.segment_size - first + 1
    window.offset = self.offset - first * root.segment_size
    window.size = self.size
    window.segment_size = root.segment_size
    return window


cdef int memory_object_new(MemoryObject **made, uint64_t size, bint executable) noexcept nogil:
    """Make a memory object of holes with no reference yet."""
    return memory_object_new_of_segments(made, size, round_up(size, PAGE_SIZE), executable)


cdef int memory_object_new_of_segments(MemoryObject **made, uint64_t size, uint64_t segment_size,
                                       bint executable) noexcept nogil:
    """Make one in segments of ``segment_size`` bytes, a page multiple; the last has the rest.

    More segments than this process may have descriptors are refused before the first is made.
    """
    cdef uint64_t count = (size - 1) // segment_size + 1
    cdef uint64_t at
    cdef MemoryObject *self
    cdef OpenFile file
    cdef int result = 0
    if count > 1 and count > min(
            kernel.resource_limit(kernel.RLIMIT_NOFILE), <uint64_t>MOST_SEGMENTS):
        return -EMFILE
    self = new_object(count, size)
    if self == NULL:
        return -ENOMEM
    self.segment_size = segment_size
    for at in range(count):
        result = open_file_take(
            &file, new_memory(min(segment_size, size - at * segment_size), executable))
        if result < 0:
            break
        add_segment(self, file, True)
    if result == 0 and count == 1:
        self.identity = self.segments[0].file
    elif result == 0:
        result = take_identity(self)
    return made_object(self, result, made)


cdef int memory_object_clone(MemoryObject **made, MemoryObject *origin, uint64_t offset,
                             uint64_t size) noexcept nogil:
    """Make a window on an object's memory with no reference yet."""
    cdef OpenFile none
    cdef MemoryObject *self
    none.fd = -1
    none.device = none.inode = none.taking = 0
    self = memory_object_adopt_clone(origin, none, origin.offset + offset, size)
    return -ENOMEM if self == NULL else made_object(self, take_identity(self), made)


cdef int take_identity(MemoryObject *self) noexcept nogil:
    """Make an object's identity."""
    cdef Window window = window_of(self)
    return open_file_take(&self.identity, identity_new(&window))


cdef int made_object(MemoryObject *self, int result, MemoryObject **made) noexcept nogil:
    """Hand a new object over, or release what was made of it when ``result`` is a -errno."""
    if result < 0:
        memory_object_release(self, 0)
    else:
        made[0] = self
    return result


cdef MemoryObject *memory_object_adopt(const OpenFile *memory, size_t count, bint writable,
                                       OpenFile identity, uint64_t segment_size,
                                       uint64_t size) noexcept nogil:
    """An object that another process made, which then owns these descriptors; NULL: no memory.

    Parameters:
        memory: its segments; where there is one, that is also its identity.
    """
    cdef MemoryObject *self = new_object(count, size)
    cdef size_t at
    if self != NULL:
        self.segment_size = segment_size
        self.identity = identity
        for at in range(count):
            add_segment(self, memory[at], writable)
    return self


cdef MemoryObject *memory_object_adopt_clone(MemoryObject *origin, OpenFile identity,
                                             uint64_t offset, uint64_t size) noexcept nogil:
    """A window at ``offset`` of the origin's root, which owns its identity; NULL: no memory."""
    cdef MemoryObject *self = new_object(0, size)
    if self != NULL:
        self.identity = identity
        self.root = origin.root
        self.origin = origin
        self.offset = offset
        memory_object_acquire(origin, 1)
    return self


cdef void memory_object_count(MemoryObject *self, BufferCounts *buffers,
                              bint locked) noexcept nogil:
    """Count the object among a VMM's buffers until it ends: the one place that charges."""
    self.counted = buffers
    self.locked = locked
    buffers.mdls += 1
    if self.root == self:
        buffers.bytes += self.size
        buffers.locked += self.size if locked else 0


cdef void memory_object_discount(const MemoryObject *self) noexcept nogil:
    """The one place that refunds."""
    if self.counted == NULL:
        return
    self.counted.mdls -= 1
    if self.root == self:
        self.counted.bytes -= self.size
        self.counted.locked -= self.size if self.locked else 0


cdef void memory_object_acquire(MemoryObject *self, int64_t references) noexcept nogil:
    """Count ``references`` more references to the object."""
    self.references += references


cdef void memory_object_release(MemoryObject *self, int64_t references) noexcept nogil:
    """Drop references. With the last one the descriptors are closed, only here.

    A clone then drops its reference to its origin.
    """
    cdef MemoryObject *origin
    while self != NULL:
        self.references -= references
        if self.references > 0:
            return
        origin = self.origin
        memory_object_discount(self)
        close_descriptors(self)
        free(self)
        self = origin
        references = 1


cdef void close_descriptors(MemoryObject *self) noexcept nogil:
    """Close what the object owns, except what the program closed or replaced."""
    cdef Segment *segment = self.segments
    cdef Segment *end = segment + self.segment_count
    if memory_object_has_own_identity(self):
        open_file_close(&self.identity)
    while segment != end:
        if segment.read_only.fd != segment.file.fd:
            open_file_close(&segment.read_only)
        open_file_close(&segment.file)
        segment += 1


cdef Extent memory_object_extent(const MemoryObject *self, uint64_t offset,
                                 uint64_t size) noexcept nogil:
    """The first part of these bytes of the window, at least one, that lies in one segment."""
    cdef const MemoryObject *root = self.root
    cdef uint64_t at = self.offset + offset
    cdef size_t number = at // root.segment_size
    cdef Extent extent
    extent.segment = root.segments + number
    extent.offset = at - number * root.segment_size
    extent.size = min(size, root.segment_size - extent.offset)
    return extent


cdef uint64_t memory_object_boundaries(const MemoryObject *self, uint64_t start,
                                       uint64_t end) noexcept nogil:
    """How many segment boundaries lie above ``start`` and not above ``end`` of the window."""
    cdef uint64_t size = self.root.segment_size
    return (self.offset + end) // size - (self.offset + start) // size


cdef bint memory_object_has_own_identity(const MemoryObject *self) noexcept nogil:
    """Whether its identity is another memfd than its memory."""
    return self.segment_count != 1


cdef bint memory_object_is_inherited(const MemoryObject *self) noexcept nogil:
    """Whether a parent of this process made the object: emptying it would empty the parent's."""
    return self.generation != kernel.fork_generation()


cdef bint memory_object_is_exclusive(const MemoryObject *self) noexcept nogil:
    """Whether no other process can have the object by inheritance."""
    return not memory_object_is_inherited(self) and self.children == kernel.fork_children()


cdef int reopen(const OpenFile *file, OpenFile *made) noexcept nogil:
    """A read-only description of its own for a memory file.

    The process that made the memory can hold a lease on it, for which a blocking open(2) waits
    up to 45 seconds. The process's own folder is empty once its first thread has ended;
    the thread's takes a microsecond longer.
    """
    cdef char path[40]
    cdef int number = open_file_number(file)
    cdef int fd
    if number < 0:
        return number
    snprintf(path, sizeof(path), b"/proc/self/fd/%d", number)
    fd = kernel.openat(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    if fd == -ENOENT:
        snprintf(path, sizeof(path), b"/proc/thread-self/fd/%d", number)
        fd = kernel.openat(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)
    return open_file_take_same(made, file, fd)


cdef int memory_object_descriptor(MemoryObject *self, Segment *segment,
                                  bint writable) noexcept nogil:
    """A descriptor of a segment, borrowed for immediate use.

    The read-only one is opened when first needed: descriptors are scarce.
    """
    cdef int result
    if writable:
        return open_file_number(&segment.file)
    if segment.read_only.fd >= 0:
        return open_file_number(&segment.read_only)
    result = reopen(&segment.file, &segment.read_only)
    if result < 0:
        return -EBUSY if result == -EAGAIN else result
    self.root.descriptions += 1
    segment.described = self.root.descriptions
    return segment.read_only.fd


cdef int memory_object_leaving(MemoryObject *self, Segment *segment, bint writable) noexcept nogil:
    """``memory_object_descriptor`` for a descriptor that another process gets.

    Its access mode is checked: the program may have put another file under this number.
    """
    cdef int fd = memory_object_descriptor(self, segment, writable)
    cdef int mode
    if fd < 0:
        return fd
    mode = access_mode(fd)
    if mode != (O_RDWR if writable else O_RDONLY):
        return mode if mode < 0 else -EBADF
    return fd


cdef void memory_object_undescribe(MemoryObject *self, uint64_t since) noexcept nogil:
    """Close the read-only descriptions after the first ``since`` ones: their call failed later."""
    cdef Segment *segment = self.root.segments
    cdef Segment *end = segment + self.root.segment_count
    while segment != end:
        if segment.described > since:
            open_file_close(&segment.read_only)
            segment.described = 0
        segment += 1


cdef int memory_object_sid(MemoryObject *self, uint64_t *sid) noexcept nogil:
    """The security id: the kernel's number for the object, the same in every process.

    It is the file's generation, a random number, with its inode number; where a sandbox hides the
    generation, the inode number alone, which the kernel may use again once the object is gone.
    Of an identity it is the complement: a sender that passes an identity on as if it were memory
    does not give that memory the security id of the buffer that the identity names.
    """
    cdef int result = 0
    if self.sid == 0:
        # A shortage during the probe must not give another security id.
        if kernel.lacks(kernel.FEATURE_FILE_HANDLES):
            self.sid = self.identity.inode
        else:
            result = open_file_number(&self.identity)
            if result >= 0:
                result = kernel.file_handle(result, &self.sid)
        if self.sid != 0 and memory_object_has_own_identity(self):
            self.sid = ~self.sid
    sid[0] = self.sid
    return result


cdef int memory_object_seal(MemoryObject *self, uint32_t seals, uint64_t *done) noexcept nogil:
    """Seal each segment of the window, for every window on it.

    ``done`` is how many bytes of the window are sealed. After a failure it is above 0 only where
    there are several segments: no system call seals two files at once.
    """
    cdef int added = 0
    cdef Extent extent
    cdef int result
    if seals & SEAL_PUBLISH:
        added |= F_SEAL_FUTURE_WRITE
    if seals & SEAL_FREEZE:
        added |= F_SEAL_WRITE
    done[0] = 0
    while done[0] < self.size:
        extent = memory_object_extent(self, done[0], self.size - done[0])
        result = open_file_number(&extent.segment.file)
        if result >= 0:
            result = kernel.fcntl(result, F_ADD_SEALS, added)
        if result < 0:
            return result
        done[0] += extent.size
    return 0


cdef int memory_object_seals(MemoryObject *self) noexcept nogil:
    """The SEAL_* bits that every segment of the window has, or -errno."""
    cdef int common = F_SEAL_FUTURE_WRITE | F_SEAL_WRITE
    cdef uint64_t done = 0
    cdef Extent extent
    cdef int seals
    while done < self.size:
        extent = memory_object_extent(self, done, self.size - done)
        seals = open_file_number(&extent.segment.file)
        if seals >= 0:
            seals = kernel.fcntl(seals, F_GET_SEALS, 0)
        if seals < 0:
            return seals
        common &= seals
        done += extent.size
    return (
        (SEAL_PUBLISH if common & F_SEAL_FUTURE_WRITE else 0)
        | (SEAL_FREEZE if common & F_SEAL_WRITE else 0))
