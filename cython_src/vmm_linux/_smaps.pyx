"""Records of ``/proc/PID/smaps`` and ``maps``, and the one parser that makes them.

The parser needs no GIL and makes no Python object: it fills a :class:`Records`, which makes
:class:`SmapsRecord` objects of what it holds when they are asked for. Text comes from memory
(:func:`parse_maps`, :func:`parse_smaps`) or from a file, in pieces (:func:`read_records`). A line
that cannot be read is a ValueError with that line, never a record left out or guessed.
"""

import os
import re
from types import MappingProxyType

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cython cimport final, no_gc
from libc.errno cimport EBADMSG, ENOMEM
from libc.stdint cimport intptr_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset, strlen

from vmm_linux cimport _syscalls
from vmm_linux._maps_text cimport Line, SPAN_SHARED, scan_decimal, scan_mapping, starts_mapping

cdef extern from "Python.h":
    object PyUnicode_DecodeFSDefaultAndSize(const char *, Py_ssize_t)


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


@no_gc                          # Strings, numbers and sets of strings: no cycle can arise.
cdef class SmapsRecord:
    """One mapping of a process, as a record of ``smaps`` or a line of ``maps`` tells it.

    Figures are in bytes, but for ``thp_eligible`` and ``protection_key``; None where the
    text does not have them (an older kernel, a line of ``maps``). A figure that a newer
    kernel adds is an attribute too, under its label in snake case. Records are not
    changed once made, compare by all they say, and can be pickled.
    """

    def __init__(self):
        raise TypeError(
            "records are not made by hand; read them with parse_smaps() or parse_maps()")

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
        return (f"<{type(self).__name__} {self.range_start:x}-{self.range_end:x} {self.permissions}"
                f" {self.file_offset:x} {self.device} {self.file_inode} {self.pathname!r}"
                f"{figures}>")

    def __reduce__(self):
        return _restore, (
            self.range_start, self.range_end, self.permission_bits, self.file_offset,
            self.device_major, self.device_minor, self.file_inode, self.pathname,
            self.vm_flags, dict(self.figures))


def _restore(*said):
    """Undoes :meth:`SmapsRecord.__reduce__`."""
    cdef SmapsRecord record = SmapsRecord.__new__(SmapsRecord)
    restore_into(record, said)
    return record


cdef int restore_into(SmapsRecord record, tuple said) except -1:
    """Makes a new record say what ``__reduce__`` told of one."""
    (start, end, permissions, offset, major, minor, inode, pathname, vm_flags, figures) = said
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
    return 0


cdef int set_figure(SmapsRecord record, int i, uint64_t value) except -1:
    if record.values == NULL:
        record.values = <uint64_t *>calloc(FIGURES, sizeof(uint64_t))
        if record.values == NULL:
            raise MemoryError
    record.values[i] = value
    record.known |= <uint32_t>1 << i
    return 0


# ---- What the parser fills -------------------------------------------------------------

cdef enum:
    CHUNK_BITS = 8
    CHUNK = 1 << CHUNK_BITS     # records that are made room for at once
    BLOCK = 1 << 15             # bytes of a block of the arena
    PIECE = 1 << 14             # bytes asked of a file at once, more than /proc gives


cdef enum Status:
    # Of the parser, beside -errno.
    WHOLE = 0                   # the text has ended where a record may end
    MORE = 1                    # all whole lines are taken
    NEW_LABEL = 2               # a figure whose label is met for the first time


