"""How much could be taken now: memory, and mappings.

The kernel hands out pages of a memory file one by one and ends somebody's process when there are
none left; whoever wants a large number of pages now has to ask first. So does whoever wants any
where the memory cgroup of this process has a limit (see ``_group_room.pyx``).
"""

cdef uint64_t meminfo(const char *label, const char *other) noexcept nogil:
    """The sum of two figures of /proc/meminfo in bytes; 2**64 - 1: it is not told."""
    cdef char text[4096]
    cdef Py_ssize_t length
    cdef int fd = openat(b"/proc/meminfo", O_RDONLY | O_CLOEXEC)
    if fd < 0:
        return <uint64_t>-1
    length = read(fd, text, sizeof(text) - 1)
    close(fd)
    if length <= 0:
        return <uint64_t>-1
    text[length] = 0
    return 1024 * (number_after(text, label) + number_after(text, other))


cpdef uint64_t available_bytes() noexcept nogil:
    """Bytes of memory and swap that could be taken now; 2**64 - 1: it is not told."""
    return meminfo(b"MemAvailable:", b"SwapFree:")


cpdef uint64_t available_without_swap() noexcept nogil:
    """Bytes of memory, swap left out; without a descriptor to ask with, those that are free."""
    cdef sysinfo_t now
    cdef uint64_t told = meminfo(b"MemAvailable:", b"no such label")
    if told == <uint64_t>-1 and sysinfo(&now) == 0:
        return <uint64_t>now.freeram * now.mem_unit
    return told


cdef int check_headroom(uint64_t size) noexcept nogil:
    """Whether ``size`` bytes more could be had now: 0, also where the kernel does not tell.

    -ENOMEM: the machine has less. -EDQUOT: the memory cgroup has.
    """
    cdef sysinfo_t now
    if not group_has_headroom(size):
        return -EDQUOT
    if sysinfo(&now) == 0 and size <= <uint64_t>now.freeram * now.mem_unit // 2:
        return 0
    return 0 if size <= available_bytes() else -ENOMEM


cdef uint64_t mapping_count() noexcept nogil:
    """How many mappings this process has, or 0 where the kernel does not tell."""
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
