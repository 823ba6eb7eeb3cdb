"""The records of one text of ``smaps`` or ``maps``, in memory that they share.

The functions without the GIL return 0 or ``-errno``, or NULL when there is no memory. What is
given out lasts as long as the :class:`Records`. Paths and flags that records have in common are
kept once.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from vmm_linux._maps_text cimport Line
from vmm_linux._smaps_record cimport FIGURES, SmapsRecord

cdef struct Figure:
    # One with no attribute of its own.
    int name                    # its place among the names
    uint64_t value
    Figure *next

cdef struct Record:
    # One mapping. What it points to belongs to the Records that it is in.
    uintptr_t start
    uintptr_t end
    uint64_t offset
    uint64_t inode
    uint32_t device_major
    uint32_t device_minor
    uint32_t permissions
    uint32_t known              # bit i: values[i] was given
    uint64_t *values            # FIGURES of them, or NULL
    const char *path
    const char *flags           # NULL: the text does not tell
    uint32_t path_length
    uint32_t flags_length
    Figure *others

cdef struct Block:
    # Of memory that is given out piece by piece, and lies behind this.
    Block *before
    size_t used
    size_t room

cdef class Records:
    cdef Record **chunks
    cdef readonly size_t count
    cdef Block *block
    cdef list names             # of figures with no attribute of their own
    cdef dict strings           # paths by their place in memory
    cdef dict flag_sets         # sets of flags by their place in memory, and by their text
    cdef bint backslashes       # some path has one: see decoded_path
    cdef const char *flags      # the flags given last
    cdef size_t flags_length

    cdef Record *at(self, size_t index) noexcept nogil
    cdef void *take(self, size_t size) noexcept nogil
    cdef const char *keep(self, const char *text, size_t length) noexcept nogil
    cdef Record *new_record(self) noexcept nogil
    cdef const char *path_after(self, const Record *before, const char *path,
                                size_t length) noexcept nogil
    cdef Record *append(self, const Line *line) noexcept nogil
    cdef void drop_overlapped(self) noexcept nogil

    cdef inline int set_figure(self, Record *record, int i, uint64_t value) noexcept nogil:
        """A figure with an attribute of its own. Here, as a record has some twenty."""
        if record.values == NULL:
            record.values = <uint64_t *>self.take(FIGURES * sizeof(uint64_t))
            if record.values == NULL:
                return -ENOMEM
            memset(record.values, 0, FIGURES * sizeof(uint64_t))
        record.values[i] = value
        record.known |= <uint32_t>1 << i
        return 0

    cdef int add_other(self, Record *record, int name, uint64_t value) noexcept nogil
    cdef int set_flags(self, Record *record, const char *text, size_t length) noexcept nogil
    cdef int number_of(self, str name) except -1
    cdef object pathname_at(self, const Record *record)
    cdef object flags_at(self, const Record *record)
    cdef int fill(self, SmapsRecord made, size_t index) except -1
    cdef SmapsRecord record(self, size_t index)
