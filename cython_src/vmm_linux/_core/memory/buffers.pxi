"""MDL buffers of one VMM: its address space with handles."""

cdef uint32_t rights_for(uint32_t flags) noexcept nogil:
    """The rights of a new handle: to do everything with the buffer that the protection names."""
    return (
        RIGHT_TRANSFER | RIGHT_COPY | RIGHT_GET_SID | (flags & FLAG_RWX_MASK) << RIGHT_MAP_SHIFT)


# ---- limits; the caller holds the mutex ------------------------------------------------------


cdef Answer check_buffer_limits(AddressSpace self, uint64_t mdls, uint64_t size,
                            bint locked) noexcept nogil:
    """Whether there may be a handle more, with so many memory objects, of so many bytes."""
    cdef Answer answer = check_limit(self, HANDLES, 1)
    if answer.reason == DONE:
        answer = check_limit(self, MDLS, mdls)
    if answer.reason == DONE:
        answer = check_limit(self, MDL_BYTES, size)
    if answer.reason == DONE and locked:
        answer = check_limit(self, LOCKED, size)
    return answer


# ---- buffers; the caller holds the mutex -----------------------------------------------------


cdef uint64_t next_handle(AddressSpace self, uint32_t flags) noexcept:
    """The handle of the next buffer with this protection. This takes the mutex by itself."""
    cdef uint64_t value
    lock_space(self)
    value = self.handles.next(rights_for(flags))
    unlock_space(self)
    return value


cdef Answer new_handle(AddressSpace self, MemoryObject *buffer, uint32_t rights,
                       Entry *parent) noexcept nogil:
    """A handle of a buffer; when memory is short, a buffer that nobody else has is gone."""
    cdef Entry *entry = self.handles.add(buffer, rights, parent)
    cdef Answer answer = done()
    if entry == NULL:
        memory_object_release(buffer, 0)
        return refused(NO_LEDGER_MEMORY)
    answer.result = entry.value
    return answer


cdef Answer create_buffer(AddressSpace self, const Request *request) noexcept nogil:
    """A buffer of holes, or with LOCKED of memory."""
    cdef int result = 0
    cdef bint locked = request.flags & FLAG_LOCKED != 0
    cdef MemoryObject *buffer
    cdef Answer answer
    if request.size > user_space_end():
        return refused(TOO_LARGE)
    answer = check_buffer_limits(self, 1, request.size, locked)
    if answer.reason != DONE:
        return answer
    buffer = memory_object_new_of_segments(
        request.size, request.segment_size, request.flags & FLAG_EXECUTE != 0, &result)
    if buffer == NULL:
        return kernel_refused(-result)
    memory_object_count(buffer, &self.buffers, locked)
    if locked:
        result = memory_object_fill(buffer, 0, request.size)
    if result < 0:
        memory_object_release(buffer, 0)
        return kernel_refused(result)
    return new_handle(self, buffer, rights_for(<uint32_t>request.flags), NULL)


cdef Answer create_from_bytes(AddressSpace self, const Request *request) noexcept nogil:
    """A buffer of these bytes; without WRITE it is frozen."""
    cdef int result = 0
    cdef uint64_t size = round_up(request.size, page_size())
    cdef uint64_t sealed
    cdef MemoryObject *buffer
    cdef Answer answer = check_buffer_limits(self, 1, size, False)
    if answer.reason != DONE:
        return answer
    buffer = memory_object_new(size, request.flags & FLAG_EXECUTE != 0, &result)
    if buffer == NULL:
        return kernel_refused(-result)
    memory_object_count(buffer, &self.buffers, False)
    result = kernel.check_headroom(request.size)
    if result == 0:
        result = memory_object_store(buffer, 0, request.data, request.size)
    if result == 0 and not request.flags & FLAG_WRITE:
        result = memory_object_seal(buffer, SEAL_FREEZE, &sealed)
    if result < 0:
        memory_object_release(buffer, 0)
        return kernel_refused(result)
    return new_handle(self, buffer, rights_for(<uint32_t>request.flags), NULL)


