"""Which features this kernel has, found by trying.

A version number says little: distributions carry features back, sandboxes take them away. So each
feature is tried once in each process, on first use, and the result kept. A probe leaves no mapping
and no descriptor behind. Where it cannot be made (no descriptor left, no memory) the feature counts
as absent for now and is tried again.

Every feature has a switch, so that the way around it can be tested on a kernel that has it:
``without(...)``, or ``VMM_LINUX_WITHOUT=NAME,NAME`` in the environment of a process.
"""

cdef extern from *:
    """
    #ifndef MADV_DONTNEED_LOCKED
    #define MADV_DONTNEED_LOCKED 24     /* Linux 5.18 */
    #endif
    """
    enum:
        MADV_DONTNEED_LOCKED


class Feature(IntEnum):
    """What a kernel may lack, with the version that brought it."""

    #: ``ioctl`` on ``/proc/PID/maps`` that finds one mapping (6.11).
    PROCMAP_QUERY = FEATURE_PROCMAP_QUERY
    #: ``ioctl`` on ``/proc/PID/pagemap`` with the categories of pages (6.7).
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


cdef enum Presence:
    UNKNOWN = 0, ABSENT = 1, PRESENT = 2

# Per feature: the fork generation that probed (a child may live in another sandbox than its
# parent, so it probes again) times 4, plus the Presence.
cdef atomic[uint64_t] found_features[FEATURE_COUNT]
# Per feature: how many switches hold it off.
cdef atomic[int] held_off[FEATURE_COUNT]


cdef bint has(int feature) noexcept nogil:
    """Whether this process may use ``feature`` (a ``FEATURE_`` number). Never fails."""
    return presence(feature) == PRESENT


cdef bint lacks(int feature) noexcept nogil:
    """Whether ``feature`` is known to be absent: after a shortage in the probe it is not."""
    return presence(feature) == ABSENT


cdef bint is_switched_off(int feature) noexcept nogil:
    return held_off[feature].load() > 0


cdef Presence presence(int feature) noexcept nogil:
    """Whether there is a feature, probed now if that is unknown."""
    cdef uint64_t generation, found
    cdef Presence result
    if not 0 <= feature < FEATURE_COUNT or is_switched_off(feature):
        return ABSENT
    generation = fork_generation()
    found = found_features[feature].load()
    if found & 3 != UNKNOWN and found >> 2 == generation:
        return <Presence>(found & 3)
    # Two threads may probe at once: both find the same.
    result = probe(feature)
    if result != UNKNOWN:
        found_features[feature].store(generation << 2 | <uint64_t>result)
    return result


cdef Presence probe(int feature) noexcept nogil:
    if feature == FEATURE_PROCMAP_QUERY:
        return probe_procmap_query()
    elif feature == FEATURE_PAGEMAP_SCAN:
        return probe_pagemap_scan()
    elif feature == FEATURE_PAGEMAP:
        return probe_pagemap()
    elif feature == FEATURE_PAGEMAP_GUARD:
        return probe_pagemap_guard()
    elif feature == FEATURE_GUARD_REGIONS:
        return probe_advice(MADV_GUARD_INSTALL)
    elif feature == FEATURE_DONTNEED_LOCKED:
        return probe_advice(MADV_DONTNEED_LOCKED)
    elif feature == FEATURE_MEMFD_NOEXEC_SEAL:
        return probe_noexec_seal()
    elif feature == FEATURE_PROCESS_VM:
        return probe_process_vm()
    elif feature == FEATURE_FILE_HANDLES:
        return probe_file_handles()
    elif feature == FEATURE_VECTORED_GUARDS:
        return probe_vectored_guards()
    elif feature == FEATURE_ANONYMOUS_NAMES:
        return probe_anonymous_names()
    else:
        return probe_advice(MADV_HUGEPAGE)


cdef Presence verdict(intptr_t result) noexcept nogil:
    """What a probe's result means; a shortage says nothing about the feature."""
    if result >= 0:
        return PRESENT
    return UNKNOWN if -result in (EAGAIN, EINTR, EMFILE, ENFILE, ENOMEM) else ABSENT


cdef Presence probe_advice(int advice) noexcept nogil:
    cdef intptr_t address
    cdef int result
    # madvise(2) promises this result for zero bytes too. But emulations of Linux accept any
    # advice about nothing, so only a refusal is believed.
    if madvise(0, 0, advice) < 0:
        return ABSENT
    address = spare_page()
    if failed(address):
        return UNKNOWN
    result = madvise(<uintptr_t>address, PAGE_SIZE, advice)
    munmap(<uintptr_t>address, PAGE_SIZE)
    return verdict(result)


