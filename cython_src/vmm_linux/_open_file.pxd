"""A descriptor that is kept: known by the file that it names (see ``_open_file.pyx``)."""

from libc.stdint cimport uint32_t, uint64_t

from vmm_linux._syscalls cimport FileStatus

cdef struct OpenFile:
    int fd                      # -1: none
    uint32_t taking             # which of the package's descriptors this is, see ``_open_file.pyx``
    uint64_t device
    uint64_t inode

cdef int open_file_note(OpenFile *self, FileStatus *status) noexcept nogil
cdef int open_file_take(OpenFile *self, int fd) noexcept nogil
cdef int open_file_take_same(OpenFile *self, const OpenFile *other, int fd) noexcept nogil
cdef int open_file_is(const OpenFile *self, int fd, FileStatus *status) noexcept nogil
cdef int open_file_status(const OpenFile *self, FileStatus *status) noexcept nogil
cdef int open_file_number(const OpenFile *self) noexcept nogil
cdef int open_file_own(OpenFile *self) noexcept nogil
cdef int access_mode(int fd) noexcept nogil
cdef void open_file_close(OpenFile *self) noexcept nogil

cdef class Descriptor:
    cdef OpenFile file
    cdef bint is_anonymous
    cdef object __weakref__

    cpdef int take(self, int fd) except -1
    cpdef void close(self) noexcept

cdef enum Mark:
    # Signals, see ``_open_file.pyx``; no program chooses these.
    MARK_AUDIT = 60
    MARK_MAPS = 61
    MARK_PAGEMAP = 62
    MARK_SMAPS = 63
    MARK_ANONYMOUS = 64

cdef int mark(int fd, Mark which) noexcept nogil
cdef int check_mark(int fd, Mark which) noexcept nogil
