"""The memory cgroup of this process: where it is, and how much it leaves.

The kernel ends a process of a full cgroup by SIGKILL at the touch of one page too many. So a call
that takes memory asks first. The answer reserves nothing: what other threads, other processes of
the cgroup and this process's own Python objects take between the answer and the touch is unknown.

The cgroup is found when the first VMM is made. A child of a fork is in the same one. A move to
another cgroup goes unnoticed. A new limit, where none was, is noticed when the next VMM is made.
The files of levels that have a limit are read at each question, by path: a descriptor would be one
of the process's few. Where no level has a limit, a question reads one variable.

A reading takes some 20 µs. One that finds headroom answers for a while, so that many small calls
share it.
"""

cdef extern from "<sys/sysinfo.h>" nogil:
    struct sysinfo_t "sysinfo":
        unsigned long totalram
        unsigned long freeram
        unsigned long freeswap
        unsigned int mem_unit
    int sysinfo(sysinfo_t *)

cdef extern from "<time.h>" nogil:
    int CLOCK_MONOTONIC_COARSE

cdef enum:
    MOST_LEVELS = 32            # of those above each other, from the process's own on
    STATISTICS = 16 << 10       # bytes of memory.stat, which has some three thousand
    AT_ONCE = 64 << 20          # bytes that calls may take, at most, until the next reading
    FOR_MILLISECONDS = 50       # and how long
    # The share of what is taken that page tables and the records of a memory file add.
    OVERHEAD = 128
    # What stays free for the rest of the process, which has an exception to make. The kernel's
    # figures lag behind by as much, too.
    SPARE = 2 << 20
    SPARE_SHARE = 32            # of a small limit

# A level of version 1 without a limit has more than any machine: the largest count of pages.
NO_LIMIT = 1 << 62
cdef uint64_t UNLIMITED = NO_LIMIT

cdef struct Level:
    # The paths of its files.
    const char *limit
    const char *usage
    const char *swap_limit
    const char *swap_usage
    const char *statistics
    bint first_version, is_limited

cdef Level levels[MOST_LEVELS]
cdef atomic[int] level_count
# Whether any level has a limit that binds before the machine does.
cdef atomic[int] any_limit
cdef atomic[int] huge_everywhere
# Bytes that may still be taken without another reading, and until when, in milliseconds.
cdef atomic[int64_t] budget
cdef atomic[int64_t] budget_ends


cdef uint64_t limit_of(const Level *this) noexcept nogil:
    """The limit of a level in bytes, NO_NUMBER where it has none."""
    cdef uint64_t limit = read_number(this.limit)
    return limit if limit < UNLIMITED else NO_NUMBER


cdef uint64_t cache_of(const Level *this) noexcept nogil:
    """Bytes of files that the kernel gives up before it ends a process; none of a memory file."""
    cdef char text[STATISTICS]
    read_text(this.statistics, text, sizeof(text))
    # Version 1 has the figures of the cgroup alone first, and these with those below it.
    if this.first_version:
        return (number_after(text, b"\ntotal_inactive_file ")
                + number_after(text, b"\ntotal_active_file "))
    return number_after(text, b"\ninactive_file ") + number_after(text, b"\nactive_file ")


cdef uint64_t swap_of(const Level *this, uint64_t memory) noexcept nogil:
    """Bytes that a level can still swap out, where its limit leaves ``memory`` bytes."""
    cdef sysinfo_t now
    cdef uint64_t limit, usage, left, free_swap
    if sysinfo(&now) != 0 or now.freeswap == 0:
        return 0
    free_swap = <uint64_t>now.freeswap * now.mem_unit
    limit = read_number(this.swap_limit)
    usage = read_number(this.swap_usage)
    if limit == NO_NUMBER or usage == NO_NUMBER:
        return free_swap
    left = limit - min(limit, usage)
    if this.first_version:      # which counts memory and swap together there
        left -= min(left, memory)
    return min(left, free_swap)


