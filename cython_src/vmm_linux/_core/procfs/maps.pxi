"""A line of ``/proc/PID/maps``, which is also the first line of a record of ``smaps``."""

cdef enum:
    # Bits of permissions; the first three are PROT_READ, PROT_WRITE, PROT_EXEC.
    SPAN_READ = 1, SPAN_WRITE = 2, SPAN_EXECUTE = 4, SPAN_SHARED = 8

cdef struct Line:
    # A line of maps, which is also the first line of a record of smaps.
    Span span
    const char *path
    size_t path_length

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
    """Read a hexadecimal number and the delimiter after it; NULL where that is not there."""
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
    """Read a decimal number of 64 bits; NULL where there is none."""
    cdef const char *begin = at
    cdef uint64_t number = 0, digit
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
    """Read ``start-end rwxp offset major:minor inode  path``, the newline not included."""
    cdef uint64_t start, stop, major, minor
    at = scan_hex(at, end, &start, c'-')
    if at == NULL:
        return False
    at = scan_hex(at, end, &stop, c' ')
    if at == NULL or stop < start or end - at < 5 or at[4] != c' ':
        return False
    line.span.permissions = SPAN_SHARED if at[3] == c's' else 0
    if (not scan_permission(at[0], c'r', SPAN_READ, &line.span.permissions)
            or not scan_permission(at[1], c'w', SPAN_WRITE, &line.span.permissions)
            or not scan_permission(at[2], c'x', SPAN_EXECUTE, &line.span.permissions)
            or at[3] != c's' and at[3] != c'p'):
        return False
    at = scan_hex(at + 5, end, &line.span.offset, c' ')
    if at == NULL:
        return False
    at = scan_hex(at, end, &major, c':')
    if at == NULL:
        return False
    at = scan_hex(at, end, &minor, c' ')
    if at == NULL:
        return False
    at = scan_decimal(at, end, &line.span.inode)
    if at == NULL or at < end and at[0] != c' ':
        return False
    while at < end and at[0] == c' ':
        at += 1
    line.span.start = start
    line.span.end = stop
    line.span.mapped = True
    line.span.device_major = <uint32_t>major
    line.span.device_minor = <uint32_t>minor
    line.path = at
    line.path_length = end - at
    return True
