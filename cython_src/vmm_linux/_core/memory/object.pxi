"""Memory objects: what can back pages and be shared.

A memory object is a window on the memory of a root, which is itself the window on all of it. A
root's memory is one memfd or several, its segments, sealed against shrinking and growing at birth;
mapped side by side they are one range. A clone is any other window. Who has a window on the border
of segments can do without the other segments: they are the most that can be kept from a receiver.

What another process knows an object by is a memfd too: the memory itself of a root with one
segment, an identity (see ``_identity.pyx``) of any other object.

An object lives as long as something refers to it: a mapping counts one for each of its pages (so
that cutting a mapping in two changes nothing), a handle one, a clone of it one. The mutex of the
VMM that made it guards its count.
"""

cdef struct Piece:
    # Part of a window that lies in one segment.
    Segment *segment
    uint64_t offset             # in the segment
    uint64_t size

cdef enum:
    # A signal interrupts fallocate(2), which then undoes itself: in pieces it always gets on.
    FILL_AT_ONCE = 64 << 20
    # Of the memory: nobody opens it for writing, neither this package nor another user; its
    # owner can, by giving himself leave first.
    READ_ONLY_MODE = 0o444
    EXECUTABLE_MODE = 0o555


cdef unsigned int creation_flags(bint executable) noexcept nogil:
    """Flags of memfd_create(2) for a buffer that may or may not be executed as a file."""
    cdef unsigned int flags = MFD_CLOEXEC | MFD_ALLOW_SEALING
    if kernel.has(kernel.FEATURE_MEMFD_NOEXEC_SEAL):
        flags |= MFD_EXEC if executable else MFD_NOEXEC_SEAL
    return flags


cdef uint32_t mode_for(bint executable) noexcept nogil:
    """Mode of the file, which cannot lose its x bits where its creation did not deny them."""
    return READ_ONLY_MODE if creation_flags(executable) & MFD_NOEXEC_SEAL else EXECUTABLE_MODE


cdef MemoryObject *object_with_room(size_t segments, uint64_t size) noexcept nogil:
    """An object with no descriptor, no segment and no reference yet; NULL when memory is short."""
    cdef MemoryObject *self = <MemoryObject *>malloc(
        sizeof(MemoryObject) + segments * sizeof(Segment))
    if self == NULL:
        return NULL
    self.root = self
    self.origin = NULL
    self.offset = 0
    self.size = size
    self.references = 0
    self.identity.fd = -1
    self.sid = 0
    self.generation = kernel.fork_generation()
    self.children = kernel.fork_children()
    self.counted = NULL
    self.locked = False
    self.segment_size = size
    self.segment_count = 0
    self.descriptions = 0
    self.segments = <Segment *>(self + 1)
    return self


cdef void add_segment(MemoryObject *self, OpenFile file, bint writable) noexcept nogil:
    """Give a root, which has room for it, another segment, which it then owns."""
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
    # Where a sandbox forbids it, the seals and the descriptors' access modes still hold.
    kernel.fchmod(fd, mode_for(executable))
    result = kernel.ftruncate(fd, size)
    if result == 0:
        result = kernel.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)
    if result < 0:
        kernel.close(fd)
        return result
    return fd


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


cdef MemoryObject *memory_object_new(uint64_t size, bint executable, int *error) noexcept nogil:
    """A memory object of holes with no reference yet, or NULL and the errno."""
    return memory_object_new_of_segments(size, size, executable, error)


cdef MemoryObject *memory_object_new_of_segments(uint64_t size, uint64_t segment_size,
                                                 bint executable, int *error) noexcept nogil:
    """One in segments of ``segment_size`` bytes; the last one is what is left of ``size``.

    More segments than this process may have descriptors are refused before the first is made.
    """
    cdef uint64_t count = (size - 1) // segment_size + 1
    cdef uint64_t at
    cdef MemoryObject *self
    cdef OpenFile file
    cdef Window window
    cdef int result = 0
    if count > 1 and count > min(kernel.most_descriptors(), <uint64_t>MOST_SEGMENTS):
        error[0] = EMFILE
        return NULL
    self = object_with_room(count, size)
    if self == NULL:
        error[0] = ENOMEM
        return NULL
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
        window = window_of(self)
        result = open_file_take(&self.identity, identity_new(&window))
    if result < 0:
        error[0] = -result
        memory_object_release(self, 0)
        return NULL
    return self


