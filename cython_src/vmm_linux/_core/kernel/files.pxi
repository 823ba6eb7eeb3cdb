"""Small files of /proc and /sys: their text, the number that one holds, a figure in a text."""

cdef uint64_t NO_NUMBER = <uint64_t>-1


cdef Py_ssize_t read_text(const char *path, char *text, size_t size) noexcept nogil:
    """Read the beginning of a file, at most ``size - 1`` bytes, and put a zero behind it.

    Returns its length, or -errno and the text is empty.
    """
    cdef int fd = openat(path, O_RDONLY | O_CLOEXEC)
    cdef Py_ssize_t length = fd
    if fd >= 0:
        length = read(fd, text, size - 1)
        close(fd)
    text[max(length, 0)] = 0
    return length


cdef uint64_t read_number(const char *path) noexcept nogil:
    """The number that a file begins with; NO_NUMBER where there is none, as in ``max``."""
    cdef char text[32]
    if read_text(path, text, sizeof(text)) < 1 or not c'0' <= text[0] <= c'9':
        return NO_NUMBER
    return strtoull(text, NULL, 10)


cdef uint64_t number_after(const char *text, const char *label) noexcept nogil:
    """The number after the first occurrence of a label, 0 where that is missing."""
    cdef const char *at = strstr(text, label)
    return 0 if at == NULL else strtoull(at + strlen(label), NULL, 10)


def text_of(path):
    """The text of a file without the blanks around it, or None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).strip()
    except OSError:
        return None


def number_in(path):
    """The number that is all of a file's text, or None where it holds something else."""
    try:
        return int(text_of(path) or "")
    except ValueError:
        return None


def value_of(text, str label):
    """A figure of a text as that of /proc/meminfo or /proc/PID/status, or None where it lacks.

    Args:
        text: lines, each a label, a colon and a number. None counts as no lines.
        label: the figure's.

    Returns:
        Bytes, where the text has kB; else the number as it is.
    """
    for line in (text or "").splitlines():
        name, _, value = line.partition(":")
        if name == label:
            digits, *unit = value.split()
            return int(digits) << (10 if unit == ["kB"] else 0)
    return None