cdef Answer create_from_vm(AddressSpace self, const Request *request) noexcept nogil:
    """A buffer of committed private pages. Once they are one, they stay one: all that could
    lack comes first, ``request.new_handle`` too, whose Python object the caller has made.
    """
    cdef MemoryObject *buffer = NULL
    cdef Entry *entry
    cdef Answer answer
    if not self.ledger.holds(request.va, request.size):
        return refused(NOT_IN_REGION)
    answer = check_convertible(
        self, request.va, request.va + request.size, request.forbidden)
    if answer.reason == DONE:
        answer = check_buffer_limits(self, 1, request.size, False)
    if answer.reason == DONE and request.new_handle != self.handles.next(rights_for(<uint32_t>request.flags)):
        answer = refused(OTHER_HANDLE)
    if answer.reason != DONE:
        return answer
    entry = self.handles.add(NULL, rights_for(<uint32_t>request.flags), NULL)
    if entry == NULL:
        return refused(NO_LEDGER_MEMORY)
    answer = convert_to_buffer(self, request, &buffer)
    if answer.reason != DONE:
        self.handles.withdraw(entry)
        return answer
    memory_object_count(buffer, &self.buffers, False)
    self.handles.give(entry, buffer)
    answer.result = entry.value
    return answer


cdef Answer buffer_size(AddressSpace self, const Request *request) noexcept nogil:
    """The size of a buffer."""
    cdef Entry *entry = NULL
    cdef Answer answer = self.handles.find(request.handle, 0, &entry)
    if answer.reason == DONE:
        answer.result = entry.buffer.size
    return answer


cdef Answer map_handle(AddressSpace self, const Request *request) noexcept nogil:
    """Map a part of a buffer, with no more than the handle's rights."""
    cdef Entry *entry = NULL
    cdef uint64_t descriptions
    cdef Answer answer = self.handles.find(
        request.handle, (request.flags & FLAG_RWX_MASK) << RIGHT_MAP_SHIFT, &entry)
    if answer.reason != DONE:
        return answer
    if not is_inside(request, entry.buffer):
        return refused(BEYOND_BUFFER, entry.buffer.size)
    descriptions = memory_object_descriptions(entry.buffer)
    answer = map_buffer(self, request, entry.buffer)
    if answer.reason == DONE:
        answer.descriptions = descriptions
    return answer


cdef Answer clone_handle(AddressSpace self, const Request *request) noexcept nogil:
    """A buffer that is a window on another."""
    cdef Entry *entry = NULL
    cdef MemoryObject *buffer
    cdef int error = 0
    cdef Answer answer = self.handles.find(request.handle, RIGHT_COPY, &entry)
    if answer.reason != DONE:
        return answer
    if not is_inside(request, entry.buffer):
        return refused(BEYOND_BUFFER, entry.buffer.size)
    answer = check_buffer_limits(self, 1, 0, False)
    if answer.reason != DONE:
        return answer
    buffer = memory_object_clone(entry.buffer, request.offset, request.size, &error)
    if buffer == NULL:
        return kernel_refused(-error)
    memory_object_count(buffer, &self.buffers, False)
    return new_handle(self, buffer, rights_of(entry.value), entry)


cdef Answer seal_buffer(AddressSpace self, const Request *request) noexcept nogil:
    """Seal the memory behind a buffer. ``done`` tells of segments sealed before a failure."""
    cdef Entry *entry = NULL
    cdef uint64_t sealed = 0
    cdef int result
    cdef Answer answer = self.handles.find(request.handle, RIGHT_MAP_WRITE, &entry)
    if answer.reason != DONE:
        return answer
    result = memory_object_seal(entry.buffer, <uint32_t>request.seals, &sealed)
    if result == -EBUSY:
        answer = refused(STILL_WRITABLE)
    elif result == -EPERM:
        answer = refused(UNSEALABLE)
    elif result < 0:
        answer = kernel_refused(result)
    if result < 0:
        answer.completed = sealed
    return answer


