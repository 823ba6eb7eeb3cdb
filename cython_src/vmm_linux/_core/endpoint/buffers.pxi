"""What the methods over buffers and handles do, once the call is allowed."""


cdef object do_mdl_create(VMM self, Call *call, object argument):
    cdef Request *request = &call.request
    check_pages(MDL_CREATE, "size", 0, request.size, "size")
    check_bits(MDL_CREATE, "prot", request.flags, FLAG_RWX_MASK | FLAG_LOCKED)
    check_some_access(MDL_CREATE, request.flags)
    check_multiple(MDL_CREATE, "segment_size", request.segment_size)
    if request.segment_size == 0 or request.segment_size > request.size:
        request.segment_size = request.size
    if request.nbytes == 0:
        request.nbytes = request.size
    if request.nbytes > request.size or request.size - request.nbytes >= PAGE_SIZE:
        raise InvalidArgument(
            "mdl_create", f"nbytes {request.nbytes} does not end in the last page of size "
            f"{request.size}")
    return make(self.space, request)


cdef object do_mdl_create_from_vm(VMM self, Call *call, object argument):
    cdef Request *request = &call.request
    cdef Answer answer
    cdef object handle
    check_pages(MDL_CREATE_FROM_VM, "va", request.va, request.size, "size")
    check_bits(MDL_CREATE_FROM_VM, "flags", request.flags, FLAG_RWX_MASK)
    check_some_access(MDL_CREATE_FROM_VM, request.flags)
    request.forbidden = 0 if self.gate is None else self.gate.forbidden
    while True:
        # The pages stay a buffer's once they are one: the handle's object comes first.
        request.new_handle = next_handle(self.space, request.flags)
        handle = Handle(request.new_handle)
        answer = (refused(NO_LEDGER_MEMORY) if request.new_handle == 0
                  else perform(self.space, request))
        if answer.reason == DONE:
            return handle
        if answer.reason != OTHER_HANDLE:       # or another thread has it by now
            raise explain(request, &answer)


cdef object do_mdl_create_from_buf(VMM self, Call *call, object argument):
    cdef Request *request = &call.request
    check_bits(MDL_CREATE_FROM_BUF, "prot", request.flags, FLAG_RWX_MASK)
    check_some_access(MDL_CREATE_FROM_BUF, request.flags)
    check_bytes(MDL_CREATE_FROM_BUF, 0, request.size)
    return make(self.space, request)


cdef object do_mdl_get_size(VMM self, Call *call, object argument):
    cdef Answer answer
    perform_or_raise(self.space, &call.request, &answer)
    return answer.result


cdef object do_mdl_map(VMM self, Call *call, object argument):
    cdef Request *request = &call.request
    check_pages(MDL_MAP, "offset", request.offset, request.size, "length")
    check_pages(MDL_MAP, "hint", request.va, request.size, "length")
    check_bits(MDL_MAP, "prot", request.flags, MAP_FLAGS)
    check_protection(MDL_MAP, request.flags & FLAG_RWX_MASK)
    check_fixed(MDL_MAP, "hint", request.flags, request.va)
    return make(self.space, request)


cdef object do_mdl_clone(VMM self, Call *call, object argument):
    cdef Request *request = &call.request
    check_pages(MDL_CLONE, "offset", request.offset, request.size, "length")
    return make(self.space, request)


cdef object do_mdl_seal(VMM self, Call *call, object argument):
    cdef Answer answer
    check_bits(MDL_SEAL, "seals", call.request.seals, SEAL_PUBLISH | SEAL_FREEZE)
    if call.request.seals == 0:
        raise InvalidArgument("mdl_seal", "seals 0: PUBLISH or FREEZE is needed")
    perform_or_raise(self.space, &call.request, &answer)


cdef object do_handle_copy(VMM self, Call *call, object argument):
    if is_absent(call, ARGUMENT_RIGHTS):
        number(HANDLE_COPY, 1, None)
    check_bits(HANDLE_COPY, "rights", call.request.rights, RIGHT_ALL)
    return make(self.space, &call.request)


cdef object do_with_handle(VMM self, Call *call, object argument):
    """Close a handle, or revoke what came from it."""
    cdef Answer answer
    perform_or_raise(self.space, &call.request, &answer)


cdef object do_handle_info(VMM self, Call *call, object argument):
    cdef Answer answer
    cdef HandleFacts facts
    call.request.facts = &facts
    perform_or_raise(self.space, &call.request, &answer)
    return HandleInfo(
        Rights(facts.rights), facts.size, facts.sid,
        facts.origin_sid if facts.cloned else None, Seal(facts.seals), facts.nbytes,
        facts.segments)


cdef object do_send_handle(VMM self, Call *call, object sock):
    cdef Answer answer
    cdef Request *request = &call.request
    cdef Parcel parcel
    cdef bint is_sent = False
    cdef int result
    check_bits(SEND_HANDLE, "rights", request.rights, RIGHT_ALL)
    request.parcel = &parcel
    if own_sendmsg(sock) is None:
        result = send_directly(self.space, fileno_of(sock), request)
        if result != -EAGAIN:
            kernel.check(result)
            return None
    perform_or_raise(self.space, request, &answer)
    try:
        send(sock, &parcel)
        is_sent = True
    finally:
        close_parcel(&parcel)
        if not is_sent:
            undescribe(self.space, parcel.handle, parcel.descriptions)


cdef int send_directly(AddressSpace space, int sock, const Request *request) noexcept:
    """Send a handle if nothing hinders that, as its files are: without duplicates of them.

    0 or the -errno of the socket; -EAGAIN also where the handle hinders it. What hinders it leaves
    everything as it was.
    """
    cdef Parcel *parcel = request.parcel
    cdef int result = -EAGAIN
    lock_space(space)
    if not space.closed and pack_handle(space, request).reason == DONE:
        result = send_at_once(sock, parcel)
        if result < 0:
            undescribe_handle(space, parcel.handle, parcel.descriptions)
    unlock_space(space)
    return result


cdef object do_recv_handle(VMM self, Call *call, object sock):
    cdef Received received
    check_bits(RECV_HANDLE, "require", call.request.seals, SEAL_PUBLISH | SEAL_FREEZE)
    peer_uid = None if is_absent(call, ARGUMENT_USER) else call.peer_uid
    received = receive(sock, &call.request, peer_uid)
    return unpack(self.space, RECV_HANDLE, &received.parcel)


cdef object do_handle_fileno(VMM self, Call *call, object argument):
    cdef Answer answer
    cdef Request *request = &call.request
    cdef Parcel parcel
    cdef bint is_made = False
    cdef object descriptor
    check_bits(HANDLE_FILENO, "rights", request.rights, RIGHT_ALL)
    request.parcel = &parcel
    perform_or_raise(self.space, request, &answer)
    try:
        descriptor = made_descriptor(parcel.files[0].fd)
        is_made = True
        return descriptor
    finally:
        if not is_made:
            undescribe(self.space, parcel.handle, parcel.descriptions)


cdef object do_handle_from_fd(VMM self, Call *call, object argument):
    cdef Parcel parcel
    check_bits(HANDLE_FROM_FD, "require", call.request.seals, SEAL_PUBLISH | SEAL_FREEZE)
    adopt(call.descriptor, &call.request, &parcel)
    return unpack(self.space, HANDLE_FROM_FD, &parcel)


cdef object unpack(AddressSpace space, Method method, Parcel *parcel):
    """A handle of a parcel that came in and was checked; the parcel is used up."""
    cdef Request request = new_request(method)
    request.parcel = parcel
    try:
        return make(space, &request)
    finally:
        close_parcel(parcel)
