"""``VMM``: the endpoint in Python's manner."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EAGAIN
from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._answer cimport (
    DONE,
    HANDLE_CLOSE,
    HANDLE_COPY,
    HANDLE_FILENO,
    HANDLE_FROM_FD,
    HANDLE_INFO,
    HANDLE_REVOKE,
    MDL_CLONE,
    MDL_CREATE,
    MDL_CREATE_FROM_BUF,
    MDL_CREATE_FROM_VM,
    MDL_GET_SIZE,
    MDL_MAP,
    MDL_SEAL,
    NO_LEDGER_MEMORY,
    OTHER_HANDLE,
    RECEIVE,
    SEND,
    Answer,
    Method,
    Request,
    explain,
    refused,
)
from vmm_linux._arguments cimport (
    MAP_FLAGS,
    check_bits,
    check_bytes,
    check_fixed,
    check_multiple,
    check_pages,
    check_protection,
    check_some_access,
    handle_request,
    number,
    request_of,
)
from vmm_linux._calls cimport (
    CALL_HANDLE_CLOSE,
    CALL_HANDLE_COPY,
    CALL_HANDLE_FILENO,
    CALL_HANDLE_FROM_FD,
    CALL_HANDLE_INFO,
    CALL_HANDLE_REVOKE,
    CALL_MDL_CLONE,
    CALL_MDL_CREATE,
    CALL_MDL_CREATE_FROM_BUF,
    CALL_MDL_CREATE_FROM_VM,
    CALL_MDL_GET_SIZE,
    CALL_MDL_MAP,
    CALL_MDL_SEAL,
    CALL_RECV_HANDLE,
    CALL_SEND_HANDLE,
)
from vmm_linux._client cimport check_open
from vmm_linux._handles cimport rights_of
from vmm_linux._mdl cimport HandleFacts, Parcel, close_parcel
from vmm_linux._memory_methods cimport MemoryMethods, made, undescribe
from vmm_linux._transfer cimport (
    Demands,
    Received,
    adopt,
    check_socket,
    is_plain,
    made_descriptor,
    receive,
    send,
    send_at_once,
    told,
)
from vmm_linux._vocabulary cimport (
    FLAG_LOCKED,
    FLAG_RWX_MASK,
    RIGHT_ALL,
    SEAL_FREEZE,
    SEAL_PUBLISH,
)

from vmm_linux._core.values import describe
from vmm_linux.endpoint import Endpoint
from vmm_linux.errors import InvalidArgument
from vmm_linux.flags import Rights, Seal
from vmm_linux.handles import Handle, HandleInfo


cdef class VMM(MemoryMethods):
    """The endpoint: every method of it (see ``vmm_linux.VMM``)."""

    @property
    def endpoint(self):
        """The reference's own face of this VMM: an ``Endpoint``."""
        return Endpoint(self)

    # ---- MDL buffers --------------------------------------------------------------------------

    def mdl_create(self, size, prot, segment_size=0):
        """Make an MDL buffer: shared memory without a name.

        In segments, a clone that begins and ends on their borders can be sent without the memory
        around it, which then is out of the receiver's reach. Each segment takes a descriptor, and
        each mapping of it is a mapping of the kernel's own; for the rest such a buffer is like any
        other. At most 253 descriptors, one or two of them its identity's, go in a message.

        Args:
            size: bytes, a page multiple.
            prot: ``VmmFlags``: the most that the handle allows, READ at least. With LOCKED the
                buffer has all its memory on return; without, pages get it when they are touched.
            segment_size: bytes of each segment, a page multiple; the last one may be shorter.
                0, like any number from ``size`` on, means one segment.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: zero size, unaligned numbers, no or illegal protection, unknown flags.
            OUT_OF_MEMORY: LOCKED, and the machine or the memory cgroup has not that much memory.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: MdlCreate; memfd_create(2), fcntl(2) F_ADD_SEALS.
        """
        if self.is_watched:
            return self.watch(CALL_MDL_CREATE, (size, prot, segment_size))
        return do_mdl_create(self, size, prot, segment_size)

    def mdl_create_from_vm(self, va, size, flags):
        """Make an MDL buffer of committed private pages, which stay where they are.

        Addresses, contents and local protection do not change. A whole SHAREABLE region moves no
        byte; other pages are copied once. The pages are MDL pages from then on.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.
            flags: ``VmmFlags``: the most that the handle allows, READ at least.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers, no or illegal protection.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or belongs to an MDL buffer.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: no memory, or no room in the memory cgroup, for the copy; or the
                kernel's map count is reached.
            SECURITY_DISALLOW: a page is executable, and the policy has ``no executable MDL``.
            QUOTA_EXCEEDED: ``limits``, RLIMIT_NOFILE, RLIMIT_AS.

        Source: MdlCreateFromVm; memfd_create(2), mremap(2).
        """
        if self.is_watched:
            return self.watch(CALL_MDL_CREATE_FROM_VM, (va, size, flags))
        return do_mdl_create_from_vm(self, va, size, flags)

    def mdl_create_from_buf(self, data, prot):
        """Make an MDL buffer of these bytes; it is frozen unless ``prot`` has WRITE.

        Args:
            data: a contiguous buffer of at least one byte; zeros fill its last page.
            prot: ``VmmFlags``: the most that the handle allows, READ at least.

        Returns:
            A ``Handle``. The buffer's size is the data's, rounded up to pages.

        Errors:
            INVALID_ARGUMENT: no bytes, no contiguous buffer, no or illegal protection.
            OUT_OF_MEMORY: no memory, or no room in the memory cgroup, for the copy.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: memfd_create(2), fcntl(2) F_SEAL_WRITE.
        """
        if self.is_watched:
            return self.watch(CALL_MDL_CREATE_FROM_BUF, (data, prot))
        return do_mdl_create_from_buf(self, data, prot)

    def mdl_get_size(self, handle):
        """The size of an MDL buffer in bytes.

        Args:
            handle: of the buffer.

        Errors:
            INVALID_ARGUMENT, RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle is not this VMM's, was
                closed, was revoked.

        Source: MdlGetSize.
        """
        if self.is_watched:
            return self.watch(CALL_MDL_GET_SIZE, (handle,))
        return do_mdl_get_size(self, handle)

    def mdl_map(self, handle, offset, length, hint, prot):
        """Map a part of an MDL buffer: a region of committed pages, shared with all who map it.

        The mapping outlives the handle. ``protect`` can never give it more than ``prot``.

        Args:
            handle: of the buffer.
            offset: bytes from the buffer's start, a page multiple.
            length: bytes, a page multiple.
            hint: preferred address, a page multiple, or 0.
            prot: ``VmmFlags``: a protection that the handle allows, and of LOCKED, LOW_GUARD,
                HIGH_GUARD and FIXED what is wished.

        Returns:
            The base address of the region.

        Errors:
            INVALID_ARGUMENT: zero or unaligned numbers, not inside the buffer, an illegal
                protection, other flags, FIXED with 0; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle's rights do not cover ``prot``; WRITE of a sealed buffer.
            BUSY: another process holds a lease on the memory, which is to be opened for reading.
            ALREADY_EXISTS: FIXED, and something is mapped there.
            OUT_OF_MEMORY: address space, map count, or memory for LOCKED (the memory cgroup's too)
                is short.
            QUOTA_EXCEEDED: ``limits``, RLIMIT_AS; RLIMIT_NOFILE for a segment's first mapping
                without WRITE.

        Source: MdlMap; mmap(2).
        """
        if self.is_watched:
            return self.watch(CALL_MDL_MAP, (handle, offset, length, hint, prot))
        return do_mdl_map(self, handle, offset, length, hint, prot)

    def mdl_clone(self, originHandle, offset, length):
        """Make an MDL buffer that is a window on another: the same memory, and no more of it.

        What another process gets of a clone are the segments that it touches, whole ones. Of a
        buffer with one segment (see ``mdl_create``) that is all its memory.

        Args:
            originHandle: of the other buffer; it needs COPY.
            offset: bytes from that buffer's start, a page multiple.
            length: bytes, a page multiple: the size of the clone.

        Returns:
            A ``Handle`` with the same rights. The clone has a security id of its own, and lives on
            when the origin's handles are closed.

        Errors:
            INVALID_ARGUMENT: zero or unaligned numbers, not inside the buffer; no handle of this
                VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks COPY.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: MdlClone; memfd_create(2) for the clone's identity.
        """
        if self.is_watched:
            return self.watch(CALL_MDL_CLONE, (originHandle, offset, length))
        return do_mdl_clone(self, originHandle, offset, length)

    def mdl_seal(self, handle, seals):
        """Give up writing to an MDL buffer: for ever, for everybody, held by the kernel.

        It holds for the whole memory: the origin, its clones, a SHAREABLE region around it; of a
        buffer in segments for every segment that this handle's buffer touches. These are sealed
        one after the other. If one of them refuses, those before it are sealed: ``completed`` of
        the exception says how many bytes that is.

        Args:
            handle: of the buffer; it needs MAP_WRITE.
            seals: ``Seal.PUBLISH``: who has a writable mapping goes on, nobody gets another.
                ``Seal.FREEZE``: nobody writes any more.

        Errors:
            INVALID_ARGUMENT: no or unknown seals; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks MAP_WRITE, or the memory takes no more seals.
            BUSY: FREEZE while something can still write.

        Source: fcntl(2) F_SEAL_FUTURE_WRITE, F_SEAL_WRITE.
        """
        if self.is_watched:
            return self.watch(CALL_MDL_SEAL, (handle, seals))
        return do_mdl_seal(self, handle, seals)

    # ---- handles --------------------------------------------------------------------------------

    def handle_copy(self, handle, rights):
        """Make another handle of the same buffer, with these rights and no others.

        Args:
            handle: to copy; it needs COPY, and every right that the copy is to have.
            rights: ``Rights`` of the copy.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: unknown rights; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks COPY or one of the rights.
            QUOTA_EXCEEDED: ``limits.handles``.
        """
        if self.is_watched:
            return self.watch(CALL_HANDLE_COPY, (handle, rights))
        return do_handle_copy(self, handle, rights)

    def handle_close(self, handle):
        """End a handle. Mappings, copies and clones made with it live on.

        Args:
            handle: to close; a revoked one may be closed too.

        Errors:
            INVALID_ARGUMENT: no handle of this VMM.
            RESOURCE_NOT_FOUND: the handle was closed before.
        """
        if self.is_watched:
            return self.watch(CALL_HANDLE_CLOSE, (handle,))
        return do_handle_close(self, handle)

    def handle_revoke(self, handle):
        """End every handle of this VMM that came from this one: copies and clones, and theirs.

        The handle itself stays, and so does every mapping. What was sent to another process is
        out of reach.

        Args:
            handle: whose descendants end.

        Errors:
            INVALID_ARGUMENT: no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
        """
        if self.is_watched:
            return self.watch(CALL_HANDLE_REVOKE, (handle,))
        return do_handle_revoke(self, handle)

    def handle_info(self, handle):
        """What a handle allows, and what it names.

        Args:
            handle: to ask about.

        Returns:
            A ``HandleInfo``: ``rights``, ``size``, ``sid``, ``origin_sid``, ``seals``. Without
            GET_SID the two security ids raise NO_CAPABILITY.

        Errors:
            INVALID_ARGUMENT: no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
        """
        if self.is_watched:
            return self.watch(CALL_HANDLE_INFO, (handle,))
        return do_handle_info(self, handle)

    def send_handle(self, sock, handle, rights=None):
        """Send a handle to another process. This VMM keeps its own.

        One message; a stream carries other data before and after it. Timeouts and non-blocking
        sockets behave as in ``socket.sendmsg``, whose exceptions pass through.

        Args:
            sock: a connected AF_UNIX socket.
            handle: to send; it needs TRANSFER, and every right that is sent.
            rights: ``Rights`` that the receiver's handle gets, or None for all that this one has.
                Without MAP_WRITE the descriptors that leave are themselves read-only.

        Errors:
            INVALID_ARGUMENT: no AF_UNIX socket, unknown rights; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks TRANSFER or one of the rights.
            INVALID_OPERATION: more segments than a message carries descriptors, 253.
            BUSY: another process holds a lease on the memory, which is to be opened for reading.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.

        Source: sendmsg(2), unix(7) SCM_RIGHTS.
        """
        if self.is_watched:
            return self.watch(CALL_SEND_HANDLE, (sock, handle, rights))
        return do_send_handle(self, sock, handle, rights)

    def recv_handle(self, sock, require=0, max_size=None, peer_uid=None):
        """Receive a handle that another process sent, trusting nothing that it says.

        Reads one message and nothing after it. A message that is refused is used up, and its
        descriptors are closed. Timeouts and non-blocking sockets behave as in
        ``socket.recvmsg``, whose exceptions pass through.

        Args:
            sock: a connected AF_UNIX socket.
            require: ``Seal`` that the memory must have. FREEZE includes PUBLISH.
            max_size: bytes that the buffer may have at most, or None.
            peer_uid: the user that must be at the other end, or None. One whom this process's user
                namespace does not map may be anybody, and is refused.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: no AF_UNIX socket; a message that is none of ``send_handle``'s.
            SECURITY_DISALLOW: what ``require``, ``max_size`` or ``peer_uid`` demands is not so.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.
            EOFError: the other end is closed.

        Source: recvmsg(2), unix(7) SCM_RIGHTS, SO_PEERCRED.
        """
        if self.is_watched:
            return self.watch(CALL_RECV_HANDLE, (sock, require, max_size, peer_uid))
        return do_recv_handle(self, sock, require, max_size, peer_uid)

    def handle_fileno(self, handle, rights=None):
        """A descriptor of the buffer's memory, for what takes descriptors.

        ``Popen(pass_fds=...)`` hands it to a program, whose ``handle_from_fd`` makes a handle of
        it. It names the memory for whoever gets it, as what ``send_handle`` sends does.

        Args:
            handle: of the buffer; it needs TRANSFER, and every right in ``rights``.
            rights: ``Rights``, or None for all that the handle has. Without MAP_WRITE the
                descriptor is itself read-only; a descriptor carries no other right.

        Returns:
            The descriptor, close-on-exec. It is the caller's to close.

        Errors:
            INVALID_ARGUMENT: unknown rights; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            INVALID_OPERATION: a clone, whose descriptor would name the whole memory; a buffer in
                segments, which has several.
            NO_CAPABILITY: the handle lacks TRANSFER or one of the rights.
            BUSY: another process holds a lease on the memory, which is to be opened for reading.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.

        Source: fcntl(2) F_DUPFD_CLOEXEC.
        """
        if self.is_watched:
            return self.watch(CALL_HANDLE_FILENO, (handle, rights))
        return do_handle_fileno(self, handle, rights)

    def handle_from_fd(self, fd, require=0, max_size=None):
        """Make a handle of a buffer whose descriptor came from somebody, trusting nothing.

        Args:
            fd: descriptor of a memfd of ordinary pages, sealed against shrinking and growing,
                open for reading; it stays the caller's.
            require: ``Seal`` that the memory must have. FREEZE includes PUBLISH.
            max_size: bytes that the buffer may have at most, or None.

        Returns:
            A ``Handle`` with TRANSFER, COPY, GET_SID and MAP_READ, as whoever has the descriptor
            can do all that without this package; with MAP_WRITE where it is open for writing.
            MAP_EXECUTE, of which a descriptor says nothing, is not given.

        Errors:
            INVALID_ARGUMENT: any other descriptor, or no open one.
            SECURITY_DISALLOW: what ``require`` or ``max_size`` demands is not so.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: memfd_create(2), fcntl(2) F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFL.
        """
        if self.is_watched:
            return self.watch(CALL_HANDLE_FROM_FD, (fd, require, max_size))
        return do_handle_from_fd(self, fd, require, max_size)

    # ---- what they share ----------------------------------------------------------------------

    cdef object carry_out(self, int call, tuple a):
        """Carry out a method: one of these, or one over regions."""
        if call == CALL_MDL_CREATE:
            return do_mdl_create(self, a[0], a[1], a[2])
        if call == CALL_MDL_CREATE_FROM_VM:
            return do_mdl_create_from_vm(self, a[0], a[1], a[2])
        if call == CALL_MDL_CREATE_FROM_BUF:
            return do_mdl_create_from_buf(self, a[0], a[1])
        if call == CALL_MDL_GET_SIZE:
            return do_mdl_get_size(self, a[0])
        if call == CALL_MDL_MAP:
            return do_mdl_map(self, a[0], a[1], a[2], a[3], a[4])
        if call == CALL_MDL_CLONE:
            return do_mdl_clone(self, a[0], a[1], a[2])
        if call == CALL_MDL_SEAL:
            return do_mdl_seal(self, a[0], a[1])
        if call == CALL_HANDLE_COPY:
            return do_handle_copy(self, a[0], a[1])
        if call == CALL_HANDLE_CLOSE:
            return do_handle_close(self, a[0])
        if call == CALL_HANDLE_REVOKE:
            return do_handle_revoke(self, a[0])
        if call == CALL_HANDLE_INFO:
            return do_handle_info(self, a[0])
        if call == CALL_SEND_HANDLE:
            return do_send_handle(self, a[0], a[1], a[2])
        if call == CALL_RECV_HANDLE:
            return do_recv_handle(self, a[0], a[1], a[2], a[3])
        if call == CALL_HANDLE_FILENO:
            return do_handle_fileno(self, a[0], a[1])
        if call == CALL_HANDLE_FROM_FD:
            return do_handle_from_fd(self, a[0], a[1], a[2])
        return MemoryMethods.carry_out(self, call, a)

    cdef Request leaving(self, Method method, str name, object handle, object rights,
                         Parcel *parcel) except *:
        """A call that fills in a parcel of a handle with these rights, or with all that it has."""
        cdef uint64_t bits
        cdef Request request = handle_request(method, number(name, "handle", handle), 0)
        if rights is None:
            request.flags = rights_of(request.handle)
        else:
            bits = number(name, "rights", rights)
            check_bits(name, "rights", bits, RIGHT_ALL)
            request.flags = <uint32_t>bits
        request.buffer = parcel
        return request

    cdef int send_directly(self, int sock, const Request *request) noexcept:
        """Send a handle if nothing hinders that, as its files are: without duplicates of them.

        0 or the -errno of the socket; -EAGAIN also where the handle hinders it. Whatever hinders
        it leaves everything as it was.
        """
        cdef Parcel *parcel = <Parcel *>request.buffer
        cdef int result = -EAGAIN
        self.space.enter()
        if not self.space.closed and self.space.pack(request).reason == DONE:
            result = send_at_once(sock, parcel)
            if result < 0:
                self.space.undescribe(parcel.handle, parcel.descriptions)
        self.space.leave()
        return result

    cdef object unpack(self, Method method, Parcel *parcel):
        """A handle of a parcel that came in, and was checked; it is used up."""
        cdef Request request = handle_request(method, 0, 0)
        request.buffer = parcel
        try:
            return made(self.space, &request)
        finally:
            close_parcel(parcel)

    cdef int window(self, Request *request, str method, object offset, object length) except -1:
        """Fill in a part of a buffer: whole pages."""
        request.offset = number(method, "offset", offset)
        request.size = number(method, "length", length)
        return check_pages(method, "offset", request.offset, request.size, "length")


