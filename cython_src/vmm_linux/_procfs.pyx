"""The files of ``/proc``: one mapping, one page, one record of smaps, or all of them.

Questions about this process go to an :class:`OwnProcess`, which holds the open files.
None of its three questions touches the page asked about, makes a Python object or
raises. Each is answered by the newest interface that this kernel has, and by an older
one where it has not (see ``_features``).

Text of ``maps`` and ``smaps``, of whatever process, goes to one parser: :func:`parse_maps`
and :func:`parse_smaps` make :class:`SmapsRecord` objects of it. A line that it cannot read
is a ValueError with that line, never a record left out or guessed.
"""

import os
import re
from types import MappingProxyType

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cython cimport final, no_gc
from libc.errno cimport (
    EACCES, EBADF, EBADMSG, EBUSY, EINVAL, ENOENT, ENOMEM, ENOTTY, EPERM)
from libc.stdint cimport intptr_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memchr, memcmp, memmove, memset, strlen

from vmm_linux cimport _features, _fork, _syscalls

cdef extern from "Python.h":
    object PyUnicode_DecodeFSDefaultAndSize(const char *, Py_ssize_t)

cdef enum:
    # More than /proc gives in one read; with room for the head of any line.
    READ_SIZE = 1 << 14
    # See hole_by_query.
    STEP_GROWTH = 64
    DIRECT_TRIES = 8
    PAGEMAP_ENTRY = 8

cdef uint64_t PM_PRESENT = <uint64_t>1 << 63
cdef uint64_t PM_SWAP = <uint64_t>1 << 62
cdef uint64_t PM_FILE = <uint64_t>1 << 61
cdef uint64_t PM_GUARD_REGION = <uint64_t>1 << 58


# ---- Lines -----------------------------------------------------------------------------

cdef struct Line:
    # A line of maps, which is also the first line of a record of smaps.
    uintptr_t start
    uintptr_t end
    uint32_t permissions
    uint64_t offset
    uint32_t device_major
    uint32_t device_minor
    uint64_t inode
    const char *path
    size_t path_length


# The value of a digit as the kernel writes them (lower case), else -1.
cdef signed char HEX[256]
cdef int character
for character in range(256):
    HEX[character] = <signed char>b"0123456789abcdef".find(character)


cdef inline int hex_digit(char character) noexcept nogil:
    return HEX[<unsigned char>character]


cdef inline bint starts_mapping(const char *line) noexcept nogil:
    # Labels of figures begin with a capital letter.
    return hex_digit(line[0]) >= 0


cdef inline const char *scan_hex(const char *at, const char *end, uint64_t *value,
                                 char delimiter) noexcept nogil:
    """Reads a hexadecimal number and the delimiter after it; NULL where that is not there."""
    cdef const char *begin = at
    cdef uint64_t number = 0
    cdef int digit
    while at < end:
        digit = hex_digit(at[0])
        if digit < 0:
            break
        number = number << 4 | <uint64_t>digit
        at += 1
    if at == begin or at - begin > 16 or at == end or at[0] != delimiter:
        return NULL
    value[0] = number
    return at + 1


cdef inline const char *scan_decimal(const char *at, const char *end,
                                     uint64_t *value) noexcept nogil:
    """Reads a decimal number of 64 bits; NULL where there is none."""
    cdef const char *begin = at
    cdef uint64_t number = 0
    cdef uint64_t digit
    while at < end and c'0' <= at[0] <= c'9':
        digit = <uint64_t>(at[0] - c'0')
        if number > (<uint64_t>-1 - digit) // 10:
            return NULL
        number = number * 10 + digit
        at += 1
    if at == begin:
        return NULL
    value[0] = number
    return at


cdef inline bint scan_permission(char character, char letter, uint32_t bit,
                                 uint32_t *permissions) noexcept nogil:
    if character == letter:
        permissions[0] |= bit
        return True
    return character == c'-'


cdef bint scan_mapping(const char *at, const char *end, Line *line) noexcept nogil:
    """Reads ``start-end rwxp offset major:minor inode  path``, the newline not included."""
    cdef uint64_t start, stop, major, minor
    at = scan_hex(at, end, &start, c'-')
    if at == NULL:
        return False
    at = scan_hex(at, end, &stop, c' ')
    if at == NULL or stop < start or end - at < 5 or at[4] != c' ':
        return False
    line.permissions = SPAN_SHARED if at[3] == c's' else 0
    if (not scan_permission(at[0], c'r', SPAN_READ, &line.permissions)
            or not scan_permission(at[1], c'w', SPAN_WRITE, &line.permissions)
            or not scan_permission(at[2], c'x', SPAN_EXECUTE, &line.permissions)
            or at[3] != c's' and at[3] != c'p'):
        return False
    at = scan_hex(at + 5, end, &line.offset, c' ')
    if at == NULL:
        return False
    at = scan_hex(at, end, &major, c':')
    if at == NULL:
        return False
    at = scan_hex(at, end, &minor, c' ')
    if at == NULL:
        return False
    at = scan_decimal(at, end, &line.inode)
    if at == NULL or at < end and at[0] != c' ':
        return False
    while at < end and at[0] == c' ':
        at += 1
    line.start = start
    line.end = stop
    line.device_major = <uint32_t>major
    line.device_minor = <uint32_t>minor
    line.path = at
    line.path_length = end - at
    return True


