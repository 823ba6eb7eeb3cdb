"""The text of ``/proc/PID/maps`` and ``smaps``: a line of it, and lines read in pieces."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

cdef enum:
    # Bits of permissions; the first three are PROT_READ, PROT_WRITE, PROT_EXEC.
    SPAN_READ = 1
    SPAN_WRITE = 2
    SPAN_EXECUTE = 4
    SPAN_SHARED = 8

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

cdef struct Text:
    # Bytes on the C heap: starts as [NULL, 0, 0], and free_text() ends it.
    char *data
    size_t length
    size_t room

cdef struct Reader:
    # Lines of a /proc file, one after the other; `text` holds what is not yet read of it,
    # and what lies from `kept` on.
    int fd
    uint64_t position           # of the file, where the next piece begins
    Text *text
    size_t kept
    size_t next

cdef void free_text(Text *text) noexcept nogil
cdef void start_reading(Reader *reader, int fd, Text *text) noexcept nogil
cdef int next_line(Reader *reader, const char **line, const char **end) noexcept nogil
cdef bint starts_mapping(const char *line) noexcept nogil
cdef const char *scan_decimal(const char *at, const char *end, uint64_t *value) noexcept nogil
cdef bint scan_mapping(const char *at, const char *end, Line *line) noexcept nogil