cdef MemoryObject *memory_object_clone(MemoryObject *origin, uint64_t offset, uint64_t size,
                                       int *error) noexcept nogil:
    """A window on an object's memory with no reference yet, or NULL and the errno."""
    cdef OpenFile none
    cdef Window window
    cdef MemoryObject *self
    none.fd = -1
    none.device = none.inode = none.taking = 0
    self = memory_object_adopt_clone(origin, none, origin.offset + offset, size)
    if self == NULL:
        error[0] = ENOMEM
        return NULL
    window = window_of(self)
    error[0] = -open_file_take(&self.identity, identity_new(&window))
    if error[0] != 0:
        memory_object_release(self, 0)
        return NULL
    return self


cdef MemoryObject *memory_object_adopt(const OpenFile *memory, size_t count, bint writable,
                                       OpenFile identity, uint64_t segment_size,
                                       uint64_t size) noexcept nogil:
    """An object of another process's making, which owns these descriptors, or NULL.

    The identity of one with a single segment is that.
    """
    cdef MemoryObject *self = object_with_room(count, size)
    cdef size_t at
    if self != NULL:
        self.segment_size = segment_size
        self.identity = identity
        for at in range(count):
            add_segment(self, memory[at], writable)
    return self


cdef MemoryObject *memory_object_adopt_clone(MemoryObject *origin, OpenFile identity,
                                             uint64_t offset, uint64_t size) noexcept nogil:
    """A window at ``offset`` of the origin's root, which owns its identity, or NULL."""
    cdef MemoryObject *self = object_with_room(0, size)
    if self != NULL:
        self.identity = identity
        self.root = origin.root
        self.origin = origin
        self.offset = offset
        memory_object_acquire(origin, 1)
    return self


cdef void memory_object_count(MemoryObject *self, Buffers *buffers, bint locked) noexcept nogil:
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
        memory_object_discount(self)
        close_descriptors(self)
        free(self)
        self = origin
        references = 1


cdef void close_descriptors(MemoryObject *self) noexcept nogil:
    """Close all that the object owns, and the program has left to it."""
    cdef Segment *segment = self.segments
    cdef Segment *end = segment + self.segment_count
    if memory_object_has_own_identity(self):
        open_file_close(&self.identity)
    while segment != end:
        if segment.read_only.fd != segment.file.fd:
            open_file_close(&segment.read_only)
        open_file_close(&segment.file)
        segment += 1


cdef Piece memory_object_piece(const MemoryObject *self, uint64_t offset,
                               uint64_t size) noexcept nogil:
    """The first part of these bytes of the window, at least one, that lies in one segment."""
    cdef const MemoryObject *root = self.root
    cdef uint64_t at = self.offset + offset
    cdef size_t number = at // root.segment_size
    cdef Piece piece
    piece.segment = root.segments + number
    piece.offset = at - number * root.segment_size
    piece.size = min(size, root.segment_size - piece.offset)
    return piece


cdef uint64_t memory_object_seams(const MemoryObject *self, uint64_t start,
                                  uint64_t end) noexcept nogil:
    """How many segments begin above ``start`` and not above ``end`` of the window."""
    cdef uint64_t size = self.root.segment_size
    return (self.offset + end) // size - (self.offset + start) // size


cdef bint memory_object_has_own_identity(const MemoryObject *self) noexcept nogil:
    """Whether its identity is another memfd than its memory."""
    return self.segment_count != 1


