"""The one parser of ``/proc/PID/smaps`` and ``maps``.

It needs no GIL and makes no Python object: it fills a ``SmapsStore``. Text comes from memory
(``parse_maps``, ``parse_smaps``) or from a file, in pieces (``read_records``). A line that cannot
be read is a ValueError with that line, never a record left out or guessed.
"""


# ---- Figures -----------------------------------------------------------------------------------

cdef const char *LABEL_TEXTS[FIGURES]
cdef size_t LABEL_LENGTHS[FIGURES]      # with the colon
cdef int index
cdef bytes label
for index, label in enumerate(LABELS):
    LABEL_TEXTS[index] = label
    LABEL_LENGTHS[index] = strlen(label)

cdef enum:
    # These are plain numbers; the figures before them are in kB.
    FIRST_PLAIN = 22


cdef inline bint has_label(const char *line, const char *end, int i) noexcept nogil:
    return (<size_t>(end - line) >= LABEL_LENGTHS[i]
            and memcmp(line, LABEL_TEXTS[i], LABEL_LENGTHS[i]) == 0)


cdef inline const char *scan_figure(const char *at, const char *end, int i,
                                    uint64_t *value) noexcept nogil:
    """Read figure ``i`` as the kernel writes it, newline included; NULL if that is not there."""
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


cdef const char *scan_value(const char *at, const char *end, uint64_t *value,
                            bint *in_kib) noexcept nogil:
    """Read what follows a label, kB as bytes: NULL, or what is wrong with it."""
    while at < end and (at[0] == c' ' or at[0] == c'\t'):
        at += 1
    at = scan_decimal(at, end, value)
    if at == NULL:
        return b"a figure without its number"
    in_kib[0] = end - at == 3 and memcmp(at, b" kB", 3) == 0
    if not in_kib[0]:
        if at != end:
            return b"a figure in an unknown unit"
        return NULL
    if value[0] >> 54:
        return b"a figure beyond 64 bits"
    value[0] <<= 10
    return NULL


cdef str snake_case(str label):
    """``KernelPageSize`` and ``Shared_Clean`` to ``kernel_page_size`` and ``shared_clean``."""
    # A capital begins a word after a small letter or a digit, and after a capital where a small
    # letter follows (MMUPageSize: mmu_page_size).
    cdef str snake = label[:1]
    cdef Py_ssize_t i
    for i in range(1, len(label)):
        if is_capital(label[i]) and (
                is_small(label[i - 1]) or "0" <= label[i - 1] <= "9"
                or is_capital(label[i - 1]) and is_small(label[i + 1:i + 2])):
            snake += "_"
        snake += label[i]
    return snake.lower()


cdef bint is_capital(str letter):
    """Whether this is a capital letter of ASCII."""
    return "A" <= letter <= "Z"


cdef bint is_small(str letter):
    """Whether this is a small letter of ASCII; no letter is none."""
    return "a" <= letter <= "z"


# ---- The parser --------------------------------------------------------------------------------

cdef struct Label:
    # Of a figure with no attribute of its own.
    const char *text
    size_t length
    int name                    # below 0: no label of the kernel's, and refused
    Label *next


cdef enum Status:
    # Of the parser, beside -errno.
    WHOLE = 0                   # the text has ended where a record may end
    MORE = 1                    # all whole lines are taken
    NEW_LABEL = 2               # a figure whose label is met for the first time


cdef object unreadable(str problem, bytes line):
    return ValueError(f"{problem}: {line!r}")


