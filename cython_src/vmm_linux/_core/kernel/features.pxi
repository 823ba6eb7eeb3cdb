"""What this kernel gives, found by trying, and the facts of this machine.

A version number says little: distributions carry features back, sandboxes take them
away. So each feature is tried, on first use, once in each process, and the answer kept.
A probe leaves no mapping and no descriptor behind. Where it could not be made at all (no
descriptor left, no memory) the feature counts as absent for now and is tried again.

Every feature has a switch, so that the way around it can be tested on a kernel that has
it: ``without(...)``, or ``VMM_LINUX_WITHOUT=NAME,NAME`` in the environment of a process.
"""

class Feature(IntEnum):
    """What a kernel may lack, with the version that brought it."""

    #: ``ioctl`` on ``/proc/PID/maps`` that finds one mapping (6.11).
    PROCMAP_QUERY = FEATURE_PROCMAP_QUERY
    #: ``ioctl`` on ``/proc/PID/pagemap`` that tells the categories of pages (6.7).
    PAGEMAP_SCAN = FEATURE_PAGEMAP_SCAN
    #: A readable ``/proc/self/pagemap``.
    PAGEMAP = FEATURE_PAGEMAP
    #: Guard regions show in ``/proc/PID/pagemap``, bit 58 (6.15).
    PAGEMAP_GUARD = FEATURE_PAGEMAP_GUARD
    #: ``MADV_GUARD_INSTALL`` and ``MADV_GUARD_REMOVE`` on private anonymous memory (6.13).
    GUARD_REGIONS = FEATURE_GUARD_REGIONS
    #: ``MADV_DONTNEED_LOCKED`` (5.18).
    DONTNEED_LOCKED = FEATURE_DONTNEED_LOCKED
    #: ``MFD_NOEXEC_SEAL`` (6.3).
    MEMFD_NOEXEC_SEAL = FEATURE_MEMFD_NOEXEC_SEAL
    #: ``process_vm_readv`` and ``process_vm_writev`` on oneself, which sandboxes block.
    PROCESS_VM = FEATURE_PROCESS_VM
    #: ``MADV_HUGEPAGE`` is accepted.
    TRANSPARENT_HUGE_PAGES = FEATURE_TRANSPARENT_HUGE_PAGES
    #: ``name_to_handle_at`` on a memfd, which sandboxes block.
    FILE_HANDLES = FEATURE_FILE_HANDLES
    #: ``process_madvise`` on oneself with guards (6.13).
    VECTORED_GUARDS = FEATURE_VECTORED_GUARDS
    #: ``prctl`` with PR_SET_VMA_ANON_NAME, where CONFIG_ANON_VMA_NAME is set (5.17).
    ANONYMOUS_NAMES = FEATURE_ANONYMOUS_NAMES


cdef enum Answer:
    UNKNOWN = 0
    ABSENT = 1
    PRESENT = 2

# Per feature: the generation that asked (a child may live in another sandbox than its
# parent, so it asks again) times 4, plus the Answer.
cdef atomic[uint64_t] answers[FEATURE_COUNT]
# Per feature: how many switches hold it off.
cdef atomic[int] held_off[FEATURE_COUNT]

cdef size_t page = <size_t>sysconf(_SC_PAGESIZE)
cdef atomic[uintptr_t] found_end
cdef atomic[uintptr_t] found_minimum
cdef atomic[size_t] found_huge

cdef enum:
    PAGEMAP_ENTRY = 8           # bytes a page has in /proc/PID/pagemap
    PAGEMAP_GUARD_BIT = 58
    MAX_ERRNO = 4095            # addresses this close below 2^64 are -errno


cdef bint has(int feature) noexcept nogil:
    """Whether this process may use ``feature`` (a ``FEATURE_`` number). Never fails."""
    return answer_for(feature) == PRESENT


cdef bint lacks(int feature) noexcept nogil:
    """Whether ``feature`` is known to be absent: a shortage in the probe does not say so."""
    return answer_for(feature) == ABSENT


cdef Answer answer_for(int feature) noexcept nogil:
    """What is known of a feature, asked for now if nothing was."""
    cdef uint64_t generation, known
    cdef Answer answer
    if not 0 <= feature < FEATURE_COUNT or held_off[feature].load() > 0:
        return ABSENT
    generation = fork_generation()
    known = answers[feature].load()
    if known & 3 != UNKNOWN and known >> 2 == generation:
        return <Answer>(known & 3)
    # Two threads may probe at once: both find the same.
    answer = probe(feature)
    if answer != UNKNOWN:
        answers[feature].store(generation << 2 | <uint64_t>answer)
    return answer


