"""One call: the mutex taken, the method carried out, the mutex let go.

Under the mutex there is no Python object in sight: no garbage collection, no signal handler and
no other Python code can run. What went wrong comes back as numbers.
"""

# Handing the GIL over costs 0.1 µs when nobody waits and a switch of threads when somebody
# does; a call over this many bytes takes at most some ten microseconds.
cdef enum:
    KEEP_GIL_UP_TO = 256 << 10


cdef void lock_space(AddressSpace self) noexcept:
    """Take the mutex, with the GIL. Never waits for the GIL with the mutex in hand, since
    a fork takes every mutex with the GIL in hand."""
    while not mutex_try(self.mutex):
        with nogil:
            wait_for_space(self)
            unlock_space(self)


cdef void wait_for_space(AddressSpace self) noexcept nogil:
    """Take the mutex, without the GIL."""
    mutex_lock(self.mutex)


cdef void unlock_space(AddressSpace self) noexcept nogil:
    """Let go of the mutex."""
    mutex_unlock(self.mutex)


cdef Answer perform(AddressSpace self, const Request *request) noexcept:
    """Carry out one call under the mutex; the GIL is released where the call can be long."""
    cdef Answer answer
    if request.size <= KEEP_GIL_UP_TO and not is_of_unknown_length(request.method):
        lock_space(self)
        answer = dispatch(self, request)
        unlock_space(self)
    else:
        with nogil:
            wait_for_space(self)
            answer = dispatch(self, request)
            unlock_space(self)
    return answer



cdef bint is_of_unknown_length(Method method) noexcept nogil:
    """Whether a call may take or give back memory of which its request says nothing.

    A handle can be the last of a buffer; a seal waits for whoever changes the memory's size.
    """
    return method in (CLOSE, HANDLE_CLOSE, HANDLE_REVOKE, MDL_SEAL)


cdef Answer dispatch(AddressSpace self, const Request *request) noexcept nogil:
    """The call itself. The caller holds the mutex."""
    cdef Method method = request.method
    if method == UNPIN:
        return unpin_pages(self, request.va, request.size)
    if method == CLOSE:
        return close_space(self)
    if self.closed:
        return refused(CLOSED)
    if method == ALLOCATE:
        return allocate_region(self, request)
    elif method == COMMIT_RANGES:
        return commit_ranges(self, request.ranges[0])
    elif method == DECOMMIT_RANGES:
        return decommit_ranges(self, request.ranges[0])
    elif method == MDL_CREATE:
        return create_buffer(self, request)
    elif method == MDL_CREATE_FROM_VM:
        return create_from_vm(self, request)
    elif method == MDL_CREATE_FROM_BUF:
        return create_from_bytes(self, request)
    elif method == MDL_GET_SIZE:
        return buffer_size(self, request)
    elif method == MDL_MAP:
        return map_handle(self, request)
    elif method == MDL_CLONE:
        return clone_handle(self, request)
    elif method == MDL_SEAL:
        return seal_buffer(self, request)
    elif method == HANDLE_COPY:
        return copy_handle(self, request)
    elif method == HANDLE_CLOSE:
        return close_handle(self, request)
    elif method == HANDLE_REVOKE:
        return revoke_handle(self, request)
    elif method == HANDLE_INFO:
        return describe_handle(self, request)
    elif method == SEND_HANDLE or method == HANDLE_FILENO:
        return pack_owned(self, request)
    elif method == UNDESCRIBE:
        return undescribe_handle(self, request.handle, request.descriptions)
    elif method == RECV_HANDLE or method == HANDLE_FROM_FD:
        return unpack_parcel(self, request)
    return dispatch_in_region(self, request)


cdef Answer dispatch_in_region(AddressSpace self, const Request *request) noexcept nogil:
    """A call about bytes or pages that lie inside one region."""
    cdef Method method = request.method
    cdef Regions.iterator region = self.ledger.region_at(request.va)
    if not self.ledger.is_inside(region, request.va, request.size):
        return refused(NOT_IN_REGION)
    if method == COMMIT:
        return commit_pages(self, region, request.va, request.va + request.size)
    elif method == DECOMMIT:
        return decommit_pages(self, region, request.va, request.va + request.size)
    elif method == PROTECT:
        return protect_pages(
            self, request.va, request.va + request.size, <uint32_t>request.flags)
    elif method == FREE:
        return free_pages(self, region, request.va, request.va + request.size)
    elif method == CHECK:
        return check_access(self, request.va, request.size, <uint32_t>request.flags)
    elif method == VIEW:
        return pin_pages(self, request)
    return copy_bytes(self, request)