# ---- handles; the caller holds the mutex -----------------------------------------------------


cdef Answer copy_handle(AddressSpace self, const Request *request) noexcept nogil:
    """Another handle of the same buffer, with no more rights."""
    cdef Entry *entry = NULL
    cdef Answer answer = self.handles.find(request.handle, RIGHT_COPY | <uint32_t>request.rights, &entry)
    if answer.reason == DONE:
        answer = check_limit(self, HANDLES, 1)
    if answer.reason != DONE:
        return answer
    return new_handle(self, entry.buffer, <uint32_t>request.rights, entry)


cdef Answer close_handle(AddressSpace self, const Request *request) noexcept nogil:
    """Close a handle, a revoked one too."""
    cdef Entry *entry = NULL
    cdef Answer answer = self.handles.find(request.handle, 0, &entry)
    if answer.reason != DONE and answer.reason != REVOKED:
        return answer
    self.handles.close(entry)
    return done()


cdef Answer revoke_handle(AddressSpace self, const Request *request) noexcept nogil:
    """End all that came from a handle."""
    cdef Entry *entry = NULL
    cdef Answer answer = self.handles.find(request.handle, 0, &entry)
    if answer.reason == DONE:
        self.handles.revoke_descendants(entry)
    return answer


cdef Answer describe_handle(AddressSpace self, const Request *request) noexcept nogil:
    """Fill in the HandleFacts that the request points to."""
    cdef HandleFacts *facts = request.facts
    cdef Entry *entry = NULL
    cdef int result
    cdef Answer answer = self.handles.find(request.handle, 0, &entry)
    if answer.reason != DONE:
        return answer
    facts.rights = rights_of(entry.value)
    facts.size = entry.buffer.size
    facts.cloned = entry.buffer.origin != NULL
    facts.origin_sid = 0
    facts.seals = memory_object_seals(entry.buffer)
    result = min(0, facts.seals)
    if result == 0:
        result = memory_object_sid(entry.buffer, &facts.sid)
    if result == 0 and facts.cloned:
        result = memory_object_sid(entry.buffer.origin, &facts.origin_sid)
    return answer if result == 0 else kernel_refused(result)


# ---- to and from other processes; the caller holds the mutex ---------------------------------


cdef Answer pack_handle(AddressSpace self, const Request *request) noexcept nogil:
    """Fill in the Parcel that the request points to, with the rights in ``rights``.

    Its files are lent: they are the buffer's, and good as long as the mutex is held.
    """
    cdef Parcel *parcel = request.parcel
    cdef Entry *entry = NULL
    cdef MemoryObject *buffer
    cdef uint64_t segments
    cdef int identities
    cdef int result = 0
    cdef Answer answer = self.handles.find(
        request.handle, RIGHT_TRANSFER | <uint32_t>request.rights, &entry)
    if answer.reason != DONE:
        return answer
    buffer = entry.buffer
    identities = identities_of(buffer)
    if request.method == HANDLE_FILENO and identities > 0:
        return refused(NO_SINGLE_DESCRIPTOR)
    segments = measure(parcel, buffer)
    if segments + identities > PARCEL_DESCRIPTORS:
        return refused(TOO_MANY_SEGMENTS, segments)
    parcel.rights = <uint32_t>request.rights
    parcel.handle = request.handle
    parcel.descriptions = memory_object_descriptions(buffer)
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


cdef Answer pack_owned(AddressSpace self, const Request *request) noexcept nogil:
    """``pack``, with duplicates in place of the files, which are the parcel's own then."""
    cdef Parcel *parcel = request.parcel
    cdef int owned = 0
    cdef int result
    cdef Answer answer = pack_handle(self, request)
    while answer.reason == DONE and owned < parcel.count:
        result = open_file_own(&parcel.files[owned])
        if result < 0:
            parcel.count = owned
            close_parcel(parcel)
            undescribe_handle(self, request.handle, parcel.descriptions)
            return kernel_refused(result)
        owned += 1
    return answer


