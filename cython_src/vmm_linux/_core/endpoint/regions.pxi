"""What the methods over regions do, once their arguments are numbers and the call is allowed."""


cdef object do_allocate(VMM self, Call *call, object argument):
    cdef Request *request = &call.request
    check_pages(ALLOCATE, "addr", request.va, request.size, "size")
    check_region_flags(request.flags, request.va)
    return make(self.space, request)


cdef object do_change_pages(VMM self, Call *call, object argument):
    """Commit, decommit or free whole pages of one region."""
    cdef Answer answer
    cdef Request *request = &call.request
    check_pages(request.method, "va", request.va, request.size, "size")
    perform_or_raise(self.space, request, &answer)


cdef object do_change_ranges(VMM self, Call *call, object argument):
    """Commit or decommit whole pages of many regions."""
    cdef Request *request = &call.request
    cdef Answer answer
    cdef size_t place
    for place in range(request.ranges.size()):
        check_pages(request.method, "va", request.ranges[0][place].start,
                    request.ranges[0][place].end - request.ranges[0][place].start, "size")
    if request.ranges.empty():
        return None
    answer = perform(self.space, request)
    if answer.reason == DONE:
        return None
    for place in range(request.ranges.size()):
        if request.ranges[0][place].index == answer.index:
            request.va = request.ranges[0][place].start
            request.size = request.ranges[0][place].end - request.va
            break
    raise explain(request, &answer)


cdef object do_protect(VMM self, Call *call, object argument):
    check_protection(PROTECT, call.request.flags)
    do_change_pages(self, call, argument)


cdef object do_query(VMM self, Call *call, object argument):
    cdef uint64_t va = call.request.va
    if va >= kernel.user_space_end():
        raise InvalidArgument(
            "query", f"va 0x{va:x} is above user space, which ends at "
            f"0x{kernel.user_space_end():x}")
    return query(self.space, self.process, va, call.choice != 0)


cdef object do_view(VMM self, Call *call, object argument):
    check_bytes(VIEW, call.request.va, call.request.size)
    return pinned_view(self.space, &call.request, call.choice)


cdef object do_read(VMM self, Call *call, object argument):
    cdef Answer answer
    cdef Request *request = &call.request
    cdef object data
    check_bytes(READ, request.va, request.size)
    request.method = CHECK
    request.flags = FLAG_READ
    perform_or_raise(self.space, request, &answer)
    try:
        data = PyBytes_FromStringAndSize(NULL, request.size)
    except MemoryError:
        raise OutOfMemory("read", f"no memory for a copy of {request.size} bytes") from None
    request.method = READ
    request.data = PyBytes_AS_STRING(data)
    perform_or_raise(self.space, request, &answer)
    return data


cdef object do_write(VMM self, Call *call, object argument):
    cdef Answer answer
    cdef Request *request = &call.request
    cdef object written = request.size      # before the bytes are there: a failure has written none
    cdef uintptr_t source = <uintptr_t>request.data
    cdef object apart
    check_bytes(WRITE, request.va, request.size)
    if source < request.va + request.size and request.va < source + request.size:
        apart = copied(source, request.size)    # else what is written would be written again
        request.data = PyBytes_AS_STRING(apart)
    request.flags = FLAG_WRITE
    perform_or_raise(self.space, request, &answer)
    return written


cdef object copied(uintptr_t source, size_t size):
    """A copy of bytes that are written to a place which they overlap."""
    cdef size_t done
    cdef object data
    try:
        data = PyBytes_FromStringAndSize(NULL, size)
    except MemoryError:
        raise OutOfMemory("write", f"no memory for a copy of {size} bytes") from None
    check_result(
        copy(True, PyBytes_AS_STRING(data), source, size, &done), "write", "the data's own memory")
    return data
