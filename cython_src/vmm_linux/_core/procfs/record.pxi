"""One mapping of a process as a Python object: its record in ``smaps``, or line in ``maps``."""

# The figures in the order of the kernel's text: their labels there, their names here.
LABELS = {
    b"Size:": "size",
    b"KernelPageSize:": "kernel_page_size",
    b"MMUPageSize:": "mmu_page_size",
    b"Rss:": "rss",
    b"Pss:": "pss",
    b"Pss_Dirty:": "pss_dirty",
    b"Shared_Clean:": "shared_clean",
    b"Shared_Dirty:": "shared_dirty",
    b"Private_Clean:": "private_clean",
    b"Private_Dirty:": "private_dirty",
    b"Referenced:": "referenced",
    b"Anonymous:": "anonymous",
    b"KSM:": "ksm",
    b"LazyFree:": "lazy_free",
    b"AnonHugePages:": "anon_huge_pages",
    b"ShmemPmdMapped:": "shmem_pmd_mapped",
    b"FilePmdMapped:": "file_pmd_mapped",
    b"Shared_Hugetlb:": "shared_hugetlb",
    b"Private_Hugetlb:": "private_hugetlb",
    b"Swap:": "swap",
    b"SwapPss:": "swap_pss",
    b"Locked:": "locked",
    b"THPeligible:": "thp_eligible",
    b"ProtectionKey:": "protection_key",
}
NAMES = tuple(LABELS.values())

# By their bits, SPAN_READ to SPAN_SHARED.
cdef tuple PERMISSIONS = (
    "---p", "r--p", "-w-p", "rw-p", "--xp", "r-xp", "-wxp", "rwxp",
    "---s", "r--s", "-w-s", "rw-s", "--xs", "r-xs", "-wxs", "rwxs")

cdef str DELETED = " (deleted)"


cdef str device_text(uint32_t major, uint32_t minor):
    return f"{major:02x}:{minor:02x}"


@final
@no_gc
cdef class FigureAttribute:
    # A figure as an attribute of records; its docstring is of the figure, not of the class.
    cdef int index
    cdef readonly str __doc__

    __reduce__ = refuse_copies("each belongs to the class of records")

    def __cinit__(self, int index, str text):
        self.index = index
        self.__doc__ = text

    def __get__(self, record, owner):
        return self if record is None else figure_at(record, self.index)

    def __set__(self, record, value):
        raise AttributeError("records do not change")


@no_gc                          # Strings, numbers and sets of strings: no cycle can arise.
cdef class SmapsRecord:
    """SmapsRecord()\n--\n
    One mapping of a process, from a record of ``smaps`` or a line of ``maps``.

    Figures are in bytes, except ``thp_eligible`` and ``protection_key``; None where the text has
    none (an older kernel, a line of ``maps``). A figure that a newer kernel adds is an attribute
    too, under its label in snake case. Records do not change, are equal where all their values are,
    and can be pickled.
    """

    def __init__(self):
        """Raise TypeError: ``parse_smaps`` and ``parse_maps`` make them."""
        raise TypeError(
            "records are not made by hand; read them with parse_smaps() or parse_maps()")

    def __dealloc__(self):
        free(self.values)

    @property
    def start(self):
        """The first address."""
        return self.span.start

    @property
    def end(self):
        """The first address after it."""
        return self.span.end

    @property
    def permissions(self):
        """As in ``maps``: ``rw-p``; the last letter is ``s`` for shared, ``p`` for private."""
        return PERMISSIONS[self.span.permissions]

    @property
    def offset(self):
        """Where in the file it begins, in bytes."""
        return self.span.offset

    @property
    def device(self):
        """The file's device, as in ``maps``: ``08:01``."""
        return device_text(self.span.device_major, self.span.device_minor)

    @property
    def inode(self):
        """The file's inode, 0 where there is no file."""
        return self.span.inode

    @property
    def deleted(self):
        """Whether the file has no name any more, as is the case for every memfd.

        The kernel then adds `` (deleted)`` to the name. Whether a file's own name ends like that
        shows in whether that file exists.
        """
        if self.pathname is None or not self.pathname.endswith(DELETED):
            return False
        try:
            return os.stat(self.pathname).st_ino != self.span.inode
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

    size = FigureAttribute(0, "The mapping's length.")
    kernel_page_size = FigureAttribute(1, "Page size the kernel uses for it.")
    mmu_page_size = FigureAttribute(2, "Page size the processor uses for it.")
    rss = FigureAttribute(3, "Resident in memory.")
    pss = FigureAttribute(4, "Resident, each page divided by the number of its users.")
    pss_dirty = FigureAttribute(5, "The dirty part of ``pss`` (6.0).")
    shared_clean = FigureAttribute(6, "Resident, used by others too, not written to.")
    shared_dirty = FigureAttribute(7, "Resident, used by others too, written to.")
    private_clean = FigureAttribute(8, "Resident, used by this process alone, not written to.")
    private_dirty = FigureAttribute(9, "Resident, used by this process alone, written to.")
    referenced = FigureAttribute(10, "Resident and accessed lately.")
    anonymous = FigureAttribute(11, "Resident and of no file.")
    ksm = FigureAttribute(12, "Merged by KSM (6.8).")
    lazy_free = FigureAttribute(13, "Given up by MADV_FREE, not yet taken.")
    anon_huge_pages = FigureAttribute(14, "Anonymous, in huge pages.")
    shmem_pmd_mapped = FigureAttribute(15, "Shared memory, in huge pages.")
    file_pmd_mapped = FigureAttribute(16, "Of files, in huge pages (5.4).")
    shared_hugetlb = FigureAttribute(17, "In hugetlbfs pages that others use too.")
    private_hugetlb = FigureAttribute(18, "In hugetlbfs pages of this process alone.")
    swap = FigureAttribute(19, "Swapped out.")
    swap_pss = FigureAttribute(20, "Swapped out, each page divided by the number of its users.")
    locked = FigureAttribute(21, "Locked in memory, counted as in ``pss``.")
    thp_eligible = FigureAttribute(
        22, "1 if transparent huge pages may be used here, else 0; not bytes (5.0).")
    protection_key = FigureAttribute(23, "The memory protection key; not bytes.")

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
        return (memcmp(&self.span, &that.span, sizeof(Span)) == 0
                and self.pathname == that.pathname and self.vm_flags == that.vm_flags
                and self.figures == that.figures)

    def __hash__(self):
        return hash((self.span.start, self.span.end, self.span.offset, self.span.inode))

    def __repr__(self):
        figures = ""
        for name, value in self.figures.items():
            if value:
                figures += f" {name}={value}"
        return (f"<{type(self).__name__} {self.span.start:x}-{self.span.end:x} {self.permissions}"
                f" {self.span.offset:x} {self.device} {self.span.inode} {self.pathname!r}"
                f"{figures}>")

    def __reduce__(self):
        return restore_record, (
            self.span.start, self.span.end, self.span.permissions, self.span.offset,
            self.span.device_major, self.span.device_minor, self.span.inode, self.pathname,
            self.vm_flags, dict(self.figures))