cdef int reopen(const OpenFile *file, OpenFile *made) noexcept nogil:
    """A read-only description of its own for a memory file: 0 or -errno.

    Whoever made the memory can hold a lease on it, and would let an open(2) that blocks wait for
    it, 45 seconds at a time. The process's own folder is empty once its first thread has ended;
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
    """A descriptor of a segment, borrowed for one use at once, or -errno.

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
    """``memory_object_descriptor`` for one that another process is to get.

    One that is not to be writable is not, and the other way round, whatever the program put under
    our number.
    """
    cdef int fd = memory_object_descriptor(self, segment, writable)
    cdef int mode
    if fd < 0:
        return fd
    mode = access_mode(fd)
    if mode != (O_RDWR if writable else O_RDONLY):
        return mode if mode < 0 else -EBADF
    return fd


cdef uint64_t memory_object_descriptions(const MemoryObject *self) noexcept nogil:
    """How many read-only descriptions of the memory were opened so far."""
    return self.root.descriptions


cdef void memory_object_undescribe(MemoryObject *self, uint64_t since) noexcept nogil:
    """Close the read-only descriptions opened ``since`` then, for what afterwards failed."""
    cdef Segment *segment = self.root.segments
    cdef Segment *end = segment + self.root.segment_count
    while segment != end:
        if segment.described > since:
            open_file_close(&segment.read_only)
            segment.described = 0
        segment += 1


cdef int memory_object_sid(MemoryObject *self, uint64_t *sid) noexcept nogil:
    """The kernel's identity of the object, the same in every process: 0 or -errno.

    The file's generation, a random number, with its inode number; where a sandbox hides it the
    inode number alone, which the kernel may give again once the object is gone.
    """
    cdef uint64_t high
    cdef int result = 0
    if self.sid == 0:
        # A shortage while the kernel is asked what it offers must not give another identity.
        if kernel.lacks(kernel.FEATURE_FILE_HANDLES):
            self.sid = self.identity.inode
        else:
            result = open_file_number(&self.identity)
            if result >= 0:
                result = kernel.file_handle(result, &self.sid, &high)
    sid[0] = self.sid
    return result


cdef int memory_object_seal(MemoryObject *self, uint32_t seals, uint64_t *done) noexcept nogil:
    """Seal each segment of the window, for every window on it: 0 or -errno.

    ``done`` says how many bytes of the window are sealed, more than 0 after a failure only if
    they are several segments: no call of the kernel's seals two files at once.
    """
    cdef int wanted = 0
    cdef Piece piece
    cdef int result
    if seals & SEAL_PUBLISH:
        wanted |= F_SEAL_FUTURE_WRITE
    if seals & SEAL_FREEZE:
        wanted |= F_SEAL_WRITE
    done[0] = 0
    while done[0] < self.size:
        piece = memory_object_piece(self, done[0], self.size - done[0])
        result = open_file_number(&piece.segment.file)
        if result >= 0:
            result = kernel.fcntl(result, F_ADD_SEALS, wanted)
        if result < 0:
            return result
        done[0] += piece.size
    return 0


cdef int memory_object_seals(MemoryObject *self) noexcept nogil:
    """The SEAL_* bits that every segment of the window has, or -errno."""
    cdef int common = F_SEAL_FUTURE_WRITE | F_SEAL_WRITE
    cdef uint64_t done = 0
    cdef Piece piece
    cdef int seals
    while done < self.size:
        piece = memory_object_piece(self, done, self.size - done)
        seals = open_file_number(&piece.segment.file)
        if seals >= 0:
            seals = kernel.fcntl(seals, F_GET_SEALS, 0)
        if seals < 0:
            return seals
        common &= seals
        done += piece.size
    return (
        (SEAL_PUBLISH if common & F_SEAL_FUTURE_WRITE else 0)
        | (SEAL_FREEZE if common & F_SEAL_WRITE else 0))


cdef bint memory_object_is_inherited(const MemoryObject *self) noexcept nogil:
    """Whether a parent of this process made the object: emptying it would empty the parent's."""
    return self.generation != kernel.fork_generation()


cdef bint memory_object_is_exclusive(const MemoryObject *self) noexcept nogil:
    """Whether no other process can have the object by inheritance."""
    return not memory_object_is_inherited(self) and self.children == kernel.fork_children()


