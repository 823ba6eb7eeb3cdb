"""The text of ``/proc/PID/maps`` and ``smaps``: a line of it, and lines read in pieces."""

cdef enum:
    # Bits of permissions; the first three are PROT_READ, PROT_WRITE, PROT_EXEC.
    SPAN_READ = 1
    SPAN_WRITE = 2
    SPAN_EXECUTE = 4
    SPAN_SHARED = 8

cdef struct Reader:
    # Lines of a /proc file, one after the other; `text` holds what is not yet read of it,
    # and what lies from `kept` on.
    int fd
    uint64_t position           # of the file, where the next piece begins
    Text *text
    size_t kept
    size_t next

cdef enum:
    # More than /proc gives in one read; with room for the head of any line.
    READ_SIZE = 1 << 14


# ---- Lines ---------------------------------------------------------------------------------

# The value of a digit as the kernel writes them (lower case), else -1.
cdef signed char HEX[256]
cdef int character
for character in range(256):
    HEX[character] = <signed char>b"0123456789abcdef".find(character)


cdef inline int hex_digit(char character) noexcept nogil:
    return HEX[<unsigned char>character]


cdef bint starts_mapping(const char *line) noexcept nogil:
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


cdef const char *scan_decimal(const char *at, const char *end, uint64_t *value) noexcept nogil:
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


# ---- Text read in pieces -------------------------------------------------------------------

cdef void free_text(Text *text) noexcept nogil:
    """Gives the memory back; the text is empty then and may be used again."""
    free(text.data)
    text.data = NULL
    text.length = text.room = 0


cdef void start_reading(Reader *reader, int fd, Text *text) noexcept nogil:
    memset(reader, 0, sizeof(Reader))
    text.length = 0
    reader.fd = fd
    reader.text = text


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
    length = kernel.pread(reader.fd, text.data + text.length, READ_SIZE, reader.position)
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
