"""The records of one text of ``smaps`` or ``maps``, in memory that they share.

The functions without the GIL return 0 or ``-errno``, or NULL when there is no memory. What is
given out lasts as long as the :class:`Records`. Paths and flags that records have in common are
kept once.
"""

cdef extern from "Python.h":
    object PyUnicode_DecodeFSDefaultAndSize(const char *, Py_ssize_t)

cdef enum:
    CHUNK_BITS = 8
    CHUNK = 1 << CHUNK_BITS     # records that are made room for at once
    BLOCK = 1 << 15             # bytes of a block of the arena


@final
@no_gc
cdef class Records:
    """The records of one text, as C structures.

    They are filled once (see :func:`read_records` in ``_smaps_parser``) and then only looked at.
    """

    __reduce__ = refuse_copies("take the objects that they make")

    def __cinit__(self):
        self.names = []
        self.strings = {}
        self.flag_sets = {}

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

    # -- memory

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

    cdef Record *new_record(self) noexcept nogil:
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

    # -- what a text says

    cdef Record *append(self, const Line *line) noexcept nogil:
        """One more record, which has no figures yet; NULL when there is no memory."""
        cdef const Record *before = self.at(self.count - 1) if self.count > 0 else NULL
        cdef Record *record = self.new_record()
        if record == NULL:
            return NULL
        record.start = line.start
        record.end = line.end
        record.permissions = line.permissions
        record.offset = line.offset
        record.device_major = line.device_major
        record.device_minor = line.device_minor
        record.inode = line.inode
        record.path_length = <uint32_t>line.path_length
        if line.path_length > 0:
            record.path = self.path_after(before, line.path, line.path_length)
            if record.path == NULL:
                return NULL
        return record

    cdef void drop_overlapped(self) noexcept nogil:
        """Drop every record of which a later one tells some address again.

        The kernel goes on at an address, and tells of the mapping that is there by then. Where that
        grew downwards meanwhile, it was told of in part, or in pieces.
        """
        cdef size_t chunks = (self.count + CHUNK - 1) >> CHUNK_BITS
        cdef size_t kept = 0
        cdef size_t i
        for i in range(self.count):
            while kept > 0 and self.at(kept - 1).end > self.at(i).start:
                kept -= 1
            if kept != i:
                self.at(kept)[0] = self.at(i)[0]
            kept += 1
        self.count = kept
        for i in range((kept + CHUNK - 1) >> CHUNK_BITS, chunks):
            free(self.chunks[i])

    cdef const char *path_after(self, const Record *before, const char *path,
                                size_t length) noexcept nogil:
        """The path's place in memory: that of the record before, where it is the same path.

        One with a backslash has its own place, as what is written alike can be different.
        """
        if has_backslash(path, length):
            self.backslashes = True
        elif (before != NULL and before.path_length == length
                and memcmp(before.path, path, length) == 0):
            return before.path
        return self.keep(path, length)

    cdef int set_flags(self, Record *record, const char *text, size_t length) noexcept nogil:
        """What follows ``VmFlags:``: 0 or -ENOMEM."""
        if (self.flags == NULL or self.flags_length != length
                or memcmp(self.flags, text, length) != 0):
            # One byte more: no flags at all still have a place.
            self.flags = self.keep(text, length + 1)
            if self.flags == NULL:
                return -ENOMEM
            self.flags_length = length
        record.flags = self.flags
        record.flags_length = <uint32_t>length
        return 0

    cdef int add_other(self, Record *record, int name, uint64_t value) noexcept nogil:
        """A figure with no attribute of its own: 0, -EEXIST where the record has it, -ENOMEM."""
        cdef Figure **place = &record.others
        cdef Figure *other
        while place[0] != NULL:
            if place[0].name == name:
                return -EEXIST
            place = &place[0].next
        other = <Figure *>self.take(sizeof(Figure))
        if other == NULL:
            return -ENOMEM
        other.name = name
        other.value = value
        other.next = NULL
        place[0] = other
        return 0

    cdef int number_of(self, str name) except -1:
        """The place of a figure's name among the names, where it is put if it is new."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)

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