# ---- the methods themselves ----------------------------------------------------------------------

cdef object do_mdl_create(VMM self, object size, object prot, object segment_size):
    cdef uint64_t length, bits, piece
    cdef Request request
    check_open(self, "mdl_create")
    length = number("mdl_create", "size", size)
    bits = number("mdl_create", "prot", prot)
    piece = number("mdl_create", "segment_size", segment_size)
    check_pages("mdl_create", "size", 0, length, "size")
    check_bits("mdl_create", "prot", bits, FLAG_RWX_MASK | FLAG_LOCKED)
    check_some_access("mdl_create", bits)
    check_multiple("mdl_create", "segment_size", piece)
    request = request_of(MDL_CREATE, 0, length, bits)
    request.offset = min(piece, length) if piece != 0 else length
    return made(self.space, &request)


cdef object do_mdl_create_from_vm(VMM self, object va, object size, object flags):
    cdef uint64_t start, length, bits
    cdef Request request
    cdef Answer answer
    check_open(self, "mdl_create_from_vm")
    start = number("mdl_create_from_vm", "va", va)
    length = number("mdl_create_from_vm", "size", size)
    bits = number("mdl_create_from_vm", "flags", flags)
    check_pages("mdl_create_from_vm", "va", start, length, "size")
    check_bits("mdl_create_from_vm", "flags", bits, FLAG_RWX_MASK)
    check_some_access("mdl_create_from_vm", bits)
    request = request_of(MDL_CREATE_FROM_VM, start, length, bits)
    request.forbidden = self.forbidden
    while True:
        request.handle = self.space.next_handle(request.flags)
        handle = Handle(request.handle)
        answer = (refused(NO_LEDGER_MEMORY) if request.handle == 0
                  else self.space.perform(&request))
        if answer.reason == DONE:
            return handle
        if answer.reason != OTHER_HANDLE:       # or another thread has it by now
            raise explain(&request, &answer)


