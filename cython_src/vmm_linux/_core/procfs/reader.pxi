"""The text of a /proc file, read in pieces: all of it, or line by line."""

cdef enum:
    # Bytes asked of a file at once: more than /proc gives.
    READ_SIZE = 1 << 14

cdef struct Reader:
    int fd                      # below 0: all of the text is there
    int64_t position            # in the file, where the next piece begins; below 0: its own
    Text *text                  # what was read, from ``kept`` on
    size_t kept                 # where what is still needed begins
    size_t next                 # where what is not taken yet begins


cdef void free_text(Text *text) noexcept nogil:
    """Free the memory; the text is empty then and may be used again."""
    free(text.data)
    text.data = NULL
    text.length = text.capacity = 0


cdef void start_reading(Reader *reader, int fd, Text *text) noexcept nogil:
    """Begin with the file's start. The text gives its memory, and what it had is gone."""
    memset(reader, 0, sizeof(Reader))
    text.length = 0
    reader.fd = fd
    reader.text = text


cdef int read_more(Reader *reader) noexcept nogil:
    """Another piece: 1, 0 at the end, or -errno. Drops what lies before ``kept``."""
    cdef Text *text = reader.text
    cdef intptr_t length
    cdef size_t capacity
    cdef char *data
    if reader.fd < 0:
        return 0
    if reader.kept > 0:
        text.length -= reader.kept
        memmove(text.data, text.data + reader.kept, text.length)
        reader.next -= reader.kept
        reader.kept = 0
    if text.capacity - text.length < READ_SIZE:
        capacity = 2 * text.capacity + READ_SIZE
        data = <char *>realloc(text.data, capacity)
        if data == NULL:
            return -ENOMEM
        text.data = data
        text.capacity = capacity
    if reader.position < 0:
        length = kernel.read(reader.fd, text.data + text.length, READ_SIZE)
    else:
        length = kernel.pread(reader.fd, text.data + text.length, READ_SIZE, reader.position)
        reader.position += max(length, 0)
    if length <= 0:
        return <int>length
    text.length += <size_t>length
    return 1


cdef int next_line(Reader *reader, const char **line, const char **end) noexcept nogil:
    """The next line without its newline: 1, 0 at the file's end, or -errno.

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
            # The kernel writes only whole lines.
            return 0 if reader.next == reader.text.length else -EBADMSG