cdef uint64_t memory_object_holes(MemoryObject *self, uint64_t offset,
                                  uint64_t size) noexcept nogil:
    """At most how many bytes of this part of the window have no memory yet."""
    cdef uint64_t holes = 0
    cdef uint64_t done = 0
    cdef Piece piece
    while done < size:
        piece = memory_object_piece(self, offset + done, size - done)
        holes += most_holes(self, piece)
        done += piece.size
    return holes


cdef uint64_t most_holes(const MemoryObject *self, Piece piece) noexcept nogil:
    """At most how many bytes of a part of a segment are holes: no more than the segment has."""
    cdef FileStatus status
    cdef uint64_t allocated = 0
    if open_file_status(&piece.segment.file, &status) == 0:
        allocated = status.st_blocks * 512
    return min(piece.size, self.root.segment_size - min(self.root.segment_size, allocated))


cdef uint64_t memory_object_missing(MemoryObject *self, uint64_t offset,
                                    uint64_t size) noexcept nogil:
    """``memory_object_holes``, counted in this part of the window instead of in all segments.

    Memory that fallocate(2) gave and nobody touched reads as a hole here, but not there.
    """
    cdef uint64_t missing = 0
    cdef uint64_t done = 0
    cdef uint64_t most
    cdef Piece piece
    while done < size:
        piece = memory_object_piece(self, offset + done, size - done)
        most = most_holes(self, piece)
        if most > 0:
            most = min(most, count_holes(piece))
        missing += most
        done += piece.size
    return missing


cdef uint64_t count_holes(Piece piece) noexcept nogil:
    """How many bytes of a part of a segment are holes; all where the kernel does not tell.

    With a description of its own: the offset of the memory's is also that of ``handle_fileno``.
    """
    cdef int64_t at = piece.offset
    cdef int64_t end = piece.offset + piece.size
    cdef uint64_t holes = 0
    cdef int64_t data
    cdef OpenFile own
    if reopen(&piece.segment.file, &own) < 0:
        return piece.size
    while at < end:
        data = kernel.lseek(own.fd, at, SEEK_DATA)
        if data < 0:            # -ENXIO: nothing but holes from here on
            data = end
        holes += min(data, end) - at
        at = data
        if at < end:
            at = kernel.lseek(own.fd, at, SEEK_HOLE)
            if at < 0:
                break
    open_file_close(&own)
    return holes


cdef int memory_object_ask(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil:
    """Whether there is memory for all holes of a part of the window: as ``kernel.ask_for``."""
    if kernel.check_headroom(memory_object_holes(self, offset, size)) == 0:
        return 0
    return kernel.check_headroom(memory_object_missing(self, offset, size))


cdef int memory_object_fill(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil:
    """Give every page of the range memory now: 0, or -errno with some of them given."""
    cdef uint64_t done = 0
    cdef Piece piece
    cdef int result = memory_object_ask(self, offset, size)
    if result < 0:
        return result
    while done < size:
        piece = memory_object_piece(
            self, offset + done, min(size - done, <uint64_t>FILL_AT_ONCE))
        result = open_file_number(&piece.segment.file)
        if result >= 0:
            result = kernel.fallocate(result, 0, piece.offset, piece.size)
        if result == 0:
            done += piece.size
        elif result != -EINTR:
            return result
    return 0


cdef int memory_object_store(MemoryObject *self, uint64_t offset, const void *data,
                             uint64_t size) noexcept nogil:
    """Write bytes into a fresh object of one segment: 0 or -errno, with some of them written.

    pwrite(2) costs half of copying through a mapping.
    """
    cdef uint64_t done = 0
    cdef Py_ssize_t written
    while done < size:
        written = open_file_number(&self.identity)
        if written >= 0:
            written = kernel.pwrite(
                <int>written, <const char *>data + done, size - done, offset + done)
        if written <= 0:
            return <int>written if written < 0 else -EFAULT
        done += written
    return 0


cdef int memory_object_punch(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil:
    """Give memory of an object of one segment back to the system, for everybody who maps it."""
    cdef int fd = open_file_number(&self.identity)
    if fd < 0:
        return fd
    return kernel.fallocate(
        fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