cdef Answer probe(int feature) noexcept nogil:
    if feature == FEATURE_PROCMAP_QUERY:
        return probe_procmap_query()
    if feature == FEATURE_PAGEMAP_SCAN:
        return probe_pagemap_scan()
    if feature == FEATURE_PAGEMAP:
        return probe_pagemap()
    if feature == FEATURE_PAGEMAP_GUARD:
        return probe_pagemap_guard()
    if feature == FEATURE_GUARD_REGIONS:
        return probe_advice(MADV_GUARD_INSTALL)
    if feature == FEATURE_DONTNEED_LOCKED:
        return probe_advice(MADV_DONTNEED_LOCKED)
    if feature == FEATURE_MEMFD_NOEXEC_SEAL:
        return probe_noexec_seal()
    if feature == FEATURE_PROCESS_VM:
        return probe_process_vm()
    if feature == FEATURE_FILE_HANDLES:
        return probe_file_handles()
    if feature == FEATURE_VECTORED_GUARDS:
        return probe_vectored_guards()
    if feature == FEATURE_ANONYMOUS_NAMES:
        return probe_anonymous_names()
    return probe_advice(MADV_HUGEPAGE)


cdef Answer verdict(intptr_t result) noexcept nogil:
    """What a probe's result says; a shortage says nothing about the feature."""
    if result >= 0:
        return PRESENT
    if -result in (EAGAIN, EINTR, EMFILE, ENFILE, ENOMEM):
        return UNKNOWN
    return ABSENT


cdef bint failed(intptr_t address) noexcept nogil:
    return -MAX_ERRNO <= address < 0


cdef uintptr_t page_of(const void *pointer) noexcept nogil:
    return <uintptr_t>pointer & ~<uintptr_t>(page - 1)


