"""The records of one text of ``smaps`` or ``maps``, in memory that they share.

The functions without the GIL return 0 or -errno, or NULL when there is no memory. Pointers last as
long as the ``SmapsStore``. Paths and flags that records have in common are kept once.
"""

cdef extern from "Python.h":
    object PyUnicode_DecodeFSDefaultAndSize(const char *, Py_ssize_t)

cdef enum:
    CHUNK_BITS = 8
    CHUNK = 1 << CHUNK_BITS     # records whose memory is allocated at once
    BLOCK = 1 << 15             # bytes of a block of the arena

cdef struct Figure:
    # One with no attribute of its own.
    int name                    # its place among the names
    uint64_t value
    Figure *next

cdef struct Block:
    # Of memory that is given out piece by piece, and lies behind this.
    Block *before
    size_t used, capacity


@final
@no_gc
cdef class SmapsStore:
    """The records of one text, as C structures. It is filled once, see ``read_records``."""

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

    cdef SmapsEntry *at(self, size_t index) noexcept nogil:
        """The record with this number, which is below ``count``."""
        return &self.chunks[index >> CHUNK_BITS][index & (CHUNK - 1)]

    cdef void drop_overlapped(self) noexcept nogil:
        """Drop every record with an address that a later one has again.

        The kernel goes on at an address, and writes the mapping that is there by then. Where that
        grew downwards meanwhile, an earlier record has a part of it.
        """
        cdef size_t chunks = (self.count + CHUNK - 1) >> CHUNK_BITS
        cdef size_t kept = 0, i
        for i in range(self.count):
            while kept > 0 and self.at(kept - 1).span.end > self.at(i).span.start:
                kept -= 1
            if kept != i:
                self.at(kept)[0] = self.at(i)[0]
            kept += 1
        self.count = kept
        for i in range((kept + CHUNK - 1) >> CHUNK_BITS, chunks):
            free(self.chunks[i])

    cdef object pathname_at(self, const SmapsEntry *entry):
        """The path as Python has paths, None where there is none."""
        if entry.path_length == 0:
            return None
        name = self.strings.get(<uintptr_t>entry.path)
        if name is None:
            name = self.strings[<uintptr_t>entry.path] = decoded_path(entry.path, entry.path_length)
        return name

    cdef int fill(self, SmapsRecord made, size_t index) except -1:
        """Make a new object the record with this number."""
        cdef const SmapsEntry *entry = self.at(index)
        cdef const Figure *other = entry.others
        made.span = entry.span
        made.pathname = self.pathname_at(entry)
        made.vm_flags = flags_at(self, entry)
        if entry.known:
            made.values = <uint64_t *>malloc(FIGURES * sizeof(uint64_t))
            if made.values == NULL:
                raise MemoryError
            memcpy(made.values, entry.values, FIGURES * sizeof(uint64_t))
            made.known = entry.known
        if other != NULL:
            made.others = {}
            while other != NULL:
                made.others[self.names[other.name]] = other.value
                other = other.next
        return 0


cdef void *take_memory(SmapsStore store, size_t size) noexcept nogil:
    """Memory that lasts as long as the records, or NULL when there is none."""
    cdef Block *block = store.block
    cdef size_t capacity
    size = (size + 7) & ~<size_t>7
    if block == NULL or block.capacity - block.used < size:
        capacity = size if size > BLOCK else BLOCK
        block = <Block *>malloc(sizeof(Block) + capacity)
        if block == NULL:
            return NULL
        block.before = store.block
        block.used = 0
        block.capacity = capacity
        store.block = block
    block.used += size
    return <char *>(block + 1) + block.used - size


cdef const char *keep_text(SmapsStore store, const char *text, size_t length) noexcept nogil:
    cdef void *kept = take_memory(store, length)
    if kept != NULL:
        memcpy(kept, text, length)
    return <const char *>kept


cdef SmapsEntry *new_entry(SmapsStore store) noexcept nogil:
    """One more record, all zero, or NULL when there is no memory."""
    cdef size_t chunk = store.count >> CHUNK_BITS
    cdef SmapsEntry **chunks
    if store.count & (CHUNK - 1) == 0:
        if chunk & (chunk - 1) == 0:
            chunks = <SmapsEntry **>realloc(store.chunks, 2 * (chunk + 1) * sizeof(SmapsEntry *))
            if chunks == NULL:
                return NULL
            store.chunks = chunks
        store.chunks[chunk] = <SmapsEntry *>calloc(CHUNK, sizeof(SmapsEntry))
        if store.chunks[chunk] == NULL:
            return NULL
    store.count += 1
    return store.at(store.count - 1)