@final
@no_gc
cdef class Records:
    """The records of one text, as C structures.

    They are read once (see :func:`read_records`) and then only looked at.
    """

    def __cinit__(self):
        cdef int i
        self.names = []
        self.strings = {}
        self.flag_sets = {}
        self.before = FIGURES
        for i in range(FIGURES):
            self.following[i] = (i + 1) % FIGURES
        self.following[FIGURES] = 0

    def __dealloc__(self):
        cdef size_t i
        cdef Block *block
        for i in range((self.count + CHUNK - 1) >> CHUNK_BITS):
            free(self.chunks[i])
        free(self.chunks)
        while self.block != NULL:
            block = self.block
            self.block = block.before
            free(block)

    def __len__(self):
        return self.count

    cdef Record *at(self, size_t index) noexcept nogil:
        """The record with this number, which is below ``count``."""
        return &self.chunks[index >> CHUNK_BITS][index & (CHUNK - 1)]

    cdef void *take(self, size_t size) noexcept nogil:
        """Memory that lasts as long as the records, or NULL when there is none."""
        cdef Block *block = self.block
        cdef size_t room
        size = (size + 7) & ~<size_t>7
        if block == NULL or block.room - block.used < size:
            room = size if size > BLOCK else BLOCK
            block = <Block *>malloc(sizeof(Block) + room)
            if block == NULL:
                return NULL
            block.before = self.block
            block.used = 0
            block.room = room
            self.block = block
        block.used += size
        return <char *>(block + 1) + block.used - size

    cdef const char *keep(self, const char *text, size_t length) noexcept nogil:
        cdef void *kept = self.take(length)
        if kept != NULL:
            memcpy(kept, text, length)
        return <const char *>kept

    cdef Record *append(self) noexcept nogil:
        """One more record, all zero, or NULL when there is no memory."""
        cdef size_t chunk = self.count >> CHUNK_BITS
        cdef Record **chunks
        if self.count & (CHUNK - 1) == 0:
            if chunk & (chunk - 1) == 0:
                chunks = <Record **>realloc(self.chunks, 2 * (chunk + 1) * sizeof(Record *))
                if chunks == NULL:
                    return NULL
                self.chunks = chunks
            self.chunks[chunk] = <Record *>calloc(CHUNK, sizeof(Record))
            if self.chunks[chunk] == NULL:
                return NULL
        self.count += 1
        return self.at(self.count - 1)

    # -- as Python objects

    cdef object pathname_at(self, const Record *record):
        """The path as Python has paths, None where there is none."""
        if record.path_length == 0:
            return None
        name = self.strings.get(<uintptr_t>record.path)
        if name is None:
            name = self.strings[<uintptr_t>record.path] = decoded_path(
                record.path, record.path_length)
        return name

    cdef object flags_at(self, const Record *record):
        """VmFlags as a set, None where the text does not tell."""
        cdef bytes text
        if record.flags == NULL:
            return None
        flags = self.flag_sets.get(<uintptr_t>record.flags)
        if flags is None:
            text = PyBytes_FromStringAndSize(record.flags, record.flags_length)
            # Records that have the same flags in different places share one set.
            flags = self.flag_sets.get(text)
            if flags is None:
                flags = self.flag_sets[text] = frozenset(
                    text.decode("ascii", "backslashreplace").split())
            self.flag_sets[<uintptr_t>record.flags] = flags
        return flags

    cdef int fill(self, SmapsRecord made, size_t index) except -1:
        """Make a new object say what the record with this number says."""
        cdef const Record *record = self.at(index)
        cdef const Figure *other = record.others
        made.range_start = record.start
        made.range_end = record.end
        made.permission_bits = record.permissions
        made.file_offset = record.offset
        made.device_major = record.device_major
        made.device_minor = record.device_minor
        made.file_inode = record.inode
        made.pathname = self.pathname_at(record)
        made.vm_flags = self.flags_at(record)
        if record.known:
            made.values = <uint64_t *>malloc(FIGURES * sizeof(uint64_t))
            if made.values == NULL:
                raise MemoryError
            memcpy(made.values, record.values, FIGURES * sizeof(uint64_t))
            made.known = record.known
        if other != NULL:
            made.others = {}
            while other != NULL:
                made.others[self.names[other.name]] = other.value
                other = other.next
        return 0

    cdef SmapsRecord record(self, size_t index):
        cdef SmapsRecord made = SmapsRecord.__new__(SmapsRecord)
        self.fill(made, index)
        return made

    # -- parser

    cdef int refuse(self, const char *problem, const char *line, const char *end) noexcept nogil:
        """Remember the line that cannot be read, and why."""
        self.problem = problem
        self.line = line
        self.line_end = end
        return -EBADMSG

    cdef int begin_record(self, const char *at, const char *end) noexcept nogil:
        """Begins the record whose first line this is."""
        cdef Line line
        cdef Record *before = self.latest
        cdef Record *record
        if not scan_mapping(at, end, &line):
            return self.refuse(b"not a line of /proc/PID/maps", at, end)
        record = self.append()
        if record == NULL:
            return -ENOMEM
        record.start = line.start
        record.end = line.end
        record.permissions = line.permissions
        record.offset = line.offset
        record.device_major = line.device_major
        record.device_minor = line.device_minor
        record.inode = line.inode
        record.path_length = <uint32_t>line.path_length
        if line.path_length == 0:
            pass
        elif (before != NULL and before.path_length == line.path_length
                and memcmp(before.path, line.path, line.path_length) == 0
                and not (self.backslashes and has_backslash(line.path, line.path_length))):
            record.path = before.path
        else:
            # A path with a backslash has its own place, as what is written alike can be different.
            record.path = self.keep(line.path, line.path_length)
            if record.path == NULL:
                return -ENOMEM
            if has_backslash(line.path, line.path_length):
                self.backslashes = True
        self.latest = record
        self.before = FIGURES
        return 0

    cdef inline int add_figure(self, int i, uint64_t value) noexcept nogil:
        cdef Record *record = self.latest
        if record.values == NULL:
            record.values = <uint64_t *>self.take(FIGURES * sizeof(uint64_t))
            if record.values == NULL:
                return -ENOMEM
            memset(record.values, 0, FIGURES * sizeof(uint64_t))
        record.values[i] = value
        record.known |= <uint32_t>1 << i
        self.before = i
        return 0

    cdef int add_flags(self, const char *at, const char *end) noexcept nogil:
        cdef Record *record = self.latest
        cdef size_t length = end - at
        if (self.flags == NULL or self.flags_length != length
                or memcmp(self.flags, at, length) != 0):
            # One byte more: no flags at all still have a place.
            self.flags = self.keep(at, length + 1)
            if self.flags == NULL:
                return -ENOMEM
            self.flags_length = length
        record.flags = self.flags
        record.flags_length = <uint32_t>length
        return 0

    cdef int add_line(self, const char *line, const char *end) noexcept nogil:
        """Adds a line that is not just the figure expected: 0, NEW_LABEL or ``-errno``.

        The line is ``VmFlags: ab cd``, ``Label:  12 kB`` or ``Label:  12``.
        """
        cdef const char *colon = <const char *>memchr(line, c':', end - line)
        cdef const char *at
        cdef uint64_t value
        cdef bint in_kib
        cdef int i
        if colon == NULL or not c'A' <= line[0] <= c'Z':
            return self.refuse(b"neither a mapping nor a figure", line, end)
        if (self.latest.flags == NULL and colon - line == 7
                and memcmp(line, b"VmFlags", 7) == 0):
            return self.add_flags(colon + 1, end)
        at = colon + 1
        while at < end and (at[0] == c' ' or at[0] == c'\t'):
            at += 1
        at = scan_decimal(at, end, &value)
        if at == NULL:
            return self.refuse(b"a figure without its number", line, end)
        in_kib = end - at == 3 and memcmp(at, b" kB", 3) == 0
        if not in_kib and at != end:
            return self.refuse(b"a figure in an unknown unit", line, end)
        if in_kib:
            if value >> 54:
                return self.refuse(b"a figure beyond 64 bits", line, end)
            value <<= 10
        for i in range(FIGURES):
            if has_label(line, end, i):
                break
        else:
            return self.add_other(line, colon, end, value)
        if in_kib != (i < FIRST_PLAIN):
            return self.refuse(b"a figure in another unit than the kernel's", line, end)
        if self.latest.known >> i & 1:
            return self.refuse(b"a figure given twice", line, end)
        self.following[self.before] = i
        return self.add_figure(i, value)

    cdef int add_other(self, const char *line, const char *colon, const char *end,
                       uint64_t value) noexcept nogil:
        """Adds a figure that has no attribute of its own."""
        cdef Label *label = self.labels
        cdef Figure **place = &self.latest.others
        cdef Figure *other
        while label != NULL and (label.length != <size_t>(colon - line)
                                 or memcmp(label.text, line, label.length) != 0):
            label = label.next
        if label == NULL:
            self.line = line
            self.line_end = end
            return NEW_LABEL
        if label.name < 0:
            return self.refuse(b"a figure given twice", line, end)
        while place[0] != NULL:
            if place[0].name == label.name:
                return self.refuse(b"a figure given twice", line, end)
            place = &place[0].next
        other = <Figure *>self.take(sizeof(Figure))
        if other == NULL:
            return -ENOMEM
        other.name = label.name
        other.value = value
        other.next = NULL
        place[0] = other
        return 0

    cdef int learn_label(self) except -1:
        """Find the name for the label that the parser has stopped at."""
        cdef const char *colon = <const char *>memchr(
            self.line, c':', self.line_end - self.line)
        cdef Label *label = <Label *>self.take(sizeof(Label))
        if label == NULL:
            raise MemoryError
        label.length = colon - self.line
        label.text = self.keep(self.line, label.length)
        if label.text == NULL:
            raise MemoryError
        name = snake_case(os.fsdecode(PyBytes_FromStringAndSize(self.line, label.length)))
        if name in NAMES:
            label.name = -1     # Another spelling of a figure that has its attribute.
        elif name in self.names:
            label.name = self.names.index(name)
        else:
            label.name = len(self.names)
            self.names.append(name)
        label.next = self.labels
        self.labels = label
        return 0

    cdef int check_whole(self) noexcept nogil:
        """Refuses the latest record if its text stops early."""
        cdef Record *record = self.latest
        # The full form begins with Size and always ends with VmFlags; short forms (WSL) and
        # smaps_rollup have neither.
        if (self.with_figures and record != NULL
                and (record.known == 0 and record.others == NULL
                     or record.known & 1 and record.flags == NULL)):
            return self.refuse(NULL, NULL, NULL)
        return 0

    cdef int parse_some(self, Source *source) noexcept nogil:
        """Takes the whole lines that are there: MORE, NEW_LABEL, or ``-errno``."""
        cdef const char *at = source.at
        cdef const char *end
        cdef uint64_t value
        cdef int i
        cdef int result = 0
        while at < source.end:
            if self.latest != NULL and self.with_figures:
                # Records of one text have their figures in one order: the next is mostly known.
                i = self.following[self.before]
                end = scan_figure(at, source.end, i, &value)
                if end != NULL and not self.latest.known >> i & 1:
                    result = self.add_figure(i, value)
                    if result < 0:
                        break
                    at = end
                    continue
            end = <const char *>memchr(at, c'\n', source.end - at)
            if end == NULL:
                break
            if starts_mapping(at):
                result = self.check_whole()
                if result == 0:
                    result = self.begin_record(at, end)
            elif self.with_figures and self.latest != NULL:
                result = self.add_line(at, end)
            else:
                result = self.refuse(b"not a line of /proc/PID/maps", at, end)
            if result != 0:
                break
            at = end + 1
        source.at = at
        return result if result != 0 else MORE

    cdef int parse(self, Source *source) noexcept nogil:
        """Takes all of the text: WHOLE, NEW_LABEL (then call again), or ``-errno``."""
        cdef intptr_t length
        cdef size_t left
        cdef char *larger
        cdef int result
        while True:
            result = self.parse_some(source)
            if result != MORE:
                return result
            if source.fd < 0:
                break
            left = source.end - source.at
            if left == source.room:
                # A path has no greatest length: a folder can be moved into another again and again.
                larger = <char *>self.take(2 * source.room)
                if larger == NULL:
                    return -ENOMEM
                source.piece = larger
                source.room *= 2
            memmove(source.piece, source.at, left)
            source.at = source.piece
            length = _syscalls.read(source.fd, source.piece + left, source.room - left)
            source.end = source.at + left + (length if length > 0 else 0)
            if length < 0:
                return <int>length
            if length == 0:
                break
        if source.at < source.end:
            return self.refuse(b"the text ends within a line", source.at, source.end)
        return self.check_whole()

    cdef int drive(self, Source *source) except? -1:
        """:meth:`parse` to the end: 0, or ``-errno`` of reading; ValueError for the text's."""
        cdef int result
        while True:
            with nogil:
                result = self.parse(source)
            if result == NEW_LABEL:
                self.learn_label()
            elif result == -ENOMEM:
                raise MemoryError
            elif result == -EBADMSG and self.problem != NULL:
                raise unreadable(
                    self.problem.decode(), self.line[:self.line_end - self.line])
            elif result == -EBADMSG:
                raise unreadable(
                    "the record of smaps is not whole that begins with", self.first_line())
            else:
                return result

    cdef bytes first_line(self):
        """The latest record's first line, as the kernel wrote it but for blanks."""
        cdef const Record *record = self.latest
        line = (f"{record.start:08x}-{record.end:08x} {PERMISSIONS[record.permissions]}"
                f" {record.offset:08x} {device_text(record.device_major, record.device_minor)}"
                f" {record.inode} ").encode()
        return line + record.path[:record.path_length] if record.path_length else line