@final
@no_gc
cdef class Parser:
    """Fills a store from a reader."""
    cdef SmapsStore store
    cdef bint with_figures
    cdef SmapsEntry *latest     # to which figures are added
    cdef int before             # the figure added last; FIGURES: none
    cdef int following[FIGURES + 1]     # figure by the one before it; FIGURES: the first
    cdef Label *labels
    cdef const char *problem    # of the line that cannot be read; NULL: a record is not whole
    cdef const char *line
    cdef const char *line_end

    __reduce__ = refuse_copies("each belongs to one text")

    def __cinit__(self):
        cdef int i
        self.before = FIGURES
        for i in range(FIGURES):
            self.following[i] = (i + 1) % FIGURES
        self.following[FIGURES] = 0

    cdef int refuse(self, const char *problem, const char *line, const char *end) noexcept nogil:
        """Remember the line that cannot be read, and why."""
        self.problem = problem
        self.line = line
        self.line_end = end
        return -EBADMSG

    cdef int begin_record(self, const char *at, const char *end) noexcept nogil:
        """Begin the record whose first line this is."""
        cdef Line line
        if not scan_mapping(at, end, &line):
            return self.refuse(b"not a line of /proc/PID/maps", at, end)
        self.latest = add_entry(self.store, &line)
        if self.latest == NULL:
            return -ENOMEM
        self.before = FIGURES
        return 0

    cdef inline int add_figure(self, int i, uint64_t value) noexcept nogil:
        self.before = i
        return set_entry_figure(self.store, self.latest, i, value)

    cdef int add_line(self, const char *line, const char *end) noexcept nogil:
        """Add a line that is not just the figure expected: 0, NEW_LABEL or -errno.

        The line is ``VmFlags: ab cd``, ``Label:  12 kB`` or ``Label:  12``.
        """
        cdef const char *colon = <const char *>memchr(line, c':', end - line)
        cdef const char *problem
        cdef uint64_t value
        cdef bint in_kib
        cdef int i
        if colon == NULL or not c'A' <= line[0] <= c'Z':
            return self.refuse(b"neither a mapping nor a figure", line, end)
        if self.latest.flags == NULL and colon - line == 7 and memcmp(line, b"VmFlags", 7) == 0:
            return set_flags(self.store, self.latest, colon + 1, end - colon - 1)
        problem = scan_value(colon + 1, end, &value, &in_kib)
        if problem != NULL:
            return self.refuse(problem, line, end)
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
        """Add a figure that has no attribute of its own."""
        cdef Label *label = self.labels
        cdef int result
        while label != NULL and (label.length != <size_t>(colon - line)
                                 or memcmp(label.text, line, label.length) != 0):
            label = label.next
        if label == NULL:
            self.line = line
            self.line_end = end
            return NEW_LABEL
        result = -EEXIST
        if label.name >= 0:
            result = add_other_figure(self.store, self.latest, label.name, value)
        if result == -EEXIST:
            return self.refuse(b"a figure given twice", line, end)
        return result

    cdef int learn_label(self) except -1:
        """Find the name for the label that the parser has stopped at."""
        cdef const char *colon = <const char *>memchr(self.line, c':', self.line_end - self.line)
        cdef Label *label = <Label *>take_memory(self.store, sizeof(Label))
        if label == NULL:
            raise MemoryError
        label.length = colon - self.line
        label.text = keep_text(self.store, self.line, label.length)
        if label.text == NULL:
            raise MemoryError
        name = snake_case(os.fsdecode(PyBytes_FromStringAndSize(self.line, label.length)))
        # Below 0: another spelling of a figure that has its attribute.
        label.name = -1 if name in NAMES else number_of(self.store, name)
        label.next = self.labels
        self.labels = label
        return 0

    cdef int check_whole(self) noexcept nogil:
        """Refuses the latest record if its text stops early."""
        cdef SmapsEntry *entry = self.latest
        # The full form begins with Size and always ends with VmFlags; short forms (WSL) and
        # smaps_rollup have neither.
        if (self.with_figures and entry != NULL
                and (entry.known == 0 and entry.others == NULL
                     or entry.known >> FIGURE_SIZE & 1 and entry.flags == NULL)):
            return self.refuse(NULL, NULL, NULL)
        return 0

    cdef int parse_some(self, Reader *reader) noexcept nogil:
        """Take the whole lines that are there: MORE, NEW_LABEL, or -errno."""
        cdef const char *at = reader.text.data + reader.next
        cdef const char *text_end = reader.text.data + reader.text.length
        cdef const char *end
        cdef uint64_t value
        cdef int i, result = 0
        while at < text_end:
            if self.latest != NULL and self.with_figures:
                # Records of one text have their figures in one order: the next is mostly known.
                i = self.following[self.before]
                end = scan_figure(at, text_end, i, &value)
                if end != NULL and not self.latest.known >> i & 1:
                    result = self.add_figure(i, value)
                    if result < 0:
                        break
                    at = end
                    continue
            end = <const char *>memchr(at, c'\n', text_end - at)
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
        reader.kept = reader.next = at - reader.text.data
        return result if result != 0 else MORE

    cdef int parse(self, Reader *reader) noexcept nogil:
        """Take all of the text: WHOLE, NEW_LABEL (then call again), or -errno."""
        cdef int result
        while True:
            result = self.parse_some(reader)
            if result != MORE:
                return result
            result = read_more(reader)
            if result < 0:
                return result
            if result == 0:
                break
        if reader.next < reader.text.length:
            return self.refuse(b"the text ends within a line", reader.text.data + reader.next,
                               reader.text.data + reader.text.length)
        return self.check_whole()

    cdef int drive(self, Reader *reader) except? -1:
        """``parse`` to the end, see ``parse_into``."""
        cdef int result
        while True:
            with nogil:
                result = self.parse(reader)
            if result == NEW_LABEL:
                self.learn_label()
            elif result == -ENOMEM:
                raise MemoryError
            elif result == -EBADMSG and self.problem != NULL:
                raise unreadable(self.problem.decode(), self.line[:self.line_end - self.line])
            elif result == -EBADMSG:
                raise unreadable(
                    "the record of smaps is not whole that begins with", self.first_line())
            else:
                return result

    cdef bytes first_line(self):
        """The latest record's first line, as the kernel wrote it except for blanks."""
        cdef const SmapsEntry *latest = self.latest
        cdef SmapsRecord made = make_record(self.store, self.store.count - 1)
        line = (f"{made.span.start:08x}-{made.span.end:08x} {made.permissions}"
                f" {made.span.offset:08x} {made.device} {made.span.inode} ").encode()
        return line + latest.path[:latest.path_length] if latest.path_length else line


