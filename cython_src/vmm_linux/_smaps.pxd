"""Records of ``/proc/PID/smaps`` and ``maps`` (see ``_smaps.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t, uintptr_t

cdef enum:
    FIGURES = 24                # how many figures of smaps have an attribute of their own
    FIGURE_SIZE = 0
    FIGURE_KERNEL_PAGE_SIZE = 1
    FIGURE_MMU_PAGE_SIZE = 2
    FIGURE_PROTECTION_KEY = 23

cdef class SmapsRecord:
    cdef uintptr_t range_start
    cdef uintptr_t range_end
    cdef uint64_t file_offset
    cdef uint64_t file_inode
    cdef uint32_t device_major
    cdef uint32_t device_minor
    cdef uint32_t permission_bits
    cdef uint32_t known         # bit i: values[i] was given
    cdef uint64_t *values       # FIGURES of them, or NULL
    cdef dict others            # figures with no attribute of their own, or None
    cdef readonly object pathname
    cdef readonly object vm_flags

    cdef object figure(self, int index)

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

cdef struct Label:
    # Of a figure with no attribute of its own.
    const char *text
    size_t length
    int name                    # below 0: no label of the kernel's, and refused
    Label *next

cdef struct Block:
    # Of memory that is given out piece by piece, and lies behind this.
    Block *before
    size_t used
    size_t room

cdef struct Source:
    # Where text comes from, and what of it is there and not yet taken.
    int fd                      # below 0: all is there
    const char *at
    const char *end
    char *piece                 # of what is read from fd
    size_t room                 # bytes of that

cdef class Records:
    cdef Record **chunks
    cdef readonly size_t count
    cdef Block *block
    cdef list names             # of figures with no attribute of their own
    cdef dict strings           # paths by their place in memory
    cdef dict flag_sets         # sets of flags by their place in memory, and by their text
    # Of the parser:
    cdef bint with_figures
    cdef bint backslashes       # some path has one: see decoded_path
    cdef Record *latest         # to which figures are added
    cdef int before             # the figure added last; FIGURES: none
    cdef int following[FIGURES + 1]     # figure by the one before it; FIGURES: the first
    cdef Label *labels
    cdef const char *flags      # the flags met last
    cdef size_t flags_length
    cdef const char *problem    # of the line that cannot be read; NULL: a record is not whole
    cdef const char *line
    cdef const char *line_end

    cdef Record *at(self, size_t index) noexcept nogil
    cdef void *take(self, size_t size) noexcept nogil
    cdef const char *keep(self, const char *text, size_t length) noexcept nogil
    cdef Record *append(self) noexcept nogil
    cdef object pathname_at(self, const Record *record)
    cdef object flags_at(self, const Record *record)
    cdef int fill(self, SmapsRecord made, size_t index) except -1
    cdef SmapsRecord record(self, size_t index)
    cdef int refuse(self, const char *problem, const char *line, const char *end) noexcept nogil
    cdef int begin_record(self, const char *at, const char *end) noexcept nogil
    cdef int add_figure(self, int i, uint64_t value) noexcept nogil
    cdef int add_flags(self, const char *at, const char *end) noexcept nogil
    cdef int add_line(self, const char *line, const char *end) noexcept nogil
    cdef int add_other(self, const char *line, const char *colon, const char *end,
                       uint64_t value) noexcept nogil
    cdef int learn_label(self) except -1
    cdef int check_whole(self) noexcept nogil
    cdef int parse_some(self, Source *source) noexcept nogil
    cdef int parse(self, Source *source) noexcept nogil
    cdef int drive(self, Source *source) except? -1
    cdef bytes first_line(self)

cdef str device_text(uint32_t major, uint32_t minor)
cdef str decoded_path(const char *path, size_t length)
cdef int restore_into(SmapsRecord record, tuple said) except -1
cdef int set_figure(SmapsRecord record, int i, uint64_t value) except -1
cdef SmapsRecord record_from(const char *text, size_t length)
cdef int read_records(Records records, int fd, bint with_figures) except? -1