# ---- Text read in pieces ---------------------------------------------------------------

cdef struct Reader:
    # Lines of a /proc file, one after the other; `text` holds what is not yet read of it,
    # and what lies from `kept` on.
    int fd
    uint64_t position           # of the file, where the next piece begins
    Text *text
    size_t kept
    size_t next


cdef void free_text(Text *text) noexcept nogil:
    """Gives the memory back; the text is empty then and may be used again."""
    free(text.data)
    text.data = NULL
    text.length = text.room = 0


cdef int read_more(Reader *reader) noexcept nogil:
    """Another piece: 1, 0 at the file's end, or ``-errno``. Drops what lies before ``kept``."""
    cdef Text *text = reader.text
    cdef intptr_t length
    cdef size_t room
    cdef char *data
    if reader.kept > 0:
        text.length -= reader.kept
        memmove(text.data, text.data + reader.kept, text.length)
        reader.next -= reader.kept
        reader.kept = 0
    if text.room - text.length < READ_SIZE:
        room = 2 * text.room + READ_SIZE
        data = <char *>realloc(text.data, room)
        if data == NULL:
            return -ENOMEM
        text.data = data
        text.room = room
    length = _syscalls.pread(reader.fd, text.data + text.length, READ_SIZE, reader.position)
    if length <= 0:
        return <int>length
    text.length += <size_t>length
    reader.position += <uint64_t>length
    return 1


cdef int next_line(Reader *reader, const char **line, const char **end) noexcept nogil:
    """The next line without its newline: 1, 0 at the file's end, or ``-errno``.

    The pointers hold until the next call.
    """
    cdef size_t searched = reader.next
    cdef size_t kept_before
    cdef const char *newline
    cdef int more
    while True:
        newline = NULL
        if searched < reader.text.length:
            newline = <const char *>memchr(
                reader.text.data + searched, c'\n', reader.text.length - searched)
        if newline != NULL:
            line[0] = reader.text.data + reader.next
            end[0] = newline
            reader.next = <size_t>(newline + 1 - reader.text.data)
            return 1
        searched = reader.text.length
        kept_before = reader.kept
        more = read_more(reader)
        searched -= kept_before - reader.kept
        if more < 0:
            return more
        if more == 0:
            # The kernel writes whole lines only.
            return 0 if reader.next == reader.text.length else -EBADMSG


# ---- This process ----------------------------------------------------------------------

cdef bint is_ours(const Descriptor *descriptor) noexcept nogil:
    """Whether the file is open, and nobody closed it so that its number now is another's."""
    cdef uint64_t device, inode
    return (descriptor.fd >= 0 and _syscalls.identity(descriptor.fd, &device, &inode) == 0
            and device == descriptor.device and inode == descriptor.inode)


cdef void forget(Descriptor *descriptor) noexcept nogil:
    """Closes the file, if it still is ours."""
    if is_ours(descriptor):
        _syscalls.close(descriptor.fd)
    descriptor.fd = -1


cdef int ensure_open(Descriptor *descriptor, const char *path) noexcept nogil:
    """The file's number, opened if it was not, or ``-errno``.

    For an ioctl, which says itself (ENOTTY, EBADF) when the file is not ours any more.
    """
    cdef int fd
    cdef int result
    if descriptor.fd < 0:
        fd = _syscalls.openat(path, _syscalls.O_RDONLY | _syscalls.O_CLOEXEC)
        if fd < 0:
            return fd
        result = _syscalls.identity(fd, &descriptor.device, &descriptor.inode)
        if result < 0:
            _syscalls.close(fd)
            return result
        descriptor.fd = fd
    return descriptor.fd


cdef int ensure_ours(Descriptor *descriptor, const char *path) noexcept nogil:
    """:func:`ensure_open` for reading, where another's file would give a wrong answer."""
    if not is_ours(descriptor):
        descriptor.fd = -1
    return ensure_open(descriptor, path)


cdef inline void fill_span(Span *span, uintptr_t start, uintptr_t end,
                           bint mapped) noexcept nogil:
    memset(span, 0, sizeof(Span))
    span.start = start
    span.end = end
    span.mapped = mapped