cdef object figure_at(SmapsRecord record, int index):
    return record.values[index] if record.known >> index & 1 else None


def restore_record(*values):
    """A new record with the values that ``SmapsRecord.__reduce__`` gave."""
    cdef SmapsRecord record = SmapsRecord.__new__(SmapsRecord)
    restore_into(record, values)
    return record


cdef int restore_into(SmapsRecord record, tuple values) except -1:
    """Give a new record the values of ``__reduce__``, where a record can have them."""
    (start, end, permissions, offset, major, minor, inode, pathname, vm_flags, figures) = values
    cdef int i
    check_values(pathname, vm_flags, figures)
    record.span.mapped = True
    record.span.start = start
    record.span.end = end
    if record.span.start > record.span.end or not 0 <= permissions <= 15:
        raise ValueError("no record of smaps: no such range, or no such permissions")
    record.span.permissions = permissions
    record.span.offset = offset
    record.span.device_major = major
    record.span.device_minor = minor
    record.span.inode = inode
    record.pathname = pathname
    record.vm_flags = vm_flags
    figures = dict(figures)
    for i in range(FIGURES):
        if NAMES[i] in figures:
            set_figure(record, i, figures.pop(NAMES[i]))
    record.others = figures or None
    return 0


cdef int check_values(object pathname, object vm_flags, object figures) except -1:
    """Refuse what no text of smaps has."""
    if pathname is not None and type(pathname) is not str:
        raise TypeError(f"no record of smaps: the path is of type {type(pathname).__name__}")
    if vm_flags is not None and not (
            type(vm_flags) is frozenset and all(type(flag) is str for flag in vm_flags)):
        raise TypeError("no record of smaps: the flags are no frozenset of strings, nor None")
    if type(figures) is not dict:
        raise TypeError(f"no record of smaps: the figures are of type {type(figures).__name__}")
    for name, value in figures.items():
        if type(name) is not str or type(value) is not int or not 0 <= value < 1 << 64:
            raise TypeError("no record of smaps: the figures are not numbers by name")
    return 0


cdef int set_figure(SmapsRecord record, int i, uint64_t value) except -1:
    """Give a record a figure with an attribute of its own."""
    if record.values == NULL:
        record.values = <uint64_t *>calloc(FIGURES, sizeof(uint64_t))
        if record.values == NULL:
            raise MemoryError
    record.values[i] = value
    record.known |= <uint32_t>1 << i
    return 0