cdef intptr_t spare_page() noexcept nogil:
    """A new page, readable and writable, or ``-errno``; the caller unmaps it."""
    cdef intptr_t address = mmap(
        0, page, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if not failed(address):
        # Where mlockall(MCL_FUTURE) is in force it is born locked, and most advice is
        # refused for locked memory.
        munlock(<uintptr_t>address, page)
    return address


cdef Answer probe_advice(int advice) noexcept nogil:
    cdef intptr_t address
    cdef int result
    # madvise(2) promises this answer for no bytes at all; but emulations of Linux are
    # known to accept any advice about nothing, so only its "no" is believed.
    if madvise(0, 0, advice) < 0:
        return ABSENT
    address = spare_page()
    if failed(address):
        return UNKNOWN
    result = madvise(<uintptr_t>address, page, advice)
    munmap(<uintptr_t>address, page)
    return verdict(result)


cdef Answer probe_procmap_query() noexcept nogil:
    cdef ProcmapQuery query
    cdef int result
    cdef int fd = openat(
        b"/proc/thread-self/maps", O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return verdict(fd)
    memset(&query, 0, sizeof(query))
    query.size = sizeof(query)
    query.query_flags = PROCMAP_COVERING_OR_NEXT
    result = procmap_query(fd, &query)
    close(fd)
    return verdict(result)


cdef int open_pagemap() noexcept nogil:
    return openat(b"/proc/thread-self/pagemap", O_RDONLY | O_CLOEXEC)


cdef Answer probe_pagemap_scan() noexcept nogil:
    cdef ScanArgument scan
    cdef PageRegion region
    cdef int result
    cdef int fd = open_pagemap()
    if fd < 0:
        return verdict(fd)
    memset(&scan, 0, sizeof(scan))
    scan.size = sizeof(scan)
    scan.start = page_of(&scan)
    scan.end = scan.start + page
    scan.vec = <uint64_t>&region
    scan.vec_len = 1
    scan.return_mask = PAGE_IS_PRESENT | PAGE_IS_HUGE
    result = pagemap_scan(fd, &scan)
    close(fd)
    return verdict(result)


cdef intptr_t read_pagemap(int fd, uintptr_t address, uint64_t *entry) noexcept nogil:
    """The entry of one page: 8 bytes read, 0 beyond user space, or ``-errno``."""
    return pread(fd, entry, PAGEMAP_ENTRY, address // page * PAGEMAP_ENTRY)


cdef Answer probe_pagemap() noexcept nogil:
    cdef uint64_t entry = 0
    cdef intptr_t result
    cdef int fd = open_pagemap()
    if fd < 0:
        return verdict(fd)
    result = read_pagemap(fd, <uintptr_t>&entry, &entry)
    close(fd)
    return ABSENT if 0 <= result < PAGEMAP_ENTRY else verdict(result)


cdef Answer probe_pagemap_guard() noexcept nogil:
    cdef uint64_t entry = 0
    cdef intptr_t address, result
    cdef int fd
    if madvise(0, 0, MADV_GUARD_INSTALL) < 0:
        return ABSENT
    fd = open_pagemap()
    if fd < 0:
        return verdict(fd)
    address = spare_page()
    if failed(address):
        close(fd)
        return UNKNOWN
    result = madvise(<uintptr_t>address, page, MADV_GUARD_INSTALL)
    if result == 0:
        result = read_pagemap(fd, <uintptr_t>address, &entry)
    munmap(<uintptr_t>address, page)
    close(fd)
    if result < 0:
        return verdict(result)
    return PRESENT if entry >> PAGEMAP_GUARD_BIT & 1 else ABSENT


cdef Answer probe_noexec_seal() noexcept nogil:
    cdef int fd = memfd_create(
        b"probe", MFD_CLOEXEC | MFD_NOEXEC_SEAL)
    if fd >= 0:
        close(fd)
    return verdict(fd)


cdef Answer probe_file_handles() noexcept nogil:
    cdef uint64_t low, high
    cdef int fd = memfd_create(b"vmm_linux probe", MFD_CLOEXEC)
    cdef Answer answer
    if fd < 0:
        return verdict(fd)
    answer = verdict(file_handle(fd, &low, &high))
    close(fd)
    return answer


cdef Answer probe_vectored_guards() noexcept nogil:
    cdef iovec range
    cdef intptr_t result
    cdef intptr_t address
    cdef int pidfd = pidfd_open_self()
    if pidfd < 0:
        return verdict(pidfd)
    address = spare_page()
    if failed(address):
        close(pidfd)
        return UNKNOWN
    range.iov_base = <void *>address
    range.iov_len = page
    result = process_madvise(pidfd, &range, 1, MADV_GUARD_INSTALL)
    munmap(<uintptr_t>address, page)
    close(pidfd)
    return verdict(result)


cdef Answer probe_anonymous_names() noexcept nogil:
    cdef int result
    cdef intptr_t address = spare_page()
    if failed(address):
        return UNKNOWN
    result = name_memory(<uintptr_t>address, page, b"vmm_linux probe")
    munmap(<uintptr_t>address, page)
    return verdict(result)


cdef Answer probe_process_vm() noexcept nogil:
    cdef char here = 0
    cdef char there = 0
    cdef intptr_t result = process_vm_readv(&here, <uintptr_t>&there, 1)
    if result == 1:
        result = process_vm_writev(&here, <uintptr_t>&there, 1)
    return verdict(result)


cpdef size_t page_size() noexcept nogil:
    """The kernel's page in bytes, asked once."""
    return page


cpdef uintptr_t user_space_end() noexcept nogil:
    """The first address that no process on this machine can ever map.

    Asked of the kernel once. Should it not be able to say (see the two searches below),
    the answer is the next power of two above this thread's stack, and the next call asks
    again.
    """
    cdef uintptr_t end = found_end.load()
    cdef uintptr_t here
    if end == 0:
        end = user_space_end_by_pagemap()
        if end == 0:
            end = user_space_end_by_mmap()
        if end != 0:
            found_end.store(end)
        else:
            here = <uintptr_t>&here
            end = 1
            while end != 0 and end <= here:
                end <<= 1
    return end


cpdef uintptr_t user_space_end_by_pagemap() noexcept nogil:
    """:func:`user_space_end` as the end of ``/proc/self/pagemap``, or 0 if that does not tell.

    It maps nothing, so that neither the map-count limit nor RLIMIT_AS matter.
    """
    cdef uintptr_t last = 0
    cdef uintptr_t bit = <uintptr_t>1 << 55
    cdef uint64_t entry
    cdef intptr_t read
    cdef int fd
    if held_off[<int>FEATURE_PAGEMAP].load() > 0:
        return 0
    fd = open_pagemap()
    if fd < 0:
        return 0
    # The highest page of user space, bit by bit. Bits above 55 can be a tag that the kernel
    # takes away (aarch64, x86 with LAM), which would let a page answer under two addresses.
    while bit >= page:
        read = read_pagemap(fd, last | bit, &entry)
        if read < 0:
            close(fd)
            return 0
        if read == PAGEMAP_ENTRY:
            last |= bit
        bit >>= 1
    close(fd)
    # Nothing found: not readable. Everything found: it may go on above bit 55.
    if last == 0 or last + page == <uintptr_t>1 << 56:
        return 0
    return last + page


cpdef uintptr_t user_space_end_by_mmap() noexcept nogil:
    """:func:`user_space_end` found by mapping single pages, or 0 if not even one can be had.

    ENOMEM is what the kernel says beyond user space, and at the map-count limit and under
    RLIMIT_AS too. So a page anywhere must be had before and after.
    """
    cdef uintptr_t last = 0
    cdef uintptr_t bit = (<uintptr_t>1) << (sizeof(uintptr_t) * 8 - 1)
    if not can_map_somewhere():
        return 0
    while bit >= page:
        if can_be_mapped(last | bit):
            last |= bit
        bit >>= 1
    if not can_map_somewhere():
        return 0
    return last + page


cdef bint can_map_somewhere() noexcept nogil:
    cdef intptr_t address = spare_page()
    if failed(address):
        return False
    munmap(<uintptr_t>address, page)
    return True


cdef bint can_be_mapped(uintptr_t address) noexcept nogil:
    """Whether the page at ``address`` belongs to user space."""
    cdef intptr_t result = mmap(
        address, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS
        | MAP_FIXED_NOREPLACE, -1, 0)
    if failed(result):
        # Taken, too low for an ordinary user, or not to be locked (mlockall): all inside.
        return -result in (EEXIST, EPERM, EAGAIN)
    munmap(<uintptr_t>result, page)
    # A kernel before 4.17 takes the address as a hint.
    return <uintptr_t>result == address


cdef uint64_t number_in(const char *path) noexcept nogil:
    """The number that a file of /proc or /sys holds, or 0 if it cannot be read."""
    cdef uint64_t value = 0
    cdef char text[32]
    cdef intptr_t length, i
    cdef int fd = openat(path, O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return 0
    length = read(fd, text, sizeof(text))
    close(fd)
    for i in range(length):
        if not c'0' <= text[i] <= c'9':
            break
        value = value * 10 + <uint64_t>(text[i] - c'0')
    return value


cpdef uintptr_t mmap_min_addr() noexcept nogil:
    """The lowest address that may be mapped: sysctl ``vm.mmap_min_addr``, a page at least.

    Asked once; 65536, the usual value, for as long as the sysctl cannot be read.
    """
    cdef uintptr_t value = found_minimum.load()
    if value == 0:
        value = number_in(b"/proc/sys/vm/mmap_min_addr")
        if value == 0:
            return max(<uintptr_t>65536, page)
        value = max(value, <uintptr_t>page)
        found_minimum.store(value)
    return value


cpdef size_t huge_page_size() noexcept nogil:
    """The size of a transparent huge page in bytes, asked once; 0 where the kernel has none."""
    cdef size_t value = found_huge.load()
    if value == 0:
        value = number_in(b"/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
        found_huge.store(value)
    return value


def available(feature):
    """Whether this process may use ``feature``; a number that names none is a ValueError."""
    return bool(has(Feature(feature)))


def state(feature):
    """What is known of ``feature``: one of four words.

    ``"present"``, ``"absent"``, ``"switched off"`` (by ``without`` or the environment), or
    ``"unknown"``: it could not be asked for now, and counts as absent until it can.
    """
    cdef int number = Feature(feature)
    cdef Answer answer
    if held_off[number].load() > 0:
        return "switched off"
    answer = answer_for(number)
    if answer == UNKNOWN:
        return "unknown"
    return "present" if answer == PRESENT else "absent"


@contextmanager
def without(*features):
    """In the ``with`` block these features are absent, for every thread; for tests."""
    chosen = list(map(Feature, features))
    for feature in chosen:
        held_off[<int>feature].fetch_add(1)
    try:
        yield
    finally:
        for feature in chosen:
            held_off[<int>feature].fetch_sub(1)


def _switch_off(names):
    """Switches off for good what a list like ``PAGEMAP,PROCESS_VM`` names."""
    for name in filter(None, map(str.strip, names.split(","))):
        try:
            feature = Feature[name.upper()]
        except KeyError:
            warnings.warn(
                f"VMM_LINUX_WITHOUT names no feature {name!r}; there are: "
                + ", ".join(Feature.__members__), RuntimeWarning, stacklevel=2)
        else:
            held_off[<int>feature].fetch_add(1)


_switch_off(os.environ.get("VMM_LINUX_WITHOUT", ""))