cdef Answer undescribe_handle(AddressSpace self, uint64_t handle, uint64_t since) noexcept nogil:
    """Close the read-only descriptions of a buffer that a call opened and does not need."""
    cdef Entry *entry = NULL
    cdef Answer answer = self.handles.find(handle, 0, &entry)
    if answer.reason == DONE:
        memory_object_undescribe(entry.buffer, since)
    return answer


cdef Answer unpack_parcel(AddressSpace self, const Request *request) noexcept nogil:
    """A handle of what came in the Parcel, checked before; its descriptors are used up.

    From the last one on: the segments, their identity if that is another memfd, a clone's
    identity, and that of a clone of it. What is adopted is not the parcel's any more.
    """
    cdef Parcel *parcel = request.parcel
    cdef int segments = parcel.segments
    cdef int first = parcel.count - segments
    cdef int identity = first - 1 if segments > 1 else first
    cdef MemoryObject *inner
    cdef MemoryObject *buffer
    cdef Answer answer = check_buffer_limits(self, 1 + identity, parcel.memory_size, False)
    if answer.reason != DONE:
        return answer
    buffer = memory_object_adopt(
        parcel.files + first, segments, parcel.rights & RIGHT_MAP_WRITE != 0,
        parcel.files[identity], parcel.segment_size, parcel.memory_size)
    if buffer == NULL:
        return refused(NO_LEDGER_MEMORY)
    memory_object_count(buffer, &self.buffers, False)
    parcel.count = identity
    while parcel.count > 0:
        inner = memory_object_adopt_clone(
            buffer, parcel.files[parcel.count - 1], parcel.offset, parcel.size)
        if inner == NULL:
            memory_object_release(buffer, 0)
            return refused(NO_LEDGER_MEMORY)
        parcel.count -= 1
        memory_object_count(inner, &self.buffers, False)
        buffer = inner
    return new_handle(self, buffer, parcel.rights, NULL)


cdef bint is_inside(const Request *request, const MemoryObject *buffer) noexcept nogil:
    """Whether the request's bytes are all the buffer's."""
    return request.offset <= buffer.size and request.size <= buffer.size - request.offset


cdef int identities_of(const MemoryObject *buffer) noexcept nogil:
    """How many identities go with a buffer's memory: none, its own, or its origin's too."""
    if not memory_object_has_own_identity(buffer):
        return 0
    return 1 if buffer.origin == NULL or not memory_object_has_own_identity(buffer.origin) else 2


cdef uint64_t measure(Parcel *parcel, const MemoryObject *buffer) noexcept nogil:
    """Fill in what a parcel says of a buffer and of the segments that it touches: how many."""
    cdef const MemoryObject *root = buffer.root
    cdef uint64_t first = buffer.offset // root.segment_size
    cdef uint64_t last = (buffer.offset + buffer.size - 1) // root.segment_size
    cdef uint64_t start = first * root.segment_size
    cdef uint64_t end = (
        root.size if last == root.segment_count - 1 else (last + 1) * root.segment_size)
    parcel.count = parcel.segments = 0
    parcel.offset = buffer.offset - start
    parcel.size = buffer.size
    parcel.memory_size = end - start
    parcel.segment_size = min(root.segment_size, parcel.memory_size)
    return last - first + 1


cdef int add_memory(Parcel *parcel, MemoryObject *buffer) noexcept nogil:
    """Put each segment that a buffer touches into a parcel: 0 or -errno."""
    cdef uint64_t added = 0
    cdef Piece piece
    cdef int result
    while added < buffer.size:
        piece = memory_object_piece(buffer, added, buffer.size - added)
        result = add_file(parcel, &piece.segment.file, memory_object_leaving(
            buffer, piece.segment, parcel.rights & RIGHT_MAP_WRITE != 0))
        if result < 0:
            return result
        parcel.segments += 1
        added += piece.size
    return 0


cdef int add_file(Parcel *parcel, const OpenFile *file, int fd) noexcept nogil:
    """Put a descriptor of a file, or the -errno of why there is none, into a parcel: 0 or -errno.
    """
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