cdef Presence probe_procmap_query() noexcept nogil:
    cdef ProcmapQuery query
    cdef int result
    cdef int fd = openat(b"/proc/thread-self/maps", O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return verdict(fd)
    memset(&query, 0, sizeof(query))
    query.size = sizeof(query)
    query.query_flags = PROCMAP_COVERING_OR_NEXT
    result = procmap_query(fd, &query)
    close(fd)
    return verdict(result)


cdef Presence probe_pagemap_scan() noexcept nogil:
    cdef ScanArgument scan
    cdef PageRegion region
    cdef int result
    cdef int fd = open_pagemap()
    if fd < 0:
        return verdict(fd)
    memset(&scan, 0, sizeof(scan))
    scan.size = sizeof(scan)
    scan.start = <uintptr_t>&scan & ~<uintptr_t>(PAGE_SIZE - 1)
    scan.end = scan.start + PAGE_SIZE
    scan.vec = <uint64_t>&region
    scan.vec_len = 1
    scan.return_mask = PAGE_IS_PRESENT | PAGE_IS_HUGE
    result = pagemap_scan(fd, &scan)
    close(fd)
    return verdict(result)


cdef Presence probe_pagemap() noexcept nogil:
    cdef uint64_t entry = 0
    cdef intptr_t result
    cdef int fd = open_pagemap()
    if fd < 0:
        return verdict(fd)
    result = read_pagemap(fd, <uintptr_t>&entry, &entry)
    close(fd)
    return ABSENT if 0 <= result < PAGEMAP_ENTRY else verdict(result)


cdef Presence probe_pagemap_guard() noexcept nogil:
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
    result = madvise(<uintptr_t>address, PAGE_SIZE, MADV_GUARD_INSTALL)
    if result == 0:
        result = read_pagemap(fd, <uintptr_t>address, &entry)
    munmap(<uintptr_t>address, PAGE_SIZE)
    close(fd)
    if result < 0:
        return verdict(result)
    return PRESENT if entry & PAGEMAP_GUARD else ABSENT


cdef Presence probe_noexec_seal() noexcept nogil:
    cdef int fd = memfd_create(b"probe", MFD_CLOEXEC | MFD_NOEXEC_SEAL)
    if fd >= 0:
        close(fd)
    return verdict(fd)


cdef Presence probe_file_handles() noexcept nogil:
    cdef uint64_t name
    cdef int fd = memfd_create(b"vmm_linux probe", MFD_CLOEXEC)
    cdef Presence result
    if fd < 0:
        return verdict(fd)
    result = verdict(file_handle(fd, &name))
    close(fd)
    return result


cdef Presence probe_vectored_guards() noexcept nogil:
    cdef iovec range
    cdef intptr_t result, address
    cdef int pidfd = pidfd_open_self()
    if pidfd < 0:
        return verdict(pidfd)
    address = spare_page()
    if failed(address):
        close(pidfd)
        return UNKNOWN
    range.iov_base = <void *>address
    range.iov_len = PAGE_SIZE
    result = process_madvise(pidfd, &range, 1, MADV_GUARD_INSTALL)
    munmap(<uintptr_t>address, PAGE_SIZE)
    close(pidfd)
    return verdict(result)


cdef Presence probe_anonymous_names() noexcept nogil:
    cdef int result
    cdef intptr_t address = spare_page()
    if failed(address):
        return UNKNOWN
    result = name_memory(<uintptr_t>address, PAGE_SIZE, b"vmm_linux probe")
    munmap(<uintptr_t>address, PAGE_SIZE)
    return verdict(result)


cdef Presence probe_process_vm() noexcept nogil:
    cdef char here = 0, there = 0
    cdef intptr_t result = process_vm_readv(&here, <uintptr_t>&there, 1)
    if result == 1:
        result = process_vm_writev(&here, <uintptr_t>&there, 1)
    return verdict(result)


def available(feature):
    """Whether this process may use ``feature``; a number that names none is a ValueError."""
    return bool(has(Feature(feature)))


def state(feature):
    """The state of ``feature``, as one of four words.

    ``"present"``, ``"absent"``, ``"switched off"`` (by ``without`` or the environment), or
    ``"unknown"``: the probe could not be made, and the feature counts as absent until it can.
    """
    cdef int number = Feature(feature)
    if is_switched_off(number):
        return "switched off"
    return ("unknown", "absent", "present")[<int>presence(number)]


@cython.final
cdef class SwitchedOff:
    """While this context lasts these features are absent, for every thread."""

    cdef tuple features

    __reduce__ = refuse_copies("call without() again")

    def __init__(self, features):
        self.features = tuple(map(Feature, features))

    def __enter__(self):
        for feature in self.features:
            held_off[<int>feature].fetch_add(1)

    def __exit__(self, *problem):
        for feature in self.features:
            held_off[<int>feature].fetch_sub(1)


def without(*features):
    """In the ``with`` block these features are absent, for every thread; for tests."""
    return SwitchedOff(features)


def _switch_off(names):
    """Switch off for good what a list like ``PAGEMAP,PROCESS_VM`` names."""
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
