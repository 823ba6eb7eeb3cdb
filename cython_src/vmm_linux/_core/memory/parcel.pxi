"""What a transfer carries: a handle packed into a parcel, and a handle made of a parcel's files.

The caller holds the mutex.
"""


cdef Answer pack_handle(AddressSpace space, const Request *request) noexcept nogil:
    """Fill in the Parcel that the request points to, with the rights in ``rights``.

    Its files are borrowed from the buffer, and valid as long as the mutex is held.
    """
    cdef Parcel *parcel = request.parcel
    cdef HandleEntry *entry = NULL
    cdef MemoryObject *buffer
    cdef uint64_t segments
    cdef int identities, result = 0
    cdef Answer answer = find_entry(
        space.handles, request.handle, RIGHT_TRANSFER | request.rights, &entry)
    if answer.reason != DONE:
        return answer
    buffer = entry.buffer
    identities = identities_of(buffer)
    if request.method == HANDLE_FILENO and identities > 0:
        return refused(NO_SINGLE_DESCRIPTOR)
    segments = measure(parcel, buffer)
    if segments + identities > PARCEL_DESCRIPTORS:
        return refused(TOO_MANY_SEGMENTS, segments)
    parcel.rights = request.rights
    parcel.handle = request.handle
    parcel.descriptions = buffer.root.descriptions
    if identities > 0:
        result = add_file(parcel, &buffer.identity, open_file_number(&buffer.identity))
    if identities > 1 and result == 0:
        result = add_file(
            parcel, &buffer.origin.identity, open_file_number(&buffer.origin.identity))
    if result == 0:
        result = add_memory(parcel, buffer)
    if result < 0:
        memory_object_undescribe(buffer, parcel.descriptions)
        return kernel_refused(result)
    return answer


cdef Answer pack_owned(AddressSpace space, const Request *request) noexcept nogil:
    """``pack_handle`` with duplicates of the files, which the parcel then owns."""
    cdef Parcel *parcel = request.parcel
    cdef int owned = 0, result
    cdef Answer answer = pack_handle(space, request)
    while answer.reason == DONE and owned < parcel.count:
        result = open_file_own(&parcel.files[owned])
        if result < 0:
            parcel.count = owned
            close_parcel(parcel)
            undescribe_handle(space, request.handle, parcel.descriptions)
            return kernel_refused(result)
        owned += 1
    return answer


cdef Answer undescribe_handle(AddressSpace space, uint64_t handle, uint64_t since) noexcept nogil:
    """Close the read-only descriptions of a buffer that a call opened and does not need."""
    cdef HandleEntry *entry = NULL
    cdef Answer answer = find_entry(space.handles, handle, 0, &entry)
    if answer.reason == DONE:
        memory_object_undescribe(entry.buffer, since)
    return answer


cdef Answer unpack_parcel(AddressSpace space, const Request *request) noexcept nogil:
    """A handle of a buffer made of the Parcel's descriptors, which were checked before.

    From the last one on: the segments, their identity if that is another memfd, a clone's
    identity, and that of a clone of it. The parcel no longer owns what the buffer adopted.
    """
    cdef Parcel *parcel = request.parcel
    cdef int segments = parcel.segments
    cdef int first = parcel.count - segments
    cdef int identity = first - 1 if segments > 1 else first
    cdef MemoryObject *inner
    cdef MemoryObject *buffer
    cdef Answer answer = check_buffer_limits(
        space, 1 + identity, round_up(parcel.memory_size, PAGE_SIZE), False)
    if answer.reason != DONE:
        return answer
    buffer = memory_object_adopt(
        parcel.files + first, segments, parcel.rights & RIGHT_MAP_WRITE != 0,
        parcel.files[identity], parcel.segment_size, parcel.memory_size)
    if buffer == NULL:
        return refused(NO_LEDGER_MEMORY)
    memory_object_count(buffer, &space.buffers, False)
    parcel.count = identity
    while parcel.count > 0:
        inner = memory_object_adopt_clone(
            buffer, parcel.files[parcel.count - 1], parcel.offset,
            round_up(parcel.size, PAGE_SIZE))
        if inner == NULL:
            memory_object_release(buffer, 0)
            return refused(NO_LEDGER_MEMORY)
        parcel.count -= 1
        memory_object_count(inner, &space.buffers, False)
        buffer = inner
    return new_handle(space, buffer, parcel.rights, NULL)


cdef int identities_of(const MemoryObject *buffer) noexcept nogil:
    """How many identities go with a buffer's memory: none, its own, or its origin's too."""
    if not memory_object_has_own_identity(buffer):
        return 0
    return 1 if buffer.origin == NULL or not memory_object_has_own_identity(buffer.origin) else 2


cdef uint64_t measure(Parcel *parcel, const MemoryObject *buffer) noexcept nogil:
    """Fill in a parcel's sizes for a buffer; returns how many segments the buffer touches."""
    cdef Window window = window_of(buffer)
    cdef uint64_t start = buffer.offset - window.offset     # of the first segment, in the memory
    parcel.count = parcel.segments = 0
    parcel.offset = window.offset
    parcel.size = memory_object_nbytes(buffer)
    parcel.memory_size = min(window.count * window.segment_size, buffer.root.nbytes - start)
    parcel.segment_size = min(
        window.segment_size, <uint64_t>round_up(parcel.memory_size, PAGE_SIZE))
    return window.count


cdef int add_memory(Parcel *parcel, MemoryObject *buffer) noexcept nogil:
    """Put each segment that a buffer touches into a parcel: 0 or -errno."""
    cdef uint64_t added = 0
    cdef Extent extent
    cdef int result
    while added < buffer.size:
        extent = memory_object_extent(buffer, added, buffer.size - added)
        result = add_file(parcel, &extent.segment.file, memory_object_leaving(
            buffer, extent.segment, parcel.rights & RIGHT_MAP_WRITE != 0))
        if result < 0:
            return result
        parcel.segments += 1
        added += extent.size
    return 0


cdef int add_file(Parcel *parcel, const OpenFile *file, int fd) noexcept nogil:
    """Put a file with this descriptor into a parcel, unless that is a -errno: 0 or -errno."""
    if fd < 0:
        return fd
    parcel.files[parcel.count] = file[0]
    parcel.files[parcel.count].fd = fd
    parcel.count += 1
    return 0


cdef void close_parcel(Parcel *parcel) noexcept nogil:
    """Close the descriptors of a parcel."""
    while parcel.count > 0:
        parcel.count -= 1
        open_file_close(&parcel.files[parcel.count])