cdef object do_mdl_create_from_buf(VMM self, object data, object prot):
    cdef uint64_t bits
    cdef Py_buffer buffer
    cdef Request request
    check_open(self, "mdl_create_from_buf")
    bits = number("mdl_create_from_buf", "prot", prot)
    check_bits("mdl_create_from_buf", "prot", bits, FLAG_RWX_MASK)
    check_some_access("mdl_create_from_buf", bits)
    try:
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            "mdl_create_from_buf",
            f"data is {describe(data)}, not a contiguous buffer") from problem
    try:
        check_bytes("mdl_create_from_buf", 0, buffer.len)
        request = request_of(MDL_CREATE_FROM_BUF, 0, buffer.len, bits)
        request.buffer = buffer.buf
        return made(self.space, &request)
    finally:
        PyBuffer_Release(&buffer)


cdef object do_mdl_get_size(VMM self, object handle):
    cdef Request request
    check_open(self, "mdl_get_size")
    request = handle_request(MDL_GET_SIZE, number("mdl_get_size", "handle", handle), 0)
    return self.space.call(&request)


cdef object do_mdl_map(VMM self, object handle, object offset, object length, object hint,
                       object prot):
    cdef Request request
    cdef uint64_t bits
    check_open(self, "mdl_map")
    request = handle_request(MDL_MAP, number("mdl_map", "handle", handle), 0)
    self.window(&request, "mdl_map", offset, length)
    request.va = number("mdl_map", "hint", hint)
    bits = number("mdl_map", "prot", prot)
    check_pages("mdl_map", "hint", request.va, request.size, "length")
    check_bits("mdl_map", "prot", bits, MAP_FLAGS)
    check_protection("mdl_map", bits & FLAG_RWX_MASK)
    check_fixed("mdl_map", "hint", bits, request.va)
    request.flags = <uint32_t>bits
    return made(self.space, &request)


