"""How much can be taken now: memory and mappings; and the default limits that follow from it.

The kernel hands out pages of a memory file one by one, and ends a process when there are none
left. So a call that takes many pages asks first; where the memory cgroup of this process has a
limit, every call that takes memory does (see ``cgroup.pxi``).

The default limits bound a VMM that is given no ``Limits``: enough that a runaway loop ends with an
error. Each stops one kind of loop while the machine, and this process, still have memory. What the
kernel itself counts more exactly has none:

* ``reserved``: addresses alone take no memory, and RLIMIT_AS bounds them.
* ``mappings``, ``mdl_mappings``: ``vm.max_map_count`` bounds what there really is. The ledger
  counts more, most of all where guard regions keep a million fragments in one mapping.

``committed``, ``locked`` and ``mdl_bytes`` may each take three quarters of the memory that is
available when the VMM is made: what the machine has, swap left out, or what the memory cgroup (and
each one above it) leaves, whichever is less. A commit that is never touched counts too: a program
that wants more than the machine has says so. ``regions`` and ``handles`` take a few hundred bytes
of this process each, ``mdls`` one or two kilobytes of the kernel's; RLIMIT_NOFILE often ends them
earlier.
"""

cpdef enum:
    MOST_REGIONS = 1 << 18
    MOST_HANDLES = 1 << 18
    MOST_MDLS = 1 << 16

cdef enum:
    BOUNDS = 9                  # as many as ``vmm_linux.limits.FIGURES`` has

cdef uint64_t NO_BOUND = <uint64_t>-1

cdef uint64_t defaults[BOUNDS]
# The second in which they were found. The machine's figures take 0.3 ms, a VMM a microsecond.
cdef int64_t defaults_second = -1


cdef uint64_t meminfo(const char *label, const char *other) noexcept nogil:
    """The sum of two figures of /proc/meminfo in bytes, NO_NUMBER where it cannot be read."""
    cdef char text[4096]
    if read_text(b"/proc/meminfo", text, sizeof(text)) < 1:
        return NO_NUMBER
    return 1024 * (number_after(text, label) + number_after(text, other))


cpdef uint64_t available_bytes() noexcept nogil:
    """Bytes of memory and swap that can be taken now; 2**64 - 1 where that is unknown."""
    return meminfo(b"MemAvailable:", b"SwapFree:")


cpdef uint64_t available_without_swap() noexcept nogil:
    """Bytes of memory, swap left out; without a descriptor to ask with, those that are free."""
    cdef sysinfo_t now
    cdef uint64_t available = meminfo(b"MemAvailable:", b"no such label")
    if available == NO_NUMBER and sysinfo(&now) == 0:
        return <uint64_t>now.freeram * now.mem_unit
    return available


cdef int check_headroom(uint64_t size) noexcept nogil:
    """Whether ``size`` bytes more are available now: 0, also where that is unknown.

    -ENOMEM: the machine has less. -EDQUOT: the memory cgroup has.
    """
    cdef sysinfo_t now
    if not group_has_headroom(size):
        return -EDQUOT
    if sysinfo(&now) == 0 and size <= <uint64_t>now.freeram * now.mem_unit // 2:
        return 0
    return 0 if size <= available_bytes() else -ENOMEM


cdef uint64_t mapping_count() noexcept nogil:
    """How many mappings this process has, 0 where that is unknown."""
    cdef char text[4096]
    cdef uint64_t lines = 0
    cdef Py_ssize_t length, i
    cdef int fd = openat(b"/proc/thread-self/maps", O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return 0
    length = read(fd, text, sizeof(text))
    while length > 0:
        for i in range(length):
            lines += text[i] == c'\n'
        length = read(fd, text, sizeof(text))
    close(fd)
    return lines


def memory_headroom(uint64_t available):
    """Bytes that this process can take, of those that the machine has available.

    That is what the memory cgroup leaves, swap left out, where it leaves less.
    """
    cdef int i
    if asked_cgroup is None:
        found = memory_cgroup()
        if found is not None:
            set_cgroup(found)
    for i in range(level_count.load()):
        available = min(available, memory_left_at(&levels[i]))
    return available


cdef void fill_bounds(uint64_t *bounds, uint64_t memory) noexcept:
    bounds[0] = MOST_REGIONS
    bounds[1] = bounds[4] = bounds[7] = NO_BOUND
    bounds[2] = bounds[3] = bounds[6] = memory // 4 * 3
    bounds[5] = MOST_MDLS
    bounds[8] = MOST_HANDLES


def bounds_for(uint64_t memory):
    """The default limits where so many bytes are available; None: no limit."""
    cdef uint64_t bounds[BOUNDS]
    cdef list found = []
    fill_bounds(bounds, memory)
    for bound in bounds:
        found.append(None if bound == NO_BOUND else bound)
    return tuple(found)


cdef const uint64_t *default_bounds() except NULL:
    """The default limits of this second, as BOUNDS numbers in the order of ``limits.FIGURES``.

    They stay where they are and change at a later call. Also finds the memory cgroup, and its
    limits, that are asked from now on.
    """
    global defaults_second
    cdef int64_t second = milliseconds() // 1000
    if second != defaults_second:
        fill_bounds(defaults, memory_headroom(available_without_swap()))
        find_limits()
        defaults_second = second
    return defaults
