"""The methods over regions of memory: the first six of the reference, and copies and views."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t

from vmm_linux cimport _features
from vmm_linux._answer cimport (
    ALLOCATE,
    CHECK,
    COMMIT,
    COMMIT_RANGES,
    DECOMMIT,
    DECOMMIT_RANGES,
    DONE,
    FREE,
    HANDLE_CLOSE,
    MDL_MAP,
    PROTECT,
    READ,
    UNDESCRIBE,
    WRITE,
    Answer,
    Method,
    Request,
    explain,
)
from vmm_linux._arguments cimport (
    check_bytes,
    check_pages,
    check_protection,
    check_region_flags,
    handle_request,
    iterate,
    number,
    pair,
    request_of,
    switch,
    tristate,
)
from vmm_linux._calls cimport (
    CALL_ALLOCATE,
    CALL_COMMIT,
    CALL_COMMIT_RANGES,
    CALL_DECOMMIT,
    CALL_DECOMMIT_RANGES,
    CALL_FREE,
    CALL_PROTECT,
    CALL_QUERY,
    CALL_READ,
    CALL_VIEW,
    CALL_WRITE,
)
from vmm_linux._client cimport Client, check_open
from vmm_linux._mdl cimport BufferSpace
from vmm_linux._query cimport query
from vmm_linux._ranges cimport Ranges, add_range
from vmm_linux._views cimport pinned_view
from vmm_linux._vocabulary cimport FLAG_READ, FLAG_WRITE

from vmm_linux._core.values import describe
from vmm_linux.errors import InvalidArgument, OutOfMemory
from vmm_linux.handles import Handle


cdef class MemoryMethods(Client):
    """Reserve, commit, give back, protect, free, query, view and copy memory."""

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
        if self.is_watched:
            return self.watch(CALL_ALLOCATE, (addr, size, flags))
        return do_allocate(self, addr, size, flags)

    cdef object carry_out(self, int call, tuple a):
        """Carry out one of these methods, or what every VMM has."""
        if call == CALL_ALLOCATE:
            return do_allocate(self, a[0], a[1], a[2])
        if call == CALL_COMMIT:
            return do_commit(self, a[0], a[1], a[2])
        if call == CALL_COMMIT_RANGES:
            return do_commit_ranges(self, a[0])
        if call == CALL_DECOMMIT_RANGES:
            return do_decommit_ranges(self, a[0])
        if call == CALL_DECOMMIT:
            return do_decommit(self, a[0], a[1])
        if call == CALL_PROTECT:
            return do_protect(self, a[0], a[1], a[2])
        if call == CALL_FREE:
            return do_free(self, a[0], a[1])
        if call == CALL_QUERY:
            return do_query(self, a[0], a[1])
        if call == CALL_VIEW:
            return do_view(self, a[0], a[1], a[2])
        if call == CALL_READ:
            return do_read(self, a[0], a[1])
        if call == CALL_WRITE:
            return do_write(self, a[0], a[1])
        return Client.carry_out(self, call, a)

    cdef int change(self, Method method, str name, object va, object size,
                    uint64_t flags) except -1:
        """A call over whole pages of one region."""
        cdef uint64_t start, length
        cdef Request request
        start = number(name, "va", va)
        length = number(name, "size", size)
        check_pages(name, "va", start, length, "size")
        request = request_of(method, start, length, flags)
        self.space.call(&request)
        return 0

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
        if self.is_watched:
            return self.watch(CALL_COMMIT, (va, size, flags))
        return do_commit(self, va, size, flags)

    cdef object change_ranges(self, Method method, str name, object ranges):
        """A call over whole pages of many regions."""
        cdef Ranges collected
        cdef uint64_t start, length
        cdef uint64_t sum = 0
        cdef Request request
        cdef Answer answer
        check_open(self, name)
        for item in iterate(name, ranges):
            va, size = pair(name, item)
            start = number(name, "va", va)
            length = number(name, "size", size)
            check_pages(name, "va", start, length, "size")
            sum += length
            if not add_range(&collected, start, start + length):
                raise OutOfMemory(name, "no memory for the list of ranges")
        if collected.empty():
            return
        request = request_of(method, 0, sum, 0)
        request.buffer = &collected
        answer = self.space.perform(&request)
        if answer.reason != DONE:
            for at in collected:
                if at.index == answer.done:
                    request.va = at.start
                    request.size = at.end - at.start
            answer.done = 0
            raise explain(&request, &answer)

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
        if self.is_watched:
            return self.watch(CALL_COMMIT_RANGES, (ranges,))
        return do_commit_ranges(self, ranges)

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
        if self.is_watched:
            return self.watch(CALL_DECOMMIT_RANGES, (ranges,))
        return do_decommit_ranges(self, ranges)

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
        if self.is_watched:
            return self.watch(CALL_DECOMMIT, (va, size))
        return do_decommit(self, va, size)

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
        if self.is_watched:
            return self.watch(CALL_PROTECT, (va, size, flags))
        return do_protect(self, va, size, flags)

    def free(self, va, size):
        """Give addresses and memory back: a whole region or any pages of one.

        Freed in the middle, a region becomes two. A guard page goes with the page next to it.

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
        if self.is_watched:
            return self.watch(CALL_FREE, (va, size))
        return do_free(self, va, size)

    def query(self, va, smaps=True):
        """Tell about the page that includes an address, without touching it.

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
        if self.is_watched:
            return self.watch(CALL_QUERY, (va, smaps))
        return do_query(self, va, smaps)

    def view(self, va, size, writable=None):
        """Look at committed memory as it is: a memoryview of bytes.

        The pages are held as long as the object that ``view.obj`` names lives, whoever keeps
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
        if self.is_watched:
            return self.watch(CALL_VIEW, (va, size, writable))
        return do_view(self, va, size, writable)

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
        if self.is_watched:
            return self.watch(CALL_READ, (va, size))
        return do_read(self, va, size)

    def write(self, va, data):
        """Copy bytes in, with the kernel's checks.

        Args:
            va: address of the first byte.
            data: a contiguous buffer of at least one byte; it goes inside one region.

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
        if self.is_watched:
            return self.watch(CALL_WRITE, (va, data))
        return do_write(self, va, data)


# ---- what a call makes ---------------------------------------------------------------------------

cdef object made(BufferSpace space, Request *request):
    """Carry out a call that makes a region or a handle: its address, its ``Handle``.

    If no memory is left for that object, what was made is given back: nobody could name it.
    """
    cdef Answer answer = space.perform(request)
    cdef bint is_region = request.method == ALLOCATE or request.method == MDL_MAP
    cdef bint is_told = False
    cdef object result
    if answer.reason != DONE:
        raise explain(request, &answer)
    try:
        result = answer.out if is_region else Handle(answer.out)
        is_told = True
        return result
    finally:
        if not is_told:
            if is_region:
                free_again(space, request, &answer)
            else:
                close_again(space, answer.out)


# What follows takes no memory of the interpreter's.

cdef void free_again(BufferSpace space, const Request *request, const Answer *answer) noexcept:
    """Undo a call that made a region."""
    cdef Request back = request_of(FREE, answer.out, request.size, 0)
    space.perform(&back)
    if request.method == MDL_MAP:
        undescribe(space, request.handle, answer.descriptions)


cdef void close_again(BufferSpace space, uint64_t handle) noexcept:
    """Undo a call that made a handle."""
    cdef Request back = handle_request(HANDLE_CLOSE, handle, 0)
    space.perform(&back)


cdef void undescribe(BufferSpace space, uint64_t handle, uint64_t since) noexcept:
    """Close what read-only descriptions a failed call opened; there were ``since`` before."""
    cdef Request back = handle_request(UNDESCRIBE, handle, 0)
    back.offset = since
    space.perform(&back)


# ---- the methods themselves ----------------------------------------------------------------------

cdef object do_allocate(MemoryMethods self, object addr, object size, object flags):
    cdef uint64_t base, length, bits
    cdef Request request
    check_open(self, "allocate")
    base = number("allocate", "addr", addr)
    length = number("allocate", "size", size)
    bits = number("allocate", "flags", flags)
    check_pages("allocate", "addr", base, length, "size")
    check_region_flags(bits, base)
    request = request_of(ALLOCATE, base, length, bits)
    return made(self.space, &request)


cdef object do_commit(MemoryMethods self, object va, object size, object flags):
    check_open(self, "commit")
    self.change(COMMIT, "commit", va, size, 0)


cdef object do_commit_ranges(MemoryMethods self, object ranges):
    self.change_ranges(COMMIT_RANGES, "commit_ranges", ranges)


cdef object do_decommit_ranges(MemoryMethods self, object ranges):
    self.change_ranges(DECOMMIT_RANGES, "decommit_ranges", ranges)


cdef object do_decommit(MemoryMethods self, object va, object size):
    check_open(self, "decommit")
    self.change(DECOMMIT, "decommit", va, size, 0)


cdef object do_protect(MemoryMethods self, object va, object size, object flags):
    cdef uint64_t protection
    check_open(self, "protect")
    protection = number("protect", "flags", flags)
    check_protection("protect", protection)
    self.change(PROTECT, "protect", va, size, protection)


cdef object do_free(MemoryMethods self, object va, object size):
    check_open(self, "free")
    self.change(FREE, "free", va, size, 0)


cdef object do_query(MemoryMethods self, object va, object smaps):
    cdef uint64_t address
    check_open(self, "query")
    address = number("query", "va", va)
    if address >= _features.user_space_end():
        raise InvalidArgument(
            "query", f"va 0x{address:x} is above user space, which ends at "
            f"0x{_features.user_space_end():x}")
    return query(self.space, self.process, address, switch("query", "smaps", smaps))


cdef object do_view(MemoryMethods self, object va, object size, object writable):
    cdef uint64_t start, length
    check_open(self, "view")
    start = number("view", "va", va)
    length = number("view", "size", size)
    check_bytes("view", start, length)
    return pinned_view(self.space, start, length, tristate("view", "writable", writable))


cdef object do_read(MemoryMethods self, object va, object size):
    cdef uint64_t start, length
    cdef Request request
    check_open(self, "read")
    start = number("read", "va", va)
    length = number("read", "size", size)
    check_bytes("read", start, length)
    request = request_of(CHECK, start, length, FLAG_READ)
    self.space.call(&request)
    try:
        data = PyBytes_FromStringAndSize(NULL, length)
    except MemoryError:
        raise OutOfMemory("read", f"no memory for a copy of {length} bytes") from None
    request.method = READ
    request.buffer = PyBytes_AS_STRING(data)
    self.space.call(&request)
    return data


cdef object do_write(MemoryMethods self, object va, object data):
    cdef uint64_t start
    cdef Py_buffer buffer
    cdef Request request
    cdef object written
    check_open(self, "write")
    start = number("write", "va", va)
    try:
        PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE)
    except MemoryError:
        raise
    except Exception as problem:
        raise InvalidArgument(
            "write", f"data is {describe(data)}, not a contiguous buffer") from problem
    try:
        check_bytes("write", start, buffer.len)
        request = request_of(WRITE, start, buffer.len, FLAG_WRITE)
        request.buffer = buffer.buf
        written = buffer.len        # before the bytes are there: what fails has written none
        self.space.call(&request)
        return written
    finally:
        PyBuffer_Release(&buffer)