cdef object do_mdl_clone(VMM self, object originHandle, object offset, object length):
    cdef Request request
    check_open(self, "mdl_clone")
    request = handle_request(
        MDL_CLONE, number("mdl_clone", "originHandle", originHandle), 0)
    self.window(&request, "mdl_clone", offset, length)
    return made(self.space, &request)


cdef object do_mdl_seal(VMM self, object handle, object seals):
    cdef Request request
    cdef uint64_t bits
    check_open(self, "mdl_seal")
    request = handle_request(MDL_SEAL, number("mdl_seal", "handle", handle), 0)
    bits = number("mdl_seal", "seals", seals)
    check_bits("mdl_seal", "seals", bits, SEAL_PUBLISH | SEAL_FREEZE)
    if bits == 0:
        raise InvalidArgument("mdl_seal", "seals 0: PUBLISH or FREEZE is needed")
    request.flags = <uint32_t>bits
    self.space.call(&request)


cdef object do_handle_copy(VMM self, object handle, object rights):
    cdef Request request
    cdef uint64_t bits
    check_open(self, "handle_copy")
    bits = number("handle_copy", "rights", rights)
    check_bits("handle_copy", "rights", bits, RIGHT_ALL)
    request = handle_request(
        HANDLE_COPY, number("handle_copy", "handle", handle), <uint32_t>bits)
    return made(self.space, &request)


