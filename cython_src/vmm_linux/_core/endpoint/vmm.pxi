"""``VMM``: the endpoint in Python's manner, and the life of one: made, closed, warned of when open.

What its methods do is in ``regions.pxi`` and ``buffers.pxi``.
"""


# As the gate, the files of /proc must not be cleared while the VMM can still be called.
# The first line of the docstring is for inspect.signature, as ``__init__`` gives a class none.
@cython.no_gc_clear
cdef class VMM:
    """VMM(limits=None, *, policy=None, audit=None)\n--\n
    The endpoint: every method of it (see ``vmm_linux.VMM``).
    """

    cdef AddressSpace space
    cdef OwnProcess process
    cdef Gate gate              # None: every call is allowed, and none is written down
    cdef bint is_gated          # whether there is a gate, or may be: it is not settled yet
    cdef bint is_settled        # whether policy and audit are settled
    cdef object __weakref__
    cdef str made_at
    cdef int made_by
    cdef public bint _warned    # set on one that is never closed on purpose

    __reduce__ = refuse_copies("each owns its memory; make another VMM, and share memory by an Mdl")

    def __cinit__(self, *arguments, **keywords):
        self.is_gated = True
        self.space = AddressSpace()
        self.process = OwnProcess()
        caller = sys._getframe()
        self.made_at = f"{caller.f_code.co_filename}:{caller.f_lineno}"
        self.made_by = os.getpid()
        register(self)

    def __dealloc__(self):
        unregister(self)

    def __init__(self, limits=None, *, policy=None, audit=None):
        """Make a VMM without regions: no memory is taken yet.

        Args:
            limits: ``Limits``, or None for what keeps a runaway loop from taking the machine: at
                most 262,144 regions and as many handles, 65,536 MDL buffers, and three quarters
                of the memory that is available now, each for committed pages, locked ones and
                buffers. ``vmm.limits`` has the numbers.
            policy: a ``Policy``, which is asked before every call, or None for the one in the file
                that ``VMM_LINUX_POLICY`` of the environment names, if it names one.
            audit: an ``Audit``, which writes every call down, or None for one to the file that
                ``VMM_LINUX_AUDIT`` names, if it names one.

        Errors:
            INVALID_ARGUMENT: another kind of object; a file of the environment that is no policy.
            INVALID_OPERATION: this VMM has been made already, with others.
            OSError: a file of the environment cannot be opened.
        """
        cdef bint settled = False
        try:
            if limits is not None:
                limits = plain_limits("VMM", limits)
            settled = self.settle(policy, audit)
        except BaseException:
            # Nothing else refers to it that could close it, unless it was called in the meantime.
            self._warned = self._warned or not self.is_settled
            raise
        if limits is not None:
            if settled:
                do_set_limits(self, NULL, limits)
            else:
                self.limits = limits

    cdef int settle(self, object policy, object audit) except -1:
        """Settle the policy and the audit once, and the bounds. The environment has the defaults.

        Returns whether this call settled them.
        """
        cdef bint given = policy is not None or audit is not None
        cdef Gate gate = None
        cdef const uint64_t *bounds
        if self.is_settled:
            return refuse_late(given)
        bounds = kernel.default_bounds()
        if policy is None:
            policy = policy_of_environment()
        elif not isinstance(policy, RuleTable) or not (<RuleTable>policy).compiled:
            raise InvalidArgument("VMM", f"policy is {describe(policy)}, not a Policy")
        if audit is None:
            audit = audit_of_environment(policy)
        elif not isinstance(audit, Audit) or not (<Audit>audit).made:
            raise InvalidArgument("VMM", f"audit is {describe(audit)}, not an Audit")
        if policy is not None or audit is not None:
            gate = Gate()
            gate.policy = policy
            gate.audit = audit
            gate.forbidden = gate.policy.forbidden if policy is not None else 0
        # Another thread may have called a method while files were read, or memory was cleaned up.
        if self.is_settled:
            return refuse_late(given)
        self.gate = gate
        self.is_gated = gate is not None
        self.is_settled = True
        set_space_bounds(self.space, bounds)
        return True

    cdef object call(self, Method method, MethodBody body, object a=None, object b=None,
                     object c=None, object d=None, object e=None):
        """Carry out a method with what the caller gave, if the gate lets it."""
        cdef Call call
        cdef Ranges ranges
        cdef PyObject *given[MOST_ARGUMENTS]
        given[0] = <PyObject *>a
        given[1] = <PyObject *>b
        given[2] = <PyObject *>c
        given[3] = <PyObject *>d
        given[4] = <PyObject *>e
        if self.is_gated:
            if not self.is_settled and method != CLOSE:
                self.settle(None, None)
            if self.gate is not None:
                return self.gate.call(self, method, body, given)
        if self.space.closed and method != CLOSE:
            refuse_closed(name_of(method))
        begin_call(&call, method, &ranges)
        try:
            return body(self, &call, read_arguments(&call, given))
        finally:
            end_call(&call)

    # ---- over regions of memory -----------------------------------------------------------------

    def allocate(self, addr, size, flags):
        """Reserve a region of memory, and commit it if asked to.

        Args:
            addr: preferred base address in bytes, a page multiple, or 0; another one is chosen
                if it is taken. With ``FIXED``: this address or none.
            size: bytes, a page multiple.
            flags: ``VmmFlags``: ``RESERVE``, the protection that committed pages get, and what
                else the region is to be.

        Returns:
            The base address.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers, an illegal protection, unknown
                flags, no RESERVE, FIXED with 0 or outside what a process may map.
            ALREADY_EXISTS: FIXED, and something is mapped there.
            OUT_OF_MEMORY: address space, map count, commit charge or memory is short; LOCKED, and
                the memory cgroup has no room.
            QUOTA_EXCEEDED: ``limits``, RLIMIT_AS, RLIMIT_DATA or RLIMIT_NOFILE.
            UNIMPLEMENTED: a caching mode, or HUGE on a kernel without huge pages.

        Source: Allocate; mmap(2), mprotect(2), madvise(2), mlock(2), memfd_create(2).
        """
        return self.call(ALLOCATE, do_allocate, addr, size, flags)

    def commit(self, va, size, flags=0):
        """Make reserved pages usable: zeroed, with the protection remembered for them.

        Pages committed already keep their contents. In a ``LOCKED`` region every page is resident
        on return.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.
            flags: a fictitious parameter, not looked at.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            OUT_OF_MEMORY: the kernel would not charge the pages, or its map count is reached; in a
                LOCKED region, the machine or the memory cgroup has no room.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_DATA.

        Source: Commit; mprotect(2), madvise(2) MADV_POPULATE_WRITE.
        """
        return self.call(COMMIT, do_change_pages, va, size, flags)

    def commit_ranges(self, ranges):
        """Make reserved pages in many ranges usable: all of them, or none.

        Args:
            ranges: pairs ``(va, size)`` in bytes, page multiples; each inside one region, no two
                overlapping, in any order. None at all is fine.

        Errors:
            INVALID_ARGUMENT: no pairs; zero, unaligned or overflowing numbers; an overlap.
            RESOURCE_NOT_FOUND, OUT_OF_MEMORY, QUOTA_EXCEEDED: as of ``commit``, for one of them.

        Source: Commit; process_madvise(2) MADV_GUARD_REMOVE.
        """
        return self.call(COMMIT_RANGES, do_change_ranges, ranges)

    def decommit_ranges(self, ranges):
        """Give the memory of pages in many ranges back: of all of them, or none.

        Args:
            ranges: pairs ``(va, size)`` in bytes, page multiples; each inside one region, no two
                overlapping, in any order. None at all is fine.

        Errors:
            INVALID_ARGUMENT: no pairs; zero, unaligned or overflowing numbers; an overlap.
            RESOURCE_NOT_FOUND, INVALID_OPERATION, BUSY, OUT_OF_MEMORY, QUOTA_EXCEEDED: as of
                ``decommit``, for one of them.

        Source: Decommit; process_madvise(2) MADV_GUARD_INSTALL.
        """
        return self.call(DECOMMIT_RANGES, do_change_ranges, ranges)

    def decommit(self, va, size):
        """Give the memory of pages back to the system; the addresses stay reserved.

        Reserved pages stay so. A later commit finds zeros.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: SHAREABLE pages that came from a parent process.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: the kernel's map count is reached.
            QUOTA_EXCEEDED: ``limits.mappings``, in the middle of alike pages.

        Source: Decommit; mmap(2) MAP_FIXED, fallocate(2) FALLOC_FL_PUNCH_HOLE.
        """
        return self.call(DECOMMIT, do_change_pages, va, size)

    def protect(self, va, size, flags):
        """Change the protection: of committed pages now, of reserved ones when they are committed.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.
            flags: ``VmmFlags``: none, READ, READ|WRITE, READ|EXECUTE or READ|WRITE|EXECUTE.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers, another protection.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            NO_CAPABILITY: pages of a buffer, and more access than ``mdl_map`` gave.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: the kernel would not charge the pages, or its map count is reached.
            QUOTA_EXCEEDED: ``limits.mappings``, or RLIMIT_DATA.

        Source: Protect; mprotect(2).
        """
        return self.call(PROTECT, do_protect, va, size, flags)

    def free(self, va, size):
        """Give addresses and memory back: a whole region or any pages of one.

        Freed in the middle, a region becomes two. A guard page is freed with the page next to it.

        Args:
            va: address of the first page.
            size: bytes, a page multiple; inside one region.

        Errors:
            INVALID_ARGUMENT: zero, unaligned or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            BUSY: a view holds a page.
            OUT_OF_MEMORY: the kernel's map count is reached.
            QUOTA_EXCEEDED: ``limits``, in the middle of a region, which becomes two.

        Source: Free; munmap(2).
        """
        return self.call(FREE, do_change_pages, va, size)

    def query(self, va, smaps=True):
        """Report on the page that includes an address, without touching it.

        Args:
            va: any address of user space, ours or not, aligned or not.
            smaps: read ``/proc/self/smaps`` for the whole record of the page's mapping, which takes
                longer the more mappings lie below; without it an answer takes microseconds.

        Returns:
            A ``PageInfo``. A free address is an answer.

        Errors:
            INVALID_ARGUMENT: not an address of user space.
            QUOTA_EXCEEDED: no descriptor is left for ``/proc/self/maps``.

        Source: Query; proc(5), ioctl PROCMAP_QUERY and PAGEMAP_SCAN.
        """
        return self.call(QUERY, do_query, va, smaps)

    def view(self, va, size, writable=None):
        """Look at committed memory as it is: a memoryview of bytes.

        The pages are held as long as the object that ``view.obj`` names lives, whatever keeps
        it: Free, Decommit and Protect of them are BUSY until then.

        Args:
            va: address of the first byte.
            size: bytes, at least one; inside one region.
            writable: True, False, or None for writable where every page is.

        Errors:
            INVALID_ARGUMENT: zero or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or its protection does not allow it.
            QUOTA_EXCEEDED: ``limits.mappings``, as a view cuts runs of alike pages.
        """
        return self.call(VIEW, do_view, va, size, writable)

    def read(self, va, size):
        """Copy bytes out, with the kernel's checks.

        Args:
            va: address of the first byte.
            size: bytes, at least one; inside one region.

        Returns:
            The bytes.

        Errors:
            INVALID_ARGUMENT: zero or overflowing numbers.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or cannot be read.
            OUT_OF_MEMORY: no memory for the copy, or none behind shared pages; the memory cgroup
                has no room for it.

        Source: process_vm_readv(2).
        """
        return self.call(READ, do_read, va, size)

    def write(self, va, data):
        """Copy bytes in, with the kernel's checks.

        Args:
            va: address of the first byte.
            data: a contiguous buffer of at least one byte; its target is inside one region.

        Returns:
            The number of bytes written, all of them.

        Errors:
            INVALID_ARGUMENT: an overflowing address, no bytes, or no contiguous buffer.
            RESOURCE_NOT_FOUND: not wholly inside one region.
            INVALID_OPERATION: a page is not committed, or cannot be written.
            OUT_OF_MEMORY: no memory behind shared pages; ``error.completed`` bytes are written.
                The memory cgroup has no room for what it takes; none are.

        Source: process_vm_writev(2).
        """
        return self.call(WRITE, do_write, va, data)

    # ---- over MDL buffers -----------------------------------------------------------------------

    def mdl_create(self, size, prot, segment_size=0, nbytes=0):
        """Make an MDL buffer: shared memory without a name.

        In segments, a clone that begins and ends on their borders can be sent without the memory
        around it, which then is out of the receiver's reach. Each segment takes a descriptor, and
        each mapping of it is a mapping of the kernel's own; otherwise such a buffer is like any
        other. At most 253 descriptors, one or two of them its identity's, go in a message.

        Args:
            size: bytes, a page multiple.
            prot: ``VmmFlags``: the most that the handle allows, READ at least. With LOCKED the
                buffer has all its memory on return; without, pages get it when they are touched.
            segment_size: bytes of each segment, a page multiple; the last one may be shorter.
                0, like any number from ``size`` on, means one segment.
            nbytes: the length to the byte, which ends in the last page of ``size``; 0 for ``size``.
                It is the memory file's own size (``st_size``), and so the same at every receiver;
                pages are mapped whole.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: zero size, unaligned numbers, no or illegal protection, unknown flags,
                a length that does not fit the size.
            OUT_OF_MEMORY: LOCKED, and the machine or the memory cgroup has not that much memory.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: MdlCreate; memfd_create(2), fcntl(2) F_ADD_SEALS.
        """
        return self.call(MDL_CREATE, do_mdl_create, size, prot, segment_size, nbytes)

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
        return self.call(MDL_CREATE_FROM_VM, do_mdl_create_from_vm, va, size, flags)

    def mdl_create_from_buf(self, data, prot):
        """Make an MDL buffer of these bytes; it is frozen unless ``prot`` has WRITE.

        Args:
            data: a contiguous buffer of at least one byte; zeros fill its last page.
            prot: ``VmmFlags``: the most that the handle allows, READ at least.

        Returns:
            A ``Handle``. The buffer has the data's length to the byte (``HandleInfo.nbytes``); its
            size is that, rounded up to pages.

        Errors:
            INVALID_ARGUMENT: no bytes, no contiguous buffer, no or illegal protection.
            OUT_OF_MEMORY: no memory, or no room in the memory cgroup, for the copy.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: memfd_create(2), fcntl(2) F_SEAL_WRITE.
        """
        return self.call(MDL_CREATE_FROM_BUF, do_mdl_create_from_buf, data, prot)

    def mdl_get_size(self, handle):
        """The size of an MDL buffer in bytes: that of its pages.

        Its length to the byte is ``handle_info(handle).nbytes``.

        Args:
            handle: of the buffer.

        Errors:
            INVALID_ARGUMENT, RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle is not this VMM's, was
                closed, was revoked.

        Source: MdlGetSize.
        """
        return self.call(MDL_GET_SIZE, do_mdl_get_size, handle)

    def mdl_map(self, handle, offset, length, hint, prot):
        """Map a part of an MDL buffer: a region of committed pages, shared with all who map it.

        The mapping outlives the handle. ``protect`` can never give it more than ``prot``.

        Args:
            handle: of the buffer.
            offset: bytes from the buffer's start, a page multiple.
            length: bytes, a page multiple.
            hint: preferred address, a page multiple, or 0.
            prot: ``VmmFlags``: a protection that the handle allows, and of LOCKED, LOW_GUARD,
                HIGH_GUARD and FIXED any.

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
        return self.call(MDL_MAP, do_mdl_map, handle, offset, length, hint, prot)

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
        return self.call(MDL_CLONE, do_mdl_clone, originHandle, offset, length)

    def mdl_seal(self, handle, seals):
        """Give up writing to an MDL buffer, for ever and in every process; the kernel enforces it.

        It holds for the whole memory: the origin, its clones, a SHAREABLE region around it; of a
        buffer in segments for every segment that this handle's buffer touches. These are sealed
        one after the other. If one of them refuses, those before it are sealed: ``completed`` of
        the exception says how many bytes that is.

        Args:
            handle: of the buffer; it needs MAP_WRITE.
            seals: ``Seal.PUBLISH``: writable mappings stay, and no new one is made.
                ``Seal.FREEZE``: the contents never change again.

        Errors:
            INVALID_ARGUMENT: no or unknown seals; no handle of this VMM.
            RESOURCE_NOT_FOUND, HANDLE_REVOKED: the handle was closed, was revoked.
            NO_CAPABILITY: the handle lacks MAP_WRITE, or the memory takes no more seals.
            BUSY: FREEZE while something can still write.

        Source: fcntl(2) F_SEAL_FUTURE_WRITE, F_SEAL_WRITE.
        """
        return self.call(MDL_SEAL, do_mdl_seal, handle, seals)

    # ---- over handles, here and on their way between processes ----------------------------------

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
        return self.call(HANDLE_COPY, do_handle_copy, handle, rights)

    def handle_close(self, handle):
        """End a handle. Mappings, copies and clones made with it live on.

        Args:
            handle: to close; a revoked one may be closed too.

        Errors:
            INVALID_ARGUMENT: no handle of this VMM.
            RESOURCE_NOT_FOUND: the handle was closed before.
        """
        return self.call(HANDLE_CLOSE, do_with_handle, handle)

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
        return self.call(HANDLE_REVOKE, do_with_handle, handle)

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
        return self.call(HANDLE_INFO, do_handle_info, handle)

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
        return self.call(SEND_HANDLE, do_send_handle, sock, handle, rights)

    def recv_handle(self, sock, require=0, max_size=None, peer_uid=None):
        """Receive a handle that another process sent, trusting nothing that it says.

        Reads one message and nothing after it. A message that is refused is used up, and its
        descriptors are closed. Timeouts and non-blocking sockets behave as in
        ``socket.recvmsg``, whose exceptions pass through.

        Args:
            sock: a connected AF_UNIX socket.
            require: ``Seal`` that the memory must have. FREEZE includes PUBLISH.
            max_size: bytes that the buffer may have at most, or None.
            peer_uid: the user that must be at the other end, or None. A user that this process's
                user namespace does not map is unknown, and refused.

        Returns:
            A ``Handle``.

        Errors:
            INVALID_ARGUMENT: no AF_UNIX socket; a message that is none of ``send_handle``'s.
            SECURITY_DISALLOW: what ``require``, ``max_size`` or ``peer_uid`` demands is not so.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.
            EOFError: the other end is closed.

        Source: recvmsg(2), unix(7) SCM_RIGHTS, SO_PEERCRED.
        """
        return self.call(RECV_HANDLE, do_recv_handle, sock, require, max_size, peer_uid)

    def handle_fileno(self, handle, rights=None):
        """A descriptor of the buffer's memory, for what takes descriptors.

        ``Popen(pass_fds=...)`` hands it to a program, whose ``handle_from_fd`` makes a handle of
        it. It gives the memory to its holder, as what ``send_handle`` sends does.

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
        return self.call(HANDLE_FILENO, do_handle_fileno, handle, rights)

    def handle_from_fd(self, fd, require=0, max_size=None):
        """Make a handle of a buffer from a descriptor, trusting nothing about it.

        Args:
            fd: descriptor of a memfd of ordinary pages, sealed against shrinking, open for
                reading; it stays the caller's.
            require: ``Seal`` that the memory must have. FREEZE includes PUBLISH.
            max_size: bytes that the buffer may have at most, or None.

        Returns:
            A ``Handle`` with TRANSFER, COPY, GET_SID and MAP_READ, as the holder of a descriptor
            can do all that without this package; with MAP_WRITE where it is open for writing.
            MAP_EXECUTE, of which a descriptor says nothing, is not given.

        Errors:
            INVALID_ARGUMENT: any other descriptor, or no open one.
            SECURITY_DISALLOW: what ``require`` or ``max_size`` demands is not so.
            QUOTA_EXCEEDED: ``limits``, or RLIMIT_NOFILE.

        Source: memfd_create(2), fcntl(2) F_DUPFD_CLOEXEC, F_GET_SEALS, F_GETFL.
        """
        return self.call(HANDLE_FROM_FD, do_handle_from_fd, fd, require, max_size)

    # ---- limits -------------------------------------------------------------------------------

    @property
    def limits(self):
        """``Limits`` of this VMM; set others any time.

        A bound below what there is takes nothing away: from then on, calls that take more are
        refused until enough was given back.

        Errors:
            INVALID_ARGUMENT: set to anything but ``Limits``.
            SECURITY_DISALLOW: the policy does not allow setting them.
            INVALID_OPERATION: the VMM is closed.
        """
        cdef uint64_t used[LIMIT_COUNT]
        cdef uint64_t bounds[LIMIT_COUNT]
        cdef int limit
        if self.space.closed:
            refuse_closed("limits")
        read_usage(self.space, used, bounds)
        return Limits(**{
            LIMIT_NAMES[limit]: bound_or_none(bounds[limit]) for limit in range(LIMIT_COUNT)})

    @limits.setter
    def limits(self, limits):
        self.call(SET_LIMITS, do_set_limits, limits)

    def usage(self):
        """What this VMM uses of each limit, and its bound, all at one moment.

        Returns:
            A ``Usage``: ``usage().committed.used`` and ``.bound``, in bytes where ``Limits`` says
            so. A child of fork begins with its parent's usage.

        Errors:
            INVALID_OPERATION: the VMM is closed.
        """
        cdef uint64_t used[LIMIT_COUNT]
        cdef uint64_t bounds[LIMIT_COUNT]
        cdef int limit
        cdef list uses = []
        if self.space.closed:
            refuse_closed("usage")
        read_usage(self.space, used, bounds)
        for limit in range(LIMIT_COUNT):
            uses.append(Use(used[limit], bound_or_none(bounds[limit])))
        return Usage(*uses)

    # ---- the life of a VMM ----------------------------------------------------------------------

    def __enter__(self):
        if self.space.closed:
            refuse_closed("__enter__")
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self):
        return f"<VMM made at {self.made_at}, {'closed' if self.space.closed else 'open'}>"

    @property
    def closed(self):
        """Whether ``close`` was called."""
        return self.space.closed

    def close(self):
        """Free everything this VMM made. A second call does nothing.

        Regions that a view holds are unmapped when the last view of them is gone. An audit that
        cannot record this reports so, and does not prevent it.

        Errors:
            OUT_OF_MEMORY: at the kernel's map count a region could not be unmapped; the VMM
                stays open, and another call tries again.
        """
        if not self.space.closed:
            self.call(CLOSE, do_close)

    def __del__(self):
        self.warn_if_open()

    cdef int warn_if_open(self) except -1:
        """Warn once, in the process that made this VMM, if it is still open."""
        if self.space is None or self.space.closed or self._warned or self.made_by != os.getpid():
            return 0
        self._warned = True
        warnings.warn(
            f"a VMM made at {self.made_at} was never closed", ResourceWarning, source=self)
        return 0

    def history(self):
        """The last calls that this VMM's audit wrote down, the oldest first.

        A closed VMM has them too. An audit that several VMMs share has the calls of all.

        Returns:
            A tuple of ``vmm_linux.audit.Record``.

        Errors:
            INVALID_OPERATION: this VMM was made without an audit.
        """
        if self.gate is None or self.gate.audit is None:
            raise InvalidOperation(
                "history", "this VMM has no audit; make it with VMM(audit=Audit())")
        return self.gate.audit.history()

    def _check(self):
        """Raise AssertionError if an invariant of the ledger does not hold. For tests."""
        cdef uintptr_t where = 0
        cdef const char *flaw
        lock_space(self.space)
        flaw = find_flaw(self.space, &where)
        unlock_space(self.space)
        if flaw != NULL:
            raise AssertionError(f"{flaw.decode()} at 0x{where:x}")


cdef object do_close(VMM self, Call *call, object argument):
    cdef Answer answer
    if self.space.closed:
        return None
    perform_or_raise(self.space, &call.request, &answer)
    # No query opens these files again: the VMM is closed.
    lock_space(self.space)
    self.process.release()
    unlock_space(self.space)


cdef int refuse_closed(str method) except -1:
    """Say that the VMM is closed."""
    raise InvalidOperation(method, "this VMM is closed; make another one")


cdef bint refuse_late(bint given) except -1:
    """Policy and audit are settled: refuse a call that gives others. False where it gives none."""
    if not given:
        return False
    raise InvalidOperation(
        "VMM", "a VMM keeps the policy and the audit that it was made with, or that its first "
        "call found in the environment; make another one")