cdef Records parse_text(const char *text, size_t length, bint with_figures):
    """The records of a text of smaps, or of maps where it is without figures."""
    cdef Records records = Records.__new__(Records)
    cdef Source source
    source.fd = -1
    source.at = text
    source.end = text + length
    records.with_figures = with_figures
    records.drive(&source)
    return records


cdef int read_records(Records records, int fd, bint with_figures) except? -1:
    """Fill ``records`` from an open smaps or maps, without the GIL: 0, or ``-errno`` of reading.

    ValueError, with the line, where one cannot be read and where the text stops early.
    """
    cdef char piece[PIECE]
    cdef Source source
    source.fd = fd
    source.piece = source.at = source.end = piece
    source.room = PIECE
    records.with_figures = with_figures
    return records.drive(&source)


# ---- Lines -----------------------------------------------------------------------------

cdef object unreadable(str problem, bytes line):
    return ValueError(f"{problem}: {line!r}")


cdef str decoded_path(const char *path, size_t length):
    """A path of the kernel's text as Python has paths."""
    if not has_backslash(path, length):
        return PyUnicode_DecodeFSDefaultAndSize(path, length)
    # The kernel writes a newline like this and nothing else, a backslash neither: a name with
    # these four characters cannot be told from one with a newline. Who can asks the kernel once
    # more: see settled_name in _own_process.
    return os.fsdecode(PyBytes_FromStringAndSize(path, length).replace(b"\\012", b"\n"))