cdef object do_handle_close(VMM self, object handle):
    cdef Request request
    check_open(self, "handle_close")
    request = handle_request(HANDLE_CLOSE, number("handle_close", "handle", handle), 0)
    self.space.call(&request)


cdef object do_handle_revoke(VMM self, object handle):
    cdef Request request
    check_open(self, "handle_revoke")
    request = handle_request(HANDLE_REVOKE, number("handle_revoke", "handle", handle), 0)
    self.space.call(&request)


cdef object do_handle_info(VMM self, object handle):
    cdef HandleFacts facts
    cdef Request request
    check_open(self, "handle_info")
    request = handle_request(HANDLE_INFO, number("handle_info", "handle", handle), 0)
    request.buffer = &facts
    self.space.call(&request)
    return HandleInfo(
        Rights(facts.rights), facts.size, facts.sid,
        facts.origin_sid if facts.cloned else None, Seal(facts.seals))


cdef object do_send_handle(VMM self, object sock, object handle, object rights):
    cdef Parcel parcel
    cdef Request request
    cdef bint is_sent = False
    cdef int result
    check_open(self, "send_handle")
    check_socket("send_handle", sock)
    request = self.leaving(SEND, "send_handle", handle, rights, &parcel)
    if is_plain(sock):
        result = self.send_directly(sock.fileno(), &request)
        if result != -EAGAIN:
            told(result)
            return None
    self.space.call(&request)
    try:
        send(sock, &parcel)
        is_sent = True
    finally:
        close_parcel(&parcel)
        if not is_sent:
            undescribe(self.space, parcel.handle, parcel.descriptions)