@final
cdef class OwnProcess:
    """The open files of ``/proc/self``, and questions to them.

    A file is opened when first needed and kept. After a fork the parent's are closed and
    the child's own opened. ``close()`` closes them; a later question opens them again.
    """

    def __cinit__(self):
        self.maps.fd = self.pagemap.fd = self.smaps.fd = -1
        self.generation = _fork.generation()

    def __dealloc__(self):
        self.release()

    def close(self):
        """Closes the files. May be called again."""
        self.release()

    cdef void release(self) noexcept nogil:
        forget(&self.maps)
        forget(&self.pagemap)
        forget(&self.smaps)
        free_text(&self.lines)

    cdef void notice_fork(self) noexcept nogil:
        cdef uint32_t generation = _fork.generation()
        if self.generation != generation:
            self.release()
            self.generation = generation

    # -- one mapping

    cdef int span_at(self, uintptr_t va, Span *span) noexcept nogil:
        """The mapping or the hole that ``va`` lies in; -EINVAL beyond user space.

        A hole begins at the end of the mapping before it, or at 0, and ends at the start
        of the next, or at the end of user space.
        """
        cdef int result
        if va >= _features.user_space_end():
            return -EINVAL
        self.notice_fork()
        if _features.has(_features.FEATURE_PROCMAP_QUERY):
            result = self.span_by_query(va, span)
            if result == -ENOTTY or result == -EBADF:
                # Somebody closed it, and the number may be another file's now.
                self.maps.fd = -1
                result = self.span_by_query(va, span)
            return result
        return self.span_by_text(va, span)

    cdef int span_by_query(self, uintptr_t va, Span *span) noexcept nogil:
        cdef _syscalls.ProcmapQuery query
        cdef int result = ensure_open(&self.maps, b"/proc/self/maps")
        if result < 0:
            return result
        result = query_mapping(self.maps.fd, va, &query)
        if result == -ENOENT:
            fill_span(span, 0, _features.user_space_end(), False)
            return self.hole_by_query(va, span)
        if result < 0:
            return result
        if query.vma_start > va:
            fill_span(span, 0, query.vma_start, False)
            return self.hole_by_query(va, span)
        fill_span(span, query.vma_start, query.vma_end, True)
        span.permissions = <uint32_t>query.vma_flags & (
            SPAN_READ | SPAN_WRITE | SPAN_EXECUTE | SPAN_SHARED)
        span.offset = query.vma_offset
        span.inode = query.inode
        span.device_major = query.dev_major
        span.device_minor = query.dev_minor
        return 0

    cdef int hole_by_query(self, uintptr_t va, Span *span) noexcept nogil:
        """Finds where the hole around ``va`` begins: the end of the mapping before it.

        The kernel only tells the mapping at or after an address. So the beginning is
        searched: an address from which nothing is mapped up to ``va`` lies in the hole; else
        the hole begins at the end of the mapping found there, or higher. First in growing
        steps down from ``va``, until a mapping is met; its end is tried next, for that is
        often it; then by halves. That is 1 to 10 queries in real processes, and never
        more than some forty: an address has not more bits above the page.
        """
        cdef _syscalls.ProcmapQuery query
        cdef uintptr_t page_mask = ~<uintptr_t>(_features.page_size() - 1)
        cdef uintptr_t low = 0
        cdef uintptr_t high = va & page_mask
        cdef uintptr_t step = _features.page_size()
        cdef uintptr_t at = high - min(step, high)
        cdef bint met = False
        cdef int tries = DIRECT_TRIES
        cdef int result
        while low < high:
            result = query_mapping(self.maps.fd, at, &query)
            if result == -ENOENT or result == 0 and query.vma_start > va:
                high = at
                if not met:
                    step = high if step > high // STEP_GROWTH else step * STEP_GROWTH
                    at = high - min(step, high)
                    continue
            elif result < 0:
                return result
            elif query.vma_end > va:
                # Another thread has mapped something here since.
                return self.span_by_text(va, span)
            else:
                met = True
                low = query.vma_end
                if tries > 0:
                    tries -= 1
                    at = low
                    continue
            at = low + ((high - low) // 2 & page_mask)
        span.start = low
        return 0

    cdef int span_by_text(self, uintptr_t va, Span *span) noexcept nogil:
        """:meth:`span_at` by reading ``/proc/self/maps`` as far as needed."""
        cdef Reader reader
        cdef Line line
        cdef const char *text
        cdef const char *end
        cdef uintptr_t before = 0
        cdef int result = ensure_ours(&self.maps, b"/proc/self/maps")
        if result < 0:
            return result
        start_reading(&reader, result, &self.lines)
        while True:
            reader.kept = reader.next
            result = next_line(&reader, &text, &end)
            if result < 0:
                return result
            if result == 0:
                break
            if not scan_mapping(text, end, &line):
                return -EBADMSG
            if line.end <= va:
                before = line.end
            elif line.start <= va:
                fill_span(span, line.start, line.end, True)
                span.permissions = line.permissions
                span.offset = line.offset
                span.inode = line.inode
                span.device_major = line.device_major
                span.device_minor = line.device_minor
                return 0
            elif line.start < _features.user_space_end():
                fill_span(span, before, line.start, False)
                return 0
            else:
                break       # The kernel's own page, which some machines show at the end.
        fill_span(span, before, _features.user_space_end(), False)
        return 0

    # -- one page

    cdef int page_at(self, uintptr_t va, PageFacts *facts) noexcept nogil:
        """What the kernel knows of the page that includes ``va``; -EINVAL beyond user space.

        Nothing is mapped there: all 0, but ``locked`` -1. Without pagemap ``present`` is
        what mincore(2) says, which for files and shared memory means that the page is in
        memory, be it in this process's page table or not; it is the only fact then.
        """
        cdef uintptr_t page = va & ~<uintptr_t>(_features.page_size() - 1)
        cdef unsigned char residency
        cdef int result
        if va >= _features.user_space_end():
            return -EINVAL
        self.notice_fork()
        memset(facts, -1, sizeof(PageFacts))
        # This advice does nothing here but to answer EBUSY for a locked mapping.
        result = _syscalls.msync(page, _features.page_size(),
                                 _syscalls.MS_ASYNC | _syscalls.MS_INVALIDATE)
        if result == 0 or result == -EBUSY:
            facts.locked = result == -EBUSY
        result = -EACCES
        if _features.has(_features.FEATURE_PAGEMAP_SCAN):
            result = self.facts_by_scan(page, facts)
            if result == -ENOTTY or result == -EBADF:
                self.pagemap.fd = -1
                result = self.facts_by_scan(page, facts)
        elif _features.has(_features.FEATURE_PAGEMAP):
            result = self.facts_by_pagemap(page, facts)
        if result == -EACCES or result == -EPERM:
            # Closed to us: a kernel, a sandbox, or this process after setuid.
            result = _syscalls.mincore(page, _features.page_size(), &residency)
            if result == 0:
                facts.present = residency & 1
            elif result == -ENOMEM:
                facts.present = 0
                result = 0
        return result

    cdef int facts_by_scan(self, uintptr_t page, PageFacts *facts) noexcept nogil:
        cdef _syscalls.ScanArgument scan
        cdef _syscalls.PageRegion region
        cdef bint guards_told = _features.has(_features.FEATURE_PAGEMAP_GUARD)
        cdef int result = ensure_open(&self.pagemap, b"/proc/self/pagemap")
        if result < 0:
            return result
        memset(&scan, 0, sizeof(scan))
        region.categories = 0
        scan.size = sizeof(scan)
        scan.start = page
        scan.end = page + _features.page_size()
        scan.vec = <uint64_t>&region
        scan.vec_len = 1
        scan.return_mask = (_syscalls.PAGE_IS_PRESENT | _syscalls.PAGE_IS_SWAPPED
                            | _syscalls.PAGE_IS_FILE | _syscalls.PAGE_IS_HUGE)
        if guards_told:
            scan.return_mask |= _syscalls.PAGE_IS_GUARD
        result = _syscalls.pagemap_scan(self.pagemap.fd, &scan)
        if result == -EINVAL and guards_told:
            # 6.15 tells guards, but not here yet.
            result = self.facts_by_pagemap(page, facts)
            if result < 0:
                return result
            guards_told = False
            scan.return_mask = _syscalls.PAGE_IS_HUGE
            result = _syscalls.pagemap_scan(self.pagemap.fd, &scan)
            if result >= 0:
                facts.huge = region.categories & _syscalls.PAGE_IS_HUGE != 0
                return 0
        if result < 0:
            return result
        facts.present = region.categories & _syscalls.PAGE_IS_PRESENT != 0
        facts.swapped = region.categories & _syscalls.PAGE_IS_SWAPPED != 0
        facts.file_or_shared = region.categories & _syscalls.PAGE_IS_FILE != 0
        facts.huge = region.categories & _syscalls.PAGE_IS_HUGE != 0
        if guards_told:
            facts.guard = region.categories & _syscalls.PAGE_IS_GUARD != 0
        tell_guard_from_swap(facts)
        return 0

    cdef int facts_by_pagemap(self, uintptr_t page, PageFacts *facts) noexcept nogil:
        cdef uint64_t entry = 0
        cdef intptr_t length
        cdef int result = ensure_ours(&self.pagemap, b"/proc/self/pagemap")
        if result < 0:
            return result
        length = _syscalls.pread(self.pagemap.fd, &entry, PAGEMAP_ENTRY,
                                 page // _features.page_size() * PAGEMAP_ENTRY)
        if length < 0:
            return <int>length
        facts.present = entry & PM_PRESENT != 0
        facts.swapped = entry & PM_SWAP != 0
        facts.file_or_shared = entry & PM_FILE != 0
        if _features.has(_features.FEATURE_PAGEMAP_GUARD):
            facts.guard = entry & PM_GUARD_REGION != 0
        tell_guard_from_swap(facts)
        return 0

    # -- one record of smaps

    cdef int smaps_text_at(self, uintptr_t va, Text *text) noexcept nogil:
        """The record of ``/proc/self/smaps`` that covers ``va``, as text; empty for a hole.

        The time grows with the number of mappings below. -EINVAL beyond user space.
        """
        cdef Reader reader
        cdef Line line
        cdef const char *begin
        cdef const char *end
        cdef bint found = False
        cdef size_t record_end = 0
        cdef int result
        text.length = 0
        if va >= _features.user_space_end():
            return -EINVAL
        self.notice_fork()
        result = ensure_ours(&self.smaps, b"/proc/self/smaps")
        if result < 0:
            return result
        start_reading(&reader, result, text)
        while True:
            if not found:
                reader.kept = reader.next
            result = next_line(&reader, &begin, &end)
            if result < 0:
                text.length = 0
                return result
            if result == 0:
                record_end = text.length
                break
            if not starts_mapping(begin):
                continue
            if found:
                record_end = <size_t>(begin - text.data)
                break
            if not scan_mapping(begin, end, &line):
                text.length = 0
                return -EBADMSG
            if line.start > va:
                break
            if line.end > va:
                found = True
        if found:
            text.length = record_end - reader.kept
            memmove(text.data, text.data + reader.kept, text.length)
        else:
            text.length = 0
        return 0

    # -- the same from Python

    def span(self, uintptr_t va):
        """:meth:`span_at` as ``(start, end, mapped, permissions, offset, inode, device)``."""
        cdef Span span
        check(self.span_at(va, &span))
        return (span.start, span.end, bool(span.mapped), span.permissions, span.offset,
                span.inode, device_text(span.device_major, span.device_minor))

    def page(self, uintptr_t va):
        """:meth:`page_at` as a dict; None for what this kernel does not tell."""
        cdef PageFacts facts
        check(self.page_at(va, &facts))
        return {
            name: None if fact < 0 else bool(fact)
            for name, fact in (
                ("present", facts.present), ("swapped", facts.swapped), ("huge", facts.huge),
                ("guard", facts.guard), ("locked", facts.locked),
                ("file_or_shared", facts.file_or_shared))
        }

    def record(self, uintptr_t va):
        """The :class:`SmapsRecord` of the mapping that ``va`` lies in, or None for a hole."""
        cdef Text text = [NULL, 0, 0]
        try:
            check(self.smaps_text_at(va, &text))
            return record_from(text.data, text.length) if text.length else None
        finally:
            free_text(&text)


cdef inline int query_mapping(int fd, uintptr_t va,
                              _syscalls.ProcmapQuery *query) noexcept nogil:
    """The mapping at ``va`` or the next above; -ENOENT where there is none."""
    memset(query, 0, sizeof(_syscalls.ProcmapQuery))
    query.size = sizeof(_syscalls.ProcmapQuery)
    query.query_flags = _syscalls.PROCMAP_COVERING_OR_NEXT
    query.query_addr = va
    return _syscalls.procmap_query(fd, query)


cdef inline void start_reading(Reader *reader, int fd, Text *text) noexcept nogil:
    memset(reader, 0, sizeof(Reader))
    text.length = 0
    reader.fd = fd
    reader.text = text


cdef inline void tell_guard_from_swap(PageFacts *facts) noexcept nogil:
    # A guard is stored where a swapped page's place would be, and reads as swapped.
    if facts.guard == 1:
        facts.swapped = 0
    elif (facts.guard == -1 and facts.swapped == 1
            and _features.has(_features.FEATURE_GUARD_REGIONS)):
        facts.swapped = -1


cdef int check(int result) except -1:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return 0


# ---- Records ---------------------------------------------------------------------------

# In the order of the kernel's text.
cdef const char *LABELS[FIGURES]
LABELS[:] = [
    b"Size:",
    b"KernelPageSize:",
    b"MMUPageSize:",
    b"Rss:",
    b"Pss:",
    b"Pss_Dirty:",
    b"Shared_Clean:",
    b"Shared_Dirty:",
    b"Private_Clean:",
    b"Private_Dirty:",
    b"Referenced:",
    b"Anonymous:",
    b"KSM:",
    b"LazyFree:",
    b"AnonHugePages:",
    b"ShmemPmdMapped:",
    b"FilePmdMapped:",
    b"Shared_Hugetlb:",
    b"Private_Hugetlb:",
    b"Swap:",
    b"SwapPss:",
    b"Locked:",
    b"THPeligible:",
    b"ProtectionKey:",
]
NAMES = (
    "size",
    "kernel_page_size",
    "mmu_page_size",
    "rss",
    "pss",
    "pss_dirty",
    "shared_clean",
    "shared_dirty",
    "private_clean",
    "private_dirty",
    "referenced",
    "anonymous",
    "ksm",
    "lazy_free",
    "anon_huge_pages",
    "shmem_pmd_mapped",
    "file_pmd_mapped",
    "shared_hugetlb",
    "private_hugetlb",
    "swap",
    "swap_pss",
    "locked",
    "thp_eligible",
    "protection_key",
)
cdef enum:
    # These are plain numbers; the figures before them are in kB.
    FIRST_PLAIN = 22

cdef size_t LABEL_LENGTHS[FIGURES]      # with the colon
cdef int index
for index in range(FIGURES):
    LABEL_LENGTHS[index] = strlen(LABELS[index])

cdef tuple PERMISSIONS = tuple(
    "".join(letter if bits & bit else "-" for letter, bit in zip("rwx", (1, 2, 4)))
    + ("s" if bits & SPAN_SHARED else "p")
    for bits in range(16))

cdef str DELETED = " (deleted)"


cdef str device_text(uint32_t major, uint32_t minor):
    return f"{major:02x}:{minor:02x}"


@final
@no_gc                          # Strings, numbers and sets of strings: no cycle can arise.
cdef class SmapsRecord:
    """One mapping of a process, as a record of ``smaps`` or a line of ``maps`` tells it.

    Figures are in bytes, but for ``thp_eligible`` and ``protection_key``; None where the
    text does not have them (an older kernel, a line of ``maps``). A figure that a newer
    kernel adds is an attribute too, under its label in snake case. Records are not
    changed once made, compare by all they say, and can be pickled.
    """

    def __init__(self):
        raise TypeError("records are made by parse_smaps() and parse_maps()")

    def __dealloc__(self):
        free(self.values)

    @property
    def start(self):
        """The first address."""
        return self.range_start

    @property
    def end(self):
        """The first address after it."""
        return self.range_end

    @property
    def permissions(self):
        """As in ``maps``: ``rw-p``; the last letter is ``s`` for shared, ``p`` for private."""
        return PERMISSIONS[self.permission_bits]

    @property
    def offset(self):
        """Where in the file it begins, in bytes."""
        return self.file_offset

    @property
    def device(self):
        """The file's device, as in ``maps``: ``08:01``."""
        return device_text(self.device_major, self.device_minor)

    @property
    def inode(self):
        """The file's inode, 0 where there is no file."""
        return self.file_inode

    @property
    def deleted(self):
        """Whether the file has no name any more, as is the case for every memfd.

        The kernel says so by adding `` (deleted)`` to the name. A file whose name really
        ends like that is told apart by looking whether it is there.
        """
        if self.pathname is None or not self.pathname.endswith(DELETED):
            return False
        try:
            return os.stat(self.pathname).st_ino != self.file_inode
        except (OSError, ValueError):
            return True

    @property
    def figures(self):
        """All figures that the text has, by name, as a read-only mapping."""
        cdef dict figures = {}
        cdef int i
        for i in range(FIGURES):
            if self.known >> i & 1:
                figures[NAMES[i]] = self.values[i]
        if self.others is not None:
            figures.update(self.others)
        return MappingProxyType(figures)

    @property
    def size(self):
        """The mapping's length."""
        return self.figure(0)

    @property
    def kernel_page_size(self):
        """Page size the kernel uses for it."""
        return self.figure(1)

    @property
    def mmu_page_size(self):
        """Page size the processor uses for it."""
        return self.figure(2)

    @property
    def rss(self):
        """Resident in memory."""
        return self.figure(3)

    @property
    def pss(self):
        """Resident, each page divided by the number of its users."""
        return self.figure(4)

    @property
    def pss_dirty(self):
        """The dirty part of ``pss`` (6.0)."""
        return self.figure(5)

    @property
    def shared_clean(self):
        """Resident, used by others too, not written to."""
        return self.figure(6)

    @property
    def shared_dirty(self):
        """Resident, used by others too, written to."""
        return self.figure(7)

    @property
    def private_clean(self):
        """Resident, used by this process alone, not written to."""
        return self.figure(8)

    @property
    def private_dirty(self):
        """Resident, used by this process alone, written to."""
        return self.figure(9)

    @property
    def referenced(self):
        """Resident and accessed lately."""
        return self.figure(10)

    @property
    def anonymous(self):
        """Resident and of no file."""
        return self.figure(11)

    @property
    def ksm(self):
        """Merged by KSM (6.8)."""
        return self.figure(12)

    @property
    def lazy_free(self):
        """Given up by MADV_FREE, not yet taken."""
        return self.figure(13)

    @property
    def anon_huge_pages(self):
        """Anonymous, in huge pages."""
        return self.figure(14)

    @property
    def shmem_pmd_mapped(self):
        """Shared memory, in huge pages."""
        return self.figure(15)

    @property
    def file_pmd_mapped(self):
        """Of files, in huge pages (5.4)."""
        return self.figure(16)

    @property
    def shared_hugetlb(self):
        """In hugetlbfs pages that others use too."""
        return self.figure(17)

    @property
    def private_hugetlb(self):
        """In hugetlbfs pages of this process alone."""
        return self.figure(18)

    @property
    def swap(self):
        """Swapped out."""
        return self.figure(19)

    @property
    def swap_pss(self):
        """Swapped out, each page divided by the number of its users."""
        return self.figure(20)

    @property
    def locked(self):
        """Locked in memory, counted as in ``pss``."""
        return self.figure(21)

    @property
    def thp_eligible(self):
        """1 if transparent huge pages may be used here, else 0; not bytes (5.0)."""
        return self.figure(22)

    @property
    def protection_key(self):
        """The memory protection key; not bytes."""
        return self.figure(23)

    cdef object figure(self, int index):
        return self.values[index] if self.known >> index & 1 else None

    def __getattr__(self, str name):
        if self.others is not None and name in self.others:
            return self.others[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __dir__(self):
        return sorted({*object.__dir__(self), *(self.others or ())})

    def __eq__(self, other):
        if not isinstance(other, SmapsRecord):
            return NotImplemented
        cdef SmapsRecord that = other
        return (self.range_start == that.range_start and self.range_end == that.range_end
                and self.permission_bits == that.permission_bits
                and self.file_offset == that.file_offset
                and self.device_major == that.device_major
                and self.device_minor == that.device_minor
                and self.file_inode == that.file_inode
                and self.pathname == that.pathname and self.vm_flags == that.vm_flags
                and self.figures == that.figures)

    def __hash__(self):
        return hash((self.range_start, self.range_end, self.file_offset, self.file_inode))

    def __repr__(self):
        figures = "".join(f" {name}={value}" for name, value in self.figures.items() if value)
        return (f"<SmapsRecord {self.range_start:x}-{self.range_end:x} {self.permissions}"
                f" {self.file_offset:x} {self.device} {self.file_inode} {self.pathname!r}"
                f"{figures}>")

    def __reduce__(self):
        return _restore, (
            self.range_start, self.range_end, self.permission_bits, self.file_offset,
            self.device_major, self.device_minor, self.file_inode, self.pathname,
            self.vm_flags, dict(self.figures))


def _restore(start, end, permissions, offset, major, minor, inode, pathname, vm_flags, figures):
    """Undoes :meth:`SmapsRecord.__reduce__`."""
    cdef SmapsRecord record = SmapsRecord.__new__(SmapsRecord)
    cdef int i
    record.range_start = start
    record.range_end = end
    record.permission_bits = permissions & 15
    record.file_offset = offset
    record.device_major = major
    record.device_minor = minor
    record.file_inode = inode
    record.pathname = pathname
    record.vm_flags = vm_flags
    figures = dict(figures)
    for i in range(FIGURES):
        if NAMES[i] in figures:
            set_figure(record, i, figures.pop(NAMES[i]))
    record.others = figures or None
    return record


cdef inline int set_figure(SmapsRecord record, int i, uint64_t value) except -1:
    if record.values == NULL:
        record.values = <uint64_t *>calloc(FIGURES, sizeof(uint64_t))
        if record.values == NULL:
            raise MemoryError
    record.values[i] = value
    record.known |= <uint32_t>1 << i
    return 0


# ---- Parser ----------------------------------------------------------------------------

cdef class Recurring:
    """What one text says again and again: made once, and used for every record."""
    cdef const char *path       # in the text
    cdef size_t path_length
    cdef object pathname
    cdef const char *flags_text
    cdef size_t flags_length
    cdef object flags
    cdef dict flags_seen        # lines of VmFlags to sets
    cdef dict names             # labels with no attribute of their own to names
    cdef int following[FIGURES + 1]     # figure by the one before it; FIGURES: the first

    def __cinit__(self):
        cdef int i
        self.path = self.flags_text = NULL
        self.flags_seen = {}
        self.names = {}
        for i in range(FIGURES):
            self.following[i] = (i + 1) % FIGURES
        self.following[FIGURES] = 0


cdef object unreadable(const char *line, const char *end, str problem):
    return ValueError(f"{problem}: {PyBytes_FromStringAndSize(line, end - line)!r}")


cdef object pathname_of(Line *line, Recurring recurring):
    """The path as Python has paths, None where there is none."""
    cdef bytes path
    if line.path_length == 0:
        return None
    if (recurring.path != NULL and recurring.path_length == line.path_length
            and memcmp(recurring.path, line.path, line.path_length) == 0):
        return recurring.pathname
    if memchr(line.path, c'\\', line.path_length) == NULL:
        recurring.pathname = PyUnicode_DecodeFSDefaultAndSize(line.path, line.path_length)
    else:
        # The kernel writes a newline like this and nothing else, a backslash neither: a
        # name with these four characters cannot be told from one with a newline.
        path = PyBytes_FromStringAndSize(line.path, line.path_length)
        recurring.pathname = os.fsdecode(path.replace(b"\\012", b"\n"))
    recurring.path = line.path
    recurring.path_length = line.path_length
    return recurring.pathname


cdef inline SmapsRecord new_record(Line *line, Recurring recurring):
    cdef SmapsRecord record = SmapsRecord.__new__(SmapsRecord)
    record.range_start = line.start
    record.range_end = line.end
    record.permission_bits = line.permissions
    record.file_offset = line.offset
    record.device_major = line.device_major
    record.device_minor = line.device_minor
    record.file_inode = line.inode
    record.pathname = pathname_of(line, recurring)
    return record


cdef inline bint has_label(const char *line, const char *end, int i) noexcept nogil:
    return (<size_t>(end - line) >= LABEL_LENGTHS[i]
            and memcmp(line, LABELS[i], LABEL_LENGTHS[i]) == 0)


cdef inline const char *scan_figure(const char *at, const char *end, int i,
                                    uint64_t *value) noexcept nogil:
    """Reads figure ``i`` as the kernel writes it, newline included; NULL if that is not there."""
    cdef uint64_t number = 0
    cdef const char *digits
    if not has_label(at, end, i):
        return NULL
    at += LABEL_LENGTHS[i]
    while at < end and at[0] == c' ':
        at += 1
    digits = at
    while at < end and c'0' <= at[0] <= c'9':
        number = number * 10 + <uint64_t>(at[0] - c'0')
        at += 1
    # 16 digits of kB are more than an address space, and still fit when shifted.
    if at == digits or at - digits > 16:
        return NULL
    if i < FIRST_PLAIN:
        if end - at < 4 or memcmp(at, b" kB\n", 4) != 0 or number >> 54:
            return NULL
        value[0] = number << 10
        return at + 4
    if at == end or at[0] != c'\n':
        return NULL
    value[0] = number
    return at + 1


cdef int add_flags(SmapsRecord record, const char *at, const char *end,
                   Recurring recurring) except -1:
    cdef bytes text
    if (recurring.flags_text == NULL or recurring.flags_length != <size_t>(end - at)
            or memcmp(recurring.flags_text, at, end - at) != 0):
        text = PyBytes_FromStringAndSize(at, end - at)
        recurring.flags = recurring.flags_seen.get(text)
        if recurring.flags is None:
            recurring.flags = recurring.flags_seen[text] = frozenset(
                text.decode("ascii", "backslashreplace").split())
        recurring.flags_text = at
        recurring.flags_length = end - at
    record.vm_flags = recurring.flags
    return 0


cdef int add_line(SmapsRecord record, const char *line, const char *end, int before,
                  Recurring recurring) except -1:
    """Adds a line that is not just the figure expected; returns the figure's index or ``before``.

    The line is ``VmFlags: ab cd``, ``Label:  12 kB`` or ``Label:  12``.
    """
    cdef const char *colon = <const char *>memchr(line, c':', end - line)
    cdef const char *at
    cdef uint64_t value
    cdef bint in_kib
    cdef int i
    if colon == NULL or not c'A' <= line[0] <= c'Z':
        raise unreadable(line, end, "neither a mapping nor a figure")
    if record.vm_flags is None and colon - line == 7 and memcmp(line, b"VmFlags", 7) == 0:
        add_flags(record, colon + 1, end, recurring)
        return before
    at = colon + 1
    while at < end and (at[0] == c' ' or at[0] == c'\t'):
        at += 1
    at = scan_decimal(at, end, &value)
    if at == NULL:
        raise unreadable(line, end, "a figure without its number")
    in_kib = end - at == 3 and memcmp(at, b" kB", 3) == 0
    if not in_kib and at != end:
        raise unreadable(line, end, "a figure in an unknown unit")
    if in_kib:
        if value >> 54:
            raise unreadable(line, end, "a figure beyond 64 bits")
        value <<= 10
    for i in range(FIGURES):
        if has_label(line, end, i):
            break
    else:
        name = name_of(line, colon, recurring)
        if record.others is None:
            record.others = {}
        if name in record.others or name in NAMES:
            raise unreadable(line, end, "a figure given twice")
        record.others[name] = value
        return before
    if in_kib != (i < FIRST_PLAIN):
        raise unreadable(line, end, "a figure in another unit than the kernel's")
    if record.known >> i & 1:
        raise unreadable(line, end, "a figure given twice")
    set_figure(record, i, value)
    recurring.following[before] = i
    return i


cdef str name_of(const char *line, const char *colon, Recurring recurring):
    """The attribute for a label that this module does not know."""
    cdef bytes label = PyBytes_FromStringAndSize(line, colon - line)
    name = recurring.names.get(label)
    if name is None:
        name = recurring.names[label] = snake_case(os.fsdecode(label))
    return name


cdef str snake_case(str label):
    """``KernelPageSize`` and ``Shared_Clean`` to ``kernel_page_size`` and ``shared_clean``."""
    # A capital begins a word after a small letter, and before one (MMUPageSize: mmu_page_size).
    label = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", label)
    return label.lower()


cdef int check_whole(SmapsRecord record, const char *line, const char *end) except -1:
    """Refuses a record whose text stops early; ``line`` is its first."""
    # The full form begins with Size and always ends with VmFlags; short forms (WSL) and
    # smaps_rollup have neither.
    if (record.known == 0 and record.others is None
            or record.known & 1 and record.vm_flags is None):
        raise unreadable(line, end, "the record of smaps is not whole that begins with")
    return 0


cdef list parse(const char *text, size_t length, bint with_figures):
    """The records of a text of smaps, or of maps where it is without figures."""
    cdef Recurring recurring = Recurring()
    cdef list records = []
    cdef SmapsRecord record = None
    cdef const char *at = text
    cdef const char *text_end = text + length
    cdef const char *end
    cdef const char *head = NULL
    cdef const char *head_end = NULL
    cdef uint64_t value
    cdef int before = FIGURES
    cdef int i
    cdef Line line
    while at < text_end:
        if with_figures and record is not None:
            # Records of one text have their figures in one order: the next is mostly known.
            i = recurring.following[before]
            end = scan_figure(at, text_end, i, &value)
            if end != NULL and not record.known >> i & 1:
                set_figure(record, i, value)
                before = i
                at = end
                continue
        end = <const char *>memchr(at, c'\n', text_end - at)
        if end == NULL:
            raise unreadable(at, text_end, "the text ends within a line")
        if starts_mapping(at):
            if with_figures and record is not None:
                check_whole(record, head, head_end)
            if not scan_mapping(at, end, &line):
                raise unreadable(at, end, "not a line of /proc/PID/maps")
            record = new_record(&line, recurring)
            records.append(record)
            before = FIGURES
            head = at
            head_end = end
        elif with_figures and record is not None:
            before = add_line(record, at, end, before, recurring)
        else:
            raise unreadable(at, end, "not a line of /proc/PID/maps")
        at = end + 1
    if with_figures and record is not None:
        check_whole(record, head, head_end)
    return records


def parse_smaps(bytes text not None):
    """The records of a ``/proc/PID/smaps`` (or ``smaps_rollup``), as a list.

    ValueError, with the line, where one cannot be read and where the text stops early.
    """
    return parse(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), True)


def parse_maps(bytes text not None):
    """The records of a ``/proc/PID/maps``, as a list; their figures are None.

    ValueError, with the line, where one cannot be read and where the text stops early.
    """
    return parse(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), False)


cdef SmapsRecord record_from(const char *text, size_t length):
    """The record of a text with just one (as ``smaps_text_at`` gives), ValueError for others."""
    cdef list records = parse(text, length, True)
    if len(records) != 1:
        raise ValueError(f"one record expected, not {len(records)}")
    return records[0]