cdef inline bint has_backslash(const char *path, size_t length) noexcept nogil:
    return memchr(path, c'\\', length) != NULL


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


cdef str snake_case(str label):
    """``KernelPageSize`` and ``Shared_Clean`` to ``kernel_page_size`` and ``shared_clean``."""
    # A capital begins a word after a small letter, and before one (MMUPageSize: mmu_page_size).
    label = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", label)
    return label.lower()


def parse_smaps(bytes text not None):
    """The records of a ``/proc/PID/smaps`` (or ``smaps_rollup``), as a list.

    ValueError, with the line, where one cannot be read and where the text stops early.
    """
    return all_of(parse_text(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), True))


def parse_maps(bytes text not None):
    """The records of a ``/proc/PID/maps``, as a list; their figures are None.

    ValueError, with the line, where one cannot be read and where the text stops early.
    """
    return all_of(parse_text(PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text), False))


cdef list all_of(Records records):
    cdef size_t i
    return [records.record(i) for i in range(records.count)]


cdef SmapsRecord record_from(const char *text, size_t length):
    """The record of a text with just one (as ``smaps_text_at`` gives), ValueError for others."""
    cdef Records records = parse_text(text, length, True)
    if records.count != 1:
        raise ValueError(f"one record expected, not {records.count}")
    return records.record(0)
