"""How much the memory cgroup of this process leaves: asked before memory is taken.

The kernel ends a process of a group that is full, by SIGKILL, whoever touches the page too many.
So whoever takes memory asks first. It is a question, no claim: what other threads, other processes
of the group and this one's own Python objects take between the answer and the touch is not known.

Where the group is comes from Python (``vmm_linux._core.memory_group``) when the first VMM is made.
A child of a fork is in the same one; a process that is moved to another later is not
noticed, nor, before another VMM is made, a limit where none was. The
files of the levels that have a limit are read when somebody asks, each by its path: a descriptor
would be one of the process's few. Where no level has one, a question is one look at a variable.

A look takes some 20 µs. One that finds room answers for a while, so that many small calls share it.
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
    struct timespec:
        int64_t tv_sec
        int64_t tv_nsec
    int clock_gettime(int, timespec *)

cdef enum:
    MOST_LEVELS = 32            # of those above each other, from the process's own on
    STAT = 16 << 10             # bytes of memory.stat, which has some three thousand
    AT_ONCE = 64 << 20          # that calls may take, at most, until somebody looks again
    FOR_MILLISECONDS = 50       # and how long
    # Of what is taken, for page tables and the kernel's records of a memory file.
    OVERHEAD = 128
    # What stays free for the rest of the process, which has an exception to make; the kernel's
    # figures are as far behind the truth, too.
    SPARE = 2 << 20
    SPARE_SHARE = 32            # of a small limit

cdef uint64_t NOT_TOLD = <uint64_t>-1

# A version 1 group without a limit has more than any machine: the largest count of pages.
cdef uint64_t NO_LIMIT = <uint64_t>1 << 62

cdef const char *HUGE_PAGES = b"/sys/kernel/mm/transparent_hugepage/enabled"

cdef struct Level:
    const char *limit
    const char *usage
    const char *swap_limit
    const char *swap_usage
    const char *stat
    bint first_version
    bint is_limited

cdef Level levels[MOST_LEVELS]
cdef atomic[int] level_count
# Whether any level has a limit that binds before the machine does.
cdef atomic[int] any_limit
cdef atomic[int] huge_everywhere
# Bytes that may still be taken without another look, and until when, in milliseconds.
cdef atomic[int64_t] budget
cdef atomic[int64_t] budget_ends

# The bytes that the levels point to; never taken away, since another thread may be reading.
cdef list kept = []


# ---- files ---------------------------------------------------------------------------------------

cdef Py_ssize_t text_of(const char *path, char *text, size_t room) noexcept nogil:
    """The beginning of a file, ended by a zero: its length, or less than 1."""
    cdef int fd = openat(path, O_RDONLY | O_CLOEXEC)
    cdef Py_ssize_t length
    if fd < 0:
        return fd
    length = read(fd, text, room - 1)
    close(fd)
    text[max(length, 0)] = 0
    return length


cdef uint64_t number(const char *path) noexcept nogil:
    """The number in a file; NOT_TOLD where there is none, as in ``max``."""
    cdef char text[32]
    if text_of(path, text, sizeof(text)) < 1 or not c'0' <= text[0] <= c'9':
        return NOT_TOLD
    return strtoull(text, NULL, 10)


cdef uint64_t number_after(const char *text, const char *label) noexcept nogil:
    """The number after a label of memory.stat, 0 when it is not there."""
    cdef const char *at = strstr(text, label)
    return 0 if at == NULL else strtoull(at + strlen(label), NULL, 10)


cdef uint64_t limit_of(const Level *this) noexcept nogil:
    """The limit of a level; NOT_TOLD where it has none."""
    cdef uint64_t limit = number(this.limit)
    return limit if limit < NO_LIMIT else NOT_TOLD


cdef uint64_t cache_of(const Level *this) noexcept nogil:
    """Bytes of files that the kernel gives up before it ends anybody; no memory file's."""
    cdef char text[STAT]
    if text_of(this.stat, text, sizeof(text)) < 1:
        return 0
    if this.first_version:
        return number_after(text, b"\ntotal_inactive_file ") + number_after(text, b"\ntotal_active_file ")
    return number_after(text, b"\ninactive_file ") + number_after(text, b"\nactive_file ")


cdef uint64_t swap_of(const Level *this, uint64_t memory) noexcept nogil:
    """Bytes that a level could still swap out, of which ``memory`` are left."""
    cdef sysinfo_t now
    cdef uint64_t limit, usage, room
    if sysinfo(&now) != 0 or now.freeswap == 0:
        return 0
    limit = number(this.swap_limit)
    usage = number(this.swap_usage)
    if limit == NOT_TOLD or usage == NOT_TOLD:
        return <uint64_t>now.freeswap * now.mem_unit
    room = limit - min(limit, usage)
    if this.first_version:      # which counts memory and swap together there
        room -= min(room, memory)
    return min(room, <uint64_t>now.freeswap * now.mem_unit)