# ---- Texts -------------------------------------------------------------------------------------

cdef int parse_into(SmapsStore store, int fd, Text *text, bint with_figures) except? -1:
    """Fill a store from an open file by way of ``text``, or from all of ``text`` if ``fd`` is -1.

    Returns 0, or -errno of reading. ValueError, with the line, where one cannot be read and where
    the text stops early.
    """
    cdef Parser parser = Parser.__new__(Parser)
    cdef Reader reader = [fd, -1, text, 0, 0]
    parser.store = store
    parser.with_figures = with_figures
    return parser.drive(&reader)


cdef SmapsStore parse_text(const char *data, size_t length, bint with_figures):
    """The records of a text of smaps, or of maps where it is without figures."""
    cdef SmapsStore store = SmapsStore.__new__(SmapsStore)
    cdef Text text = [<char *>data, length, length]
    parse_into(store, -1, &text, with_figures)
    return store


cdef int read_records(SmapsStore store, int fd, bint with_figures) except? -1:
    """Fill a store from an open smaps or maps, without the GIL: see ``parse_into``."""
    cdef Text text = [NULL, 0, 0]
    try:
        return parse_into(store, fd, &text, with_figures)
    finally:
        free_text(&text)


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


cdef list all_of(SmapsStore store):
    cdef list found = []
    cdef size_t i
    for i in range(store.count):
        found.append(make_record(store, i))
    return found


cdef SmapsRecord record_from(const char *text, size_t length):
    """The record of a text with exactly one (as ``smaps_text_at`` gives); else a ValueError."""
    cdef SmapsStore store = parse_text(text, length, True)
    if store.count != 1:
        raise ValueError(f"one record expected, not {store.count}")
    return make_record(store, 0)
