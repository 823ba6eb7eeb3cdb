"""MDL buffers: create, clone, seal and measure them.

The caller holds the mutex.
"""


cdef Answer create_buffer(AddressSpace space, const Request *request) noexcept nogil:
    """A buffer of holes, or with LOCKED of memory."""
    cdef int result
    cdef bint locked = request.flags & FLAG_LOCKED != 0
    cdef MemoryObject *buffer = NULL
    cdef Answer answer
    if request.size > user_space_end():
        return refused(TOO_LARGE)
    answer = check_buffer_limits(space, 1, request.size, locked)
    if answer.reason != DONE:
        return answer
    result = memory_object_new_of_segments(
        &buffer, request.nbytes, request.segment_size, request.flags & FLAG_EXECUTE != 0)
    if result < 0:
        return kernel_refused(result)
    memory_object_count(buffer, &space.buffers, locked)
    if locked:
        result = memory_object_fill(buffer, 0, request.size)
    if result < 0:
        memory_object_release(buffer, 0)
        return kernel_refused(result)
    return new_handle(space, buffer, rights_for(request.flags), NULL)


cdef Answer create_from_bytes(AddressSpace space, const Request *request) noexcept nogil:
    """A buffer of these bytes; without WRITE it is frozen."""
    cdef int result
    cdef uint64_t size = round_up(request.size, PAGE_SIZE)
    cdef uint64_t sealed
    cdef MemoryObject *buffer = NULL
    cdef Answer answer = check_buffer_limits(space, 1, size, False)
    if answer.reason != DONE:
        return answer
    result = memory_object_new(&buffer, request.size, request.flags & FLAG_EXECUTE != 0)
    if result < 0:
        return kernel_refused(result)
    memory_object_count(buffer, &space.buffers, False)
    result = kernel.check_headroom(request.size)
    if result == 0:
        result = memory_object_store(buffer, 0, request.data, request.size)
    if result == 0 and not request.flags & FLAG_WRITE:
        result = memory_object_seal(buffer, SEAL_FREEZE, &sealed)
    if result < 0:
        memory_object_release(buffer, 0)
        return kernel_refused(result)
    return new_handle(space, buffer, rights_for(request.flags), NULL)


cdef Answer create_from_vm(AddressSpace space, const Request *request) noexcept nogil:
    """A buffer of committed private pages.

    This cannot be undone, so all that could be missing comes first, the handle too:
    ``request.new_handle``, for which the caller has made the Python object.
    """
    cdef uint32_t rights = rights_for(request.flags)
    cdef MemoryObject *buffer = NULL
    cdef HandleEntry *entry
    cdef Answer answer
    if not space.ledger.holds(request.va, request.size):
        return refused(NOT_IN_REGION)
    answer = check_convertible(
        space.ledger, request.va, request.va + request.size, request.forbidden)
    if answer.reason == DONE:
        answer = check_buffer_limits(space, 1, request.size, False)
    if answer.reason == DONE and request.new_handle != next_value(space.handles, rights):
        answer = refused(OTHER_HANDLE)
    if answer.reason != DONE:
        return answer
    entry = add_entry(space.handles, NULL, rights, NULL)
    if entry == NULL:
        return refused(NO_LEDGER_MEMORY)
    answer = convert_to_buffer(space, request, &buffer)
    if answer.reason != DONE:
        withdraw_entry(space.handles, entry)
        return answer
    memory_object_count(buffer, &space.buffers, False)
    give_buffer(entry, buffer)
    answer.result = entry.value
    return answer


cdef Answer clone_handle(AddressSpace space, const Request *request) noexcept nogil:
    """A buffer that is a window on another."""
    cdef HandleEntry *entry = NULL
    cdef MemoryObject *buffer = NULL
    cdef int result
    cdef Answer answer = find_entry(space.handles, request.handle, RIGHT_COPY, &entry)
    if answer.reason != DONE:
        return answer
    if not is_inside(request, entry.buffer):
        return refused(BEYOND_BUFFER, entry.buffer.size)
    answer = check_buffer_limits(space, 1, 0, False)
    if answer.reason != DONE:
        return answer
    result = memory_object_clone(&buffer, entry.buffer, request.offset, request.size)
    if result < 0:
        return kernel_refused(result)
    memory_object_count(buffer, &space.buffers, False)
    return new_handle(space, buffer, rights_of(entry.value), entry)


cdef Answer seal_buffer(AddressSpace space, const Request *request) noexcept nogil:
    """Seal the memory behind a buffer. ``completed``: bytes that were sealed before a failure."""
    cdef HandleEntry *entry = NULL
    cdef uint64_t sealed = 0
    cdef int result
    cdef Answer answer = find_entry(space.handles, request.handle, RIGHT_MAP_WRITE, &entry)
    if answer.reason != DONE:
        return answer
    result = memory_object_seal(entry.buffer, request.seals, &sealed)
    if result == -EBUSY:
        answer = refused(STILL_WRITABLE)
    elif result == -EPERM:
        answer = refused(UNSEALABLE)
    elif result < 0:
        answer = kernel_refused(result)
    if result < 0:
        answer.completed = sealed
    return answer


cdef Answer buffer_size(AddressSpace space, const Request *request) noexcept nogil:
    """The size of a buffer."""
    cdef HandleEntry *entry = NULL
    cdef Answer answer = find_entry(space.handles, request.handle, 0, &entry)
    if answer.reason == DONE:
        answer.result = entry.buffer.size
    return answer


cdef bint is_inside(const Request *request, const MemoryObject *buffer) noexcept nogil:
    """Whether the buffer has all of the request's bytes."""
    return request.offset <= buffer.size and request.size <= buffer.size - request.offset


cdef uint32_t rights_for(uint64_t flags) noexcept nogil:
    """The rights of a new handle: all, as far as the protection allows."""
    return RIGHT_TRANSFER | RIGHT_COPY | RIGHT_GET_SID | (flags & FLAG_RWX_MASK) << RIGHT_MAP_SHIFT


cdef uint64_t next_handle(AddressSpace space, uint64_t flags) noexcept:
    """The handle of the next buffer with this protection. This takes the mutex by itself."""
    cdef uint64_t value
    lock_space(space)
    value = next_value(space.handles, rights_for(flags))
    unlock_space(space)
    return value


cdef Answer new_handle(AddressSpace space, MemoryObject *buffer, uint32_t rights,
                       HandleEntry *parent) noexcept nogil:
    """A handle of a buffer; when memory is short, a buffer without other references ends."""
    cdef HandleEntry *entry = add_entry(space.handles, buffer, rights, parent)
    cdef Answer answer = done()
    if entry == NULL:
        memory_object_release(buffer, 0)
        return refused(NO_LEDGER_MEMORY)
    answer.result = entry.value
    return answer
