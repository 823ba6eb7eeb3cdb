"""The contents of memory objects: which bytes have memory, and giving, writing and freeing it.

What can fail returns 0 or -errno.
"""

cdef enum:
    # A signal interrupts fallocate(2), which then undoes itself: in parts it always advances.
    FILL_AT_ONCE = 64 << 20


cdef uint64_t memory_object_holes(MemoryObject *self, uint64_t offset, uint64_t size,
                                  bint counted) noexcept nogil:
    """How many bytes of this part of the window have no memory yet: at most, or ``counted``.

    At most: by what its segments have. Memory that fallocate(2) gave and that was never touched
    is a hole where holes are counted, but not there.
    """
    cdef uint64_t holes = 0, done = 0, most
    cdef Extent extent
    size = min(size, memory_object_nbytes(self) - offset)
    while done < size:
        extent = memory_object_extent(self, offset + done, size - done)
        most = most_holes(self, extent)
        holes += min(most, count_holes(extent)) if counted and most > 0 else most
        done += extent.size
    return holes


cdef uint64_t most_holes(const MemoryObject *self, Extent extent) noexcept nogil:
    """At most how many bytes of an extent are holes: as many as its whole segment has."""
    cdef FileStatus status
    cdef uint64_t allocated = 0
    if open_file_status(&extent.segment.file, &status) == 0:
        allocated = status.st_blocks * 512
    return min(extent.size, self.root.segment_size - min(self.root.segment_size, allocated))


cdef uint64_t count_holes(Extent extent) noexcept nogil:
    """How many bytes of an extent are holes; all where the kernel does not say.

    It opens a description of its own: lseek would move the offset that ``handle_fileno`` shares.
    """
    cdef int64_t at = extent.offset
    cdef int64_t end = extent.offset + extent.size
    cdef uint64_t holes = 0
    cdef int64_t data
    cdef OpenFile own
    if reopen(&extent.segment.file, &own) < 0:
        return extent.size
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


cdef int memory_object_check_headroom(MemoryObject *self, uint64_t offset,
                                      uint64_t size) noexcept nogil:
    """Whether there is memory for all holes of this part: as ``kernel.check_headroom``."""
    if kernel.check_headroom(memory_object_holes(self, offset, size, False)) == 0:
        return 0
    return kernel.check_headroom(memory_object_holes(self, offset, size, True))


cdef int memory_object_fill(MemoryObject *self, uint64_t offset, uint64_t size) noexcept nogil:
    """Give every page of the range memory now. A failure leaves those that were given it.

    The end of the file is inside its last page, and F_SEAL_GROW refuses whatever is beyond it.
    """
    cdef uint64_t done = 0
    cdef Extent extent
    cdef int result = memory_object_check_headroom(self, offset, size)
    if result < 0:
        return result
    size = min(size, memory_object_nbytes(self) - offset)
    while done < size:
        extent = memory_object_extent(self, offset + done, min(size - done, <uint64_t>FILL_AT_ONCE))
        result = open_file_number(&extent.segment.file)
        if result >= 0:
            result = kernel.fallocate(result, 0, extent.offset, extent.size)
        if result == 0:
            done += extent.size
        elif result != -EINTR:
            return result
    return 0


cdef int memory_object_store(MemoryObject *self, uint64_t offset, const void *data,
                             uint64_t size) noexcept nogil:
    """Write bytes into a fresh object of one segment. A failure leaves those that were written.

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
    """Give memory of an object of one segment back to the system, for every mapping of it."""
    cdef int fd = open_file_number(&self.identity)
    if fd < 0:
        return fd
    return kernel.fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size)
