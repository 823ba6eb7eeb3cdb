"""Records of ``/proc/PID/smaps`` and ``maps``, and the one parser that makes them.

Text of whatever process goes to :func:`parse_maps` and :func:`parse_smaps`, which make
:class:`SmapsRecord` objects of it. A line that they cannot read is a ValueError with that
line, never a record left out or guessed.
"""

import os
import re
from types import MappingProxyType

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cython cimport final, no_gc
from libc.stdlib cimport calloc, free
from libc.string cimport memchr, memcmp, strlen

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