cdef uint64_t headroom_at(const Level *this, uint64_t enough) noexcept nogil:
    """Bytes that a level can still take; NO_NUMBER without a limit. Exact below ``enough``."""
    cdef uint64_t limit = limit_of(this)
    cdef uint64_t usage = read_number(this.usage)
    cdef uint64_t spare, left
    if limit == NO_NUMBER or usage == NO_NUMBER:
        return NO_NUMBER
    spare = min(<uint64_t>SPARE, limit // SPARE_SHARE)
    left = limit - min(limit, usage)
    if left < enough + spare:
        limit += cache_of(this) + swap_of(this, left)
        left = limit - min(limit, usage)
    return left - min(left, spare)


cdef uint64_t memory_left_at(const Level *this) noexcept nogil:
    """Bytes up to the limit of a level, swap left out; NO_NUMBER where it has none."""
    cdef uint64_t limit = limit_of(this)
    cdef uint64_t usage = read_number(this.usage)
    if limit == NO_NUMBER or usage == NO_NUMBER:
        return NO_NUMBER
    usage -= min(usage, cache_of(this))
    return limit - min(limit, usage)


cdef int64_t milliseconds() noexcept nogil:
    """A clock that costs nanoseconds."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return <int64_t>now.tv_sec * 1000 + now.tv_nsec // 1000000


cdef bint group_has_limit() noexcept nogil:
    """Whether there is anything to ask."""
    return any_limit.load() != 0


cdef bint is_huge_everywhere() noexcept nogil:
    """Whether the kernel gives huge pages to all private memory, not to HUGE regions alone."""
    return huge_everywhere.load() != 0


cdef bint group_has_headroom(uint64_t size) noexcept nogil:
    """Whether the cgroup has so many bytes more; true where that is unknown."""
    if any_limit.load() == 0 or size == 0:
        return True
    if (size <= AT_ONCE and budget.fetch_sub(<int64_t>size) >= <int64_t>size
            and milliseconds() < budget_ends.load()):
        return True
    return read_headroom(size)


cdef bint read_headroom(uint64_t size) noexcept nogil:
    """``group_has_headroom`` by the cgroup's files."""
    cdef uint64_t wanted = size + size // OVERHEAD
    cdef uint64_t enough = wanted + 2 * AT_ONCE     # more than that makes no difference
    cdef uint64_t left = enough
    cdef int i
    for i in range(level_count.load()):
        if levels[i].is_limited:
            left = min(left, headroom_at(&levels[i], enough))
    if left < wanted:
        budget.store(0)
        return False
    budget.store((left - wanted) // 2)
    budget_ends.store(milliseconds() + FOR_MILLISECONDS)
    return True


# Of a level: limit and use of memory, limit and use of swap, statistics. Version 1 counts memory
# and swap together in the second pair.
CGROUP_FILES = {
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.memsw.limit_in_bytes",
           "memory.memsw.usage_in_bytes", "memory.stat"),
    "v2": ("memory.max", "memory.current", "memory.swap.max", "memory.swap.current",
           "memory.stat"),
}

# The MemoryCgroup that is asked, or None.
cdef object asked_cgroup = None
# The paths that levels point to; never taken away, since another thread may be reading.
cdef list kept_paths = []


@cython.final
cdef class MemoryCgroup:
    """A memory cgroup.

    Args:
        version: ``"v1"`` or ``"v2"``.
        mount: the folder where its hierarchy is mounted.
        path: its own folder, below that.

    Attributes:
        version, mount: the same.
        limit, usage: the names of the files with the limit and the use of memory.
        levels: its own folder and those above it, which bind it too.
    """

    cdef readonly object version, mount, limit, usage, levels

    __reduce__ = refuse_copies("ask memory_cgroup() again")

    def __init__(self, version, mount, path):
        self.version = version
        self.limit, self.usage, *_ = CGROUP_FILES[version]
        self.mount = os.path.normpath(mount)
        folder = os.path.normpath(os.path.join(mount, path))
        if not os.path.isdir(folder):
            folder = self.mount     # seen from inside a container, whose own cgroup is the mount
        self.levels = [folder]
        while len(folder) > len(self.mount):
            folder = os.path.dirname(folder)
            self.levels.append(folder)


def memory_cgroup():
    """The ``MemoryCgroup`` that counts this process's memory; None where none does."""
    unified = None
    for line in lines_of("/proc/self/cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return mounted_cgroup("v1", path)
        if hierarchy == "0" and not controllers:
            unified = mounted_cgroup("v2", path)
    if unified is not None:
        controllers = text_of(f"{unified.mount}/cgroup.controllers") or ""
        if "memory" in controllers.split():
            return unified
    return None


cdef object mounted_cgroup(str version, str path):
    """The cgroup of this path in the hierarchy of a version, None where that is not mounted."""
    for line in lines_of("/proc/self/mountinfo"):
        place, _, source = line.partition(" - ")
        _, _, _, root, mount, *_ = place.split(" ")
        filesystem, *_, options = source.split(" ")
        if (filesystem == "cgroup2" if version == "v2"
                else filesystem == "cgroup" and "memory" in options.split(",")):
            below = os.path.relpath(path, root) if path.startswith(root) else "."
            return MemoryCgroup(version, mount, below)
    return None


cdef object lines_of(str path):
    """The lines of a file of the kernel: a path in one may have all that ends lines elsewhere."""
    return filter(None, (text_of(path) or "").split("\n"))


cdef const char *keep_path(str folder, str name) except NULL:
    cdef bytes path = os.fsencode(f"{folder}/{name}")
    kept_paths.append(path)
    return path


def set_cgroup(cgroup):
    """Ask this cgroup from now on, where ``find_limits`` finds limits in it.

    Args:
        cgroup: a ``MemoryCgroup``, or None to ask none until the next VMM is made.

    Returns:
        What was asked before.
    """
    global asked_cgroup, defaults_second
    cdef object before = asked_cgroup
    cdef Level *level
    cdef int count = 0
    any_limit.store(0)
    level_count.store(0)
    for folder in () if cgroup is None else cgroup.levels[:MOST_LEVELS]:
        limit, usage, swap_limit, swap_usage, statistics = CGROUP_FILES[cgroup.version]
        level = &levels[count]
        level.limit = keep_path(folder, limit)
        level.usage = keep_path(folder, usage)
        level.swap_limit = keep_path(folder, swap_limit)
        level.swap_usage = keep_path(folder, swap_usage)
        level.statistics = keep_path(folder, statistics)
        level.first_version = cgroup.version == "v1"
        level.is_limited = False
        count += 1
    level_count.store(count)
    asked_cgroup = cgroup
    defaults_second = -1
    return before


def find_limits():
    """See which levels have a limit now that binds before the machine's memory is used up.

    A limit that is found here and changes later is noticed at every reading.
    """
    cdef sysinfo_t now
    cdef uint64_t most = UNLIMITED
    cdef int i, limited = 0
    cdef char text[64]
    if sysinfo(&now) == 0:
        most = <uint64_t>now.totalram * now.mem_unit
    for i in range(level_count.load()):
        levels[i].is_limited = limit_of(&levels[i]) < most
        limited |= levels[i].is_limited
    budget.store(0)
    any_limit.store(limited)
    if limited and read_text(
            b"/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof(text)) > 0:
        huge_everywhere.store(strstr(text, b"[always]") != NULL)


def tightest():
    """The level with the least headroom: ``(bytes, limit, path of the limit)``; None without."""
    cdef uint64_t left
    cdef int i
    found = []
    for i in range(level_count.load()):
        if levels[i].is_limited:
            left = headroom_at(&levels[i], UNLIMITED)
            if left != NO_NUMBER:
                left -= left // OVERHEAD
                found.append((left, limit_of(&levels[i]), levels[i].limit))
    return min(found, default=None)


def has_headroom(uint64_t size):
    """``group_has_headroom``, for tests."""
    return group_has_headroom(size)
