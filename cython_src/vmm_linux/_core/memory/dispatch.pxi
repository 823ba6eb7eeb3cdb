"""One call: take the mutex, carry out the method, release the mutex.

No code under the mutex touches a Python object, so no garbage collection, signal handler or other
Python code can run there. A failure is returned as numbers.
"""

cdef enum:
    # Releasing the GIL costs 0.1 µs when no thread waits for it, and a switch of threads when one
    # does; a call over this many bytes takes some ten microseconds at most.
    KEEP_GIL_UP_TO = 256 << 10


cdef void lock_space(AddressSpace space) noexcept:
    """Take the mutex, with the GIL.

    This never waits for the GIL while it holds the mutex: a fork takes every mutex with the GIL.
    """
    while not mutex_try(space.mutex):
        with nogil:
            wait_for_space(space)
            unlock_space(space)


cdef void wait_for_space(AddressSpace space) noexcept nogil:
    """Take the mutex, without the GIL."""
    mutex_lock(space.mutex)


cdef void unlock_space(AddressSpace space) noexcept nogil:
    """Release the mutex."""
    mutex_unlock(space.mutex)


cdef Answer perform(AddressSpace space, const Request *request) noexcept:
    """Carry out one call under the mutex; the GIL is released where the call can be long."""
    cdef Answer answer
    if request.size <= KEEP_GIL_UP_TO and not is_of_unknown_length(request.method):
        lock_space(space)
        answer = dispatch(space, request)
        unlock_space(space)
    else:
        with nogil:
            wait_for_space(space)
            answer = dispatch(space, request)
            unlock_space(space)
    return answer


cdef bint is_of_unknown_length(Method method) noexcept nogil:
    """Whether a call may take or give back memory that its request does not mention.

    A handle can be the last of a buffer; a seal waits for a process that changes the file's size.
    """
    return method in (CLOSE, HANDLE_CLOSE, HANDLE_REVOKE, MDL_SEAL)


cdef Answer dispatch(AddressSpace space, const Request *request) noexcept nogil:
    """The call itself. The caller holds the mutex."""
    cdef Method method = request.method
    if space.closed and method != UNPIN and method != CLOSE:
        return refused(CLOSED)
    if method == ALLOCATE:
        return allocate_region(space, request)
    elif method == COMMIT_RANGES:
        return commit_ranges(space, request.ranges[0])
    elif method == DECOMMIT_RANGES:
        return decommit_ranges(space, request.ranges[0])
    elif method == MDL_CREATE:
        return create_buffer(space, request)
    elif method == MDL_CREATE_FROM_VM:
        return create_from_vm(space, request)
    elif method == MDL_CREATE_FROM_BUF:
        return create_from_bytes(space, request)
    elif method == MDL_GET_SIZE:
        return buffer_size(space, request)
    elif method == MDL_MAP:
        return map_handle(space, request)
    elif method == MDL_CLONE:
        return clone_handle(space, request)
    elif method == MDL_SEAL:
        return seal_buffer(space, request)
    elif method == HANDLE_COPY:
        return copy_handle(space, request)
    elif method == HANDLE_CLOSE:
        return close_handle(space, request)
    elif method == HANDLE_REVOKE:
        return revoke_handle(space, request)
    elif method == HANDLE_INFO:
        return describe_handle(space, request)
    elif method == SEND_HANDLE or method == HANDLE_FILENO:
        return pack_owned(space, request)
    elif method == UNDESCRIBE:
        return undescribe_handle(space, request.handle, request.descriptions)
    elif method == RECV_HANDLE or method == HANDLE_FROM_FD:
        return unpack_parcel(space, request)
    elif method == UNPIN:
        return unpin_pages(space, request.va, request.size)
    elif method == CLOSE:
        return close_space(space)
    return dispatch_in_region(space, request)


cdef Answer dispatch_in_region(AddressSpace space, const Request *request) noexcept nogil:
    """A call about bytes or pages that lie inside one region."""
    cdef Method method = request.method
    cdef uintptr_t va = request.va
    cdef uintptr_t end = va + request.size
    cdef Regions.iterator region = space.ledger.region_at(va)
    if not space.ledger.is_inside(region, va, request.size):
        return refused(NOT_IN_REGION)
    if method == COMMIT:
        return commit_pages(space, region, va, end)
    elif method == DECOMMIT:
        return decommit_pages(space, region, va, end)
    elif method == PROTECT:
        return protect_pages(space, va, end, request.flags)
    elif method == FREE:
        return free_pages(space, region, va, end)
    elif method == CHECK:
        return check_access(space.ledger, va, request.size, request.flags)
    elif method == VIEW:
        return pin_pages(space, request)
    return copy_bytes(space, request)