cdef SmapsEntry *add_entry(SmapsStore store, const Line *line) noexcept nogil:
    """One more record, which has no figures yet; NULL when there is no memory."""
    cdef const SmapsEntry *before = store.at(store.count - 1) if store.count > 0 else NULL
    cdef SmapsEntry *entry = new_entry(store)
    if entry == NULL:
        return NULL
    entry.span = line.span
    entry.path_length = <uint32_t>line.path_length
    if line.path_length > 0:
        entry.path = path_after(store, before, line.path, line.path_length)
        if entry.path == NULL:
            return NULL
    return entry


cdef const char *path_after(SmapsStore store, const SmapsEntry *before, const char *path,
                            size_t length) noexcept nogil:
    """Where the path is in memory: that of the record before, if both are the same.

    A path with a backslash has its own place, as two that are written alike can be different.
    """
    if has_backslash(path, length):
        store.backslashes = True
    elif before != NULL and before.path_length == length and memcmp(before.path, path, length) == 0:
        return before.path
    return keep_text(store, path, length)


cdef inline int set_entry_figure(SmapsStore store, SmapsEntry *entry, int i,
                                 uint64_t value) noexcept nogil:
    """A figure with an attribute of its own. Inline, as a record has some twenty."""
    if entry.values == NULL:
        entry.values = <uint64_t *>take_memory(store, FIGURES * sizeof(uint64_t))
        if entry.values == NULL:
            return -ENOMEM
        memset(entry.values, 0, FIGURES * sizeof(uint64_t))
    entry.values[i] = value
    entry.known |= <uint32_t>1 << i
    return 0


cdef int set_flags(SmapsStore store, SmapsEntry *entry, const char *text,
                   size_t length) noexcept nogil:
    """What follows ``VmFlags:``: 0 or -ENOMEM."""
    if (store.flags == NULL or store.flags_length != length
            or memcmp(store.flags, text, length) != 0):
        # One byte more: no flags at all still have a place.
        store.flags = keep_text(store, text, length + 1)
        if store.flags == NULL:
            return -ENOMEM
        store.flags_length = length
    entry.flags = store.flags
    entry.flags_length = <uint32_t>length
    return 0


cdef int add_other_figure(SmapsStore store, SmapsEntry *entry, int name,
                          uint64_t value) noexcept nogil:
    """A figure with no attribute of its own: 0, -EEXIST where the record has it, -ENOMEM."""
    cdef Figure **place = &entry.others
    cdef Figure *other
    while place[0] != NULL:
        if place[0].name == name:
            return -EEXIST
        place = &place[0].next
    other = <Figure *>take_memory(store, sizeof(Figure))
    if other == NULL:
        return -ENOMEM
    other.name = name
    other.value = value
    other.next = NULL
    place[0] = other
    return 0


cdef int number_of(SmapsStore store, str name) except -1:
    """The place of a figure's name among the names, where it is put if it is new."""
    if name not in store.names:
        store.names.append(name)
    return store.names.index(name)


cdef object flags_at(SmapsStore store, const SmapsEntry *entry):
    """VmFlags as a set, None where the text has none."""
    cdef bytes text
    if entry.flags == NULL:
        return None
    flags = store.flag_sets.get(<uintptr_t>entry.flags)
    if flags is None:
        text = PyBytes_FromStringAndSize(entry.flags, entry.flags_length)
        # Records with the same flags at different places share one set.
        flags = store.flag_sets.get(text)
        if flags is None:
            flags = store.flag_sets[text] = frozenset(
                text.decode("ascii", "backslashreplace").split())
        store.flag_sets[<uintptr_t>entry.flags] = flags
    return flags


cdef SmapsRecord make_record(SmapsStore store, size_t index):
    """The record with this number as an object."""
    cdef SmapsRecord made = SmapsRecord.__new__(SmapsRecord)
    store.fill(made, index)
    return made


cdef str decoded_path(const char *path, size_t length):
    """A path of the kernel's text as Python has paths."""
    if not has_backslash(path, length):
        return PyUnicode_DecodeFSDefaultAndSize(path, length)
    # The kernel escapes newlines alone, no backslash: a name with these four characters reads like
    # one with a newline. Where PROCMAP_QUERY works, settled_name finds out.
    return os.fsdecode(PyBytes_FromStringAndSize(path, length).replace(b"\\012", b"\n"))


cdef inline bint has_backslash(const char *path, size_t length) noexcept nogil:
    return memchr(path, c'\\', length) != NULL