cdef uint64_t room_at(const Level *this, uint64_t enough) noexcept nogil:
    """Bytes that a level could still take; NOT_TOLD where it has no limit. Exact below enough."""
    cdef uint64_t limit = limit_of(this)
    cdef uint64_t usage = number(this.usage)
    cdef uint64_t spare, room
    if limit == NOT_TOLD or usage == NOT_TOLD:
        return NOT_TOLD
    spare = min(<uint64_t>SPARE, limit // SPARE_SHARE)
    room = limit - min(limit, usage)
    if room < enough + spare:
        limit += cache_of(this) + swap_of(this, room)
        room = limit - min(limit, usage)
    return room - min(room, spare)


# ---- the question --------------------------------------------------------------------------------

cdef int64_t milliseconds() noexcept nogil:
    """A clock that costs nanoseconds."""
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now)
    return now.tv_sec * 1000 + now.tv_nsec // 1000000


cdef bint group_has_limit() noexcept nogil:
    """Whether there is anything to ask."""
    return any_limit.load() != 0


cdef bint is_huge_everywhere() noexcept nogil:
    """Whether the kernel gives huge pages to all private memory, not to HUGE regions alone."""
    return huge_everywhere.load() != 0


cdef bint group_has_headroom(uint64_t size) noexcept nogil:
    """Whether the group has room for so many bytes more; true where it does not tell."""
    if any_limit.load() == 0 or size == 0:
        return True
    if (size <= AT_ONCE and budget.fetch_sub(<int64_t>size) >= <int64_t>size
            and milliseconds() < budget_ends.load()):
        return True
    return look(size)


cdef bint look(uint64_t size) noexcept nogil:
    """The same by the group's files."""
    cdef uint64_t wanted = size + size // OVERHEAD
    cdef uint64_t enough = wanted + 2 * AT_ONCE     # more than that makes no difference
    cdef uint64_t room = enough
    cdef int i
    for i in range(level_count.load()):
        if levels[i].is_limited:
            room = min(room, room_at(&levels[i], enough))
    if room < wanted:
        budget.store(0)
        return False
    budget.store((room - wanted) // 2)
    budget_ends.store(milliseconds() + FOR_MILLISECONDS)
    return True


# ---- from Python, with the GIL -------------------------------------------------------------------

def watch(list found, bint first_version):
    """Ask these levels of a group, once their limits were looked for.

    Args:
        found: for each, from the group itself upwards, the paths of its files as bytes: limit and
            use of memory, limit and use of swap, statistics.
        first_version: whether they are of cgroup version 1.
    """
    cdef int i
    cdef tuple paths
    any_limit.store(0)
    level_count.store(0)
    kept.append(found)
    for i in range(min(len(found), MOST_LEVELS)):
        paths = found[i]
        levels[i].limit = paths[0]
        levels[i].usage = paths[1]
        levels[i].swap_limit = paths[2]
        levels[i].swap_usage = paths[3]
        levels[i].stat = paths[4]
        levels[i].first_version = first_version
        levels[i].is_limited = False
    level_count.store(min(len(found), MOST_LEVELS))


def look_for_limits():
    """See which levels have a limit now that binds before the machine's memory is used up.

    One that is found here and lowered or raised later is noticed at every look.
    """
    cdef sysinfo_t now
    cdef uint64_t most = NO_LIMIT
    cdef int i
    cdef int limited = 0
    cdef char text[64]
    if sysinfo(&now) == 0:
        most = <uint64_t>now.totalram * now.mem_unit
    for i in range(level_count.load()):
        levels[i].is_limited = limit_of(&levels[i]) < most
        limited |= levels[i].is_limited
    budget.store(0)
    any_limit.store(limited)
    if limited and text_of(HUGE_PAGES, text, sizeof(text)) > 0:
        huge_everywhere.store(strstr(text, b"[always]") != NULL)


def tightest():
    """The level with the least room: ``(room, limit, path of the limit)``; None without a limit."""
    cdef uint64_t room
    cdef int i
    found = []
    for i in range(level_count.load()):
        if levels[i].is_limited:
            room = room_at(&levels[i], NO_LIMIT)
            if room != NOT_TOLD:
                room -= room // OVERHEAD
                found.append((room, limit_of(&levels[i]), levels[i].limit))
    return min(found, default=None)


def has_room_for(uint64_t size):
    """``group_has_headroom``, for tests."""
    return group_has_headroom(size)