cdef object do_recv_handle(VMM self, object sock, object require, object max_size, object peer_uid):
    cdef Received received
    check_open(self, "recv_handle")
    check_socket("recv_handle", sock)
    demands = demands_of("recv_handle", require, max_size)
    if peer_uid is not None:
        peer_uid = number("recv_handle", "peer_uid", peer_uid)
    received = receive(sock, demands, peer_uid)
    return self.unpack(RECEIVE, &received.parcel)


cdef object do_handle_fileno(VMM self, object handle, object rights):
    cdef Parcel parcel
    cdef Request request
    cdef bint is_told = False
    check_open(self, "handle_fileno")
    request = self.leaving(HANDLE_FILENO, "handle_fileno", handle, rights, &parcel)
    self.space.call(&request)
    try:
        descriptor = made_descriptor(parcel.files[0].fd)
        is_told = True
        return descriptor
    finally:
        if not is_told:
            undescribe(self.space, parcel.handle, parcel.descriptions)


cdef object do_handle_from_fd(VMM self, object fd, object require, object max_size):
    cdef Parcel parcel
    check_open(self, "handle_from_fd")
    demands = demands_of("handle_from_fd", require, max_size)
    adopt(number("handle_from_fd", "fd", fd), demands, &parcel)
    return self.unpack(HANDLE_FROM_FD, &parcel)


cdef Demands demands_of(str method, object require, object max_size):
    """What a receiver demands, checked."""
    cdef Demands demands = Demands.__new__(Demands)
    demands.method = method
    demands.require = number(method, "require", require)
    check_bits(method, "require", demands.require, SEAL_PUBLISH | SEAL_FREEZE)
    if max_size is not None:
        demands.max_size = number(method, "max_size", max_size)
    return demands
